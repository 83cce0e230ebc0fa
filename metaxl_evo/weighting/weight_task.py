"""Weights of training texts: a classifier on noisy labels, beside the same training without weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import EvalPrediction, PreTrainedTokenizerBase

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.experiments.folders import hub_id
from metaxl_evo.experiments.scores import Rate
from metaxl_evo.experiments.task import Task
from metaxl_evo.models.adapters import ADAPTER
from metaxl_evo.models.weighers import FORMS, NORMALISATIONS, WeightTable
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.schedules import steps_of
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.training.weight_watch import LABELS, over_time
from metaxl_evo.weighting.drawn import SYNTHETIC
from metaxl_evo.weighting.encoding import encode
from metaxl_evo.weighting.labelled import LabelledArguments, LabelledData, load_labelled
from metaxl_evo.weighting.pretrained import SEQUENCE, load_classifier, trained_labels
from metaxl_evo.weighting.selection import (
    ConfidentTrainer,
    SmallLossText,
    SmallLossTrainer,
    refuse_drops,
    refuse_lone_rows,
    require_cleanlab,
)
from metaxl_evo.weighting.trainer import WeightingTrainer
from metaxl_evo.weighting.verdict import (
    WEIGHTS_PICTURE,
    WEIGHTS_TABLE,
    judged,
    plot_weights,
    weights_facts,
    weights_table,
)
from metaxl_evo.weighting.weighted_text import SUBFOLDER, WeightedText

logger = logging.getLogger(__name__)

METHODS = ("weighted", "plain", "union", "clean_only", "small_loss", "confident")
WEIGHERS = {"each": "number", "domain": "number", "loss": "loss", "hidden": "hidden", "columns": "columns"}


@dataclass
class WeightTextArguments(LabelledArguments):
    """Settings of `weight-text`.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    method: str = field(
        default="weighted",
        metadata={
            "help": "weighted: losses are weighted, clean texts judge the weights; without weights: plain (the noisy "
            "texts), union (the clean ones too), clean_only, small_loss (the noisy ones but for a batch's largest "
            "losses), confident (but for labels that cleanlab doubts); all on the same number of steps."
        },
    )
    drop_rate: float | None = field(
        default=None,
        metadata={"help": "Share of a batch that method small_loss leaves out, below 1 (default: noise_rate)."},
    )
    drop_warmup: float = field(
        default=0.1,
        metadata={"help": "Part of the steps in which that share grows from 0: a model at chance keeps what it says."},
    )
    weigher: str = field(
        default="loss",
        metadata={
            "help": "A number for each text (each) or for each value of domain_column (domain), or a network of the "
            "text's loss (loss: Meta-Weight-Net), of the mean of the model's own states (hidden) or of "
            "feature_columns (columns)."
        },
    )
    form: str = field(
        default="sigmoid", metadata={"help": f"Of weigher each or domain, one of {', '.join(FORMS)} (1 on average)."}
    )
    weight_normalisation: str | None = field(
        default=None,
        metadata={
            "help": f"One of {', '.join(NORMALISATIONS)}: mean leaves the weights of a micro-batch as they are, sum "
            "divides by their mean, label by the mean of those with the same label (default: label of weigher each, "
            "else mean)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("weight_normalisation", self.normalisation, NORMALISATIONS)
        self.require_known("method", self.method, METHODS)
        self.require_known("weigher", self.weigher, WEIGHERS)
        self.require_known("form", self.form, FORMS)
        refuse_drops(self.method, self.drop_rate, self.drop_warmup, self.left_out)
        if self.form != "sigmoid" and WEIGHERS[self.weigher] != "number":
            raise ValueError(f"form {self.form} is over all texts, weigher {self.weigher} sees one: use sigmoid")
        if (self.weigher == "columns") != bool(self.feature_columns):
            raise ValueError("weigher columns reads feature_columns: set both, or neither")
        if self.weigher == "domain" and self.domain_column is None:
            raise ValueError("weigher domain reads a text's domain: set domain_column")

    @property
    def normalisation(self) -> str:
        """That of a micro-batch's weights: by label where each text has a number, as measured."""
        return self.weight_normalisation or ("label" if self.weigher == "each" else "mean")

    @property
    def left_out(self) -> float:
        """The share that small_loss leaves out."""
        return self.noise_rate if self.drop_rate is None else self.drop_rate


class WeightTextTask(Task[WeightTextArguments, LabelledData]):
    """Losses of noisy texts times learned weights, which clean texts judge."""

    settings = WeightTextArguments
    title = "Weighted training texts"
    sources = ("Shu et al., Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting, NeurIPS 2019",)
    usage = (
        'from transformers import pipeline\n\nclassify = pipeline("text-classification", model=".")  # this folder\n'
        'print(classify("some text"))'
    )
    own_files = (SUBFOLDER, ADAPTER, WEIGHTS_TABLE, WEIGHTS_PICTURE, "tokenizer.json", "tokenizer_config.json")
    configs = "weighting"
    units: ClassVar = {"accuracy": "%"}

    def learns(self, settings: WeightTextArguments) -> bool:
        return settings.method == "weighted"

    def refuse(self, settings: WeightTextArguments, args: MetaTrainingArguments) -> None:
        if args.meta_portion != 1:
            raise ValueError("clean texts judge alone: set meta_portion to 1 (method: union trains on them, too)")
        if settings.method == "confident":
            require_cleanlab()
        refuse_lone_rows(settings.method, settings.normalisation, False, args)

    def load(self, settings: WeightTextArguments, args: MetaTrainingArguments) -> LabelledData:
        trained = trained_labels(settings, SEQUENCE)
        data = load_labelled(settings, args.seed, trained)
        if args.load_best_model_at_end and data.validation is None:
            raise ValueError("load_best_model_at_end needs a part `validation` of the data, which may choose")
        return data

    def fit_arguments(
        self, settings: WeightTextArguments, args: MetaTrainingArguments, data: LabelledData
    ) -> MetaTrainingArguments:
        """As many steps as on the noisy texts, whatever trains."""
        args = copy.copy(args)
        if args.max_steps <= 0:
            batch, accumulation = args.per_device_train_batch_size * args.world_size, args.gradient_accumulation_steps
            args.max_steps = steps_of(args.num_train_epochs, len(data.train), batch, accumulation)
        return args

    def build_trainer(
        self, settings: WeightTextArguments, args: MetaTrainingArguments, data: LabelledData
    ) -> WeightingTrainer:
        base, tokenizer = load_classifier(settings, data.names)
        config: Any = base.config
        weigher = _make_weigher(settings, data, config.hidden_size)
        learns, reads = self.learns(settings), WEIGHERS[settings.weigher]
        made = SmallLossText if settings.method == "small_loss" else WeightedText
        module = made(
            base,
            weigher,
            reads=reads,
            weighted=learns,
            **self._told_apart(settings, data),
            normalisation=settings.normalisation,
        )
        train, meta = self._rows(settings, data.train, tokenizer, learns), self._rows(settings, data.meta, tokenizer)
        if module.domain_of == "wrong":
            train = train.add_column("wrong", np.asarray(data.wrong, int).tolist())
        trained = {"union": lambda: concatenate_datasets([train, meta]), "clean_only": lambda: meta}
        trainers: dict[str, Callable[..., WeightingTrainer]] = {
            "small_loss": partial(SmallLossTrainer, drop_rate=settings.left_out, drop_warmup=settings.drop_warmup),
            "confident": ConfidentTrainer,
        }
        return trainers.get(settings.method, WeightingTrainer)(
            module,
            args,
            train_dataset=trained.get(settings.method, lambda: train)(),
            meta_dataset=meta if learns else None,
            eval_dataset=None if data.validation is None else self._rows(settings, data.validation, tokenizer),
            processing_class=tokenizer,
            compute_metrics=accuracy,
        )

    def _told_apart(self, settings: WeightTextArguments, data: LabelledData) -> dict[str, Any]:
        """Whose weights the log has: of domains that are weighed, or else of right and wrong labels."""
        if not self.learns(settings):
            return {}
        if settings.weigher == "domain":
            return {"domains": tuple(data.domains)}
        return {} if data.wrong is None else {"domains": LABELS, "domain_of": "wrong"}

    @staticmethod
    def _rows(
        settings: WeightTextArguments, texts: Dataset, tokenizer: PreTrainedTokenizerBase, weighed: bool = False
    ) -> Dataset:
        """Encoded texts with their labels, and what the weigher reads where they are weighed."""
        rows = encode(texts["text"][:], tokenizer, settings.max_length).add_column("labels", texts["label"][:])
        if weighed and settings.weigher == "each":
            return rows.add_column("number", list(range(len(rows))))
        if weighed and settings.weigher == "domain":
            numbers = {name: number for number, name in enumerate(sorted(set(texts["domain"])))}
            return rows.add_column("number", [numbers[name] for name in texts["domain"]])
        return rows.add_column("columns", texts["features"][:]) if weighed and settings.feature_columns else rows

    def score(self, trainer: MetaTrainer, settings: WeightTextArguments, data: LabelledData) -> dict[str, Any]:
        return {"accuracy": self._accuracy(trainer, settings, data.test)}

    def dev_score(
        self, trainer: MetaTrainer, settings: WeightTextArguments, data: LabelledData
    ) -> dict[str, Any] | None:
        texts = data.validation
        return None if texts is None else {"accuracy": self._accuracy(trainer, settings, texts)}

    def _accuracy(self, trainer: MetaTrainer, settings: WeightTextArguments, texts: Dataset) -> Rate:
        tokenizer: Any = trainer.processing_class
        found: Any = trainer.predict(self._rows(settings, texts, tokenizer))
        return Rate.mean(logits_of(found.predictions).argmax(-1) == found.label_ids)

    def describe(
        self, trainer: MetaTrainer, settings: WeightTextArguments, data: LabelledData, start: Tree
    ) -> dict[str, Any]:
        found: dict[str, Any] = {
            "train_texts": len(data.train),
            "meta_texts": len(data.meta),
            "wrong_labels": None if data.wrong is None else float(data.wrong.mean()),
        }
        weighing = cast(WeightingTrainer, trainer)
        if self.learns(settings):
            weighing.said = judged(trainer, cast(Dataset, trainer.train_dataset))
            found["weights_over_time"] = over_time(trainer.state.log_history, weighing.model.watch.domains)
            if data.domains:
                found["domains"] = weighing.said["weight"].groupby(np.asarray(data.train["domain"])).mean().to_dict()
        if weighing.said is not None:
            found["weights"] = weights_facts(weighing.said, data.wrong)
        return found

    def write_files(
        self, folder: Path, trainer: MetaTrainer, settings: WeightTextArguments, data: LabelledData
    ) -> None:
        said = cast(WeightingTrainer, trainer).said
        if said is not None:
            weights_table(said, data).to_csv(folder / WEIGHTS_TABLE, index=False)

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        if "weights" in results["run"]:
            plot_weights(results["run"]["weights"], results["run"].get("weights_over_time"), folder / WEIGHTS_PICTURE)

    def card_text(self, settings: WeightTextArguments) -> str:
        data = hub_id(settings.data, SYNTHETIC) or Path(settings.data).name
        return f"Method `{settings.method}`, weigher `{settings.weigher}`, data `{data}`."

    def card_metadata(self, settings: WeightTextArguments) -> dict[str, Any]:
        return {
            "tasks": "text-classification",
            "dataset_tags": hub_id(settings.data, SYNTHETIC),
            "finetuned_from": hub_id(settings.model_name_or_path, SYNTHETIC),
        }


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of texts whose class has the largest logit."""
    hits = logits_of(prediction.predictions).argmax(-1) == prediction.label_ids
    return {"accuracy": float(np.mean(hits))}


def logits_of(predictions: Any) -> Any:
    """The first of what a model puts out."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def _make_weigher(settings: WeightTextArguments, data: LabelledData, hidden_size: int) -> WeightTable | WeightNet:
    if WEIGHERS[settings.weigher] == "number":
        entries = len(data.train) if settings.weigher == "each" else len(data.domains)
        return WeightTable(entries, settings.form, settings.floor)
    columns = len(settings.feature_columns or ())
    inputs = {"loss": 1, "hidden": hidden_size, "columns": columns}[settings.weigher]
    return WeightNet(settings.weigher_hidden, inputs, settings.floor)
