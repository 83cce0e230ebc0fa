"""The rotation experiment: upright training images, askew ones that judge and that are tested."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
from torch.utils.data import default_collate

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from vision_tasks.classification import (
    ClassificationTask,
    ClassifierArguments,
    accuracy,
    make_base,
    scores_on,
    tell_fewer,
)
from vision_tasks.image_sources import load_images
from vision_tasks.images import ImageRows, ImageSet
from vision_tasks.pretrained import Preparation
from vision_tasks.rotation import SUBFOLDER, RotatedClassifier, Rotation, rotated

METHODS = ("rotation", "baseline")


@dataclass
class RotationArguments(ClassifierArguments):
    """Settings of the rotation experiment.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    method: str = field(
        default="rotation", metadata={"help": "rotation: the angle is learned; baseline: trains on upright images."}
    )
    degrees: float = field(
        default=30.0, metadata={"help": "How far the judging and the test images are turned, counter-clockwise."}
    )
    train_size: int | None = field(
        default=None,
        metadata={"help": "Upright training images at most, the first ones (default: all but the meta images)."},
    )
    meta_size: int | None = field(
        default=None, metadata={"help": "Images that judge, the last of the training part (default: a sixth of it)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("method", self.method, METHODS)
        self.require_count("train_size", self.train_size)
        self.require_count("meta_size", self.meta_size)
        if not -180 <= self.degrees <= 180:
            raise ValueError(f"degrees must be between -180 and 180, not {self.degrees}")


@dataclass(frozen=True, eq=False)
class RotationData:
    """Upright training images, askew ones that judge, and the test images either way."""

    train: ImageSet
    meta: ImageSet
    test: ImageSet
    upright: ImageSet
    preparation: Preparation | None = None


class RotationTask(ClassificationTask[RotationArguments, RotationData]):
    """An angle learned by hypergradients (Bohdal et al., NeurIPS 2021, section 4.2)."""

    settings = RotationArguments
    title = "Rotation transformer"
    sources = ("Bohdal et al., EvoGrad, NeurIPS 2021, section 4.2",)
    usage = "\n# The angle is in rotation/config.json."
    own_files = (*ClassificationTask.own_files, SUBFOLDER)
    units: ClassVar = {"accuracy": "%", "accuracy_upright": "%", "degrees": "°"}
    shown_only = ("degrees",)

    def learns(self, settings: RotationArguments) -> bool:
        return settings.method == "rotation"

    def load(self, settings: RotationArguments, args: MetaTrainingArguments) -> RotationData:
        preparation = settings.preparation()
        parts = load_images(settings.data, settings.layout(), prepare=preparation)
        images, test = parts["train"], parts["test"].require_classes()
        judging = len(images) // 6 if settings.meta_size is None else settings.meta_size
        available = len(images) - judging
        if available < 1:
            raise ValueError(
                f"{images.where} has {len(images)} images: meta_size {judging} leaves none to train "
                "on: lower meta_size"
            )
        size = min(settings.train_size or available, available)
        tell_fewer("train_size", settings.train_size, size)
        train, meta = images.take(np.arange(size)), images.take(np.arange(available, len(images)))
        meta.require_classes()
        judges, askew = (rotated(images, settings.degrees) for images in (meta, test))
        return RotationData(train.require_classes(), judges, askew, test, preparation)

    def build_trainer(
        self, settings: RotationArguments, args: MetaTrainingArguments, data: RotationData
    ) -> MetaTrainer:
        base, processor = make_base(settings, data.train, data.preparation)
        return MetaTrainer(
            RotatedClassifier(base, Rotation(), rotated=self.learns(settings)),
            args,
            train_dataset=ImageRows(data.train),
            meta_dataset=ImageRows(data.meta) if self.learns(settings) else None,
            eval_dataset=ImageRows(data.test),
            data_collator=default_collate,
            processing_class=processor,
            compute_metrics=accuracy,
        )

    def score(self, trainer: MetaTrainer, settings: RotationArguments, data: RotationData) -> dict[str, Any]:
        return {
            **scores_on(trainer, data.test, data.train.labels),
            "accuracy_upright": scores_on(trainer, data.upright)["accuracy"],
            "degrees": cast(Rotation, trainer.model.meta).degrees,
        }

    def describe(
        self, trainer: MetaTrainer, settings: RotationArguments, data: RotationData, start: Tree
    ) -> dict[str, Any]:
        log = trainer.state.log_history
        return {"meta_loss": [[row["step"], row["meta_loss"]] for row in log if "meta_loss" in row]}
