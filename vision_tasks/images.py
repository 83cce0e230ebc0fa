"""Labelled images, read or generated, and the rows that a trainer sees of them.

Pixels are uint8 until a row is read, floats in [0, 1] from there on; whoever applies a model normalises them, so that
what is done to an image (a rotation, a crop) is done before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.messages import unknown
from vision_tasks.augmentation import Transform, to_float

SYNTHETIC = "synthetic"
PARTS = ("train", "test")
SHOWN = 10  # images that a message names


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their classes.

    Args:
        images: (N, H, W, C) uint8, C 1 or 3.
        labels: (N,) int64, numbers of `names`.
        names: of the classes.
        where: for error messages.
        ids: (N,) of the images in their source: paths or row numbers (default: from 0).
        true_labels: (N,) where `labels` are known to be partly wrong.

    Raises:
        ValueError: one line for another shape, dtype or range.
    """

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    where: str = "the images"
    ids: Any = None
    true_labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.ids is None:
            object.__setattr__(self, "ids", np.arange(len(self.images)))
        shape, dtype = self.images.shape, self.images.dtype
        if dtype != np.uint8:
            raise ValueError(f"{self.where}: pixels must be uint8 from 0 to 255, not {dtype}: convert them")
        if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[:3]:
            raise ValueError(
                f"{self.where}: images must have the shape (N, height, width, 1 or 3), not {shape}: transpose or stack"
            )
        for labels in (self.labels,) if self.true_labels is None else (self.labels, self.true_labels):
            if labels.shape != shape[:1]:
                raise ValueError(f"{self.where}: {shape[0]} images and labels of shape {labels.shape}: one an image")
            outside = (labels < 0) | (labels >= len(self.names))
            if outside.any():
                raise ValueError(
                    f"{self.where}: label {labels[outside][0]} is none of the {len(self.names)} classes: renumber"
                )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return int(self.images.shape[3])

    @property
    def side(self) -> int:
        """The pixels of a row and of a column.

        Raises:
            ValueError: for images that are not square.
        """
        height, width = self.images.shape[1:3]
        if height != width:
            raise ValueError(f"{self.where}: images must be square, not {height} x {width} pixels: crop or pad them")
        return int(height)

    def take(self, indices: Any) -> ImageSet:
        """These images, in this order."""
        true = None if self.true_labels is None else self.true_labels[indices]
        return replace(
            self,
            images=self.images[indices],
            labels=self.labels[indices],
            ids=self.ids[indices],
            true_labels=true,
        )

    def joined(self, others: ImageSet) -> ImageSet:
        """These images, and others of the same classes behind them.

        Raises:
            ValueError: for images of another shape.
        """
        here, there = self.images.shape[1:], others.images.shape[1:]
        if here != there:
            raise ValueError(f"{others.where}: images are {there}, those of {self.where} {here}: resize one of them")
        ids = np.concatenate([np.asarray(one.ids).astype(str) for one in (self, others)])
        images, labels = (
            np.concatenate(pair) for pair in ((self.images, others.images), (self.labels, others.labels))
        )
        return replace(self, images=images, labels=labels, ids=ids, true_labels=None)

    def clean(self) -> ImageSet:
        """With the true labels, where others are known to be wrong."""
        return self if self.true_labels is None else replace(self, labels=self.true_labels)

    def named(self, which: np.ndarray) -> str:
        """The ids of these images, for a message; of many the first."""
        ids = self.ids[which].tolist()
        more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
        return ", ".join(map(str, ids[:SHOWN])) + more

    def numbered_as(self, images: ImageSet) -> ImageSet:
        """With its classes numbered as those of `images`: by their names, or by numbers where only those have names.

        Raises:
            ValueError: for a class that the others have not.
        """
        known, own = images.names, self.names
        if own == known:
            return self
        if all(map(str.isdecimal, own)) and not any(map(str.isdecimal, known)):
            numbers = [int(name) for name in own]
        else:
            numbers = [known.index(name) if name in known else len(known) for name in own]
        absent = [name for name, number in zip(own, numbers, strict=True) if number >= len(known)]
        if absent:
            raise ValueError(
                f"{self.where}: {unknown('class', absent[0], known)}, those of {images.where}: rename or remove it"
            )
        return replace(self, labels=np.array(numbers)[self.labels], names=known, true_labels=None)

    def counts(self) -> np.ndarray:
        """Images of each class, (classes,)."""
        return np.bincount(self.labels, minlength=len(self.names))

    def pooled(self, side: int | None) -> ImageSet:
        """Averaged over square blocks to `side` x `side` pixels.

        Raises:
            ValueError: where the blocks would not be whole.
        """
        height, width = self.images.shape[1:3]
        if side is None or side == height == width:
            return self
        if side < 1 or height % side or width % side:
            raise ValueError(f"image_size {side} does not divide the {height} x {width} pixels of {self.where}")
        return replace(self, images=block_means(self.images, side))

    def require_classes(self, least: int = 1) -> ImageSet:
        """Itself, where every class has so many images.

        Raises:
            ValueError: naming a class that has fewer.
        """
        counts = self.counts()
        if counts.min() < least:
            name = self.names[int(counts.argmin())]
            raise ValueError(
                f"{self.where}: class {name!r} has {counts.min()} images and needs {least}: add some, or ask for fewer"
            )
        return self


