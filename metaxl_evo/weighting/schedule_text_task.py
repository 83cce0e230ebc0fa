"""Schedules of fine-tuning a text classifier: by forward mode, greedily, or by black-box search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import pandas as pd
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.experiments.folders import hub_id
from metaxl_evo.experiments.schedule_build import (
    Parts,
    best_loss,
    describe_search,
    make_schedule_trainer,
    rows_a_step,
    schedule_of,
)
from metaxl_evo.experiments.schedule_rows import Splits
from metaxl_evo.experiments.schedule_task import (
    ScheduleArguments,
    ScheduleTrainingArguments,
    fit_schedule,
    own_files,
    plot_schedule,
    refuse_schedule,
    write_schedule,
)
from metaxl_evo.experiments.schedule_trainer import RETRAINING
from metaxl_evo.experiments.scores import Rate
from metaxl_evo.experiments.task import Task
from metaxl_evo.models.adapters import ADAPTER
from metaxl_evo.models.schedule import Schedule
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.training.values import evenly
from metaxl_evo.weighting.arguments import TextArguments
from metaxl_evo.weighting.drawn import SYNTHETIC
from metaxl_evo.weighting.encoding import encode
from metaxl_evo.weighting.labelled import label_names, label_numbers, require_columns, require_texts
from metaxl_evo.weighting.pretrained import SEQUENCE, load_classifier, trained_labels
from metaxl_evo.weighting.schedule_text import ScheduledText, TextTrainingRows
from metaxl_evo.weighting.sources import read_parts
from metaxl_evo.weighting.weight_task import logits_of


@dataclass
class ScheduleTextArguments(ScheduleArguments, TextArguments):
    """Settings of `schedule-text`.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    n_momentum: int = field(default=0, metadata={"help": "Windows of momentum: SGD has it, AdamW has betas instead."})
    train_size: int | None = field(default=None, metadata={"help": "Training texts at most, spread over their file."})
    eval_size: int | None = field(default=None, metadata={"help": "Test texts at most, spread over their file."})
    validation_share: float = field(
        default=0.1, metadata={"help": "Of them that judge a training, drawn anew for each; the others train."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_schedule()
        for name in ("train_size", "eval_size"):
            self.require_count(name, getattr(self, name))
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be above 0 and below 1, not {self.validation_share}")

    def judging(self, texts: int) -> int:
        """How many of so many texts judge."""
        return max(1, round(texts * self.validation_share))


@dataclass
class ScheduleTextTrainingArguments(ScheduleTrainingArguments):
    """Those of schedules, for AdamW."""

    optimizer_class: str | None = field(default="AdamW", metadata={"help": "The optimiser whose numbers are learned."})


@dataclass(frozen=True, eq=False)
class ScheduleTexts:
    """Columns `text` and `label` (a number) of all texts that train or judge, and of those that test."""

    train: Dataset
    test: Dataset
    names: list[str]


class ScheduleTextTask(Task[ScheduleTextArguments, ScheduleTexts]):
    """A schedule of fine-tuning, judged at its end (Micaelli and Storkey, NeurIPS 2021, of AdamW)."""

    settings = ScheduleTextArguments
    training = ScheduleTextTrainingArguments
    title = "Schedule of fine-tuning"
    sources = ("Micaelli and Storkey, Gradient-based Hyperparameter Optimization Over Long Horizons, NeurIPS 2021",)
    usage = (
        'from transformers import pipeline\n\nclassify = pipeline("text-classification", model=".")  # this folder\n'
        'print(classify("some text"))\n# The schedule is in schedule.json.'
    )
    own_files = (*own_files(), RETRAINING, ADAPTER, "tokenizer.json", "tokenizer_config.json")
    configs = "weighting"
    units: ClassVar = {"accuracy": "%", "validation_loss": ""}
    shown_only = ("validation_loss",)

    def learns(self, settings: ScheduleTextArguments) -> bool:
        return settings.method == "learned"

    def refuse(self, settings: ScheduleTextArguments, args: MetaTrainingArguments) -> None:
        refuse_schedule(settings, args)
        if args.meta_portion != 1:
            raise ValueError("texts that judge a training do not train in it: set meta_portion to 1")
        if settings.n_momentum and "Adam" in str(args.optimizer_class):
            raise ValueError(
                f"{args.optimizer_class} has betas, whose derivative forward mode does not carry, and no momentum: "
                "set n_momentum: 0, or optimizer_class: SGD"
            )
        refuse_idle_rates(settings, args)

    def load(self, settings: ScheduleTextArguments, args: MetaTrainingArguments) -> ScheduleTexts:
        parts = read_parts(settings.data, ("train", "test"), settings.data_configuration)
        for split in ("train", "test"):
            if split not in parts:
                raise ValueError(
                    f"{settings.data} has no part {split}: give a folder, or a Hub id, with train and test"
                )
        trained = trained_labels(settings, SEQUENCE)
        names = label_names(parts["train"], [settings.label_column], settings.data, trained)
        sizes = {"train": settings.train_size, "test": settings.eval_size}
        made = {split: _texts(rows, settings, names, split, sizes[split]) for split, rows in parts.items()}
        return ScheduleTexts(made["train"], made["test"], names)

    def fit_arguments(
        self, settings: ScheduleTextArguments, args: MetaTrainingArguments, data: ScheduleTexts
    ) -> MetaTrainingArguments:
        return fit_schedule(settings, args, settings.judging(len(data.train)))

    def build_trainer(
        self, settings: ScheduleTextArguments, args: MetaTrainingArguments, data: ScheduleTexts
    ) -> MetaTrainer:
        _, tokenizer = load_classifier(settings, data.names)
        texts, ranges = _encoded(settings, data.train, tokenizer), settings.ranges()
        collate = DataCollatorWithPadding(tokenizer)

        def module(network: nn.Module, schedule: Schedule, steps: int) -> ScheduledText:
            return ScheduledText(network, schedule, texts, collate, steps=steps, ranges=ranges)

        def rows(splits: Splits, steps: int) -> TextTrainingRows:
            return TextTrainingRows(splits, texts, steps, rows_a_step(args))

        return make_schedule_trainer(
            settings,
            args,
            Parts(lambda: load_classifier(settings, data.names)[0], module, rows, collate, tokenizer),
            Splits(texts, settings.judging(len(texts)), args.seed),
        )

    def score(self, trainer: MetaTrainer, settings: ScheduleTextArguments, data: ScheduleTexts) -> dict[str, Any]:
        tokenizer: Any = trainer.processing_class
        found: Any = trainer.predict(cast(Any, _encoded(settings, data.test, tokenizer)))
        hits = logits_of(found.predictions).argmax(-1) == found.label_ids
        return {"accuracy": Rate.mean(hits), "validation_loss": best_loss(trainer, learned=self.learns(settings))}

    def describe(
        self, trainer: MetaTrainer, settings: ScheduleTextArguments, data: ScheduleTexts, start: Tree
    ) -> dict[str, Any]:
        return describe_search(trainer, settings, settings.judging(len(data.train)))

    def write_files(
        self, folder: Path, trainer: MetaTrainer, settings: ScheduleTextArguments, data: ScheduleTexts
    ) -> None:
        write_schedule(folder, schedule_of(trainer))

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        plot_schedule(folder, results["run"])

    def card_text(self, settings: ScheduleTextArguments) -> str:
        return f"Method `{settings.method}`, data `{hub_id(settings.data, SYNTHETIC) or Path(settings.data).name}`."

    def card_metadata(self, settings: ScheduleTextArguments) -> dict[str, Any]:
        return {
            "tasks": "text-classification",
            "dataset_tags": hub_id(settings.data, SYNTHETIC),
            "finetuned_from": hub_id(settings.model_name_or_path, SYNTHETIC),
        }


def refuse_idle_rates(settings: ScheduleArguments, args: MetaTrainingArguments) -> None:
    """Refuse a schedule of the Trainer's beside a learned rate, which would take its place unseen.

    Raises:
        ValueError: with the way out.
    """
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if settings.n_lr and (kind != "constant" or args.warmup_steps):
        raise ValueError(
            f"the learning rate is learned in {settings.n_lr} windows, so that lr_scheduler_type {kind} and "
            f"warmup_steps {args.warmup_steps:g} would do nothing: leave them out, or "
            "set n_lr: 0"
        )


def _texts(rows: Dataset, settings: ScheduleTextArguments, names: list[str], split: str, size: int | None) -> Dataset:
    where = f"{settings.data}, {split}"
    require_columns(rows, [settings.text_column, settings.label_column], where)
    texts = pd.Series(rows[settings.text_column][:])
    require_texts(texts, pd.Series(range(len(texts))), where)
    labels = label_numbers(rows, settings.label_column, names, where)
    taken = evenly(len(texts), size)
    missing = set(range(len(names))) - {labels[row] for row in taken}
    if split == "train" and missing:
        raise ValueError(
            f"none of the {len(taken)} training texts is of class {names[min(missing)]}: raise train_size, or leave "
            "the class out of the data"
        )
    return Dataset.from_dict({"text": [texts[row] for row in taken], "label": [labels[row] for row in taken]})


def _encoded(settings: ScheduleTextArguments, texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    encoded = encode(texts["text"][:], tokenizer, settings.max_length)
    return encoded.add_column("labels", texts["label"][:])
