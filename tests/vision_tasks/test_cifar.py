"""CIFAR's own files, written here as Python 2 left them, and pickles that would run code."""

from __future__ import annotations

import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vision_tasks.image_parts import Layout
from vision_tasks.image_sources import load_images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3072), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 3, (6, 5)).tolist()


def dump(file: Path, held: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(held, protocol=2))


def write_cifar10(folder: Path, **changes: Any) -> Path:
    """Five batches and a test batch of five images of three classes, keys and texts as bytes."""
    place = folder / "cifar-10-batches-py"
    dump(place / "batches.meta", {b"label_names": [b"cat", b"dog", b"ship"], b"num_vis": 3072})
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        files = [f"{name}_{n}.png".encode() for n in range(5)]
        batch = {b"data": PIXELS[number], b"labels": LABELS[number], b"filenames": files, b"batch_label": b"one"}
        dump(place / name, batch | (changes if number == 2 else {}))
    return place


def write_cifar100(folder: Path) -> Path:
    dump(folder / "meta", {b"fine_label_names": [b"a", b"b", b"c"], b"coarse_label_names": [b"x", b"y", b"z"]})
    for number, name in enumerate(("train", "test")):
        dump(folder / name, {b"data": PIXELS[number], b"fine_labels": LABELS[number], b"coarse_labels": LABELS[2]})
    return folder


def packed(folder: Path) -> Path:
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(write_cifar10(folder), "cifar-10-batches-py")
    return folder / "cifar-10-python.tar.gz"


def python_2(pixels: np.ndarray, labels: list[int]) -> bytes:
    """{'data': pixels, 'labels': labels}, opcode by opcode as Python 2 with an old numpy writes it."""
    shape = b"".join(b"M" + struct.pack("<H", size) for size in pixels.shape) + b"\x86"
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01" + shape + kind + b"\x89T" + struct.pack("<i", pixels.nbytes) + pixels.tobytes() + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + state
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


def test_a_batch_of_python_2(tmp_path: Path) -> None:
    file = write_cifar10(tmp_path) / "test_batch"
    file.write_bytes(python_2(PIXELS[0], [2, 1, 0, 1, 2]))
    found = load_images(str(tmp_path))["test"]
    assert np.array_equal(found.images[:, 0, :, 1], PIXELS[0, :, 1024:1056])
    assert (found.labels.tolist(), found.ids[4]) == ([2, 1, 0, 1, 2], "test_batch/4")


@pytest.mark.parametrize("place", ["the folder", "the one above", "the archive"])
def test_cifar_10(tmp_path: Path, place: str) -> None:
    path = packed(tmp_path) if place == "the archive" else write_cifar10(tmp_path)
    found = load_images(str(tmp_path if place == "the one above" else path))
    assert {part: images.images.shape for part, images in found.items()} == {
        "train": (25, 32, 32, 3),
        "test": (5, 32, 32, 3),
    }
    red, green, blue = (PIXELS[1, 3, n * 1024 : (n + 1) * 1024].reshape(32, 32) for n in range(3))
    shown = Image.merge("RGB", [Image.fromarray(one) for one in (red, green, blue)])
    assert np.array_equal(found["train"].images[8], np.asarray(shown))
    assert found["train"].labels.tolist() == np.concatenate(LABELS[:5]).tolist()
    assert found["test"].labels.tolist() == LABELS[5]
    assert found["test"].names == ("cat", "dog", "ship")
    assert found["train"].ids[8] == "data_batch_2_3.png"


def test_cifar_100_has_fine_labels_or_coarse_ones(tmp_path: Path) -> None:
    folder = str(write_cifar100(tmp_path / "cifar-100-python"))
    fine, coarse = load_images(folder), load_images(folder, Layout(label_column="coarse_labels"))
    assert (fine["train"].names, coarse["train"].names) == (("a", "b", "c"), ("x", "y", "z"))
    assert fine["test"].labels.tolist() == LABELS[1]
    assert coarse["test"].labels.tolist() == LABELS[2]
    with pytest.raises(
        ValueError, match=r"unknown column 'label': .*Valid: fine_labels, coarse_labels: set label_column"
    ):
        load_images(folder, Layout(label_column="label"))


class Evil:
    """What a pickle may make of whoever loads it freely."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_would_run_code_runs_none(tmp_path: Path) -> None:
    """As a value, and as an item of an array of objects."""
    made = tmp_path / "made"
    for evil in (Evil(made), np.array([Evil(made)], dtype=object)):
        with pytest.raises(
            ValueError, match=r"data_batch_3 cannot be read as .* \(it asks for posix.mkdir, which is no"
        ):
            load_images(str(write_cifar10(tmp_path, more=evil)))
    assert not made.exists()


def _cut(place: Path) -> None:
    file = place / "data_batch_2"
    file.write_bytes(file.read_bytes()[:-100])


def _without(place: Path) -> None:
    (place / "data_batch_5").unlink()


def _without_names(place: Path) -> None:
    dump(place / "batches.meta", {b"names": []})


def _of_other_sizes(place: Path) -> None:
    dump(place / "test_batch", {b"data": PIXELS[0, :, :300], b"labels": LABELS[0]})


def _no_mapping(place: Path) -> None:
    dump(place / "test_batch", [1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, "data_batch_2 cannot be read as a pickle of arrays .*: fetch it again$"),
        (_without, "has no data_batch_5: fetch it again, whole"),
        (_without_names, "batches.meta has no list 'label_names'"),
        (_of_other_sizes, r"test_batch: expected `data` \(N, 3072\) uint8 and N labels"),
        (_no_mapping, "test_batch holds no mapping"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(write_cifar10(tmp_path))
    with pytest.raises(ValueError, match=message) as found:
        load_images(str(tmp_path))
    assert "\n" not in str(found.value)


def test_archives_that_are_no_cifar(tmp_path: Path) -> None:
    file = packed(tmp_path)
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz cannot be read as an archive"):
        load_images(str(file))
    with tarfile.open(file, "w:gz") as archive:
        archive.add(__file__, "test_cifar.py")
    with pytest.raises(ValueError, match=r"holds neither batches.meta nor meta: give CIFAR as it is downloaded"):
        load_images(str(file))