def block_means(images: np.ndarray, side: int) -> np.ndarray:
    """The rounded means of blocks, uint8 (N, H, W, C) -> (N, side, side, C), where `side` divides H and W."""
    n, height, width, channels = images.shape
    blocks = images.reshape(n, side, height // side, side, width // side, channels)
    return np.rint(blocks.mean((2, 4))).astype(np.uint8)


class ImageRows:
    """Rows `{"images": (C, H, W) float in [0, 1], "labels": ()}`; row i of epoch e depends on (seed, e, i) alone.

    Args:
        images: the images.
        transform: (uint8 (H, W, C), generator) -> float (C, H, W); None leaves the image as it is.
        seed: of the augmentation.
        wrong: (N,) which labels are wrong; where it is known, rows have it, as 0 or 1.
    """

    def __init__(
        self, images: ImageSet, transform: Transform | None = None, seed: int = 0, wrong: np.ndarray | None = None
    ) -> None:
        self.set, self.transform, self.seed, self.epoch, self.wrong = images, transform, seed, 0, wrong

    def set_epoch(self, epoch: int) -> None:
        """What the trainer calls at the begin of every pass: images are augmented anew."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.set)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row(index, index)

    def row(self, number: int, draw: int) -> dict[str, Tensor]:
        """Image `number`, augmented by draw `draw` of this epoch."""
        image, row = self.set.images[number], {"labels": torch.tensor(self.set.labels[number])}
        if self.wrong is not None:
            row["wrong"] = torch.tensor(int(self.wrong[number]))
        if self.transform is None:
            return {"images": to_float(image), **row}
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch, draw))
        return {"images": self.transform(image, generator), **row}


def drawn(per_class: int, *, classes: int = 10, side: int = 28, seed: int = 0) -> ImageSet:
    """Generated grey images: three strokes a class, whose ends are jittered from image to image, and pixel noise."""
    shapes = np.random.default_rng(0).uniform(0.15, 0.85, (classes, 3, 4)) * side
    rng = np.random.default_rng([1, seed])
    labels = np.tile(np.arange(classes), per_class)
    images = [_strokes(shapes[label] + rng.normal(0, 0.04 * side, (3, 4)), side) for label in labels]
    noisy = np.stack(images) + rng.normal(0, 20, (len(labels), side, side))
    pixels = np.clip(noisy, 0, 255).astype(np.uint8)[..., None]
    return ImageSet(pixels, labels, tuple(map(str, range(classes))), f"{SYNTHETIC} images")


def _strokes(ends: np.ndarray, side: int) -> np.ndarray:
    canvas = Image.new("L", (side, side))
    for stroke in ends:
        ImageDraw.Draw(canvas).line(stroke.tolist(), fill=230, width=max(side // 10, 1))
    return np.asarray(canvas)
