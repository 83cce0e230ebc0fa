"""Labelled images: what is refused, pooling, class numbers, and rows that follow the epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from metaxl_evo.training.meta_rows import DrawnByEpoch
from tests.vision_tasks.small import random_images
from vision_tasks.augmentation import PadCropFlip
from vision_tasks.image_sources import load_images
from vision_tasks.images import ImageRows, ImageSet, drawn

PIXELS = np.zeros((3, 4, 4, 1), np.uint8)
LABELS = np.array([0, 1, 0])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (PIXELS.astype(np.float32), LABELS, "here: pixels must be uint8 from 0 to 255, not float32: convert them"),
        (PIXELS.astype(bool), LABELS, "must be uint8"),
        (PIXELS[..., 0], LABELS, r"must have the shape \(N, height, width, 1 or 3\), not \(3, 4, 4\)"),
        (PIXELS.transpose(0, 3, 1, 2), LABELS, r"not \(3, 1, 4, 4\): transpose or stack"),
        (PIXELS.repeat(2, 3), LABELS, r"not \(3, 4, 4, 2\)"),
        (PIXELS[:0], LABELS[:0], r"not \(0, 4, 4, 1\)"),
        (PIXELS[:, :0], LABELS, r"not \(3, 0, 4, 1\)"),
        (PIXELS, LABELS[:2], r"3 images and labels of shape \(2,\): one an image"),
        (PIXELS, LABELS[:, None], r"labels of shape \(3, 1\)"),
        (PIXELS, LABELS + 1, "here: label 2 is none of the 2 classes: renumber"),
        (PIXELS, LABELS - 1, "label -1 is none of the 2 classes"),
    ],
)
def test_images_that_are_refused(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSet(images, labels, ("a", "b"), "here")


def test_sizes_and_choices() -> None:
    images = random_images(6, classes=4)
    assert (len(images), images.channels, images.side) == (6, 1, 8)
    assert images.counts().tolist() == [2, 2, 1, 1]
    chosen = images.take([4, 0])
    assert chosen.labels.tolist() == [0, 0]
    assert np.array_equal(chosen.images, images.images[[4, 0]])
    assert images.require_classes() is images
    with pytest.raises(ValueError, match="class 'c' has 1 images and needs 2: add some, or ask for fewer"):
        images.require_classes(2)
    with pytest.raises(ValueError, match="class 'd' has 0 images and needs 1"):
        images.take([0, 1, 2]).require_classes()
    wide = ImageSet(np.zeros((1, 4, 6, 1), np.uint8), np.array([0]), ("a",), "here")
    with pytest.raises(ValueError, match="here: images must be square, not 4 x 6 pixels"):
        wide.side  # noqa: B018


def test_ids_and_true_labels_go_along() -> None:
    images = ImageSet(PIXELS, LABELS, ("a", "b"), "here", np.array(["x", "y", "z"]), 1 - LABELS)
    chosen = images.take([2, 0])
    assert (chosen.ids.tolist(), chosen.labels.tolist(), chosen.clean().labels.tolist()) == (
        ["z", "x"],
        [0, 0],
        [1, 1],
    )
    assert images.named(np.array([True, False, True])) == "x, z"
    assert random_images(40).named(np.arange(40) > 20) == "21, 22, 23, 24, 25, 26, 27, 28, 29, 30 and 9 more"
    with pytest.raises(ValueError, match="here: label 2 is none of the 2 classes"):
        ImageSet(PIXELS, LABELS, ("a", "b"), "here", true_labels=LABELS + 1)


@pytest.mark.parametrize(
    ("own", "known", "labels"),
    [
        (("a", "b"), ("a", "b"), [0, 1, 0]),
        (("b", "a"), ("a", "b", "c"), [1, 0, 1]),
        (("1", "2"), ("0", "1", "2"), [1, 2, 1]),
        (("1", "2"), ("a", "b", "c"), [1, 2, 1]),  # numbers of named classes
    ],
)
def test_classes_are_matched_by_name(own: tuple[str, ...], known: tuple[str, ...], labels: list[int]) -> None:
    others = ImageSet(PIXELS, LABELS, known, "there")
    found = ImageSet(PIXELS, LABELS, own, "here").numbered_as(others)
    assert (found.names, found.labels.tolist()) == (known, labels)


@pytest.mark.parametrize(
    ("own", "known"), [(("a", "x"), ("a", "b")), (("1", "2"), ("a", "b")), (("0", "1"), ("1", "2"))]
)
def test_a_class_of_no_name_is_refused(own: tuple[str, ...], known: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"here: unknown class '[x20]': .*, those of there: rename or remove it"):
        ImageSet(PIXELS, LABELS, own, "here").numbered_as(ImageSet(PIXELS, LABELS, known, "there"))


# Pooling


def test_pooled_pixels_are_means_of_blocks() -> None:
    rows = [[0, 4, 10, 11], [8, 5, 12, 10], [255, 255, 1, 1], [255, 254, 1, 1]]
    images = np.stack([np.array(rows, np.uint8), np.full((4, 4), 9, np.uint8)], -1)[..., [0, 1, 1]]
    found = ImageSet(images[None], np.array([0]), ("a",)).pooled(2)
    assert found.images.shape == (1, 2, 2, 3)
    assert found.images.dtype == np.uint8
    assert found.images[0, ..., 0].tolist() == [[4, 11], [255, 1]]  # 17/4, 43/4, 1019/4, 1
    assert (found.images[0, ..., 1:] == 9).all()
    assert found.pooled(1).images[0, 0, 0].tolist() == [68, 9, 9]  # 271/4


def test_sizes_that_do_not_divide_are_refused() -> None:
    images = random_images(2)
    assert images.pooled(None) is images
    assert images.pooled(8) is images
    for size in (3, 5, 16, 0, -2):
        with pytest.raises(ValueError, match=f"image_size {size} does not divide the 8 x 8 pixels of the images"):
            images.pooled(size)
    wide = ImageSet(np.zeros((1, 4, 6, 1), np.uint8), np.array([0]), ("a",))
    assert wide.pooled(2).side == 2
    with pytest.raises(ValueError, match="image_size 4 does not divide the 4 x 6 pixels"):
        wide.pooled(4)


# Rows


def test_rows_are_the_pixels_over_255() -> None:
    images = random_images(3, channels=3)
    rows = ImageRows(images)
    assert len(rows) == 3
    row = rows[2]
    assert row["images"].dtype == torch.float32
    assert torch.equal(row["images"], torch.from_numpy(images.images[2].transpose(2, 0, 1)).float() / 255)
    assert (row["labels"].shape, row["labels"].dtype, int(row["labels"])) == ((), torch.int64, 2)


def read(rows: ImageRows, epoch: int) -> torch.Tensor:
    rows.set_epoch(epoch)
    return torch.stack([rows[index]["images"] for index in range(len(rows))])


def test_augmented_rows_follow_the_epoch_alone() -> None:
    images, state = random_images(12), torch.random.get_rng_state()
    rows, again, other = (ImageRows(images, PadCropFlip(), seed) for seed in (5, 5, 6))
    assert isinstance(rows, DrawnByEpoch)
    first, second = read(rows, 0), read(rows, 1)
    assert not torch.equal(first, second)
    assert len({row.numpy().tobytes() for row in torch.cat([first, second])}) == 24
    assert torch.equal(read(again, 1), second)  # without having been in epoch 0
    assert torch.equal(read(rows, 0), first)
    assert not torch.equal(read(other, 0), first)
    rows.set_epoch(1)
    assert torch.equal(torch.stack([rows[index]["images"] for index in reversed(range(12))]).flip(0), second)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(read(ImageRows(images), 0), read(ImageRows(images), 1))


# Generated images


def test_generated_images_are_the_same_every_time_and_can_be_told_apart() -> None:
    first, second = load_images("synthetic"), load_images("synthetic")
    assert [len(first[part]) for part in ("train", "test")] == [2000, 500]
    for part in first:
        assert np.array_equal(first[part].images, second[part].images)
        assert set(first[part].counts()) == {len(first[part]) // 10}
    seen = {image.tobytes() for images in first.values() for image in images.images}
    assert len(seen) == 2500
    train, test = (first[part].images.astype(float).reshape(len(first[part]), -1) for part in ("train", "test"))
    means = np.stack([train[first["train"].labels == label].mean(0) for label in range(10)])
    nearest = ((test[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == first["test"].labels).mean() > 0.8
    assert np.array_equal(drawn(2, classes=3, side=12, seed=4).labels, [0, 1, 2, 0, 1, 2])
