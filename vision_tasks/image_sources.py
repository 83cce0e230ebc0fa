"""Where labelled images come from: .npz files, folders, tables on disk or of the Hub, CIFAR's files, or drawn."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_from_disk

from metaxl_evo.messages import one_line, unknown
from metaxl_evo.training.hub import Instead, load_from_hub, require_reachable
from vision_tasks.cifar import is_cifar, read_cifar
from vision_tasks.image_files import EncodedImages, TableImages, class_files, subfolders
from vision_tasks.image_parts import Found, Layout, Prepare, alike, decoded, flat_labels, numbered, prepared
from vision_tasks.images import PARTS, SYNTHETIC, ImageSet, drawn

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "fine_label")
INSTEAD = Instead("--data FILE.npz", "MNIST: ylecun/mnist")
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
SHARD = re.compile(r"(?P<split>.+?)(-\d{5}-of-(?P<count>\d{5})(-[0-9a-f]+)?)?")


def load_images(
    data: str, layout: Layout | None = None, parts: Sequence[str] = PARTS, prepare: Prepare | None = None
) -> dict[str, ImageSet]:
    """The parts of a data set, over the same classes.

    Args:
        data: an .npz file with x_train, y_train, x_test and y_test; a folder of train/CLASS/IMAGE and
            test/CLASS/IMAGE, of `save_to_disk` or of parquet files; a parquet file; CIFAR as it is downloaded; a Hub
            id, or ID:CONFIGURATION; or the word `synthetic`.
        parts: `train` and `test`, or one of them, whose source then need not hold the other; `validation` where
            there is one.
        prepare: what makes each image ready for a model, of whatever size it is.

    Raises:
        ValueError: one line for what is missing, unreadable or out of range.
        OSError: `data` is neither a file nor a Hub id that can be reached or is in the cache.
    """
    path, layout = Path(data).expanduser(), layout or Layout()
    if data == SYNTHETIC:
        made = {part: drawn(200 if part == "train" else 50, seed=PARTS.index(part)) for part in PARTS if part in parts}
        return _prepared(made, prepare)
    if path.suffix == ".npz" and not path.is_dir():
        return alike(_prepared(read_npz(path, layout, parts), prepare))
    if is_cifar(path):
        found = read_cifar(path, layout, parts)
    elif path.is_dir() and not _has_tables(path):
        found = _of_folders(path, layout, parts)
    else:
        tables = _tables(path) if path.exists() else _hub(data)
        found = {
            part: _of_table(part, _choose(tables, split, data, len(parts) == 1), layout, f"{data}, {split}")
            for part, split in layout.splits(parts, tables).items()
        }
    return alike(numbered(decoded(found, prepare)))


def _prepared(sets: dict[str, ImageSet], prepare: Prepare | None) -> dict[str, ImageSet]:
    if prepare is None:
        return sets
    return {part: replace(one, images=prepared(one.images, prepare)) for part, one in sets.items()}


def read_npz(path: Path, layout: Layout | None = None, parts: Sequence[str] = PARTS) -> dict[str, ImageSet]:
    """A file with the arrays `x_train, y_train, x_test, y_test`; grey images may lack the channel.

    Raises:
        ValueError: for a file that cannot be read or lacks an array.
    """
    layout, found = replace(layout or Layout(), label_column="y"), {}
    with _opened(path) as file:
        present = list(file.files)
    splits = layout.splits(parts, [name.removeprefix("x_") for name in present])
    for part, split in splits.items():
        own = layout.of(part, [name.removesuffix(f"_{split}") for name in present])
        columns = [name for name in ("x", own.label_column, own.true_label_column) if name is not None]
        needed, where = [f"{name}_{split}" for name in columns], f"{path}, {split}"
        missing = [name for name in needed if name not in present]
        if missing:
            raise ValueError(f"{path} has no array {missing[0]!r}; present: {', '.join(present) or 'none'}")
        with _opened(path) as file:
            images, *labels = (file[name] for name in needed)
        label, *true = (flat_labels(one, where) for one in labels)
        images = images[..., None] if images.ndim == 3 else images
        found[part] = Found(images, label, where, true_labels=true[0] if true else None)
    return numbered(found)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with zipfile.ZipFile(path), np.load(path) as file:  # numpy alone advises to trust what is no archive
            yield file
    except Exception as error:  # numpy, zipfile and zlib have kinds of their own
        raise ValueError(f"{path} cannot be read as .npz ({one_line(error)}): give another --data") from error


# Folders CLASS/IMAGE


def _of_folders(path: Path, layout: Layout, parts: Sequence[str]) -> dict[str, Found]:
    """SPLIT/CLASS/IMAGE, of a single part also CLASS/IMAGE; classes by turns, so that the first images are of all."""
    if layout.true_label_column is not None:
        raise ValueError(f"true_label_column: {path} holds image files, which have one label each: give a table")
    found = {}
    for part, split in layout.splits(parts, [place.name for place in subfolders(path)]).items():
        place = path / split
        if not place.is_dir() and len(parts) == 1:
            place = path
        if not place.is_dir() or not (classes := class_files(place)):
            present = ", ".join(one.name for one in subfolders(path)) or "no folder"
            raise ValueError(
                f"{place} has no folder of images; {path} holds {present}: it should hold "
                f"{layout.train_split}/CLASS/IMAGE and {layout.test_split}/CLASS/IMAGE (or set train_split and "
                "test_split), parquet files or what save_to_disk leaves; or give one of its .npz files"
            )
        turns = sorted((turn, name, file) for name, files in classes.items() for turn, file in enumerate(files))
        files, labels = [file for *_, file in turns], np.array([name for _, name, _ in turns])
        ids = np.array([str(file.relative_to(path)) for file in files])
        found[part] = Found(EncodedImages(files, [str(file) for file in files]), labels, f"{path}, {split}", ids)
    return found


# Tables


def _has_tables(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED) or any(path.rglob("*.parquet"))


def _tables(path: Path) -> dict[str, Dataset]:
    """The splits of a folder of `save_to_disk`, or of parquet files."""
    saved = any((path / name).is_file() for name in SAVED)
    shards = {} if saved else _shards(path)
    try:
        if not saved:
            return {split: Dataset(pyarrow.parquet.read_table(files)) for split, files in shards.items()}
        loaded = load_from_disk(str(path))
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a table ({one_line(error)}): write or fetch it again") from error
    return dict(loaded) if isinstance(loaded, DatasetDict) else {path.name: loaded}


def _shards(path: Path) -> dict[str, list[Path]]:
    """The parquet files of each split: one, or `train-00000-of-00002.parquet` and so on."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    found: dict[str, list[Path]] = {}
    counts: dict[str, int] = {}
    for file in files:
        shard = SHARD.fullmatch(file.stem)
        if shard is not None and not file.name.startswith("."):
            found.setdefault(shard["split"], []).append(file)
            counts[shard["split"]] = int(shard["count"] or 1)
    for split, count in counts.items():
        if path.is_dir() and len(found[split]) != count:
            raise ValueError(
                f"{path}: {len(found[split])} parquet files of {split}, not {count}: fetch one set of all"
            )
    return found


