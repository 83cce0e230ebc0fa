"""Where texts come from: files of tables, a folder of them, the Hub, or drawn here; a row an example."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from metaxl_evo.messages import one_line, unknown
from metaxl_evo.training.hub import Instead, load_from_hub, require_reachable
from metaxl_evo.weighting.drawn import SYNTHETIC, draw_parts

SPLITS = {"train": "train", **dict.fromkeys(("dev", "val", "valid", "validation"), "validation"), "test": "test"}
INSTEAD = Instead("--data FOLDER or FILE", "a data set of parquet files")
PLAIN = {"keep_default_na": False}  # pandas would read the words "NA" and "null" as missing
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", PLAIN),
    ".tsv": ("csv", {**PLAIN, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),  # a line an example, the column `text`
}


def read_parts(source: str, splits: Sequence[str], configuration: str | None = None) -> dict[str, Dataset]:
    """Those of `splits` (`train`, `validation`, `test`) that there are; a single file is `train`.

    Args:
        source: a file, a folder of files named as splits are, a Hub id, or `synthetic`.
        configuration: of a Hub id.

    Raises:
        ValueError: one line for what is not there, or cannot be read.
    """
    place = Path(source).expanduser()
    if source == SYNTHETIC:
        return draw_parts(splits)
    if place.is_file():
        return {"train": read_file(place)}
    found: dict[str, Callable[[], Dataset]] = _of_folder(place) if place.is_dir() else _of_hub(source, configuration)
    if not found:
        raise ValueError(f"{source} holds no data: expected files train, test of the suffixes {', '.join(READERS)}")
    return {split: read() for split, read in found.items() if split in splits}


def read_file(file: Path) -> Dataset:
    """The rows of a file of tables, or the lines of a text that are not empty.

    Raises:
        ValueError: naming the file.
    """
    if file.suffix not in READERS:
        raise ValueError(f"{file}: {unknown('suffix', file.suffix, READERS)}")
    if not file.stat().st_size:
        raise ValueError(f"{file} is empty")
    kind, settings = READERS[file.suffix]
    try:
        rows = load_dataset(kind, data_files=str(file), split="train", **settings)
    except Exception as error:  # of the libraries below `datasets`, each with its own
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"{file} is not a readable {file.suffix.removeprefix('.')} file ({reason})") from error
    return rows.filter(lambda row: row["text"].strip() != "") if kind == "text" else rows


def _of_folder(folder: Path) -> dict[str, Callable[[], Dataset]]:
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.stem in SPLITS and file.suffix in READERS:
            files.setdefault(SPLITS[file.stem], []).append(file)
    for split, several in files.items():
        if len(several) > 1:
            raise ValueError(f"{' and '.join(map(str, several))} hold the same split, {split}: keep one of them")
    return {split: lambda file=several[0]: read_file(file) for split, several in files.items()}  # type: ignore[misc]


def _of_hub(name: str, configuration: str | None) -> dict[str, Callable[[], Dataset]]:
    require_reachable(name, INSTEAD)
    what = "the default configuration" if configuration is None else f"configuration {configuration!r}"
    loaded: Mapping[Any, Dataset] = load_from_hub(name, configuration, instead=INSTEAD, what=what)
    return {SPLITS[str(split)]: lambda rows=rows: rows for split, rows in loaded.items() if str(split) in SPLITS}  # type: ignore[misc]
