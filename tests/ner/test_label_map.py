"""Label sets that a map of entity types joins."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from seqeval.metrics.sequence_labeling import get_entities

from metaxl_evo.ner.arguments import NerArguments
from metaxl_evo.ner.data import load_ner_dataset
from metaxl_evo.ner.labels import label_names, map_types
from metaxl_evo.ner.layout import Layout
from metaxl_evo.ner.target_data import load_target
from tests.ner.test_data import tags_of, write


@pytest.mark.parametrize("label_map", [{}, {"LOC": "O"}, {"LOC": "PER"}, {"LOC": "ORG", "PER": "O"}, {"O": "O"}])
def test_every_short_sentence_keeps_its_entities_under_other_names(label_map: dict[str, str]) -> None:
    """As seqeval finds them, which are then renamed; two of one name that touch stay two."""
    tags = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER", "B-O"]
    for sentence in chain.from_iterable(map(list, product(tags, repeat=length)) for length in (1, 2, 3)):
        renamed = [(label_map.get(kind, kind), start, end) for kind, start, end in get_entities(sentence)]
        assert get_entities(map_types(sentence, label_map)) == [one for one in renamed if one[0] != "O"], sentence


def test_a_map_joins_the_label_sets_of_languages(tmp_path: Path) -> None:
    write(tmp_path, train="Ada\tB-PERSON\nsaw\tO\nRome\tB-LOC\n")
    write(tmp_path, "yy", train="Ada\tB-PER\nat\tO\nnoon\tB-DATE\n", test="noon\tB-DATE\nRome\tB-LOC\n")
    ner = NerArguments(
        dataset=str(tmp_path),
        source_languages=["xx"],
        target_languages=["yy"],
        select="last",
        label_map={"PERSON": "PER", "DATE": "O"},
    )
    data = load_target(ner, "yy")
    assert data.names == label_names(("LOC", "PER"))
    assert tags_of(data.test) == [["O", "B-LOC"]]
    assert load_target(ner, "yy", label_names(("LOC", "ORG", "PER"))).names == label_names(("LOC", "ORG", "PER"))
    with pytest.raises(ValueError, match=r"label sets differ: xx has .*, but yy has B-PER, O: .* label_map"):
        load_target(replace(ner, label_map={"DATE": "O"}), "yy")


def test_declared_names_are_mapped_in_their_order(tmp_path: Path) -> None:
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=label_names("ABC")))})
    (tmp_path / "xx").mkdir()
    Dataset.from_dict({"tokens": [["a"]], "ner_tags": [[3]]}, features=features).to_parquet(
        tmp_path / "xx/train.parquet"
    )
    layout = Layout(label_map={"A": "C", "B": "O"})
    train = load_ner_dataset(str(tmp_path), ["xx"], splits=["train"], layout=layout)["xx"]["train"]
    assert (train.features["ner_tags"].feature.names, tags_of(train)) == (label_names("C"), [["O"]])


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({"PRE": "PER"}, "unknown entity type of xx in label_map 'PRE': did you mean 'PER'"),
        ({"PER": "my type"}, "label_map maps an entity type to another, or to O, not to 'my type'"),
        ({"PER": None}, "label_map maps an entity type to another, or to O, not to None"),
    ],
)
def test_maps_that_cannot_be(tmp_path: Path, label_map: dict[str, Any], message: str) -> None:
    write(tmp_path, train="Ada\tB-PER\n")
    with pytest.raises(ValueError, match=message):
        load_ner_dataset(str(tmp_path), ["xx"], splits=["train"], layout=Layout(label_map=label_map))
