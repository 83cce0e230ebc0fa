"""Where sentences come from: local folders, the Hugging Face Hub, or a table of either.

A reader checks that all that was asked for exists before it reads the first sentence, and every error is one line
that says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, LargeList, List, Value
from huggingface_hub import is_offline_mode

from metaxl_evo.messages import one_line, unknown
from metaxl_evo.ner.columns import read_columns, without_prefix
from metaxl_evo.ner.layout import Layout
from metaxl_evo.training.hub import Instead, configurations_of, load_from_hub, require_reachable, script_message

SPLITS = {"train": "train", "dev": "validation", "valid": "validation", "validation": "validation", "test": "test"}
TEXT_SUFFIXES = ("", ".txt", ".tsv", ".conll", ".iob2")
SHARD = re.compile(r"(?P<split>\w+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")
INSTEAD = Instead("--dataset FOLDER", "WikiAnn: unimelb-nlp/wikiann")


class Sentences(NamedTuple):
    """One split as read: parallel lists of tokens and tags, and the label names where the source declares them."""

    tokens: list[list[str]]
    tags: list[list[str]]
    declared: list[str] | None = None


Corpus = dict[str, dict[str, Sentences]]  # language -> split -> sentences


def read_folder(root: Path, languages: Sequence[str], splits: Sequence[str], layout: Layout) -> Corpus:
    """Read `root/LANGUAGE/SPLIT`, a text file or parquet files each."""
    if (root / f"{root.resolve().name}.py").is_file():
        raise ValueError(script_message(str(root), INSTEAD))
    folders = {folder.name: _split_files(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    present = {language: files for language, files in folders.items() if files}
    if not present:
        raise ValueError(f"{root} holds no language: expected folders LANGUAGE with files train, dev and test")
    for language in languages:
        if language not in present:
            raise ValueError(unknown(f"language of {root}", language, present))
        for split in splits:
            _require_split(split, present[language], str(root / language))
    return {
        language: {split: _read_files(present[language][split], language, layout) for split in splits}
        for language in languages
    }


def read_hub(dataset: str, languages: Sequence[str], splits: Sequence[str], layout: Layout) -> Corpus:
    """Read one configuration a language from the Hub, or in offline mode from the cache of `datasets`."""
    require_reachable(dataset, INSTEAD)
    _require_configurations(dataset, languages)
    corpus = {}
    for language in languages:
        loaded = load_from_hub(dataset, language, instead=INSTEAD, what=f"language {language!r}")
        parts = {SPLITS.get(str(split), str(split)): part for split, part in loaded.items()}
        for split in splits:
            _require_split(split, parts, f"{dataset}, {language}")
        corpus[language] = {
            split: _plain(read_table(parts[split], where, layout), language, where)
            for split in splits
            for where in [f"{dataset}, {language}, {split}"]
        }
    return corpus


def read_table(table: Dataset, where: str, layout: Layout) -> Sentences:
    """Read the columns `tokens` and `ner_tags`, the latter of a `ClassLabel` or of strings."""
    if not {"tokens", "ner_tags"} <= set(table.column_names):
        raise ValueError(
            f"{where} needs the columns tokens and ner_tags, but has {', '.join(table.column_names) or 'none'}"
        )
    if not _is_text(_kind_of_items(table, "tokens")):
        raise ValueError(f"{where}: tokens must be a list of strings for each sentence: split them into words")
    tokens, tags, declared = table["tokens"][:], table["ner_tags"][:], None
    kind = _kind_of_items(table, "ner_tags")
    if not (isinstance(kind, ClassLabel) or _is_text(kind)):
        raise ValueError(f"{where}: ner_tags has no label names: make it a list of ClassLabel or of strings")
    for number, row in enumerate(zip(tokens, tags, strict=True)):
        if any(part is None or None in part for part in row):
            raise ValueError(f"{where}: sentence {number} has a missing token or tag: repair the data")
    if isinstance(kind, ClassLabel):
        declared = kind.names
        names = dict(enumerate(declared))
        try:
            tags = [[names[tag] for tag in row] for row in tags]
        except KeyError as error:
            raise ValueError(f"{where}: label id {error} has no name among {', '.join(declared)}") from error
    for tag in declared or {tag for row in tags for tag in row}:
        if not layout.scheme.tag.fullmatch(tag):
            raise ValueError(f"{where}: {layout.scheme.refusal(tag)}")
    return Sentences(tokens, tags, declared)


def _plain(part: Sentences, language: str, where: str) -> Sentences:
    """Without the prefixes that a table may have kept of the file that it was made from."""
    places = [f"{where}: sentence {number}" for number, words in enumerate(part.tokens) for _ in words]
    words = iter(without_prefix([word for words in part.tokens for word in words], language, places))
    return part._replace(tokens=[[next(words) for _ in row] for row in part.tokens])


def _kind_of_items(table: Dataset, column: str) -> Any:
    """The feature of a list's items; None where the column holds no lists."""
    feature = table.features[column]
    return feature.feature if isinstance(feature, List | LargeList) else None


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def _split_files(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        shard = SHARD.fullmatch(path.stem) if path.suffix == ".parquet" else None
        stem = path.stem if shard is None else shard["split"]
        if path.is_file() and stem in SPLITS and path.suffix in (*TEXT_SUFFIXES, ".parquet"):
            files.setdefault(SPLITS[stem], []).append(path)
    return files


def _read_files(paths: list[Path], language: str, layout: Layout) -> Sentences:
    _require_one_set(paths)
    if paths[0].suffix != ".parquet":
        return Sentences(*read_columns(paths[0], language, layout))
    parts = [_plain(read_table(_read_parquet(path), str(path), layout), language, str(path)) for path in paths]
    tokens = [words for part in parts for words in part.tokens]
    return Sentences(tokens, [tags for part in parts for tags in part.tags], parts[0].declared)


def _require_one_set(paths: list[Path]) -> None:
    """One file, or all the shards of one: `train-00000-of-00002.parquet` and so on."""
    shards = [shard for path in paths if path.suffix == ".parquet" and (shard := SHARD.fullmatch(path.stem))]
    if len(paths) == 1 and not shards:
        return
    numbers, counts = {shard["number"] for shard in shards}, {int(shard["count"]) for shard in shards}
    if len(numbers) < len(paths) or len(counts) > 1:
        raise ValueError(f"{' and '.join(map(str, paths))} hold the same split: keep one of them")
    if len(paths) != max(counts):
        raise ValueError(f"{paths[0]} is one of {max(counts)} shards, {len(paths)} are there: fetch them all")


def _read_parquet(path: Path) -> Dataset:
    try:
        return Dataset(pyarrow.parquet.read_table(path))  # Dataset.from_parquet would fill the user's cache folder
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: fetch it again ({one_line(error)})") from error


def _require_configurations(dataset: str, languages: Sequence[str]) -> None:
    if is_offline_mode():
        return  # the names are not known here; the error of a failed load lists those in the cache
    configurations = configurations_of(dataset, INSTEAD)
    for language in languages:
        if language not in configurations:
            raise ValueError(unknown(f"language of {dataset}", language, configurations))


def _require_split(split: str, present: Iterable[str], where: str) -> None:
    if split not in present:
        raise ValueError(f"{where} has no split {split!r}; present: {', '.join(present) or 'none'}")
