"""What a source of labelled images holds, and how its parts become image sets over the same classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vision_tasks.images import ImageSet

Prepare = Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, C) -> uint8, all of one size
VALIDATION = ("validation", "val", "valid", "dev")  # what a split of that kind is called
MOST_CLASSES = 100_000  # a label beyond is no number of a class


@dataclass(frozen=True)
class Layout:
    """Which columns and splits of a data set are read.

    Args:
        image_column, label_column: of a table; None finds one of the usual names.
        true_label_column: of a table, or of an .npz file that holds `NAME_train`: the right labels of noisy ones.
        train_split, test_split: of a table, a folder of files, or of an .npz file (`x_train`).
        validation_split: the same; None finds one of the usual names.
    """

    image_column: str | None = None
    label_column: str | None = None
    true_label_column: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    validation_split: str | None = None

    def of(self, part: str, present: Collection[str]) -> Layout:
        """For a part whose source has such names: a test counts right labels, where it has them."""
        true = self.true_label_column
        if part == "train" or true is None:
            return self
        return replace(self, label_column=true if true in present else self.label_column, true_label_column=None)

    def splits(self, parts: Sequence[str], present: Collection[str]) -> dict[str, str]:
        """The split of each part; that of `validation` is left out where it is not named and there is none.

        Raises:
            ValueError: where several could be the validation split.
        """
        named = {part: getattr(self, f"{part}_split") for part in parts}
        if "validation" in named and named["validation"] is None:
            usual = [name for name in VALIDATION if name in present and name not in named.values()]
            if len(usual) > 1:
                raise ValueError(f"{' and '.join(usual)} are there: set validation_split to one of them")
            named["validation"] = usual[0] if usual else None
        return {part: split for part, split in named.items() if split is not None}


@dataclass(frozen=True, eq=False)
class Found:
    """A part as its source holds it: `labels` are numbers of `names` or, without these, any numbers or words."""

    images: Any
    labels: np.ndarray
    where: str
    ids: np.ndarray | None = None
    true_labels: np.ndarray | None = None
    names: tuple[str, ...] | None = None


def flat_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels as int64 or words, (N,); Keras' CIFAR has (N, 1).

    Raises:
        ValueError: for others, or numbers too large for classes.
    """
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
    if labels.dtype.kind not in "iuU":
        raise ValueError(f"{where}: labels must be whole numbers or words, not {labels.dtype}: number the classes")
    if labels.dtype.kind == "U":
        return labels
    if labels.max(initial=0) >= MOST_CLASSES:
        raise ValueError(f"{where}: labels go up to {labels.max()}: number the classes from 0")
    return labels.astype(np.int64)


def prepared(images: Any, prepare: Prepare) -> np.ndarray:
    """Each of at least one image as `prepare` makes it, (N, H, W, C)."""
    first = prepare(images[0])
    held = np.empty((len(images), *first.shape), np.uint8)  # a list and its stack would be twice as much
    for number in range(len(images)):
        held[number] = prepare(images[number])
    return held


def decoded(found: Mapping[str, Found], prepare: Prepare | None = None) -> dict[str, Found]:
    """With pixels of one size (N, H, W, C); grey images among coloured ones are in three equal channels.

    Raises:
        ValueError: for images that differ in size where nobody prepares them, or none.
    """
    for one in found.values():
        if not len(one.images):
            raise ValueError(f"{one.where}: no images")
    if prepare is not None:
        return {part: replace(one, images=prepared(one.images, prepare)) for part, one in found.items()}
    pixels = {part: list(one.images) for part, one in found.items()}
    channels = max((image.shape[2] for held in pixels.values() for image in held), default=1)
    stacked = {}
    for part, one in found.items():
        sizes = [f"{image.shape[0]} x {image.shape[1]}" for image in pixels[part]]
        other = next((number for number, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            first, second = (number if one.ids is None else one.ids[number] for number in (0, other))
            raise ValueError(
                f"{one.where}: its images differ in size ({first}: {sizes[0]}, {second}: {sizes[other]} pixels): "
                "this task needs them alike, resize them first (a model_name_or_path does it by itself)"
            )
        images = [image.repeat(channels // image.shape[2], 2) for image in pixels.pop(part)]
        stacked[part] = replace(one, images=np.stack(images))
    return stacked


def numbered(found: Mapping[str, Found]) -> dict[str, ImageSet]:
    """With the classes of all parts numbered as they are declared, or else in the order of their numbers or words.

    Raises:
        ValueError: for labels that do not fit together, or negative ones.
    """
    first, *others = found.values()
    for other in others:
        if other.names != first.names:
            raise ValueError(f"{first.where} and {other.where} declare other classes: give them the same ClassLabel")
    labels = [held for one in found.values() for held in (one.labels, one.true_labels) if held is not None]
    if len({held.dtype.kind for held in labels}) > 1:
        raise ValueError(f"{first.where}: labels are numbers in one place and words in another: use one of both")
    names = first.names
    if names is None:
        numbers = np.unique(np.concatenate(labels))
        if numbers.dtype.kind == "i" and (numbers < 0).any():
            raise ValueError(f"{first.where}: label {numbers[0]} is no class: renumber, or take its images out")
        names, found = tuple(map(str, numbers)), {part: _renumbered(one, numbers) for part, one in found.items()}
    return {
        part: ImageSet(one.images, one.labels, names, one.where, one.ids, one.true_labels)
        for part, one in found.items()
    }


def _renumbered(found: Found, numbers: np.ndarray) -> Found:
    true = None if found.true_labels is None else np.searchsorted(numbers, found.true_labels)
    return replace(found, labels=np.searchsorted(numbers, found.labels), true_labels=true)


def alike(parts: dict[str, ImageSet]) -> dict[str, ImageSet]:
    """Themselves, where the images of all parts are of one shape.

    Raises:
        ValueError: where they are not.
    """
    first, *others = parts.values()
    for other in others:
        if other.images.shape[1:] != first.images.shape[1:]:
            raise ValueError(
                f"{first.where}: images of {first.images.shape[1:]} pixels, but {other.where}: of "
                f"{other.images.shape[1:]}: a model trained on the one cannot be tested on the other"
            )
    return parts