def _hub(dataset: str) -> dict[str, Dataset]:
    name, _, configuration = dataset.partition(":")
    require_reachable(name, INSTEAD)
    return dict(load_from_hub(name, *filter(None, [configuration]), instead=INSTEAD))


def _choose(tables: Mapping[str, Dataset], split: str, where: str, alone: bool) -> Dataset:
    """A split, or the only one where no other is wanted."""
    if split in tables:
        return tables[split]
    if alone and len(tables) == 1:
        return next(iter(tables.values()))
    raise ValueError(
        f"{where} has no split {split!r}; present: {', '.join(map(str, tables))}: set train_split and "
        "test_split (or validation_split)"
    )


def _of_table(part: str, table: Dataset, layout: Layout, where: str) -> Found:
    layout = layout.of(part, table.column_names)
    image = _column(table, "image_column", layout.image_column, IMAGE_COLUMNS, where)
    columns = [_column(table, "label_column", layout.label_column, LABEL_COLUMNS, where)]
    if layout.true_label_column is not None:
        columns.append(_column(table, "true_label_column", layout.true_label_column, (), where))
    if isinstance(table.features[image], dict):  # parquet that another library wrote
        table = table.cast_column(image, Image())
    kinds = {tuple(kind.names) for one in columns if isinstance(kind := table.features[one], ClassLabel)}
    if len(kinds) > 1:
        raise ValueError(f"{where}: {' and '.join(columns)} name other classes: give them the same ClassLabel")
    names = kinds.pop() if kinds else None
    label, *true = (_values(table, one, names, where) for one in columns)
    images = TableImages(table, image, where)
    return Found(images, label, where, true_labels=true[0] if true else None, names=names)


def _column(table: Dataset, option: str, given: str | None, usual: Sequence[str], where: str) -> str:
    for name in usual if given is None else [given]:
        if name in table.column_names:
            return name
    raise ValueError(f"{where}: {unknown('column', given or usual[0], table.column_names)}: set {option}")


def _values(table: Dataset, column: str, names: tuple[str, ...] | None, where: str) -> np.ndarray:
    """The labels of a column; words beside a ClassLabel are its names."""
    values = flat_labels(np.array(list(table[column])), f"{where}, {column}")
    if names is None or values.dtype.kind != "U":
        return values
    number = {name: place for place, name in enumerate(names)}
    absent = sorted(set(values.tolist()) - set(names))
    if absent:
        raise ValueError(f"{where}, {column}: {unknown('class', absent[0], names)}")
    return np.array([number[value] for value in values])
