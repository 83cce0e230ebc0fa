"""Where labelled images come from: an .npz file, a folder of files, tables on disk or of the Hub, or generated."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_from_disk

from metaxl_evo.messages import one_line, unknown
from metaxl_evo.training.hub import Instead, load_from_hub, require_reachable
from vision_tasks.image_files import EncodedImages, TableImages, class_files, subfolders
from vision_tasks.images import PARTS, SYNTHETIC, ImageSet, drawn

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "fine_label")
INSTEAD = Instead("--data FILE.npz", "MNIST: ylecun/mnist")
MOST_CLASSES = 100_000  # a label beyond is no number of a class
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
SHARD = re.compile(r"(?P<split>.+?)(-\d{5}-of-(?P<count>\d{5})(-[0-9a-f]+)?)?")


@dataclass(frozen=True)
class Layout:
    """Which columns and splits of a data set are read.

    Args:
        image_column, label_column: of a table; None finds one of the usual names.
        true_label_column: of a table, or of an .npz file that holds `NAME_train`: the right labels of noisy ones.
        train_split, test_split: of a table, a folder of files, or of an .npz file (`x_train`).
    """

    image_column: str | None = None
    label_column: str | None = None
    true_label_column: str | None = None
    train_split: str = "train"
    test_split: str = "test"

    def splits(self, parts: Sequence[str]) -> dict[str, str]:
        """The split of each part."""
        return {part: getattr(self, f"{part}_split") for part in parts}


@dataclass(frozen=True, eq=False)
class _Found:
    """A part as its source holds it: `labels` are numbers of `names` or, without these, any numbers or words."""

    images: Any
    labels: np.ndarray
    where: str
    ids: np.ndarray | None = None
    true_labels: np.ndarray | None = None
    names: tuple[str, ...] | None = None


def load_images(data: str, layout: Layout | None = None, parts: Sequence[str] = PARTS) -> dict[str, ImageSet]:
    """The parts of a data set, over the same classes.

    Args:
        data: an .npz file with x_train, y_train, x_test and y_test; a folder of train/CLASS/IMAGE and
            test/CLASS/IMAGE, of `save_to_disk` or of parquet files; a parquet file; a Hub id; or the word `synthetic`.
        parts: `train` and `test`, or one of them, whose source then need not hold the other.

    Raises:
        ValueError: one line for what is missing, unreadable or out of range.
        OSError: `data` is neither a file nor a Hub id that can be reached or is in the cache.
    """
    if data == SYNTHETIC:
        return {part: drawn(200 if part == "train" else 50, seed=PARTS.index(part)) for part in parts}
    path, layout = Path(data).expanduser(), layout or Layout()
    if path.suffix == ".npz" and not path.is_dir():
        return _alike(read_npz(path, layout, parts))
    if path.is_dir() and not _has_tables(path):
        found = _of_folders(path, layout, parts)
    else:
        tables = _tables(path) if path.exists() else _hub(data)
        found = {
            part: _of_table(_choose(tables, split, data, len(parts) == 1), layout, f"{data}, {split}")
            for part, split in layout.splits(parts).items()
        }
    return _alike(_numbered(_decoded(found)))


def read_npz(path: Path, layout: Layout | None = None, parts: Sequence[str] = PARTS) -> dict[str, ImageSet]:
    """A file with the arrays `x_train, y_train, x_test, y_test`; grey images may lack the channel.

    Raises:
        ValueError: for a file that cannot be read or lacks an array.
    """
    layout = layout or Layout()
    true = layout.true_label_column
    splits, letters = layout.splits(parts), ("x", "y") if true is None else ("x", "y", true)
    arrays = _arrays(path, [f"{letter}_{split}" for split in splits.values() for letter in letters])
    found = {}
    for part, split in splits.items():
        images, where = arrays[f"x_{split}"], f"{path}, {split}"
        images = images[..., None] if images.ndim == 3 else images
        labels = [_flat(arrays[f"{letter}_{split}"], where) for letter in letters[1:]]
        found[part] = _Found(images, labels[0], where, true_labels=labels[1] if true else None)
    return _numbered(found)


def _arrays(path: Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path), np.load(path) as file:  # numpy alone advises to trust what is no archive
            present = list(file.files)
            found = {key: file[key] for key in needed if key in present}
    except Exception as error:  # numpy, zipfile and zlib have kinds of their own
        raise ValueError(f"{path} cannot be read as .npz ({one_line(error)}): give another --data") from error
    missing = [key for key in needed if key not in found]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]!r}; present: {', '.join(present) or 'none'}")
    return found


def _flat(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels as int64 or words, (N,); Keras' CIFAR has (N, 1)."""
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
    if labels.dtype.kind not in "iuU":
        raise ValueError(f"{where}: labels must be whole numbers or words, not {labels.dtype}: number the classes")
    if labels.dtype.kind == "U":
        return labels
    if labels.max(initial=0) >= MOST_CLASSES:
        raise ValueError(f"{where}: labels go up to {labels.max()}: number the classes from 0")
    return labels.astype(np.int64)


