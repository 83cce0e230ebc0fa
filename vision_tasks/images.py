"""Labelled images: from the Hub, from a packed .npz file, or generated; and the rows that a trainer sees of them.

Pixels are uint8 until a row is read, floats in [0, 1] from there on; whoever applies a model normalises them, so that
what is done to an image (a rotation, a crop) is done before.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image, ImageDraw
from torch import Tensor

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.messages import one_line, unknown
from metaxl_evo.training.hub import Instead, load_from_hub, require_reachable
from vision_tasks.augmentation import Transform, to_float
from vision_tasks.image_files import TableImages

SYNTHETIC = "synthetic"
PARTS = ("train", "test")
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "fine_label")
INSTEAD = Instead("--data FILE.npz", "MNIST: ylecun/mnist")
MOST_CLASSES = 100_000  # a label beyond is no number of a class


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their classes.

    Args:
        images: (N, H, W, C) uint8, C 1 or 3.
        labels: (N,) int64, numbers of `names`.
        names: of the classes.
        where: for error messages.

    Raises:
        ValueError: one line for another shape, dtype or range.
    """

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    where: str = "the images"

    def __post_init__(self) -> None:
        shape, dtype = self.images.shape, self.images.dtype
        if dtype != np.uint8:
            raise ValueError(f"{self.where}: pixels must be uint8 from 0 to 255, not {dtype}: convert them")
        if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[:3]:
            raise ValueError(
                f"{self.where}: images must have the shape (N, height, width, 1 or 3), not {shape}: transpose or stack"
            )
        if self.labels.shape != shape[:1]:
            raise ValueError(f"{self.where}: {shape[0]} images and labels of shape {self.labels.shape}: one an image")
        outside = (self.labels < 0) | (self.labels >= len(self.names))
        if outside.any():
            raise ValueError(
                f"{self.where}: label {self.labels[outside][0]} is none of the {len(self.names)} classes: renumber"
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
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def counts(self) -> np.ndarray:
        """Images of each class, (classes,)."""
        return np.bincount(self.labels, minlength=len(self.names))

    def pooled(self, side: int | None) -> ImageSet:
        """Averaged over square blocks to `side` x `side` pixels.

        Raises:
            ValueError: where the blocks would not be whole.
        """
        n, height, width, channels = self.images.shape
        if side is None or side == height == width:
            return self
        if side < 1 or height % side or width % side:
            raise ValueError(f"image_size {side} does not divide the {height} x {width} pixels of {self.where}")
        blocks = self.images.reshape(n, side, height // side, side, width // side, channels)
        return replace(self, images=np.rint(blocks.mean((2, 4))).astype(np.uint8))

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


class ImageRows:
    """Rows `{"images": (C, H, W) float in [0, 1], "labels": ()}`; row i of epoch e depends on (seed, e, i) alone.

    Args:
        images: the images.
        transform: (uint8 (H, W, C), generator) -> float (C, H, W); None leaves the image as it is.
        seed: of the augmentation.
    """

    def __init__(self, images: ImageSet, transform: Transform | None = None, seed: int = 0) -> None:
        self.set, self.transform, self.seed, self.epoch = images, transform, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """What the trainer calls at the begin of every pass: images are augmented anew."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.set)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.set.images[index], torch.tensor(self.set.labels[index])
        if self.transform is None:
            return {"images": to_float(image), "labels": label}
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch, index))
        return {"images": self.transform(image, generator), "labels": label}


def load_images(data: str) -> dict[str, ImageSet]:
    """The train and the test part of a data set, over the same classes.

    Args:
        data: an .npz file with x_train, y_train, x_test and y_test; a Hub id; or the word `synthetic`.

    Raises:
        ValueError: one line for what is missing, unreadable or out of range.
        OSError: `data` is neither a file nor a Hub id that can be reached or is in the cache.
    """
    if data == SYNTHETIC:
        return {part: drawn(200 if part == "train" else 50, seed=number) for number, part in enumerate(PARTS)}
    path = Path(data).expanduser()
    if path.is_dir():
        raise ValueError(f"{data} is a folder: give one of its files with {INSTEAD.option}, or a Hub id")
    parts = read_npz(path) if path.suffix == ".npz" or path.is_file() else read_hub(data)
    train, test = (parts[part] for part in PARTS)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"{train.where}: images of {train.images.shape[1:]} pixels, but {test.where}: of "
            f"{test.images.shape[1:]}: a model trained on the one cannot be tested on the other"
        )
    return parts


def read_npz(path: Path) -> dict[str, ImageSet]:
    """A file with the arrays `x_train, y_train, x_test, y_test`; grey images may lack the channel.

    Raises:
        ValueError: for a file that cannot be read or lacks an array.
    """
    needed = [f"{letter}_{part}" for part in PARTS for letter in "xy"]
    try:
        with zipfile.ZipFile(path), np.load(path) as file:  # numpy alone advises to trust what is no archive
            present = list(file.files)
            found = {key: file[key] for key in needed if key in present}
    except Exception as error:  # numpy, zipfile and zlib have kinds of their own
        raise ValueError(f"{path} cannot be read as .npz ({one_line(error)}): give another --data") from error
    missing = [key for key in needed if key not in found]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]!r}; present: {', '.join(present) or 'none'}")
    arrays = {part: (found[f"x_{part}"], found[f"y_{part}"]) for part in PARTS}
    for part, (_, labels) in arrays.items():
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{path}: y_{part} must be whole numbers, not {labels.dtype}: number the classes from 0")
    classes = 1 + max(int(labels.max(initial=0)) for _, labels in arrays.values())
    if classes > MOST_CLASSES:
        raise ValueError(f"{path}: labels go up to {classes - 1}: number the classes from 0")
    names = tuple(map(str, range(classes)))
    return {
        part: ImageSet(
            images if images.ndim != 3 else images[..., None],
            (labels if labels.shape[1:] != (1,) else labels[:, 0]).astype(np.int64),  # Keras' CIFAR has (N, 1)
            names,
            f"{path}, {part}",
        )
        for part, (images, labels) in arrays.items()
    }


def read_hub(dataset: str) -> dict[str, ImageSet]:
    """The splits `train` and `test` of a Hub data set with a column of images and one of class labels."""
    require_reachable(dataset, INSTEAD)
    loaded = load_from_hub(dataset, instead=INSTEAD)
    return {part: _of_table(_split(loaded, part, dataset), f"{dataset}, {part}") for part in PARTS}


def _split(loaded: DatasetDict, part: str, dataset: str) -> Dataset:
    if part not in loaded:
        raise ValueError(f"{dataset} has no split {part!r}; present: {', '.join(map(str, loaded))}")
    return loaded[part]


def _of_table(table: Dataset, where: str) -> ImageSet:
    image, label = (_column(table, names, where) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
    kind = table.features[label]
    if not isinstance(kind, ClassLabel):
        raise ValueError(f"{where}: {label} must be a ClassLabel, which says how many classes there are")
    pixels = list(TableImages(table, image, where))
    if len({one.shape for one in pixels}) != 1:
        raise ValueError(f"{where}: its images differ in size: this task needs them alike, resize them first")
    return ImageSet(np.stack(pixels), np.asarray(table[label], np.int64), tuple(kind.names), where)


def _column(table: Dataset, names: Sequence[str], where: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise ValueError(f"{where}: {unknown('column', names[0], table.column_names)}")


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
