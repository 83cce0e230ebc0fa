"""Entity scores against hand counts and against seqeval called directly."""

from __future__ import annotations

import socket
import warnings
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2
from transformers import AutoTokenizer

from metaxl_evo.ner.data import load_ner_dataset
from metaxl_evo.ner.encoding import STRIDE, encode
from metaxl_evo.ner.metrics import (
    EntityF1,
    average,
    entity_scores,
    scores_table,
    with_sentences,
    word_predictions,
)

# 4 entities; found: Ada (PER) and Rome (LOC). Wrong: the ORG is cut short, the second PER is taken for a LOC.
REFERENCES = [["B-PER", "I-PER", "O", "B-ORG", "I-ORG"], ["B-LOC", "O", "B-PER"]]
PREDICTIONS = [["B-PER", "I-PER", "O", "B-ORG", "O"], ["B-LOC", "O", "B-LOC"]]
STRAY = [["O", "I-PER", "O", "I-ORG", "I-ORG"], ["B-LOC", "O", "I-PER"]]


def test_hand_counted_scores() -> None:
    assert entity_scores(REFERENCES, PREDICTIONS) == {
        "precision": 2 / 4,
        "recall": 2 / 4,
        "f1": 0.5,
        "n_entities": 4,
        "accuracy": 6 / 8,
        "n_sentences": 2,
        "n_words": 8,
        "per_type": {
            "LOC": {"precision": 1 / 2, "recall": 1.0, "f1": pytest.approx(2 / 3), "n_entities": 1},
            "ORG": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n_entities": 1},
            "PER": {"precision": 1.0, "recall": 1 / 2, "f1": pytest.approx(2 / 3), "n_entities": 2},
        },
    }


@pytest.mark.parametrize("predictions", [PREDICTIONS, STRAY, REFERENCES])
@pytest.mark.parametrize("strict", [False, True])
def test_scores_are_those_of_seqeval(predictions: list[list[str]], strict: bool) -> None:
    mode = {"mode": "strict", "scheme": IOB2} if strict else {}
    scores = entity_scores(REFERENCES, predictions, strict=strict)
    for key, oracle in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert scores[key] == pytest.approx(oracle(REFERENCES, predictions, zero_division=0, **mode), abs=1e-12)


@pytest.mark.parametrize("strict", [False, True])
def test_scores_bring_their_sentences(strict: bool) -> None:
    """Those that are left out change the score as seqeval says."""
    tags, rng = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"], np.random.default_rng(0)
    true, found = ([rng.choice(tags, 1 + index % 7).tolist() for index in range(60)] for _ in range(2))
    scores = with_sentences(entity_scores(true, found, strict=strict), true, found, strict=strict)
    kept = rng.random(60) < 0.5
    halves = [[one for one, keep in zip(part, kept, strict=True) if keep] for part in (true, found)]
    for name, value in entity_scores(*halves, strict=strict).items():
        if name in ("precision", "recall", "f1"):
            above, below = scores[name].outcomes[kept].sum(0)
            assert 0 < above / below == pytest.approx(value, rel=1e-12)


