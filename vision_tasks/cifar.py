"""CIFAR-10 and CIFAR-100 as they are downloaded: pickled batches in a folder, or in the .tar.gz that holds it.

A pickle may run any code of its author's, so that nothing but arrays and plain values is built of one.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metaxl_evo.messages import one_line, unknown
from vision_tasks.image_parts import Found, Layout

SIDE = 32
ARCHIVES = (".tar.gz", ".tgz", ".tar")
FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
NAMES = {"batches.meta": {"labels": "label_names"}, "meta": {"fine_labels": "fine_label_names"}}
COARSE = {"coarse_labels": "coarse_label_names"}
PLAIN = {  # what the pickle of an array of numbers calls, by any version of numpy and of Python
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("_codecs", "encode"),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(module, name)


def is_cifar(path: Path) -> bool:
    """Whether this is CIFAR as it is downloaded: an archive, its folder, or the folder above it."""
    return (path.is_file() and path.name.endswith(ARCHIVES)) or (path.is_dir() and _folder(path) is not None)


def read_cifar(path: Path, layout: Layout, parts: Sequence[str]) -> dict[str, Found]:
    """Train and test images; of CIFAR-100 with the fine labels, or those that `label_column: coarse_labels` names.

    Raises:
        ValueError: for files that are missing, damaged, no CIFAR, or pickles of more than arrays and plain values.
    """
    read = _reader(path)
    meta = next((name for name in NAMES if read(name) is not None), None)
    if meta is None:
        raise ValueError(
            f"{path} holds neither {' nor '.join(NAMES)}: give CIFAR as it is downloaded, or another --data"
        )
    if layout.true_label_column is not None:
        raise ValueError(f"true_label_column: {path} has one label an image: leave it out")
    kinds = NAMES[meta] | (COARSE if meta == "meta" else {})
    column = layout.label_column or next(iter(kinds))
    if column not in kinds:
        raise ValueError(f"{path}: {unknown('column', column, kinds)}: set label_column")
    names = _plain(path, meta, read(meta)).get(kinds[column])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}, {meta} has no list {kinds[column]!r}: fetch it again")
    found = {}
    for part, split in layout.splits(parts, BATCHES).items():
        if split not in BATCHES:
            raise ValueError(f"{path} has no split {split!r}; present: {', '.join(BATCHES)}")
        files = BATCHES[split] if meta == "batches.meta" else [split]
        batches = [_batch(path, name, read(name), column) for name in files]
        images, labels, ids = (np.concatenate(held) for held in zip(*batches, strict=True))
        found[part] = Found(images, labels, f"{path}, {split}", ids, names=tuple(names))
    return found


def _batch(path: Path, name: str, data: bytes | None, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3), labels (N,) and the names of the images' files of one pickle."""
    held = _plain(path, name, data)
    images, labels = np.asarray(held.get("data", ())), np.asarray(held.get(column, ()))
    fits = images.dtype == np.uint8 and images.shape[1:] == (3 * SIDE * SIDE,)
    if not fits or labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}, {name}: expected `data` (N, {3 * SIDE * SIDE}) uint8 and N {column}: fetch it again"
        )
    ids = held.get("filenames", [])
    ids = ids if len(ids) == len(images) else [f"{name}/{number}" for number in range(len(images))]
    return images.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels.astype(np.int64), np.array(ids, str)


def _plain(path: Path, name: str, data: bytes | None) -> dict[str, Any]:
    """The mapping that a pickle holds; its texts, which Python 2 wrote as bytes, as words."""
    if data is None:
        raise ValueError(f"{path} has no {name}: fetch it again, whole")
    try:
        held = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged one leads into any
        raise ValueError(
            f"{path}, {name} cannot be read as a pickle of arrays ({one_line(error)}): fetch it again"
        ) from error
    if not isinstance(held, dict):
        raise ValueError(f"{path}, {name} holds no mapping: fetch it again")
    return {
        _word(key): [_word(one) for one in value] if isinstance(value, list) else value for key, value in held.items()
    }


def _word(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _reader(path: Path) -> Callable[[str], bytes | None]:
    """What gives the bytes of a file by its name, None for one that is not there."""
    folder = _folder(path) if path.is_dir() else None
    if folder is not None:
        return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None
    held: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:  # nothing is written: a name may lead anywhere
                    held[Path(member.name).name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an archive ({one_line(error)}): fetch it again") from error
    return held.get


def _folder(path: Path) -> Path | None:
    """Where the batches are."""
    places = [path, *(path / name for name in FOLDERS)]
    found = (place for place in places for name in NAMES if (place / name).is_file())
    return next(found, None)
