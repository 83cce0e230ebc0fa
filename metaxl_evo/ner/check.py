"""What `--check` finds of a tagger beside the findings of any: the sentences, and what the RTN acts on."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from datasets import Dataset

from metaxl_evo.bilevel import tree
from metaxl_evo.ner.arguments import TaggingArguments
from metaxl_evo.ner.encoding import cut_off, lost_words
from metaxl_evo.ner.pretrained import longest_input
from metaxl_evo.ner.tagger import CrossLingualTagger
from metaxl_evo.ner.target_data import TargetData
from metaxl_evo.training.trainer import MetaTrainer


def sentence_findings(ner: TaggingArguments, data: TargetData, trainer: MetaTrainer) -> dict[str, Any]:
    """The sentences that were read, and what of them the tokenizer loses."""
    tokenizer: Any = trainer.processing_class
    longest = longest_input(trainer.model.plain_base)
    parts = {f"train {language}": (rows, ner.max_length) for language, rows in data.sources.items()}
    parts |= {"train target": (data.target, ner.max_length)} if data.target is not None else {}
    parts |= {"dev": (data.dev, ner.eval_max_length)} if data.dev is not None else {}
    parts["test"] = (data.test, ner.eval_max_length)
    lost = {name: lost_words(rows, tokenizer, min(length, longest)) for name, (rows, length) in parts.items()}
    words = {name: sum(map(len, rows["tokens"])) for name, (rows, _) in parts.items()}
    cut = {name: cut_off(rows, tokenizer, min(length, longest)) for name, (rows, length) in parts.items()}
    return {
        "target": ner.target_languages[0],
        "sentences": {name: len(rows) for name, (rows, _) in parts.items()},
        "labels": data.names,
        "sentences_cut_off": {name: cut[name] / len(rows) for name, (rows, _) in parts.items()},
        "words_cut_off": {name: lost[name].truncated / words[name] for name in parts},
        "words_without_sub_token": {name: lost[name].without_sub_token for name in parts},
    }


def evaluation_findings(trainer: MetaTrainer) -> tuple[dict[str, bool], list[str]]:
    """Whether another RTN changes the training loss (it should, where it acts) and the evaluation (it must not)."""
    problems: list[str] = []
    module, dataset = cast(CrossLingualTagger, trainer.model), cast(Dataset, trainer.train_dataset)
    rows = [dataset[index] for index in range(min(4, len(dataset)))]
    batch = send_to_device(trainer.data_collator(rows), trainer.args.device)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    module.eval()
    before: tree.Tree = tree.clone(module.meta_parameters())
    if module.rtn is None:
        return {}, problems
    with torch.no_grad():
        loss, logits = module.mean_inner_loss(batch), module(**inputs).logits
        for parameter in module.rtn.parameters():
            parameter.mul_(-2.0)
        reaches, same = (
            not torch.equal(loss, module.mean_inner_loss(batch)),
            torch.equal(logits, module(**inputs).logits),
        )
        for name, held in module.meta_parameters().items():
            held.copy_(before[name])
    if not same:
        problems.append("the RTN changes the evaluation: please report this as a bug")
    if module.transform and not reaches:
        problems.append("the RTN does not change the training loss: check rtn_layers and rtn_module_path")
    return {"evaluation_without_rtn": same, "rtn_reaches_training": reaches}, problems
