"""What the tasks share that train an image classifier: its batches, its accuracy, and its normalisation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME

from metaxl_evo.estimators import Estimator
from metaxl_evo.experiments.folders import hub_id
from metaxl_evo.experiments.scores import Rate
from metaxl_evo.experiments.task import Data
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.training.trainer import MetaTrainer
from vision_tasks.arguments import VisionArguments
from vision_tasks.backbones import BACKBONES
from vision_tasks.image_parts import Layout
from vision_tasks.image_processor import SmallImageProcessor
from vision_tasks.images import SYNTHETIC, ImageRows, ImageSet
from vision_tasks.pretrained import Preparation, load_classifier, load_preparation
from vision_tasks.task import CLASS_ACCURACY, SHOT_ACCURACY, VisionTask

logger = logging.getLogger(__name__)

REGISTERS = "import vision_tasks.backbones  # registers the classifier and its image processor with transformers\n"
USAGE = """\
from PIL import Image
from transformers import pipeline

classify = pipeline("image-classification", model=".")  # this folder; or its path, or its id on the Hub
image = Image.new("RGB", (64, 64))  # or Image.open(FILE)
print(classify(image))"""


@dataclass
class ClassifierArguments(VisionArguments):
    """Settings of the experiments that train one classifier of images.

    Raises:
        ValueError: for a backbone that there is not.
    """

    data: str = field(
        default=SYNTHETIC,
        metadata={
            "help": "An .npz file (x_train, y_train, x_test, y_test), a folder {train,test}/CLASS/IMAGE, of "
            "save_to_disk or of parquet files, CIFAR's .tar.gz or its folder, a Hub id, or `synthetic`: generated."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Of a table (default: image or img)."})
    label_column: str | None = field(default=None, metadata={"help": "Of a table (default: label or fine_label)."})
    train_split: str = field(default="train", metadata={"help": "The split or folder of the training images."})
    test_split: str = field(default="test", metadata={"help": "That of the test images."})
    backbone: str = field(default="lenet", metadata={"help": f"One of {', '.join(BACKBONES)}."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of an image classifier of transformers, in place of backbone; its own image "
            "processor makes the images ready, whatever their sizes."
        },
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Of pixels in [0, 1], a channel each (default: of the training images)."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "Their standard deviation."})

    def __post_init__(self) -> None:
        self.require_known("backbone", self.backbone, BACKBONES)
        if self.train_split == self.test_split:
            raise ValueError(f"test_split: {self.test_split} is trained on: name another")
        self.require_left_to_the_model("image_mean", "image_std")

    def require_left_to_the_model(self, *names: str) -> None:
        """Refuse settings of the images beside a pretrained model, whose image processor has its own."""
        for name in names if self.model_name_or_path is not None else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is what the model of model_name_or_path says: leave it out, or set it to null"
                )

    def preparation(self) -> Preparation | None:
        """What the image processor of a pretrained model does; None for a backbone of ours."""
        return None if self.model_name_or_path is None else load_preparation(self.model_name_or_path)

    def layout(self) -> Layout:
        """Which columns and splits of the data are read."""
        return Layout(self.image_column, self.label_column, None, self.train_split, self.test_split)


Settings = TypeVar("Settings", bound=ClassifierArguments)
PREDICTIONS = "_predictions.csv"
FORMULAS = ("=", "+", "-", "@", "\t", "\r")


class ClassificationTask(VisionTask[Settings, Data]):
    """A task that leaves an image classifier, with its image processor, for `pipeline`."""

    own_files: Sequence[str] = (IMAGE_PROCESSOR_NAME, PREDICTIONS)

    def card_usage(self, settings: Settings) -> str:
        return f"{REGISTERS if settings.model_name_or_path is None else ''}{USAGE}{self.usage}"

    def card_metadata(self, settings: Settings) -> dict[str, Any]:
        found, model = super().card_metadata(settings), settings.model_name_or_path
        if model is None:
            return found
        return {**found, "tasks": "image-classification", "finetuned_from": hub_id(model)}

    def card_sections(
        self, results: Mapping[str, Any], settings: Settings, estimator: Estimator | None
    ) -> Sequence[str]:
        """Without the backbone that a pretrained model takes the place of."""
        left_out = "backbone" if settings.model_name_or_path is not None else None
        shown = {name: value for name, value in results["settings"].items() if name != left_out}
        return super().card_sections({**results, "settings": shown}, settings, estimator)

    def write_files(self, folder: Path, trainer: MetaTrainer, settings: Settings, data: Any) -> None:
        if trainer.args.do_predict:
            size = trainer.args.per_device_eval_batch_size
            table = predictions_of(cast(ImageTask, trainer.model), data.test, size)
            spreadsheet(table).to_csv(folder / PREDICTIONS, index=False)


class ImageTask(BilevelModule):
    """A BilevelModule on batches of `images` (B, C, H, W) in [0, 1] and `labels` (B,).

    The base is a classifier of transformers that says in its configuration how pixels are normalised
    (`image_mean`, `image_std`); outer loss = mean cross-entropy of the meta images as they are.
    """

    def __init__(self, base: nn.Module, meta: nn.Module) -> None:
        super().__init__(base, meta)
        for name in ("image_mean", "image_std"):
            values = torch.tensor(getattr(base.config, name), dtype=torch.get_default_dtype())
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    image_mean: Tensor
    image_std: Tensor

    def costs(self, images: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of each image, (B,)."""
        logits = self.base(pixel_values=self.normalised(images)).logits
        return F.cross_entropy(logits, labels, reduction="none")

    def normalised(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] as the base takes them, (B, C, H, W)."""
        return (images - self.image_mean) / self.image_std

    def outer_loss(self, batch: Batch) -> Tensor:
        return self.costs(batch["images"], batch["labels"])

    def forward(self, **batch: Any) -> Any:
        if self.training:
            return super().forward(**batch)
        return self.base(pixel_values=self.normalised(batch["images"]), labels=batch["labels"])


def logits_of(module: ImageTask, images: ImageSet, batch_size: int) -> Tensor:
    """Those of the base for every image as it is, in evaluation mode, (N, classes)."""
    device, training = module.image_mean.device, module.training
    module.eval()
    with torch.no_grad():
        logits = [
            module.base(pixel_values=module.normalised(batch["images"].to(device))).logits
            for batch in DataLoader(cast(Any, ImageRows(images)), batch_size)
        ]
    module.train(training)
    return torch.cat(logits)


def predictions_of(module: ImageTask, images: ImageSet, batch_size: int) -> pd.DataFrame:
    """A row an image, in their order: image (its id), label, predicted, and confidence, the share of the softmax."""
    confidence, likeliest = logits_of(module, images, batch_size).softmax(-1).cpu().max(-1)
    names = np.array(images.names)
    columns = {"image": images.ids, "label": names[images.labels], "predicted": names[likeliest.numpy()]}
    return pd.DataFrame({**columns, "confidence": confidence.numpy()})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of images whose class has the largest logit."""
    logits: Any = prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def make_base(
    settings: ClassifierArguments, images: ImageSet, preparation: Preparation | None, **sizes: int | None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The classifier that the settings ask for, and the image processor to be saved beside it.

    Args:
        images: those that are trained on.
        preparation: that of the settings, which made these images.
        sizes: of a backbone of ours; None leaves its own.
    """
    if preparation is not None:
        model = str(settings.model_name_or_path)
        return load_classifier(model, images.names, preparation), preparation.processor
    mean, std = settings.image_mean, settings.image_std
    base = make_classifier(settings.backbone, images, image_mean=mean, image_std=std, **sizes)
    names = ("image_size", "num_channels", "image_mean", "image_std")
    return base, SmallImageProcessor(**{name: getattr(base.config, name) for name in names})


def make_classifier(
    backbone: str,
    images: ImageSet,
    *,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    **sizes: int | None,
) -> PreTrainedModel:
    """A backbone for such images, which names their classes and how their pixels are normalised.

    Args:
        images: those that are trained on.
        sizes: of this backbone; None leaves its own.
    """
    mean, std = pixel_statistics(images, image_mean, image_std)
    return BACKBONES[backbone](
        id2label=dict(enumerate(images.names)),
        label2id={name: number for number, name in enumerate(images.names)},
        num_channels=images.channels,
        image_size=images.side,
        image_mean=mean,
        image_std=std,
        **{name: size for name, size in sizes.items() if size is not None},
    )


def tell_fewer(name: str, asked: int | None, found: int) -> None:
    """Warn of a number of images that is not reached."""
    if asked is not None and found < asked:
        logger.warning("%s is %d, there are only %d images: taking all", name, asked, found)


def scores_on(trainer: MetaTrainer, images: ImageSet, train_labels: np.ndarray | None = None) -> dict[str, Any]:
    """The trained base on these images: `accuracy`, and `class_accuracy`, class -> its own.

    Args:
        train_labels: where there are more of one class than of another, `shot_accuracy` is that of their groups.
    """
    found: Any = trainer.predict(cast(Any, ImageRows(images)))
    hits = found.predictions.argmax(-1) == found.label_ids
    of_class = [float(hits[found.label_ids == number].mean()) for number in range(len(images.names))]
    scores = {"accuracy": Rate.mean(hits), CLASS_ACCURACY: dict(zip(images.names, of_class, strict=True))}
    counts = np.bincount([] if train_labels is None else train_labels, minlength=len(images.names))
    return scores if np.ptp(counts) == 0 else {**scores, SHOT_ACCURACY: shot_accuracy(of_class, counts)}


def shot_accuracy(of_class: Sequence[float], counts: np.ndarray) -> dict[str, float]:
    """The mean accuracy of the classes with many training images (above 100), medium (20 to 100) and few.

    Source: Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019.
    """
    groups = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    return {name: float(np.asarray(of_class)[which].mean()) for name, which in groups.items() if which.any()}


def pixel_statistics(
    images: ImageSet, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """How pixels in [0, 1] are normalised: as given, or by the mean and the deviation of each channel of `images`.

    Raises:
        ValueError: where the numbers are not one a channel or not finite, or a deviation is not positive.
    """
    if not (mean and std):
        channels = np.moveaxis(images.images, 3, 0)
        counts = np.stack([np.bincount(one.ravel(), minlength=256) for one in channels]) / channels[0].size
        levels = np.arange(256) / 255
        centre = counts @ levels  # (C,)
        mean, std = mean or centre, std or np.sqrt((counts * (levels - centre[:, None]) ** 2).sum(1))
    found = [[float(one) for one in values] for values in (mean, std)]
    for name, values in zip(("image_mean", "image_std"), found, strict=True):
        if len(values) != images.channels:
            raise ValueError(f"{name} has {len(values)} numbers, {images.where} {images.channels} channels: one each")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite numbers, not {values}")
    if not min(found[1]) > 0:
        raise ValueError(f"image_std must be above 0, not {found[1]}: are all pixels of {images.where} alike?")
    return found[0], found[1]


def spreadsheet(table: pd.DataFrame) -> pd.DataFrame:
    """The table for a CSV file: names that a spreadsheet would compute, as a folder may have them, behind a quote."""
    return table.map(lambda cell: f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULAS) else cell)
