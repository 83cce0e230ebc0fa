"""A cross-lingual NER run: data, model, training, scores, and the folder that is left behind."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from metaxl_evo.bilevel import tree
from metaxl_evo.messages import one_line, unknown
from metaxl_evo.models.adapters import ADAPTER
from metaxl_evo.models.hooks import encoder_layers
from metaxl_evo.models.rtn import SUBFOLDER, RepresentationTransform
from metaxl_evo.ner.arguments import NerArguments, refuse_fields, steps_of
from metaxl_evo.ner.card import card_sections
from metaxl_evo.ner.data import load_ner_dataset, overlap, sample
from metaxl_evo.ner.encoding import PadRight, encode
from metaxl_evo.ner.evaluation import EvaluationSet, WordTrainer
from metaxl_evo.ner.metrics import average, scores_table
from metaxl_evo.ner.pretrained import (
    SYNTHETIC,
    add_lora,
    load_classifier,
    longest_input,
    require_padding_unseen,
    require_readable,
    trained_labels,
)
from metaxl_evo.ner.spacing import as_in_text
from metaxl_evo.ner.tagger import TARGET, CrossLingualTagger
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.checkpoint import LATEST
from metaxl_evo.training.dry_run import refuse_unusable
from metaxl_evo.training.meta_rows import MetaRows
from metaxl_evo.training.runs import (
    RESULTS,
    checkpoint_settings,
    finished_run,
    hub_id,
    refuse_another_run,
    training_settings,
    write_results,
)
from metaxl_evo.training.trainer import MetaTrainer

logger = logging.getLogger(__name__)

METRICS = ("f1", "precision", "recall", "loss")
OWN_FILES = (SUBFOLDER, ADAPTER, "tokenizer.json")


class NerTrainer(WordTrainer, MetaTrainer):
    """A MetaTrainer that is scored by words."""


@dataclass
class TargetData:
    """The sentences of one run; the sources count the steps also where a method does not train on them."""

    sources: dict[str, Dataset]
    target: Dataset | None
    dev: Dataset | None
    test: Dataset
    names: list[str]
    overlap: int


def run_experiment(ner: NerArguments, args: MetaTrainingArguments) -> dict[str, Any]:
    """Train and evaluate one model per target language; returns and saves the results.

    With one target the output folder is the model's; with several there is a folder a language and a summary above.

    Raises:
        ValueError: before any training, for what cannot work or would overwrite another run.
    """
    refuse_fields(args)
    refuse_unusable(args)
    targets = ner.target_languages
    folders = {t: Path(args.output_dir) / t if len(targets) > 1 else Path(args.output_dir) for t in targets}
    resuming = args.resume_from_checkpoint is not None
    if resuming and len(targets) > 1 and str(args.resume_from_checkpoint).lower() not in LATEST:
        raise ValueError(
            "resume_from_checkpoint: one checkpoint cannot continue several targets: use latest, or one target"
        )
    for folder in dict.fromkeys([Path(args.output_dir), *folders.values()]):
        refuse_another_run(folder, resuming, OWN_FILES)
    names = trained_labels(ner.model_name_or_path)
    data = {target: load_target(ner, target, names) for target in targets}
    for target in targets:
        require_enough(ner, args, target, data[target])
    results = {}
    for target in targets:
        target_args = copy.copy(args)
        target_args.output_dir = str(folders[target])
        saved = folders[target] / RESULTS
        if resuming and saved.exists():
            fitted = fit_arguments(ner, target_args, data[target])
            results[target] = finished_run(saved, run_settings(ner, fitted, target))
            continue
        if len(targets) > 1:  # a repository a target
            target_args.hub_model_id = f"{args.hub_model_id or Path(args.output_dir).name}-{target}"
        results[target] = train_target(ner, target_args, target, data[target])
    summary = summarise(results)
    if len(targets) > 1 and args.should_save:
        write_results(Path(args.output_dir), summary)
    if args.should_log:
        print(scores_table({target: summary["test"][target] for target in targets}))
        print(f"models, cards and {RESULTS}: {', '.join(map(str, folders.values()))}")
    return summary


def load_target(ner: NerArguments, target: str, names: Sequence[str] | None = None) -> TargetData:
    """Source, target and evaluation sentences of one run, all with one label set: `names`, or that of the data.

    Raises:
        ValueError: for languages, splits or labels that are not there.
    """
    recipe, sources = ner.recipe, ner.source_languages
    wants_dev = ner.select == "dev"
    target_splits = ["train"] * recipe.target + ["validation"] * (wants_dev and recipe.target) + ["test"]
    source_splits = ["train"] + ["validation"] * (wants_dev and not recipe.target)
    loaded = load_ner_dataset(ner.dataset, sources, splits=source_splits, names=names)
    names_of = "the model" if names is not None else sources[0]
    names = names or loaded[sources[0]]["train"].features["ner_tags"].feature.names
    of_target = load_ner_dataset(ner.dataset, [target], splits=target_splits, names=names, names_of=names_of)[target]
    train = sample(of_target["train"], ner.target_train_size, ner.sample_seed, name=target) if recipe.target else None
    dev = None
    if wants_dev:  # a zero-shot run knows no target labels, not even for choosing a checkpoint
        dev = of_target["validation"] if recipe.target else loaded[sources[0]]["validation"]
    return TargetData(
        sources={one: sample(loaded[one]["train"], ner.train_size, ner.sample_seed, name=one) for one in sources},
        target=train,
        dev=None if dev is None else _first(dev, ner.eval_size),
        test=_first(of_target["test"], ner.eval_size),
        names=of_target["test"].features["ner_tags"].feature.names,
        overlap=0 if train is None else overlap(train, of_target["test"]),
    )


def require_enough(ner: NerArguments, args: MetaTrainingArguments, target: str, data: TargetData) -> None:
    """Every target has the sentences for one step, known before the first one is trained.

    Raises:
        ValueError: naming the target, how many it has and how many a step needs.
    """
    if data.target is None or not ner.recipe.source:
        return
    portion = 0.0 if ner.recipe.all_target_rows else args.meta_portion
    rows = args.per_device_meta_batch_size * args.world_size
    try:
        MetaRows(data.target, rows, portion=portion, seed=0)
    except ValueError as error:
        raise ValueError(f"target {target}: {error}: raise target_train_size or per_device_meta_batch_size") from error


def train_target(ner: NerArguments, args: MetaTrainingArguments, target: str, data: TargetData) -> dict[str, Any]:
    """Train, select, test and save the tagger of one target language."""
    set_seed(args.seed)
    trainer, evaluation = build_trainer(ner, args, data)
    tagger = cast(CrossLingualTagger, trainer.model)
    if "dev" in evaluation and not trainer.args.load_best_model_at_end:
        logger.warning("load_best_model_at_end is off: the last weights are tested and saved, not the best on dev")
    started = tree.clone(tagger.meta_parameters())
    begun = time.perf_counter()
    settings = run_settings(ner, trainer.args, target)
    trainer.run_settings = checkpoint_settings(settings)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.perf_counter() - begun
    results: dict[str, Any] = {"test": {target: evaluation["test"].predict(trainer)}}
    if "dev" in evaluation:
        results["dev"] = {target: evaluation["dev"].predict(trainer)}
    results["settings"] = settings
    results["run"] = {
        "steps": trainer.state.global_step,
        "train_seconds": seconds,
        "rtn_relative_change": tagger.meta.relative_change(started),
        "skipped_meta_steps": trainer.skipped_meta_steps,
        "best_checkpoint": trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None,
        "test_sentences_in_train": data.overlap,
    }
    results = summarise({target: results})
    trainer.save_model()
    if args.should_save:
        write_results(Path(args.output_dir), results)
    trainer.card_sections = card_sections(results, ner, trainer.estimator)
    finish = trainer.push_to_hub if args.push_to_hub else trainer.create_model_card
    finish(
        tasks="token-classification",
        language=target,
        dataset_tags=hub_id(ner.dataset, SYNTHETIC),
        finetuned_from=hub_id(ner.model_name_or_path, SYNTHETIC),
        model_name=Path(args.output_dir).name,
    )
    return results


def build_trainer(
    ner: NerArguments, args: MetaTrainingArguments, data: TargetData
) -> tuple[MetaTrainer, dict[str, EvaluationSet]]:
    """The trainer of one run and its evaluation sets (`test`, and `dev` where one is used)."""
    base, tokenizer = load_classifier(ner.model_name_or_path, data.names, ner.attn_implementation)
    trained = [*(data.sources.values() if ner.recipe.source else ()), *([data.target] if data.target else ())]
    tokenizer = as_in_text(
        tokenizer, [words for part in (data.test, *trained) for words in part["tokens"][:100]], base.config
    )
    longest = longest_input(base)
    tagger = build_tagger(ner, base, tokenizer)
    evaluation = {
        split: EvaluationSet(sentences, tokenizer, min(ner.eval_max_length, longest), data.names, ner.strict)
        for split, sentences in (("dev", data.dev), ("test", data.test))
        if sentences is not None
    }
    max_length = min(ner.max_length, longest)
    sources = [
        _with_language(encode(sentences, tokenizer, max_length), index if ner.rtn_per_language else 0)
        for index, sentences in enumerate(data.sources.values() if ner.recipe.source else ())
    ]
    target = None if data.target is None else _with_language(encode(data.target, tokenizer, max_length), TARGET)
    for one in evaluation.values():
        require_readable(base, one.rows, "eval_max_length")
        size = args.per_device_eval_batch_size
        require_padding_unseen(base, one.rows, tokenizer.pad_token_id, "per_device_eval_batch_size", size)
    for rows in (*sources, *([] if target is None else [target])):
        require_readable(base, rows, "max_length")
    train = concatenate_datasets(sources) if sources else target
    assert train is not None  # every method trains on one or the other
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train) < batch:
        raise ValueError(
            f"dataloader_drop_last would drop all {len(train)} train sentences, less than a batch of {batch}: "
            "lower per_device_train_batch_size, or leave it out"
        )
    with _telling_of_the_hub():
        trainer = NerTrainer(
            tagger,
            fit_arguments(ner, args, data),
            train_dataset=train,
            meta_dataset=target if sources else None,
            eval_dataset=evaluation["dev"].rows if "dev" in evaluation else None,
            data_collator=PadRight(tokenizer.pad_token_id),
            processing_class=tokenizer,
            compute_metrics=evaluation["dev"].compute_metrics if "dev" in evaluation else None,
        )
    return trainer, evaluation


@contextmanager
def _telling_of_the_hub() -> Iterator[None]:
    """Turns an HTTP library's error at the making of a repository, whatever its class, into one line."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "requests"):
            raise
        raise ValueError(f"push_to_hub: the Hub cannot be reached ({one_line(error)}): leave it out") from error


