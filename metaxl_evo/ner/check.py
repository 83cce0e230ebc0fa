"""`--check` of the NER task: the findings of any task, the sentences that were read, and what the RTN acts on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from datasets import Dataset

from metaxl_evo.bilevel import tree
from metaxl_evo.ner.arguments import NerArguments, refuse_fields
from metaxl_evo.ner.encoding import lost_words
from metaxl_evo.ner.experiment import (
    OWN_FILES,
    TargetData,
    build_trainer,
    fit_arguments,
    load_target,
    require_enough,
)
from metaxl_evo.ner.pretrained import longest_input, trained_labels
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.check import check_training
from metaxl_evo.training.dry_run import refuse_unusable
from metaxl_evo.training.runs import refuse_another_run
from metaxl_evo.training.trainer import MetaTrainer


def check_experiment(ner: NerArguments, args: MetaTrainingArguments) -> dict[str, Any]:
    """Run a few steps for the first target at the full learning rates; print the findings and a verdict, return them.

    Nothing of the user's is touched. The returned `problems` is empty where the verdict is OK.

    Raises:
        ValueError: for what a run would refuse as well.
    """
    refuse_fields(args)
    refuse_unusable(args)
    target = ner.target_languages[0]
    ner = replace(ner, target_languages=[target])
    data = load_target(ner, target, trained_labels(ner.model_name_or_path))
    require_enough(ner, args, target, data)
    args = fit_arguments(ner, args, data)
    report, trainer = check_training(lambda args: build_trainer(ner, args, data)[0], args)
    described = {"target": target, **_describe(ner, data, trainer)}
    report.findings = {**described, **report.findings, **_evaluation(trainer, report.problems)}
    try:
        refuse_another_run(Path(args.output_dir), args.resume_from_checkpoint is not None, OWN_FILES)
    except ValueError as error:
        report.problems.append(str(error))
    if args.should_log:
        print(report)
    return report.as_dict()


def _describe(ner: NerArguments, data: TargetData, trainer: MetaTrainer) -> dict[str, Any]:
    tokenizer: Any = trainer.processing_class
    longest = longest_input(trainer.model.plain_base)
    parts = {f"train {language}": (rows, ner.max_length) for language, rows in data.sources.items()}
    parts |= {"train target": (data.target, ner.max_length)} if data.target is not None else {}
    parts |= {"dev": (data.dev, ner.eval_max_length)} if data.dev is not None else {}
    parts["test"] = (data.test, ner.eval_max_length)
    lost = {name: lost_words(rows, tokenizer, min(length, longest)) for name, (rows, length) in parts.items()}
    words = {name: sum(map(len, rows["tokens"])) for name, (rows, _) in parts.items()}
    return {
        "sentences": {name: len(rows) for name, (rows, _) in parts.items()},
        "labels": data.names,
        "words_cut_off": {name: lost[name].truncated / words[name] for name in parts},
        "words_without_sub_token": {name: lost[name].without_sub_token for name in parts},
    }


def _evaluation(trainer: MetaTrainer, problems: list[str]) -> dict[str, bool]:
    """Whether another RTN changes the training loss (it should, where it acts) and the evaluation (it must not)."""
    module, dataset = trainer.model, cast(Dataset, trainer.train_dataset)
    rows = [dataset[index] for index in range(min(4, len(dataset)))]
    batch = send_to_device(trainer.data_collator(rows), trainer.args.device)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    module.eval()
    before = tree.clone(module.meta_parameters())
    with torch.no_grad():
        loss, logits = module.mean_inner_loss(batch), module(**inputs).logits
        for parameter in module.meta_parameters().values():
            parameter.mul_(-2.0)
        reaches, same = (
            not torch.equal(loss, module.mean_inner_loss(batch)),
            torch.equal(logits, module(**inputs).logits),
        )
        for name, parameter in module.meta_parameters().items():
            parameter.copy_(before[name])
    if not same:
        problems.append("the RTN changes the evaluation: please report this as a bug")
    if module.transform and not reaches:
        problems.append("the RTN does not change the training loss: check rtn_layers and rtn_module_path")
    return {"evaluation_without_rtn": same, "rtn_reaches_training": reaches}
