"""Tag schemes against seqeval's own: conversion keeps the entities, and no other spelling of them passes for IOB2."""

from __future__ import annotations

from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, Entities

from metaxl_evo.ner.arguments import NerArguments
from metaxl_evo.ner.data import load_ner_dataset
from metaxl_evo.ner.layout import Layout
from metaxl_evo.ner.schemes import PREFIXES, TagScheme
from tests.ner.test_data import tags_of, write

OWN = {"iob2": IOB2, "iob1": IOB1, "bioes": IOBES, "bilou": BILOU}


def entities(tags: list[str], scheme: Any) -> set[Any]:
    return {one.to_tuple()[1:] for sentence in Entities([tags], scheme).entities for one in sentence}


@pytest.mark.parametrize("name", OWN)
def test_every_short_sentence_keeps_its_entities(name: str) -> None:
    """All sequences of up to three tags of two types, as far as seqeval finds no tag outside of all entities."""
    scheme, seen = TagScheme(name), 0
    tags = ["O", *(f"{prefix}-{kind}" for prefix in PREFIXES[name] for kind in ("PER", "LOC"))]
    for sentence in chain.from_iterable(map(list, product(tags, repeat=length)) for length in (1, 2, 3)):
        before = entities(sentence, OWN[name])
        whole = sum(end - start for _, start, end in before) == sum(tag != "O" for tag in sentence)
        assert scheme.is_well_formed(sentence) == whole, sentence
        if whole:
            assert entities(scheme.to_iob2(sentence), IOB2) == before, sentence
            seen += 1
    assert seen > 30


SENTENCE = ["Ada", "Lovelace", "Paul", "saw", "York"]  # two people that touch, and a place
WRITTEN = {
    "iob2": ["B-PER", "I-PER", "B-PER", "O", "B-LOC"],
    "iob1": ["I-PER", "I-PER", "B-PER", "O", "I-LOC"],
    "bioes": ["B-PER", "E-PER", "S-PER", "O", "S-LOC"],
    "bilou": ["B-PER", "L-PER", "U-PER", "O", "U-LOC"],
}
NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def read(root: Path, name: str, tags: list[str], kind: str, entity_type: str | None = None) -> Dataset:
    """One sentence that a text file, or a table of strings or of class labels, holds."""
    if kind == "text":
        write(root, train="".join(f"{word}\t{tag}\n" for word, tag in zip(SENTENCE, tags, strict=True)))
    else:
        (root / "xx").mkdir(parents=True)
        declared = List(ClassLabel(names=list(dict.fromkeys(["O", *sorted(tags)]))))
        features = Features({"tokens": List(Value("string")), "ner_tags": declared}) if kind == "classes" else None
        table = {"tokens": [SENTENCE], "ner_tags": [tags]}
        Dataset.from_dict(table, features=features).to_parquet(root / "xx/train.parquet")
    layout = Layout(TagScheme(name, entity_type))
    return load_ner_dataset(str(root), ["xx"], splits=["train"], layout=layout)["xx"]["train"]


@pytest.mark.parametrize("kind", ["text", "strings", "classes"])
def test_all_sources_come_out_in_iob2(tmp_path: Path, kind: str) -> None:
    for name, tags in WRITTEN.items():
        train = read(tmp_path / name, name, tags, kind)
        assert tags_of(train) == [WRITTEN["iob2"]]
        bare = read(tmp_path / f"bare {name}", name, [tag[0] for tag in tags], kind, "ENT")
        assert tags_of(bare) == [[tag[:2] + "ENT" * (tag != "O") for tag in WRITTEN["iob2"]]]
        if name != "iob2":
            assert sorted(train.features["ner_tags"].feature.names) == sorted(NAMES)


@pytest.mark.parametrize(
    ("name", "entity_type", "tag", "advice"),
    [
        ("iob2", None, "S-PER", "a tag is O, B-TYPE or I-TYPE: it looks like BIOES: set label_scheme: bioes"),
        ("iob2", None, "L-PER", "it looks like BILOU: set label_scheme: bilou"),
        ("bioes", None, "U-PER", "a tag is O, B-TYPE, I-TYPE, E-TYPE or S-TYPE: it looks like BILOU"),
        ("iob2", None, "B", "it names no type: set entity_type, e.g. ENT"),
        ("bilou", "ENT", "U-PER", "a tag is O, B, I, L or U: it has a type: leave entity_type out"),
        ("iob2", "ENT", "S", "it looks like BIOES: set label_scheme: bioes"),
        ("iob2", None, "PER", "a tag is O, B-TYPE or I-TYPE"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "strings", "classes"])
def test_another_scheme_is_named(
    tmp_path: Path, kind: str, name: str, entity_type: str | None, tag: str, advice: str
) -> None:
    with pytest.raises(ValueError, match=rf"malformed tag '{tag}': .*{advice}"):
        read(tmp_path, name, [tag, *["O"] * 4], kind, entity_type)


def test_tags_that_their_scheme_does_not_know_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = read(tmp_path, "bioes", ["E-PER", "I-LOC", "B-LOC", "O", "S-LOC"], "text")
    assert tags_of(train) == [["B-PER", "B-LOC", "B-LOC", "O", "B-LOC"]]
    assert "xx, train: not well-formed BIOES in 1 sentences (read leniently)" in caplog.text


def test_schemes_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"unknown label_scheme 'bio': .*Valid: iob2, iob1, bioes, bilou"):
        NerArguments(label_scheme="bio")
    with pytest.raises(ValueError, match=r"entity_type must be one word, e.g. ENT, not 'my type'"):
        NerArguments(entity_type="my type")
