"""Schedules of an image classifier's optimiser over long trainings: by FDS, greedily, or by black-box search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.utils.data import default_collate

from metaxl_evo.bilevel.tree import Tree
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
from metaxl_evo.models.schedule import Schedule
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from vision_tasks.augmentation import AUGMENTATIONS
from vision_tasks.classification import (
    ClassificationTask,
    ClassifierArguments,
    make_base,
    scores_on,
    tell_fewer,
)
from vision_tasks.image_sources import load_images
from vision_tasks.images import ImageSet
from vision_tasks.pretrained import Preparation
from vision_tasks.schedule import ScheduledClassifier, TrainingRows


@dataclass
class ImageScheduleArguments(ScheduleArguments, ClassifierArguments):
    """Settings of the experiment.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    train_size: int | None = field(default=None, metadata={"help": "Training images at most, the first ones."})
    validation_share: float = field(
        default=0.05, metadata={"help": "Of them that judge a training, drawn anew for each; the others train."}
    )
    augmentation: str = field(default="none", metadata={"help": f"Of training images: {', '.join(AUGMENTATIONS)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_schedule()
        self.require_known("augmentation", self.augmentation, AUGMENTATIONS)
        self.require_count("train_size", self.train_size)
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be above 0 and below 1, not {self.validation_share}")

    def judging(self, images: int) -> int:
        """How many of so many images judge."""
        return max(1, round(images * self.validation_share))


@dataclass(frozen=True, eq=False)
class ScheduleData:
    """All images that train or judge, and those that test."""

    train: ImageSet
    test: ImageSet
    preparation: Preparation | None = None


class ScheduleTask(ClassificationTask[ImageScheduleArguments, ScheduleData]):
    """A schedule that is judged at the end of a training (Micaelli and Storkey, NeurIPS 2021)."""

    settings = ImageScheduleArguments
    training = ScheduleTrainingArguments
    configs = "long_horizon"
    title = "Schedule of an optimiser"
    sources = ("Micaelli and Storkey, Gradient-based Hyperparameter Optimization Over Long Horizons, NeurIPS 2021",)
    usage = "\n# The schedule is in schedule.json."
    own_files = (*ClassificationTask.own_files, *own_files(), RETRAINING)
    units: ClassVar = {"accuracy": "%", "validation_loss": ""}
    shown_only = ("validation_loss",)

    def learns(self, settings: ImageScheduleArguments) -> bool:
        return settings.method == "learned"

    def refuse(self, settings: ImageScheduleArguments, args: MetaTrainingArguments) -> None:
        super().refuse(settings, args)
        refuse_schedule(settings, args)

    def load(self, settings: ImageScheduleArguments, args: MetaTrainingArguments) -> ScheduleData:
        preparation = settings.preparation()
        parts = load_images(settings.data, settings.layout(), prepare=preparation)
        train, test = parts["train"], parts["test"].require_classes()
        tell_fewer("train_size", settings.train_size, len(train))
        return ScheduleData(train.take(slice(settings.train_size)).require_classes(), test, preparation)

    def fit_arguments(
        self, settings: ImageScheduleArguments, args: MetaTrainingArguments, data: ScheduleData
    ) -> MetaTrainingArguments:
        return fit_schedule(settings, args, settings.judging(len(data.train)))

    def build_trainer(
        self, settings: ImageScheduleArguments, args: MetaTrainingArguments, data: ScheduleData
    ) -> MetaTrainer:
        images, augment, ranges = data.train, AUGMENTATIONS[settings.augmentation], settings.ranges()
        _, processor = make_base(settings, images, data.preparation)

        def module(network: nn.Module, schedule: Schedule, steps: int) -> ScheduledClassifier:
            return ScheduledClassifier(network, schedule, images, steps=steps, ranges=ranges)

        def rows(splits: Splits, steps: int) -> TrainingRows:
            made = TrainingRows(splits, steps, rows_a_step(args), augment)
            made[0]  # complains before the first step of images that are too small for the augmentation
            return made

        return make_schedule_trainer(
            settings,
            args,
            Parts(lambda: make_base(settings, images, data.preparation)[0], module, rows, default_collate, processor),
            Splits(images, settings.judging(len(images)), args.seed),
        )

    def score(self, trainer: MetaTrainer, settings: ImageScheduleArguments, data: ScheduleData) -> dict[str, Any]:
        scores = scores_on(trainer, data.test, data.train.labels)
        return {**scores, "validation_loss": best_loss(trainer, learned=self.learns(settings))}

    def describe(
        self, trainer: MetaTrainer, settings: ImageScheduleArguments, data: ScheduleData, start: Tree
    ) -> dict[str, Any]:
        return describe_search(trainer, settings, settings.judging(len(data.train)))

    def write_files(
        self, folder: Path, trainer: MetaTrainer, settings: ImageScheduleArguments, data: ScheduleData
    ) -> None:
        super().write_files(folder, trainer, settings, data)
        write_schedule(folder, schedule_of(trainer))

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        plot_schedule(folder, results["run"])
