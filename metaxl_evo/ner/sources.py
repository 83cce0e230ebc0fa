"""Where sentences come from: local folders, the Hugging Face Hub, or a table of either.

A reader checks that all that was asked for exists before it reads the first sentence, and every error is one line
that says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from huggingface_hub import is_offline_mode

from metaxl_evo.messages import unknown
from metaxl_evo.ner.columns import read_columns, without_prefix
from metaxl_evo.ner.layout import Layout
from metaxl_evo.ner.tables import READERS, columns_of, read_file
from metaxl_evo.training.hub import Instead, configurations_of, load_from_hub, require_reachable, script_message

SPLITS = {"train": "train", **dict.fromkeys(("dev", "val", "valid", "validation"), "validation"), "test": "test"}
TEXT_SUFFIXES = ("", ".txt", ".tsv", ".conll", ".conllu", ".iob2", ".bio")
SUFFIXES = tuple(dict.fromkeys((*TEXT_SUFFIXES, *READERS)))
SHARD = re.compile(r"(?P<split>\w+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")
ONLY = "default"  # what a data set of one configuration calls it
INSTEAD = Instead("--dataset FOLDER", "WikiAnn: unimelb-nlp/wikiann")


class Sentences(NamedTuple):
    """One split as read: parallel lists of tokens and tags, and the label names where the source declares them."""

    tokens: list[list[str]]
    tags: list[list[str]]
    declared: list[str] | None = None


Corpus = dict[str, dict[str, Sentences]]  # language -> split -> sentences


def read_folder(root: Path, languages: Sequence[str], splits: Sequence[str], layout: Layout) -> Corpus:
    """Read `root/LANGUAGE/SPLIT`, a file of a known suffix, or parquet shards, each; `NAME-SPLIT` is a split's too."""
    if (root / f"{root.resolve().name}.py").is_file():
        raise ValueError(script_message(str(root), INSTEAD))
    folders = {folder.name: _split_files(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
    present = [language for language, files in folders.items() if files or _unread(root / language)]
    if not present:
        raise ValueError(f"{root} holds no language: expected folders LANGUAGE with files train, dev and test")
    for language in languages:
        if language not in present:
            raise ValueError(unknown(f"language of {root}", language, present))
        for split in splits:
            _require_split(split, folders[language], str(root / language), _unread(root / language))
    return {
        language: {split: _read_files(folders[language][split], language, layout) for split in splits}
        for language in languages
    }


def read_hub(dataset: str, languages: Sequence[str], splits: Sequence[str], layout: Layout) -> Corpus:
    """Read one configuration a language from the Hub, or in offline mode from the cache of `datasets`.

    A data set of one configuration has its languages in the names of its splits: `train_en`.
    """
    require_reachable(dataset, INSTEAD)
    loaded = _load_languages(dataset, languages)
    corpus = {}
    for language in languages:
        parts = {SPLITS.get(name, name): part for name, part in loaded[language].items()}
        for split in splits:
            _require_split(split, parts, f"{dataset}, {language}")
        corpus[language] = {
            split: _plain(read_table(parts[split], where, layout), language, where, layout)
            for split in splits
            for where in [f"{dataset}, {language}, {split}"]
        }
    return corpus


def read_table(table: Dataset, where: str, layout: Layout) -> Sentences:
    """Read the columns of tokens and tags, the latter of a `ClassLabel`, of strings or of integers with names."""
    words, labels = columns_of(table.column_names, layout, where)
    if layout.of_texts:
        table = _texts_as_sentences(table, words, labels, where)
    if not _is_text(_kind_of_items(table, words)):
        raise ValueError(f"{where}: {words} must be a list of strings for each sentence: split them into words")
    tokens, tags = table[words][:], table[labels][:]
    kind = _kind_of_items(table, labels)
    if not (isinstance(kind, ClassLabel) or _is_text(kind) or (_is_integer(kind) and layout.label_names)):
        raise ValueError(
            f"{where}: {labels} has no label names: make it a list of ClassLabel or of strings, or set label_names"
        )
    for number, row in enumerate(zip(tokens, tags, strict=True)):
        if any(part is None or None in part for part in row):
            raise ValueError(f"{where}: sentence {number} has a missing token or tag: repair the data")
    if isinstance(kind, ClassLabel):
        if layout.label_names:
            raise ValueError(f"{where} has label names of its own, {', '.join(kind.names)}: leave label_names out")
        _require_tags(kind.names, where, layout)
        return _named(tokens, tags, kind.names, where)
    _require_tags({str(tag) for row in tags for tag in row}, where, layout)
    return _named(tokens, tags, layout.label_names, where)


def _texts_as_sentences(table: Dataset, text: str, label: str, where: str) -> Dataset:
    """Each text in a list of its own, and so its label.

    Raises:
        ValueError: for a text that is none, or is empty.
    """
    kinds = {name: table.features[name] for name in (text, label)}
    unread = [number for number, one in enumerate(table[text]) if not isinstance(one, str) or not one.strip()]
    if unread:
        raise ValueError(f"{where}: {len(unread)} rows have no {text}, such as row {unread[0]}: leave them out")
    rows = {name: [[one] for one in table[name]] for name in kinds}
    return Dataset.from_dict(rows, features=Features({name: List(kind) for name, kind in kinds.items()}))


def _require_tags(tags: Iterable[str], where: str, layout: Layout) -> None:
    for tag in tags:
        if not layout.tag.fullmatch(tag):
            raise ValueError(f"{where}: {layout.refusal(tag)}")


def _named(tokens: list[list[str]], tags: list[list[Any]], names: Sequence[str], where: str) -> Sentences:
    """With the names of the numbers that the tags are; without names the tags are names themselves."""
    if not names:
        return Sentences(tokens, tags)
    known = dict(enumerate(names))
    try:
        return Sentences(tokens, [[known[int(tag)] for tag in row] for row in tags], list(names))
    except KeyError as error:
        raise ValueError(f"{where}: label id {error} has no name among {', '.join(names)}") from error


def _plain(part: Sentences, language: str, where: str, layout: Layout) -> Sentences:
    """Without the prefixes that a table may have kept of the file that it was made from; texts have none."""
    if layout.of_texts:
        return part
    places = [f"{where}: sentence {number}" for number, words in enumerate(part.tokens) for _ in words]
    words = iter(without_prefix([word for words in part.tokens for word in words], language, places))
    return part._replace(tokens=[[next(words) for _ in row] for row in part.tokens])


def _kind_of_items(table: Dataset, column: str) -> Any:
    """The feature of a list's items; None where the column holds no lists."""
    feature = table.features[column]
    return feature.feature if isinstance(feature, List | LargeList) else None


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def _is_integer(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype.startswith(("int", "uint"))


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split: those of its name, else those whose name ends so, as `en_ewt-ud-train.iob2` does."""
    exact: dict[str, list[Path]] = {}
    ending: dict[str, list[Path]] = {}
    for path in sorted(filter(Path.is_file, folder.iterdir())):
        shard = SHARD.fullmatch(path.stem) if path.suffix == ".parquet" else None
        name = path.stem if shard is None else shard["split"]
        split = SPLITS.get(re.split("[-_]", name)[-1])
        if split is not None and path.suffix in SUFFIXES:
            (exact if name in SPLITS else ending).setdefault(split, []).append(path)
    return {**ending, **exact}


def _unread(folder: Path) -> list[str]:
    """The names of files that are named as splits are, but of no suffix that is known."""
    files = sorted(filter(Path.is_file, folder.iterdir()))
    return [path.name for path in files if path.name.split(".")[0] in SPLITS and path.suffix not in SUFFIXES]


def _read_files(paths: list[Path], language: str, layout: Layout) -> Sentences:
    _require_one_set(paths)
    if layout.of_texts and paths[0].suffix not in READERS:
        raise ValueError(f"{paths[0]} holds no table: texts and their labels are read from {', '.join(READERS)}")
    if paths[0].suffix in TEXT_SUFFIXES and not layout.of_texts:
        tokens, tags = read_columns(paths[0], language, layout)
        return _named(tokens, tags, layout.label_names, str(paths[0]))
    parts = [
        _plain(read_table(read_file(path, layout), str(path), layout), language, str(path), layout) for path in paths
    ]
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


def _load_languages(dataset: str, languages: Sequence[str]) -> dict[str, dict[str, Dataset]]:
    """The splits of each language, by their names."""
    # Offline the names are not known here; the error of a failed load lists those in the cache.
    there = [] if is_offline_mode() else configurations_of(dataset, INSTEAD)
    if len(there) == 1 and there[0] not in languages:
        return _by_name_of_split(dataset, languages)
    for language in languages:
        if there and language not in there:
            raise ValueError(unknown(f"language of {dataset}", language, there))
    try:
        loaded = {one: load_from_hub(dataset, one, instead=INSTEAD, what=f"language {one!r}") for one in languages}
    except ValueError as error:
        try:
            return _by_name_of_split(dataset, languages)
        except ValueError:
            raise error from error.__cause__
    return {one: {str(name): part for name, part in splits.items()} for one, splits in loaded.items()}


def _by_name_of_split(dataset: str, languages: Sequence[str]) -> dict[str, dict[str, Dataset]]:
    found: dict[str, dict[str, Dataset]] = {}
    for name, part in load_from_hub(dataset, instead=INSTEAD).items():
        split, _, language = str(name).partition("_")
        found.setdefault(language, {})[split] = part
    for language in languages:
        if language not in found or not language:
            raise ValueError(unknown(f"language of {dataset}", language, list(filter(None, found)) or [ONLY]))
    return found


def _require_split(split: str, present: Iterable[str], where: str, unread: Sequence[str] = ()) -> None:
    if split not in present:
        suffixes = ", ".join(suffix or "none" for suffix in SUFFIXES)
        advice = f" ({', '.join(unread)}: the suffixes that are read are {suffixes})" if unread else ""
        raise ValueError(f"{where} has no split {split!r}; present: {', '.join(present) or 'none'}{advice}")
