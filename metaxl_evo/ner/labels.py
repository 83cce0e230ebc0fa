"""The labels of named entities, in IOB2: their order, and the columns of a data set that has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from datasets import ClassLabel, Features, List, Value


def ner_features(names: Sequence[str]) -> Features:
    """The columns of every NER data set here."""
    return Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(names)))})


def label_names(types: Iterable[str]) -> list[str]:
    """The canonical label order: O, then B- and I- of each entity type, the types in alphabetical order."""
    return ["O", *(f"{position}-{kind}" for kind in sorted(types) for position in "BI")]


def map_types(tags: Sequence[str], label_map: Mapping[str, str]) -> list[str]:
    """A sentence's IOB2 tags with each type as `label_map` has it, a type or O; entities that touch stay apart."""
    mapped: list[str] = []
    for before, tag in zip(["O", *tags], tags, strict=False):
        kind = label_map.get(tag[2:], tag[2:]) if tag != "O" else "O"
        is_another = tag[2:] != before[2:] and bool(mapped) and mapped[-1][2:] == kind
        mapped.append("O" if kind == "O" else f"{'B' if is_another else tag[0]}-{kind}")
    return mapped