def test_strict_scores_refuse_a_stray_inside() -> None:
    lenient, strict = (entity_scores(REFERENCES, STRAY, strict=strict) for strict in (False, True))
    assert lenient["recall"] == 3 / 4  # ORG, LOC and the second PER
    assert (strict["precision"], strict["recall"]) == (1.0, 1 / 4)  # LOC alone begins with B-


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("references", "predictions", "n_entities"),
    [([], [], 0), ([[]], [[]], 0), ([["O"]], [["O"]], 0), ([["O"]], [["B-PER"]], 0), ([["B-PER"]], [["O"]], 1)],
)
def test_undefined_ratios_are_zero_without_a_warning(
    references: list[list[str]], predictions: list[list[str]], n_entities: int, strict: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = entity_scores(references, predictions, strict=strict)
    assert (scores["precision"], scores["recall"], scores["f1"]) == (0.0, 0.0, 0.0)
    assert scores["n_entities"] == n_entities


def test_strict_without_a_beginning_is_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert entity_scores([["I-PER"]], [["I-PER"]], strict=True)["n_entities"] == 0
    assert entity_scores([["I-PER"]], [["I-PER"]])["f1"] == 1.0


@pytest.mark.parametrize("predictions", [[["O"]], [["O"], ["O", "O"]]])
def test_scores_of_unequal_lengths(predictions: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="differ in the number of sentences, or of words"):
        entity_scores([["O"], ["O"]], predictions)


@pytest.mark.parametrize("container", [np.array, torch.tensor, lambda rows: [np.array([row]) for row in rows]])
def test_words_take_the_label_of_their_first_sub_token(container: Any) -> None:
    """Whatever the order of the rows, the side of the padding, and whether batches come apart or as one array."""
    word = [STRIDE * number for number in range(6)]
    predictions = container([[9, 9, 9, 0, 1], [9, 1, 2, 0, 9]])
    labels = container([[-100, -100, -100, -100, word[5] + 2], [-100, word[0], word[1] + 1, word[3], -100]])
    found = word_predictions(predictions, labels, [4, 0, 2], ["O", "B-PER", "I-PER"])
    assert found == [["B-PER", "I-PER", "O", "O"], [], ["O", "B-PER"]]


def test_an_entity_lost_to_truncation_is_missed(shared: Path) -> None:
    """A tagger that is right wherever it can look loses exactly the entities that it cannot see whole."""
    test = load_ner_dataset(str(shared / "data/wikiann"), ["ig"], splits=["test"])["ig"]["test"]
    names = test.features["ner_tags"].feature.names
    references = [[names[tag] for tag in tags] for tags in test["ner_tags"]]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/xlmr-tokenizer")
    n_entities = sum(tag.startswith("B-") for tags in references for tag in tags)
    scores = {}
    for max_length in (512, 8):
        labels = [np.array(row) for row in encode(test, tokenizer, max_length, numbered=True)["labels"]]
        predictions = word_predictions([row % STRIDE for row in labels], labels, list(map(len, references)), names)
        assert [len(tags) for tags in predictions] == [len(tags) for tags in references]
        scores[max_length] = entity_scores(references, predictions)
    assert scores[512]["f1"] == 1.0
    assert scores[8]["recall"] < 0.9
    assert scores[8]["n_entities"] == scores[512]["n_entities"] == n_entities


def test_average_and_table() -> None:
    good, bad = entity_scores(REFERENCES, REFERENCES), entity_scores(REFERENCES[:1], [["O"] * 5])
    mean = average({"sw": good, "ig": bad})
    assert (mean["f1"], mean["precision"], mean["recall"]) == (0.5, 0.5, 0.5)
    assert (mean["n_sentences"], mean["n_entities"], mean["n_words"]) == (3, 6, 13)
    assert mean["accuracy"] == (1 + 1 / 5) / 2
    assert scores_table({"sw": good, "ig": bad}).splitlines() == [
        "| language | F1 | precision | recall | sentences | entities |",
        "|---|---:|---:|---:|---:|---:|",
        "| sw | 100.00 | 100.00 | 100.00 | 2 | 4 |",
        "| ig | 0.00 | 0.00 | 0.00 | 1 | 2 |",
        "| average | 50.00 | 50.00 | 50.00 | 3 | 6 |",
    ]
    with pytest.raises(ValueError, match="no language"):
        average({})


def test_metric_of_evaluate_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it went online"))
    metric = EntityF1()
    metric.add_batch(predictions=[["B-PER"], ["O", "O"]], references=[["B-PER"], ["O", "B-LOC"]])
    scores = metric.compute(strict=True)
    assert (scores["precision"], scores["recall"], scores["n_words"]) == (1.0, 0.5, 3)
    assert isinstance(metric, evaluate.Metric)
