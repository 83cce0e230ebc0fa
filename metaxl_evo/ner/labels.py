"""The labels of named entities, in IOB2: their order, and the columns of a data set that has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from datasets import ClassLabel, Features, List, Value


def ner_features(names: Sequence[str]) -> Features:
    """The columns of every NER data set here."""
    return Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(names)))})


def label_names(types: Iterable[str]) -> list[str]:
    """The canonical label order: O, then B- and I- of each entity type, the types in alphabetical order."""
    return ["O", *(f"{position}-{kind}" for kind in sorted(types) for position in "BI")]
