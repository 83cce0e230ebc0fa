"""Weights of tagged sentences or words: a tagger on noisy entities, beside the same training without weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, cast

import pandas as pd
from datasets import Dataset, concatenate_datasets

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.experiments.folders import hub_id
from metaxl_evo.experiments.task import Task
from metaxl_evo.models.adapters import ADAPTER
from metaxl_evo.models.weighers import FORMS, NORMALISATIONS, WeightTable
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.ner.arguments import NerTrainingArguments, refuse_fields, refuse_metric
from metaxl_evo.ner.encoding import IGNORED, PadRight, cut_off, encode
from metaxl_evo.ner.evaluation import EvaluationSet, WordTrainer, evaluation_sets
from metaxl_evo.ner.pretrained import load_classifier, longest_input, require_readable
from metaxl_evo.ner.scorers import EntityScorer
from metaxl_evo.ner.spacing import as_in_text
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.schedules import steps_of
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.training.weight_watch import LABELS, over_time
from metaxl_evo.weighting.drawn import SYNTHETIC
from metaxl_evo.weighting.selection import SmallLossText, SmallLossTrainer, refuse_drops, refuse_lone_rows
from metaxl_evo.weighting.tagged import TaggedArguments, TaggedData, load_tagged
from metaxl_evo.weighting.trainer import WeightingTrainer
from metaxl_evo.weighting.verdict import (
    WEIGHTS_PICTURE,
    WEIGHTS_TABLE,
    items_judged,
    plot_weights,
    weights_facts,
)
from metaxl_evo.weighting.weighted_text import SUBFOLDER, WeightedText

logger = logging.getLogger(__name__)

METHODS = ("weighted", "plain", "union", "clean_only", "small_loss")
WEIGHERS = {"each": "number", "loss": "loss", "hidden": "hidden"}


@dataclass
class WeightTagsArguments(TaggedArguments):
    """Settings of `weight-tags`.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    method: str = field(
        default="weighted",
        metadata={
            "help": "weighted: losses are weighted, clean sentences judge the weights; without weights: plain (the "
            "noisy sentences), union (the clean ones too), clean_only, small_loss (the noisy ones but for a batch's "
            "largest losses, of sentences or words); all on the same number of steps."
        },
    )
    drop_rate: float | None = field(
        default=None, metadata={"help": "Share of a batch that method small_loss leaves out, below 1."}
    )
    drop_warmup: float = field(
        default=0.1,
        metadata={"help": "Part of the steps in which that share grows from 0: a model at chance keeps what it says."},
    )
    weigher: str = field(
        default="loss",
        metadata={
            "help": "A number for each (each), or a network of the loss (loss: Meta-Weight-Net) or of the model's own "
            "states (hidden), of a sentence or a word."
        },
    )
    per_token: bool = field(
        default=False,
        metadata={"help": "Words are weighed, each by its own number, loss or state; else sentences."},
    )
    form: str = field(default="sigmoid", metadata={"help": f"Of weigher each, one of {', '.join(FORMS)}."})
    weight_normalisation: str = field(
        default="mean",
        metadata={
            "help": f"One of {', '.join(NORMALISATIONS)}: mean leaves the weights of a micro-batch as they are, sum "
            "divides by their mean, label by the mean of the words with the same tag."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "confident":
            raise ValueError("method confident doubts the one label of a text, not the tags of words: use small_loss")
        self.require_known("method", self.method, METHODS)
        refuse_drops(self.method, self.drop_rate, self.drop_warmup, self.drop_rate)
        self.require_known("weigher", self.weigher, WEIGHERS)
        self.require_known("form", self.form, FORMS)
        self.require_known("weight_normalisation", self.weight_normalisation, NORMALISATIONS)
        if self.form != "sigmoid" and self.weigher != "each":
            raise ValueError(f"form {self.form} is over all sentences, weigher {self.weigher} sees one: use sigmoid")


@dataclass
class WeightTagsTrainingArguments(NerTrainingArguments):
    """MetaTrainingArguments of a tagger whose clean sentences judge, and do not train."""

    meta_portion: float = field(
        default=1.0, metadata={"help": "Share of each draw of clean sentences that judges: all of it."}
    )


class TagsTrainer(WordTrainer, WeightingTrainer):
    """A WeightingTrainer that is scored by words.

    Attributes:
        evaluation: `test`, and `dev` where one is used.
        cut_off: set of sentences -> the share of which the model reads only a part.
    """

    evaluation: dict[str, EvaluationSet]
    cut_off: dict[str, float]


class SmallLossTagsTrainer(TagsTrainer, SmallLossTrainer):
    """A SmallLossTrainer that is scored by words."""


class WeightTagsTask(Task[WeightTagsArguments, TaggedData]):
    """Losses of the words of noisy sentences times learned weights, which clean sentences judge."""

    settings = WeightTagsArguments
    training = WeightTagsTrainingArguments
    title = "Weighted tagged sentences"
    sources = ("Shu et al., Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting, NeurIPS 2019",)
    usage = (
        'from transformers import pipeline\n\ntag = pipeline("token-classification", model=".")  # this folder\n'
        'print(tag("some text"))'
    )
    own_files = (SUBFOLDER, ADAPTER, WEIGHTS_TABLE, WEIGHTS_PICTURE, "tokenizer.json", "tokenizer_config.json")
    inputs = (*Task.inputs, "dataset", "meta_dataset")
    configs = "weighting"
    scorer = EntityScorer()
    units: ClassVar = EntityScorer.units

    def learns(self, settings: WeightTagsArguments) -> bool:
        return settings.method == "weighted"

    def refuse(self, settings: WeightTagsArguments, args: MetaTrainingArguments) -> None:
        refuse_fields(args)
        if args.meta_portion != 1:
            raise ValueError("clean sentences judge alone: set meta_portion to 1 (method: union trains on them, too)")
        refuse_lone_rows(settings.method, settings.weight_normalisation, settings.per_token, args)
        refuse_metric(args, (*self.units, "loss"))

    def load(self, settings: WeightTagsArguments, args: MetaTrainingArguments) -> TaggedData:
        return load_tagged(settings, args.seed, wants_dev=args.load_best_model_at_end, label_names=args.label_names)

    def fit_arguments(
        self, settings: WeightTagsArguments, args: MetaTrainingArguments, data: TaggedData
    ) -> MetaTrainingArguments:
        """As many steps as on the noisy sentences, whatever trains."""
        args = copy.copy(args)
        if args.max_steps <= 0:
            batch, accumulation = args.per_device_train_batch_size * args.world_size, args.gradient_accumulation_steps
            args.max_steps = steps_of(args.num_train_epochs, len(data.train), batch, accumulation)
        if not self.learns(settings):
            args.estimator, args.estimator_kwargs = NO_ESTIMATOR, None
        return args

    def build_trainer(
        self, settings: WeightTagsArguments, args: MetaTrainingArguments, data: TaggedData
    ) -> TagsTrainer:
        trusted = settings.trust_remote_code
        base, tokenizer = load_classifier(settings.model_name_or_path, data.names, trust_remote_code=trusted)
        words = [words for part in (data.test, data.train) for words in part["tokens"][:100]]
        tokenizer = as_in_text(tokenizer, words, base.config, trust_remote_code=trusted)
        longest = min(settings.max_length, longest_input(base))
        train, meta = (encode(part, tokenizer, longest) for part in (data.train, data.meta))
        for rows in (train, meta):
            require_readable(base, rows, "max_length")
        learns, told = self.learns(settings), data.wrong is not None and settings.method == "weighted"
        if told:
            flags = [list(map(int, row)) for row in data.wrong or ()]
            train = train.add_column("wrong", _labelled(data.train, flags, tokenizer, longest))
        entries = len(train)
        if learns and settings.weigher == "each" and settings.per_token:
            numbers, entries = _numbers(train["labels"][:])
            train = train.add_column("number", numbers)
        elif learns and settings.weigher == "each":
            train = train.add_column("number", list(range(entries)))
        evaluation = evaluation_sets(
            {"dev": data.dev, "test": data.test},
            base,
            tokenizer,
            settings.eval_max_length,
            args.per_device_eval_batch_size,
            names=data.names,
            scorer=self.scorer,
        )
        config: Any = base.config
        made = SmallLossText if settings.method == "small_loss" else WeightedText
        module = made(
            settings.adapted(base),
            _make_weigher(settings, entries, config.hidden_size),
            reads=WEIGHERS[settings.weigher],
            weighted=learns,
            tokens=True,
            per_token=settings.per_token,
            domains=LABELS if told else (),
            domain_of="wrong",
            normalisation=settings.weight_normalisation,
        )
        trained = {"union": lambda: concatenate_datasets([train, meta]), "clean_only": lambda: meta}
        trainers: dict[str, Callable[..., TagsTrainer]] = {
            "small_loss": partial(
                SmallLossTagsTrainer, drop_rate=settings.drop_rate or 0.0, drop_warmup=settings.drop_warmup
            )
        }
        columns = ("labels", "wrong", *["number"] * settings.per_token)
        trainer = trainers.get(settings.method, TagsTrainer)(
            module,
            args,
            train_dataset=trained.get(settings.method, lambda: train)(),
            meta_dataset=meta if learns else None,
            eval_dataset=evaluation["dev"].rows if "dev" in evaluation else None,
            data_collator=PadRight(tokenizer.pad_token_id, columns),
            processing_class=tokenizer,
            compute_metrics=evaluation["dev"].compute_metrics if "dev" in evaluation else None,
        )
        trainer.evaluation, trainer.cut_off = evaluation, _cut_off(settings, data, tokenizer, longest_input(base))
        return trainer

    def score(self, trainer: MetaTrainer, settings: WeightTagsArguments, data: TaggedData) -> dict[str, Any]:
        return cast(TagsTrainer, trainer).evaluation["test"].predict(trainer)

    def dev_score(
        self, trainer: MetaTrainer, settings: WeightTagsArguments, data: TaggedData
    ) -> dict[str, Any] | None:
        held = cast(TagsTrainer, trainer).evaluation
        return held["dev"].predict(trainer) if "dev" in held else None

    def describe(
        self, trainer: MetaTrainer, settings: WeightTagsArguments, data: TaggedData, start: Tree
    ) -> dict[str, Any]:
        found: dict[str, Any] = {
            "train_sentences": len(data.train),
            "meta_sentences": len(data.meta),
            "test_sentences_seen": data.seen,
            "sentences_cut_off": cast(TagsTrainer, trainer).cut_off,
            "wrong_tags": None if data.wrong is None else sum(map(sum, data.wrong)),
        }
        weighing = cast(TagsTrainer, trainer)
        if self.learns(settings):
            weighing.said = _said(weighing, settings, data)
            found["weights_over_time"] = over_time(trainer.state.log_history, weighing.model.watch.domains)
            wrong = weighing.said["wrong"].to_numpy() if data.wrong is not None else None
            found["weights"] = weights_facts(weighing.said, wrong)
        return found

    def describe_check(
        self, trainer: MetaTrainer, settings: WeightTagsArguments, data: TaggedData
    ) -> tuple[dict[str, Any], list[str]]:
        sizes = {"train": len(data.train), "clean": len(data.meta), "test": len(data.test)}
        return {
            "sentences": sizes,
            "labels": data.names,
            "sentences_cut_off": cast(TagsTrainer, trainer).cut_off,
        }, []

    def write_files(self, folder: Path, trainer: MetaTrainer, settings: WeightTagsArguments, data: TaggedData) -> None:
        said = cast(TagsTrainer, trainer).said
        if said is not None:
            said.sort_values("weight", kind="stable").to_csv(folder / WEIGHTS_TABLE, index=False)

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        if "weights" in results["run"]:
            what = "word" if results["settings"]["per_token"] else "sentence"
            plot_weights(
                results["run"]["weights"], results["run"].get("weights_over_time"), folder / WEIGHTS_PICTURE, what
            )

    def card_text(self, settings: WeightTagsArguments) -> str:
        data = hub_id(settings.dataset, SYNTHETIC) or Path(settings.dataset).name
        return f"Method `{settings.method}`, weigher `{settings.weigher}`, data `{data}`, {settings.language}."

    def card_metadata(self, settings: WeightTagsArguments) -> dict[str, Any]:
        return {
            "tasks": "token-classification",
            "language": settings.language,
            "dataset_tags": hub_id(settings.dataset, SYNTHETIC),
            "finetuned_from": hub_id(settings.model_name_or_path, SYNTHETIC),
        }


def _make_weigher(settings: WeightTagsArguments, entries: int, hidden_size: int) -> WeightTable | WeightNet:
    if settings.weigher == "each":
        return WeightTable(entries, settings.form, settings.floor)
    return WeightNet(settings.weigher_hidden, 1 if settings.weigher == "loss" else hidden_size, settings.floor)


def _numbers(labels: list[list[int]]) -> tuple[list[list[int]], int]:
    """The labelled tokens of all rows numbered from 0, -100 elsewhere; and how many there are."""
    counted = count()
    numbers = [[IGNORED if label == IGNORED else next(counted) for label in row] for row in labels]
    return numbers, next(counted)


def _cut_off(settings: WeightTagsArguments, data: TaggedData, tokenizer: Any, longest: int) -> dict[str, float]:
    """The share of sentences that are longer than what the model reads of them, warned of where there are some."""
    found = {}
    for name, part, setting in (
        ("train", data.train, "max_length"),
        ("clean", data.meta, "max_length"),
        ("test", data.test, "eval_max_length"),
    ):
        length = min(getattr(settings, setting), longest)
        found[name] = share = cut_off(part, tokenizer, length) / len(part)
        if share:
            logger.warning("%.1f%% of the %s sentences are cut off: %s is %d", 100 * share, name, setting, length)
    return found


def _labelled(sentences: Dataset, values: list[list[int]], tokenizer: Any, max_length: int) -> list[list[int]]:
    """A number of each word, at its labelled token; elsewhere -100."""
    rows = Dataset.from_dict({"tokens": sentences["tokens"][:], "ner_tags": values})
    found: list[list[int]] = encode(rows, tokenizer, max_length)["labels"][:]
    return found


def _said(trainer: TagsTrainer, settings: WeightTagsArguments, data: TaggedData) -> pd.DataFrame:
    """A row a sentence or word: weight, loss, what it is, and whether its tag, or one of its tags, is wrong."""
    items = items_judged(trainer, cast(Dataset, trainer.train_dataset)).rename(columns={"row": "sentence"})
    longest = min(settings.max_length, longest_input(cast(Any, trainer.model).plain_base))
    words: list[list[str]] = data.train["tokens"][:]
    places = _labelled(data.train, [list(range(len(row))) for row in words], trainer.processing_class, longest)
    items["place"] = [place for row in places for place in row if place >= 0]
    where = list(zip(items["sentence"], items["place"], strict=True))
    if data.wrong is not None:
        items["wrong"] = [data.wrong[row][place] for row, place in where]
    if settings.per_token:
        tags = data.train["ner_tags"][:]
        items["word"] = [words[row][place] for row, place in where]
        items["tag"] = [data.names[tags[row][place]] for row, place in where]
        return items
    how = {"weight": "mean", "loss": "mean"} | ({"wrong": "any"} if data.wrong is not None else {})
    table = items.groupby("sentence").agg(how).reset_index()
    return table.assign(text=[" ".join(words[row]) for row in table["sentence"]])