def build_tagger(ner: NerArguments, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> CrossLingualTagger:
    """The two-level module: an RTN for the source languages on the chosen layers of the encoder."""
    try:
        last = len(encoder_layers(base, ner.rtn_module_path))
    except ValueError as error:
        raise ValueError(
            f"{str(error).split(':')[0]}: set rtn_module_path to the place of its list of layers"
        ) from error
    rtn = RepresentationTransform(
        base.config.hidden_size,
        layers=ner.rtn_layers or [last],
        kind=ner.rtn_kind,
        bottleneck=ner.rtn_bottleneck,
        languages=ner.source_languages if ner.rtn_per_language else ["source"],
    )
    recipe = ner.recipe
    return CrossLingualTagger(
        _with_lora(ner, base),
        rtn,
        pad_token_id=tokenizer.pad_token_id,
        transform=recipe.transform,
        source_weight=recipe.weight,
        target_weight=recipe.weight,
        module_path=ner.rtn_module_path,
    )


def _with_lora(ner: NerArguments, base: PreTrainedModel) -> nn.Module:
    """The base with the adapter that the settings ask for, if they do."""
    if not ner.use_peft:
        return base
    return add_lora(
        base,
        r=ner.lora_r,
        alpha=ner.lora_alpha,
        dropout=ner.lora_dropout,
        target_modules=ner.lora_target_modules,
    )


def summarise(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results of several targets as one: scores per language and their average."""
    summary: dict[str, Any] = {}
    for split in ("test", "dev"):
        scores = {target: found[split][target] for target, found in results.items() if split in found}
        if scores:
            summary[split] = {**scores, "average": average(scores)}
    first = next(iter(results.values()))
    if len(results) == 1:
        return {**summary, "settings": first["settings"], "run": first["run"]}
    summary["settings"] = {**first["settings"], "target_languages": list(results)}
    return summary | {"run": {target: found["run"] for target, found in results.items()}}


def fit_arguments(ner: NerArguments, args: MetaTrainingArguments, data: TargetData) -> MetaTrainingArguments:
    """The arguments as the method needs them: no estimator without meta learning, no selection without dev data."""
    args, recipe = copy.copy(args), ner.recipe
    if not recipe.meta:
        args.estimator, args.estimator_kwargs = NO_ESTIMATOR, None
    if recipe.all_target_rows:
        args.meta_portion = 0.0
    if data.dev is None:
        args.eval_strategy, args.load_best_model_at_end, args.metric_for_best_model = "no", False, None
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in METRICS:
        raise ValueError(unknown("metric_for_best_model", metric, METRICS))
    if metric is not None and args.greater_is_better == metric.endswith("loss"):
        raise ValueError(f"greater_is_better would choose the checkpoint with the worst {metric}: leave it out")
    if not recipe.source:
        _keep_source_schedule(args, sum(map(len, data.sources.values())))
    return args


def _keep_source_schedule(args: MetaTrainingArguments, sentences: int) -> None:
    """Without source rows: as many steps, and checkpoints to choose from, as the other methods count on the source."""
    if args.max_steps > 0:
        return
    batch, accumulation = args.per_device_train_batch_size * args.world_size, args.gradient_accumulation_steps
    args.max_steps = steps_of(args.num_train_epochs, sentences, batch, accumulation)
    an_epoch = steps_of(1, sentences, batch, accumulation)
    if args.eval_strategy == IntervalStrategy.EPOCH:
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, an_epoch
    if args.save_strategy == SaveStrategy.EPOCH:
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, an_epoch


def run_settings(ner: NerArguments, args: MetaTrainingArguments, target: str) -> dict[str, Any]:
    """What a run is made with: the NER settings, the estimator, and the training arguments off their defaults."""
    return {**asdict(ner), "target_languages": [target], **training_settings(args)}


def _with_language(rows: Dataset, index: int) -> Dataset:
    return rows.add_column("language", [index] * len(rows))


def _first(rows: Dataset, size: int | None) -> Dataset:
    return rows if size is None else rows.select(range(min(size, len(rows))))
