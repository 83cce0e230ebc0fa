"""Labelled images: what is refused, pooling, rows that follow the epoch, .npz files and tables of the Hub."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

from metaxl_evo.training.meta_rows import DrawnByEpoch
from tests.vision_tasks.small import pack, random_images
from vision_tasks.augmentation import PadCropFlip
from vision_tasks.images import ImageRows, ImageSet, drawn, load_images

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


# Files


def test_an_npz_file(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz")
    parts = load_images(str(file))
    assert list(parts) == ["train", "test"]
    for number, (part, count) in enumerate({"train": 40, "test": 20}.items(), start=1):
        expected = random_images(count, seed=number, classes=10)
        assert np.array_equal(parts[part].images, expected.images)
        assert np.array_equal(parts[part].labels, expected.labels)
        assert parts[part].labels.dtype == np.int64
        assert parts[part].names == tuple("0123456789")
    coloured = {f"x_{part}": np.zeros((count, 4, 4, 3), np.uint8) for part, count in (("train", 40), ("test", 20))}
    assert load_images(str(pack(tmp_path / "b.npz", **coloured)))["test"].channels == 3


def test_classes_are_those_of_both_parts(tmp_path: Path) -> None:
    parts = load_images(str(pack(tmp_path / "a.npz", y_test=np.arange(20, dtype=np.uint8) % 12)))
    assert [len(part.names) for part in parts.values()] == [12, 12]


BAD_ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"y_test": None}, r"a.npz has no array 'y_test'; present: x_train, x_test, y_train$"),
    ({"x_train": None}, r"has no array 'x_train'; present: "),
    ({"x_train": np.zeros((40, 8, 8))}, r"a.npz, train: pixels must be uint8 from 0 to 255, not float64"),
    ({"x_test": np.zeros((20, 64), np.uint8)}, r"a.npz, test: images must have the shape .* not \(20, 64\)"),
    ({"x_test": np.zeros((20, 4, 4), np.uint8)}, r"a.npz, train: images of \(8, 8, 1\) pixels, but .*of \(4, 4, 1\)"),
    ({"x_train": np.zeros((40, 8, 8, 3), np.uint8)}, r"a.npz, train: images of \(8, 8, 3\) pixels, but "),
    ({"y_train": np.zeros(40)}, r"a.npz: y_train must be whole numbers, not float64: number the classes from 0"),
    ({"y_test": np.array(["a"] * 20)}, r"y_test must be whole numbers"),
    ({"y_train": np.arange(39)}, r"40 images and labels of shape \(39,\)"),
    ({"y_train": np.r_[np.arange(39) % 10, -1]}, r"a.npz, train: label -1 is none of the 10 classes"),
    ({"y_train": np.r_[np.arange(39), 2**62]}, r"a.npz: labels go up to 4611686018427387904: number the classes"),
    ({"x_test": np.array([None] * 20)}, r"a.npz cannot be read as .npz \(Object arrays cannot be loaded .*--data$"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_images(str(pack(tmp_path / "a.npz", **arrays)))


def damaged(file: Path, how: str) -> Path:
    whole = pack(file).read_bytes()
    if how == "no .npz":
        other = io.BytesIO()
        np.save(other, PIXELS)
        whole = other.getvalue()
    elif how == "packed data":
        np.savez_compressed(file, x_train=PIXELS, y_train=LABELS, x_test=PIXELS, y_test=LABELS)
        whole = file.read_bytes()
        whole = whole[:60] + bytes(30) + whole[90:]
    elif how == "a bit":
        at = whole.index(random_images(40, seed=1, classes=10).images.tobytes()) + 500
        whole = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    ends = {"half": len(whole) // 2, "its last byte": -1, "all": 0}
    file.write_bytes(b"hello" if how == "text" else whole[: ends.get(how, len(whole))])
    return file


@pytest.mark.parametrize("how", ["half", "its last byte", "all", "text", "no .npz", "packed data", "a bit"])
def test_damaged_files_are_named(tmp_path: Path, how: str) -> None:
    with pytest.raises(ValueError, match=r"a.npz cannot be read as .npz \(.+\): give another --data$") as error:
        load_images(str(damaged(tmp_path / "a.npz", how)))
    assert "allow_pickle=`" not in str(error.value)


def test_other_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"absent.npz cannot be read as .npz \(.*No such file.*\)"):
        load_images(str(tmp_path / "absent.npz"))
    (tmp_path / "b.npz").mkdir()
    for folder in (tmp_path, tmp_path / "b.npz"):
        with pytest.raises(ValueError, match=r"is a folder: give one of its files with --data FILE.npz, or a Hub id"):
            load_images(str(folder))
    with pytest.raises(ValueError, match=r"Dataset scripts are no longer supported: use .*ylecun/mnist"):
        load_images("mnist.py")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"neither a folder nor a reachable Hub id .*: use --data FILE.npz, or HF_HUB_OFF"
    ):
        load_images("no-such-organisation-here/absent")


# The Hub


def table(monkeypatch: pytest.MonkeyPatch, pictures: list[Any], labels: list[Any], **columns: Any) -> None:
    """`load_dataset` gives this in both splits."""
    names = {"image": "image", "label": "label"} | columns.pop("named", {})
    kind = columns.pop("kind", ClassLabel(names=["cat", "dog"]))
    features = Features({names["image"]: Image(), names["label"]: kind})
    rows = Dataset.from_dict({names["image"]: pictures, names["label"]: labels}, features=features)
    splits = columns.pop("splits", ("train", "test"))
    monkeypatch.setattr(
        "vision_tasks.images.load_from_hub", lambda name, instead: DatasetDict(dict.fromkeys(splits, rows))
    )
    monkeypatch.setattr("vision_tasks.images.require_reachable", lambda name, instead: None)


def pictures(mode: str = "L", sides: tuple[int, ...] = (4, 4)) -> list[Any]:
    channels = () if mode == "L" else (len(mode),)
    return [
        Picture.fromarray(np.arange(s * s * int(np.prod(channels)), dtype=np.uint8).reshape(s, s, *channels))
        for s in sides
    ]


@pytest.mark.parametrize("named", [{}, {"image": "img", "label": "fine_label"}])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_table_of_the_hub(monkeypatch: pytest.MonkeyPatch, mode: str, channels: int, named: dict[str, str]) -> None:
    table(monkeypatch, pictures(mode), [1, 0], named=named)
    parts = load_images("some/pets")
    assert parts["train"].names == ("cat", "dog")
    assert parts["test"].labels.tolist() == [1, 0]
    expected = np.arange(16 * channels, dtype=np.uint8).reshape(4, 4, channels)
    assert np.array_equal(parts["test"].images[1], expected)


def test_a_palette_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = [Picture.new("RGB", (4, 4), colour) for colour in ((200, 30, 10), (5, 100, 255))]
    table(monkeypatch, [one.convert("P", palette=Picture.Palette.ADAPTIVE) for one in colours], [1, 0])
    found = load_images("some/pets")["train"]
    assert [image[0, 0].tolist() for image in found.images] == [[200, 30, 10], [5, 100, 255]]


@pytest.mark.parametrize(
    ("pixels", "labels", "settings", "message"),
    [
        (pictures(), [1, 0], {"splits": ("train", "valid")}, "some/pets has no split 'test'; present: train, valid$"),
        (pictures(sides=(4, 5)), [1, 0], {}, "some/pets, train: its images differ in size: .* resize them first"),
        (
            [Picture.new("I;16", (4, 4))] * 2,
            [1, 0],
            {},
            r"some/pets, train, column image, row 0 has mode I;16: convert it to 8 bits a channel",
        ),
        (pictures(), [1, -1], {}, "some/pets, train: label -1 is none of the 2 classes"),
        (pictures(), [1, 0], {"kind": Value("int64")}, "some/pets, train: label must be a ClassLabel, which says"),
        (pictures(), [1, 0], {"named": {"image": "photo"}}, "train: unknown column 'image': Valid: photo, label"),
        (pictures(), [1, 0], {"named": {"label": "coarse"}}, "train: unknown column 'label': Valid: image, coarse"),
    ],
)
def test_tables_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, pixels: Any, labels: Any, settings: dict[str, Any], message: str
) -> None:
    table(monkeypatch, pixels, labels, **settings)
    with pytest.raises(ValueError, match=message):
        load_images("some/pets")


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
