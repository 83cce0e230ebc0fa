"""The hyper-cleaning experiment: one weight a training image, beside the same training without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from torch.utils.data import default_collate

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.figures import figure
from metaxl_evo.training.trainer import MetaTrainer
from vision_tasks.backbones import BACKBONES
from vision_tasks.classification import (
    ClassificationTask,
    ClassifierArguments,
    accuracy,
    make_base,
    scores_on,
    spreadsheet,
)
from vision_tasks.hyper_cleaning import (
    SUBFOLDER,
    CleanedClassifier,
    CleaningData,
    ImageWeights,
    NumberedRows,
    found_flips,
    make_cleaning,
    weights_table,
)
from vision_tasks.image_sources import load_images
from vision_tasks.images import ImageRows
from vision_tasks.pretrained import Preparation

METHODS = ("hyper_cleaning", "baseline")
PICTURE = "weights.png"
TABLE = "_weights.csv"  # stays out of an upload: ids may be paths of the user's


@dataclass
class HyperCleaningArguments(ClassifierArguments):
    """Settings of the hyper-cleaning experiment.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    method: str = field(
        default="hyper_cleaning",
        metadata={"help": "hyper_cleaning: a learned weight for each training image; baseline: plain training."},
    )
    backbone: str = field(default="convnet_8", metadata={"help": f"One of {', '.join(BACKBONES)}."})
    flip_rate: float = field(
        default=0.5, metadata={"help": "Probability that a training label becomes another class, all others alike."}
    )
    train_size: int = field(default=1000, metadata={"help": "Training images, drawn from the training part."})
    validation_size: int | None = field(
        default=None, metadata={"help": "Clean images that judge, drawn from the test part (default: all of it)."}
    )
    test_size: int | None = field(
        default=None,
        metadata={"help": "Images that test, drawn from the training images left over (default: all of these)."},
    )
    initial_logit: float = field(default=0.0, metadata={"help": "Where lam begins: weight = sigmoid(lam)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("method", self.method, METHODS)
        for name in ("train_size", "validation_size", "test_size"):
            self.require_count(name, getattr(self, name))
        if not 0 <= self.flip_rate < 1:
            raise ValueError(f"flip_rate must be at least 0 and below 1, not {self.flip_rate}")
        if not abs(self.initial_logit) <= 10:
            raise ValueError(
                f"initial_logit must be between -10 and 10, not {self.initial_logit}: beyond, none learns"
            )


@dataclass(frozen=True, eq=False)
class PreparedData(CleaningData):
    """With what made the images ready for a pretrained model."""

    preparation: Preparation | None = None


class HyperCleaningTask(ClassificationTask[HyperCleaningArguments, PreparedData]):
    """A weight for each training image, which clean images judge (ICLR 2025 submission 6297)."""

    settings = HyperCleaningArguments
    title = "Data hyper-cleaning"
    sources = ("Generalized Greedy Gradient-Based Hyperparameter Optimization, ICLR 2025 submission 6297",)
    usage = "\n# The weights of the training images are in image_weights/, before the sigmoid."
    own_files = (*ClassificationTask.own_files, SUBFOLDER, TABLE, PICTURE)
    units: ClassVar = {"accuracy": "%", "validation_accuracy": "%"}

    def learns(self, settings: HyperCleaningArguments) -> bool:
        return settings.method == "hyper_cleaning"

    def refuse(self, settings: HyperCleaningArguments, args: MetaTrainingArguments) -> None:
        super().refuse(settings, args)
        if not self.learns(settings) and args.episode_reset != "continue":
            raise ValueError(
                f"the baseline has no episodes and would train on where episode_reset: {args.episode_reset} begins "
                "anew, so that it compares with nothing: give it episode_reset: continue and max_steps of one episode"
            )

    def load(self, settings: HyperCleaningArguments, args: MetaTrainingArguments) -> PreparedData:
        preparation = settings.preparation()
        parts = load_images(settings.data, settings.layout(), prepare=preparation)
        made = make_cleaning(
            parts["train"],
            parts["test"],
            rate=settings.flip_rate,
            train_size=settings.train_size,
            validation_size=settings.validation_size,
            test_size=settings.test_size,
            seed=args.seed,
        )
        _refuse_repeated_rows(len(made.train), args)
        return PreparedData(**vars(made), preparation=preparation)

    def build_trainer(
        self, settings: HyperCleaningArguments, args: MetaTrainingArguments, data: PreparedData
    ) -> MetaTrainer:
        base, processor = make_base(settings, data.train, data.preparation)
        weights = ImageWeights(len(data.train), settings.initial_logit)
        return MetaTrainer(
            CleanedClassifier(base, weights, weighted=self.learns(settings)),
            args,
            train_dataset=NumberedRows(data.train),
            meta_dataset=ImageRows(data.validation) if self.learns(settings) else None,
            eval_dataset=ImageRows(data.validation),
            data_collator=default_collate,
            processing_class=processor,
            compute_metrics=accuracy,
        )

    def score(self, trainer: MetaTrainer, settings: HyperCleaningArguments, data: PreparedData) -> dict[str, Any]:
        judged = float(scores_on(trainer, data.validation)["accuracy"])  # not of the test examples, so no Rate
        return {**scores_on(trainer, data.test), "validation_accuracy": judged}

    def describe(
        self, trainer: MetaTrainer, settings: HyperCleaningArguments, data: PreparedData, start: Tree
    ) -> dict[str, Any]:
        found: dict[str, Any] = {
            "train_images": len(data.train),
            "validation_images": len(data.validation),
            "test_images": len(data.test),
            "flipped_labels": float(data.flipped.mean()) if data.known else None,
        }
        return {**found, "weights": weights_facts(_weights(trainer), data)} if self.learns(settings) else found

    def write_files(
        self, folder: Path, trainer: MetaTrainer, settings: HyperCleaningArguments, data: PreparedData
    ) -> None:
        super().write_files(folder, trainer, settings, data)
        if self.learns(settings):
            spreadsheet(weights_table(_weights(trainer), data)).to_csv(folder / TABLE, index=False)

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        if "weights" in results["run"]:
            plot_histogram(results["run"]["weights"]["histogram"], folder / PICTURE)


def _refuse_repeated_rows(images: int, args: MetaTrainingArguments) -> None:
    """Several processes fill up the last batch of an epoch with rows that it had already."""
    step = args.per_device_train_batch_size * args.world_size
    if args.world_size > 1 and images % step and not args.dataloader_drop_last:
        raise ValueError(
            f"train_size {images} is no multiple of the {step} images that {args.world_size} processes take at once, "
            "so that some would count twice: set per_device_train_batch_size so that it is"
        )


def _weights(trainer: MetaTrainer) -> np.ndarray:
    """(N,) of the training images."""
    weights: np.ndarray = cast(ImageWeights, trainer.model.meta).logits.detach().sigmoid().cpu().numpy()
    return weights


def weights_facts(weights: np.ndarray, data: CleaningData) -> dict[str, Any]:
    """Means and histograms of the weights of right and flipped labels, and how well they tell them; plain values."""
    groups = {"right": ~data.flipped, "flipped": data.flipped} if data.known else {"all": np.ones(len(weights), bool)}
    bins = np.linspace(0, 1, 41)
    return {
        "mean": {name: float(weights[which].mean()) for name, which in groups.items() if which.any()},
        **(found_flips(weights, data.flipped) if data.known else {}),
        "histogram": {
            "bins": bins.tolist(),
            **{name: np.histogram(weights[which], bins)[0].tolist() for name, which in groups.items()},
        },
    }


def plot_histogram(histogram: Mapping[str, Any], file: Path) -> None:
    """The weights of right and of flipped labels.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    with figure(file) as (axis,):
        for name, colour in (("right", "C0"), ("flipped", "C3"), ("all", "C0")):
            counts = np.array(histogram.get(name, ()))
            if counts.sum():
                axis.stairs(counts, histogram["bins"], fill=True, alpha=0.5, color=colour, label=f"{name} labels")
        axis.set(xlabel="learned weight", ylabel="training images")
        axis.legend()
