"""NER data: one loader for the Hub, local folders and the synthetic family, and what a tagger needs of it.

Whatever the source, a language becomes a `DatasetDict` in memory with the columns `tokens` (strings) and `ner_tags`
(a `ClassLabel` over O, B-TYPE and I-TYPE, or over parts of speech), and all languages loaded together share one label
set.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

from datasets import Dataset, DatasetDict, Features

from metaxl_evo.messages import unknown
from metaxl_evo.ner.labels import ner_features
from metaxl_evo.ner.layout import Layout
from metaxl_evo.ner.schemes import DROP, IOB2, NO_WORD, Scheme, TagScheme, TextLabels
from metaxl_evo.ner.sources import SPLITS, Corpus, Sentences, read_folder, read_hub, read_table
from metaxl_evo.ner.synthetic import SyntheticFamily
from metaxl_evo.training.values import evenly

logger = logging.getLogger(__name__)


def load_ner_dataset(
    dataset: str,
    languages: Sequence[str],
    *,
    splits: Sequence[str] = ("train", "validation", "test"),
    names: Sequence[str] | None = None,
    names_of: str = "the model",
    synthetic: SyntheticFamily | None = None,
    layout: Layout | None = None,
) -> dict[str, DatasetDict]:
    """Load the requested splits of every language, all with one label set.

    Args:
        dataset: a folder `LANGUAGE/{train,dev,test}` of text or parquet files, a Hub id with one configuration a
            language, or the word `synthetic`.
        languages: all that meet in one model, the source first. Text files declare no labels, so the first language's
            entity types are the label set there, of which a later, smaller language may lack some.
        splits: only these are required and read; `dev` and `valid` mean `validation`.
        names: the label names of a trained model, which the data must then fit, instead of those of the data.
        names_of: whose names these are, for error messages.
        synthetic: the family that the word `synthetic` stands for; the default one if None.
        layout: what the data do not say of themselves; whatever their tag scheme, IOB2 comes out.

    Raises:
        ValueError: an unknown language, a missing or empty split, a file that cannot be read, a malformed line or tag,
            label sets that differ, or a map of types that are not there. A stray I- is no error: it is counted and
            logged.
        OSError: `dataset` is neither a folder nor a Hub id that can be reached or is in the cache.
    """
    layout = layout or Layout()
    corpus = read_corpus(dataset, languages, splits, layout, synthetic)
    require_types(layout, corpus)
    return label_corpus(corpus, layout, names, names_of)


def read_corpus(
    dataset: str,
    languages: Sequence[str],
    splits: Sequence[str],
    layout: Layout,
    synthetic: SyntheticFamily | None = None,
) -> Corpus:
    """The first half of `load_ner_dataset`: the sentences as read and checked, in IOB2, the types not mapped yet."""
    for split in splits:
        if split not in SPLITS:
            raise ValueError(unknown("split", split, SPLITS))
    wanted = list(dict.fromkeys(SPLITS[split] for split in splits))
    languages = list(dict.fromkeys(languages))
    if dataset == "synthetic":
        corpus = _read_synthetic(synthetic, languages, wanted, layout)
    elif Path(dataset).expanduser().is_dir():
        corpus = read_folder(Path(dataset).expanduser(), languages, wanted, layout)
    else:
        corpus = read_hub(dataset, languages, wanted, layout)
    for language, parts in corpus.items():
        for split, part in parts.items():
            where = f"{dataset}, {language}, {split}"
            _check_sentences(part, where)
            parts[split] = _as_labels(part, layout.scheme, where)
    return corpus


def require_types(layout: Layout, corpus: Corpus) -> None:
    """Refuse a map of a type that no language has, as of a name that is misspelt."""
    parts = [part for splits in corpus.values() for part in splits.values()]
    kind_of = layout.scheme.kind
    there = {kind_of(tag) for part in parts for tags in (*part.tags, part.declared or ()) for tag in tags} - {""}
    for kind in layout.label_map:
        if kind not in there:
            raise ValueError(unknown(f"{layout.scheme.what} of {', '.join(corpus)} in label_map", kind, sorted(there)))


def label_corpus(
    corpus: Corpus, layout: Layout, names: Sequence[str] | None = None, names_of: str = "the model"
) -> dict[str, DatasetDict]:
    """The second half of `load_ner_dataset`: the types mapped, and all languages with one label set."""
    if layout.label_map:
        corpus = {
            language: {split: _mapped(part, layout) for split, part in parts.items()}
            for language, parts in corpus.items()
        }
    features = ner_features(_shared_names(corpus, layout.scheme, names, names_of))
    return {
        language: DatasetDict({split: _to_dataset(part, features) for split, part in parts.items()})
        for language, parts in corpus.items()
    }


def _mapped(part: Sentences, layout: Layout) -> Sentences:
    mapped, label_map = layout.scheme.mapped, layout.label_map
    declared = [name for tag in part.declared or () for name in mapped([tag], label_map)]
    tags = [mapped(tags, label_map) for tags in part.tags]
    kept = [not layout.of_texts or bool(row) for row in tags]
    if not any(kept):
        raise ValueError(f"label_map leaves no text of a split: map a label to another, or fewer to {DROP}")
    return Sentences(
        list(compress(part.tokens, kept)), list(compress(tags, kept)), list(dict.fromkeys(declared)) or None
    )


def sample(dataset: Dataset, size: int | None, seed: int, *, name: str = "the data set") -> Dataset:
    """Draw `size` sentences without replacement (None: all). Of one seed, a small sample is the start of a larger.

    `name` is said where there are fewer.
    """
    if size is None:
        return dataset
    if size < 1:
        raise ValueError(f"the number of sentences must be at least 1, not {size}")
    if size > len(dataset):
        logger.warning("%s: %d sentences asked for, there are only %d: taking all", name, size, len(dataset))
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    return dataset.select(order[:size], keep_in_memory=True)


def shuffled_labels(dataset: Dataset, seed: int) -> Dataset:
    """The same sentences, the labels of all their words permuted: as many of each label, at words of no meaning."""
    rows = dataset["ner_tags"][:]
    tags = iter(random.Random(seed).sample(held := [tag for row in rows for tag in row], len(held)))
    columns = {"tokens": dataset["tokens"][:], "ner_tags": [[next(tags) for _ in row] for row in rows]}
    return Dataset.from_dict(columns, features=dataset.features)


def evaluated_rows(dataset: Dataset, size: int | None, layout: Layout) -> Dataset:
    """`size` rows to score (None: all), or all where there are fewer: the first sentences, or texts evenly spread.

    Files of texts may be sorted by their labels: the first rows would all have one.
    """
    if size is None or size >= len(dataset):
        return dataset
    return dataset.select(evenly(len(dataset), size) if layout.of_texts else range(size))


def overlap(train: Dataset, test: Dataset) -> int:
    """The number of different train sentences that also stand in the test set."""
    return len(set(map(tuple, train["tokens"])) & set(map(tuple, test["tokens"])))


def _to_dataset(part: Sentences, features: Features) -> Dataset:
    return Dataset.from_dict({"tokens": part.tokens, "ner_tags": part.tags}, features=features)


def _read_synthetic(
    family: SyntheticFamily | None, languages: Sequence[str], splits: Sequence[str], layout: Layout
) -> Corpus:
    family = family or SyntheticFamily()
    loaded = {language: family.load(language) for language in languages}
    return {
        language: {split: read_table(parts[split], f"synthetic, {language}, {split}", layout) for split in splits}
        for language, parts in loaded.items()
    }


def _check_sentences(part: Sentences, where: str) -> None:
    if not part.tokens:
        raise ValueError(f"{where} is empty: it must hold at least one sentence")
    for number, (words, tags) in enumerate(zip(part.tokens, part.tags, strict=True)):
        if len(words) != len(tags):
            raise ValueError(
                f"{where}: sentence {number} has {len(words)} tokens but {len(tags)} tags: repair the data"
            )
    if not any(word.strip() for words in part.tokens for word in words):
        raise ValueError(f"{where} has only empty tokens: repair the data")


def _as_labels(part: Sentences, scheme: Scheme, where: str) -> Sentences:
    if isinstance(scheme, TagScheme):
        return _in_iob2(part, scheme, where)
    if isinstance(scheme, TextLabels):
        return part
    kept = [[tag != NO_WORD for tag in tags] for tags in part.tags]
    declared = part.declared and [name for name in part.declared if name != NO_WORD]
    words, tags = (
        [list(compress(*pair)) for pair in zip(rows, kept, strict=True)] for rows in (part.tokens, part.tags)
    )
    return Sentences(words, tags, declared)


def _in_iob2(part: Sentences, scheme: TagScheme, where: str) -> Sentences:
    """The same entities in IOB2; tags that are not as their scheme has them are counted and logged."""
    tags = list(map(scheme.to_iob2, part.tags))
    stray = sum(map(_stray_insides, tags))
    odd = 0 if scheme.name == IOB2 else sum(not scheme.is_well_formed(row) for row in part.tags)
    if stray:
        advice = "kept as they are; of IOB1 they are right, set label_scheme: iob1"
        logger.warning("%s: %d I- tags do not continue an entity of their type (%s)", where, stray, advice)
    if odd:
        logger.warning("%s: not well-formed %s in %d sentences (read leniently)", where, scheme.name.upper(), odd)
    return Sentences(part.tokens, tags, part.declared and scheme.names_in_iob2(part.declared))


def _stray_insides(tags: list[str]) -> int:
    return sum(tag[0] == "I" and tag[2:] != before[2:] for before, tag in zip(["O", *tags], tags, strict=False))


def _shared_names(corpus: Corpus, scheme: Scheme, names: Sequence[str] | None, names_of: str) -> list[str]:
    """The label names: those given, else those that a language declares, else those of the first language's types."""
    parts = [(language, part) for language, splits in corpus.items() for part in splits.values()]
    declared = next(((language, part.declared) for language, part in parts if part.declared), None)
    first = parts[0][0]
    seen = {scheme.kind(tag) for language, part in parts if language == first for tags in part.tags for tag in tags}
    seen -= {""}
    if names is None and declared is None and not seen:
        raise ValueError(f"{first} has no entity: choose a first language with every entity type, or repair its tags")
    if isinstance(scheme, TextLabels) and len(seen) < 2:
        raise ValueError(f"{first}: all labels are {', '.join(seen)}: there is nothing to tell apart")
    owner, chosen = (names_of, list(names)) if names is not None else declared or (first, scheme.label_names(seen))
    for language, part in parts:
        labels = part.declared or sorted({tag for tags in part.tags for tag in tags})
        # Declared label sets must be the same; labels merely seen in text, or judged by a model, may be fewer.
        same = part.declared is None or names is not None or len(labels) == len(chosen)
        if not (same and set(labels) <= set(chosen)):
            raise ValueError(
                f"label sets differ: {owner} has {', '.join(chosen)}, but {language} has {', '.join(labels)}: "
                f"use languages of one label set, or join them by label_map{scheme.advice}, and a model without a "
                "head or with a head for these labels (ignore_mismatched_sizes drops another)"
            )
    return chosen