# Folders CLASS/IMAGE


def _of_folders(path: Path, layout: Layout, parts: Sequence[str]) -> dict[str, _Found]:
    """SPLIT/CLASS/IMAGE, of a single part also CLASS/IMAGE; classes by turns, so that the first images are of all."""
    if layout.true_label_column is not None:
        raise ValueError(f"true_label_column: {path} holds image files, which have one label each: give a table")
    found = {}
    for part, split in layout.splits(parts).items():
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
        found[part] = _Found(EncodedImages(files, [str(file) for file in files]), labels, f"{path}, {split}", ids)
    return found


# Tables


def _has_tables(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED) or any(path.rglob("*.parquet"))


def _tables(path: Path) -> dict[str, Dataset]:
    """The splits of a folder of `save_to_disk`, or of parquet files."""
    try:
        if not any((path / name).is_file() for name in SAVED):
            return {split: Dataset(pyarrow.parquet.read_table(files)) for split, files in _shards(path).items()}
        loaded = load_from_disk(str(path))
    except (pyarrow.ArrowException, OSError, KeyError) as error:
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
    require_reachable(dataset, INSTEAD)
    return dict(load_from_hub(dataset, instead=INSTEAD))


def _choose(tables: Mapping[str, Dataset], split: str, where: str, alone: bool) -> Dataset:
    """A split, or the only one where no other is wanted."""
    if split in tables:
        return tables[split]
    if alone and len(tables) == 1:
        return next(iter(tables.values()))
    raise ValueError(
        f"{where} has no split {split!r}; present: {', '.join(map(str, tables))}: set train_split and test_split"
    )


def _of_table(table: Dataset, layout: Layout, where: str) -> _Found:
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
    return _Found(images, label, where, true_labels=true[0] if true else None, names=names)


def _column(table: Dataset, option: str, given: str | None, usual: Sequence[str], where: str) -> str:
    for name in usual if given is None else [given]:
        if name in table.column_names:
            return name
    raise ValueError(f"{where}: {unknown('column', given or usual[0], table.column_names)}: set {option}")


def _values(table: Dataset, column: str, names: tuple[str, ...] | None, where: str) -> np.ndarray:
    """The labels of a column; words beside a ClassLabel are its names."""
    values = _flat(np.array(list(table[column])), f"{where}, {column}")
    if names is None or values.dtype.kind != "U":
        return values
    absent = sorted(set(values.tolist()) - set(names))
    if absent:
        raise ValueError(f"{where}, {column}: {unknown('class', absent[0], names)}")
    return np.array([names.index(value) for value in values])


# All sources


def _decoded(found: Mapping[str, _Found]) -> dict[str, _Found]:
    """With pixels of one size (N, H, W, C); grey images among coloured ones are in three equal channels.

    Raises:
        ValueError: for images that differ in size, or none.
    """
    pixels = {part: list(one.images) for part, one in found.items()}
    channels = max((image.shape[2] for held in pixels.values() for image in held), default=1)
    decoded = {}
    for part, one in found.items():
        sizes = [f"{image.shape[0]} x {image.shape[1]}" for image in pixels[part]]
        if not sizes:
            raise ValueError(f"{one.where}: no images")
        other = next((number for number, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            first, second = (number if one.ids is None else one.ids[number] for number in (0, other))
            raise ValueError(
                f"{one.where}: its images differ in size ({first}: {sizes[0]}, {second}: {sizes[other]} pixels): "
                "this task needs them alike, resize them first"
            )
        stacked = [image.repeat(channels // image.shape[2], 2) for image in pixels.pop(part)]
        decoded[part] = replace(one, images=np.stack(stacked))
    return decoded


def _numbered(found: Mapping[str, _Found]) -> dict[str, ImageSet]:
    """With the classes of all parts numbered as they are declared, or else in the order of their numbers or words."""
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


def _renumbered(found: _Found, numbers: np.ndarray) -> _Found:
    true = None if found.true_labels is None else np.searchsorted(numbers, found.true_labels)
    return replace(found, labels=np.searchsorted(numbers, found.labels), true_labels=true)


def _alike(parts: dict[str, ImageSet]) -> dict[str, ImageSet]:
    first, *others = parts.values()
    for other in others:
        if other.images.shape[1:] != first.images.shape[1:]:
            raise ValueError(
                f"{first.where}: images of {first.images.shape[1:]} pixels, but {other.where}: of "
                f"{other.images.shape[1:]}: a model trained on the one cannot be tested on the other"
            )
    return parts
