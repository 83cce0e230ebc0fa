"""Confusions and worst sentences against seqeval's counts, over random labels."""

from __future__ import annotations

from random import Random

import pytest
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2

from metaxl_evo.ner.errors import confusion, errors_text, worst_sentences
from metaxl_evo.ner.metrics import entity_scores
from metaxl_evo.ner.scorers import EntityScorer

TAGS = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]


def drawn(seed: int, sentences: int = 60) -> list[list[str]]:
    """Labels of sentences whose lengths are the same for each seed."""
    draw = Random(seed)
    return [draw.choices(TAGS, k=1 + number % 7) for number in range(sentences)]


@pytest.mark.parametrize("strict", [False, True])
def test_rows_and_columns_add_up_to_the_counts_of_seqeval(strict: bool) -> None:
    true, found = drawn(1), drawn(2)
    table = confusion(true, found, EntityScorer(strict))
    mode = {"mode": "strict", "scheme": IOB2} if strict else {}
    report = classification_report(true, found, output_dict=True, zero_division=0, **mode)
    for kind in ("LOC", "ORG", "PER"):
        assert sum(table[kind].values()) == report[kind]["support"]
        assert table[kind][kind] == pytest.approx(report[kind]["recall"] * report[kind]["support"])
        assert sum(row[kind] for row in table.values()) * report[kind]["precision"] == pytest.approx(table[kind][kind])
    assert list(table) == ["LOC", "ORG", "PER", "O"]
    assert sum(count for true, row in table.items() for found, count in row.items() if true != found) > 20


def test_types_are_confused_on_the_same_words_only() -> None:
    table = confusion([["B-PER", "I-PER", "O", "B-LOC"]], [["B-ORG", "I-ORG", "B-PER", "O"]])
    assert table["PER"] == {"LOC": 0, "ORG": 1, "PER": 0, "O": 0}
    assert table["LOC"] == {"LOC": 0, "ORG": 0, "PER": 0, "O": 1}
    assert table["O"] == {"LOC": 0, "ORG": 0, "PER": 1}


def test_the_worst_sentences_have_the_most_wrong_entities() -> None:
    true, found = drawn(3), drawn(4)
    tokens = [[f"w{number}" for number in range(len(tags))] for tags in true]
    worst = worst_sentences(tokens, true, found)

    def wrong(row: int) -> int:
        scores = entity_scores([true[row]], [found[row]])
        right = round(scores["recall"] * scores["n_entities"])
        return scores["n_entities"] + entity_scores([found[row]], [found[row]])["n_entities"] - 2 * right

    assert len(worst) == 10
    assert [one["wrong"] for one in worst] == sorted(map(wrong, range(60)), reverse=True)[:10]
    for one in worst:
        row = one["sentence"] - 1
        assert (one["wrong"], one["tokens"]) == (wrong(row), tokens[row])
        assert (one["references"], one["predictions"]) == (true[row], found[row])
    assert worst_sentences(tokens, true, true) == []


def test_the_text_of_errors() -> None:
    tokens, true, found = [["Ada", "in", "Rome"]], [["B-PER", "O", "B-LOC"]], [["B-PER", "O", "B-ORG"]]
    errors = {"confusion": confusion(true, found), "worst_sentences": worst_sentences(tokens, true, found)}
    text = errors_text("xx", entity_scores(true, found), errors)
    assert "| PER | 100.00 | 100.00 | 100.00 | 1 |" in text
    assert "| LOC | 0 | 1 | 0 | 0 |" in text
    assert text.rstrip().endswith("xx, sentence 1, 2 wrong: Rome B-LOC/B-ORG")
