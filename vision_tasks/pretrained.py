"""Pretrained image classifiers of a folder or the Hub, and what their image processors make of an image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
)

from metaxl_evo.messages import first_line
from metaxl_evo.training.saved_models import ask_hub, cannot_load, load, require_whole
from vision_tasks.augmentation import to_float

logger = logging.getLogger(__name__)

PROBES = ((48, 48), (60, 90), (300, 200))  # sizes of an image, all of which must become one
ROUNDING = 0.05  # of a level from 0 to 255


@dataclass(frozen=True, eq=False)
class Preparation:
    """What an image processor does, in two parts: `self(image)` resizes and crops, and the model's task normalises.

    So an image can be turned, cropped and shown in between, as pixels from 0 to 255.

    Attributes:
        processor: of transformers, as it is saved beside the model.
        image_mean, image_std: of pixels in [0, 1], a channel each.
        shape: of every image that it gives, (H, W, 3).
    """

    processor: Any
    image_mean: list[float]
    image_std: list[float]
    shape: tuple[int, ...]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """An image of any size, uint8 (H, W, 1 or 3), as the model sees it before it is normalised, uint8 `shape`."""
        return np.rint(_levels(_processed(self.processor, image), self.image_mean, self.image_std)).astype(np.uint8)


@dataclass(frozen=True)
class PreparedTransform:
    """A preparation as a transform of augmentation, which draws nothing."""

    preparation: Preparation

    def __call__(self, image: Any, generator: Generator | None = None) -> Tensor:
        return to_float(self.preparation(np.asarray(image)))


def load_preparation(model: str) -> Preparation:
    """That of the model's own image processor.

    Raises:
        ValueError: where it has none, or one that does more than to resize, crop and normalise.
    """
    place = _located(model)
    try:
        processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # the content of a file leads the library into any
        raise ValueError(
            f"model_name_or_path: {model} has no image processor that can be loaded ({first_line(error)}): save the "
            "model's own there (AutoImageProcessor)"
        ) from error
    return _of_processor(model, processor)


def _of_processor(model: str, processor: Any) -> Preparation:
    """Tried on plain and on random images: its normalisation is what it makes of black and of white."""
    black, white = (_processed(processor, np.full((*PROBES[0], 3), level, np.uint8)) for level in (0, 255))
    spread = np.ptp(black, (0, 1)).max() + np.ptp(white, (0, 1)).max()
    std = 1 / (white - black).mean((0, 1))  # (C,)
    mean = -black.mean((0, 1)) * std
    rng = np.random.default_rng(0)
    given = [_processed(processor, rng.integers(0, 256, (*size, 3), np.uint8)) for size in PROBES]
    shapes = sorted({one.shape for one in (black, *given)})
    if len(shapes) > 1:
        raise ValueError(
            f"model_name_or_path: the image processor of {model} gives images of several sizes ({shapes[0]}, "
            f"{shapes[1]}): let it resize to a height and a width, or crop (do_center_crop)"
        )
    levels = np.concatenate([_levels(one, mean, std).ravel() for one in given])
    if not (spread < 1e-3 and shapes[0][2] == 3 and np.abs(levels - np.rint(levels)).max() < ROUNDING):
        raise ValueError(
            f"model_name_or_path: the image processor of {model} does more than to resize, crop and normalise "
            f"({type(processor).__name__}): give a model with another one"
        )
    return Preparation(processor, mean.tolist(), std.tolist(), shapes[0])


def _processed(processor: Any, image: np.ndarray) -> np.ndarray:
    """What `pipeline` hands to the model of this image, (H, W, C) float64."""
    shown = Image.fromarray(image.repeat(3 // image.shape[2], 2))
    return np.asarray(processor(images=shown, return_tensors="pt")["pixel_values"][0]).transpose(1, 2, 0).astype(float)


def _levels(processed: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    """Normalised pixels as levels from 0 to 255 again."""
    return (processed * np.asarray(std) + np.asarray(mean)) * 255


def load_classifier(model: str, names: Sequence[str], preparation: Preparation) -> PreTrainedModel:
    """A float32 classifier of these classes, which takes images as the preparation gives them, normalised.

    A head of other classes makes way for a new one, which is said once. The configuration names `image_mean` and
    `image_std`.

    Raises:
        ValueError: for a model that cannot be had, is not whole, or cannot read such images.
    """
    place = _located(model)
    labels: dict[str, Any] = {
        "num_labels": len(names),  # timm's configuration asks for it
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    try:
        trained = list((AutoConfig.from_pretrained(place, trust_remote_code=False).id2label or {}).values())
        base, found = load(AutoModelForImageClassification, place, ignore_mismatched_sizes=True, **labels)
        if isinstance(base.config, TimmWrapperConfig):
            base.config.label_names = list(names)  # its file has these, not id2label
        head = _head(base)
        if trained != list(names):
            _say_once(f"{model}: a new head for {len(names)} classes takes the place of its own ({len(trained)})")
            base = _without(base, head)
    except Exception as error:  # the content of a file leads the library into any
        raise _unusable(model, error) from error
    require_whole(
        model,
        base,
        [name for name in found["missing_keys"] if name not in head and name.startswith(f"{base.base_model_prefix}.")],
    )
    _require_readable(model, base, preparation.shape, len(names))
    base.config.image_mean, base.config.image_std = preparation.image_mean, preparation.image_std
    return base


def load_encoder(model: str) -> PreTrainedModel:
    """A float32 encoder of images, without a head.

    Raises:
        ValueError: for a model that cannot be had, or is not whole.
    """
    place = _located(model)
    try:
        encoder, found = load(AutoModel, place)
    except Exception as error:  # the content of a file leads the library into any
        raise _unusable(model, error) from error
    lacking = [name for name in sorted(found["missing_keys"]) if not name.startswith("pooler.")]  # nobody reads it
    require_whole(model, encoder, lacking)
    made: PreTrainedModel = encoder
    return made


def _head(base: PreTrainedModel) -> set[str]:
    """The parameters whose shape follows the number of classes."""
    config = type(base.config).from_dict(base.config.to_dict() | {"id2label": None, "label2id": None})
    config.num_labels = int(base.config.num_labels or 0) + 1
    with torch.device("meta"):
        other = type(base)(config).state_dict()
    return {name for name, value in base.state_dict().items() if value.shape != other[name].shape}


def _without(base: PreTrainedModel, head: set[str]) -> PreTrainedModel:
    """The same model, its head as its class initialises one."""
    held = {name: value for name, value in base.state_dict().items() if name not in head}
    made: PreTrainedModel = load(type(base), None, config=base.config, state_dict=held)[0]
    return made


@cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)


def _require_readable(model: str, base: PreTrainedModel, shape: tuple[int, ...], classes: int) -> None:
    height, width, channels = shape
    try:
        with torch.no_grad():
            found = base.eval()(pixel_values=torch.zeros(1, channels, height, width))
        if found.keys() != {"logits"} or found.logits.shape != (1, classes):
            raise ValueError(f"it gives {', '.join(found)}, not logits of {classes} classes alone")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path: {model} cannot read what its image processor gives, {channels} x {height} x {width} "
            f"pixels ({first_line(error)}): save a processor that fits it"
        ) from error
    finally:
        base.train()


def _located(model: str) -> str | Path:
    """The folder of a model, or a Hub id that was asked for once, with a short timeout.

    Raises:
        ValueError: for what is neither, or brings code along, which is never run.
    """
    folder = Path(model).expanduser()
    place: str | Path = folder if folder.is_dir() else model
    try:
        if place is model:
            ask_hub(model)
        kernel = str(AutoConfig.from_pretrained(place, trust_remote_code=False)._attn_implementation)
        if "/" in kernel:
            raise ValueError(f"its attention kernel {kernel} of the Hub is code, which is not run")
    except Exception as error:  # of the id, the HTTP library, or whatever the content of a file leads into
        raise _unusable(model, error) from error
    return place


def _unusable(model: str, error: Exception) -> ValueError:
    return cannot_load(model, error, "an image classifier of transformers")
