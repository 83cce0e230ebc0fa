"""Entity scores by seqeval: words aligned with sub-tokens, scores per language, their average and a table.

All scores are fractions in 0..1; only `scores_table` prints percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import datasets
import evaluate
import numpy as np
from seqeval.metrics import accuracy_score, classification_report
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2, Entities

from metaxl_evo.experiments.scores import Rate
from metaxl_evo.ner.encoding import STRIDE

Scores = dict[str, Any]
Mark = tuple[str, int, int]  # its kind, its first and its last word

RATES = ("precision", "recall", "f1", "accuracy")
COUNTS = ("n_sentences", "n_words", "n_entities")


def word_predictions(
    predictions: Any, labels: Any, lengths: Sequence[int], names: Sequence[str], unread: str = "O"
) -> list[list[str]]:
    """The predicted label of each word: that of its first sub-token, and `unread` for a word that has none.

    Every word is judged, so that an entity lost to truncation counts as missed.

    Args:
        predictions, labels: (n, L) label ids and the numbered labels of `encode` that came back with them, in any
            order and padded anywhere with negative labels; or lists of such batches.
        lengths: the words of each sentence.
    """
    found = by_word(predictions, labels, lengths)
    return [[unread if guess is None else names[guess] for guess in row] for row in found]


def by_word(values: Any, labels: Any, lengths: Sequence[int]) -> list[list[Any]]:
    """The value at the first sub-token of each word, as in `word_predictions`; None for a word that has none."""
    numbers, found = numbers_of(labels), _flat(values)[_flat(labels) >= 0]
    words: list[Any] = [None] * sum(lengths)
    for number, value in zip((numbers // STRIDE).tolist(), found.tolist(), strict=True):
        words[number] = value
    ends = list(accumulate(lengths))
    return [words[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def numbers_of(labels: Any) -> np.ndarray:
    """The numbered labels of words in what a Trainer brings back, in its order."""
    flat = _flat(labels)
    return flat[flat >= 0]


def _flat(batches: Any) -> np.ndarray:
    return np.concatenate([np.ravel(batch) for batch in (batches if isinstance(batches, list) else [batches])])


def entity_scores(
    references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], *, strict: bool = False
) -> Scores:
    """Micro-averaged precision, recall and F1 of entities, overall and per type; undefined ratios are 0.

    Lenient like `conlleval` by default: an I- that continues nothing starts an entity. With `strict`, only well-formed
    IOB2 entities count. `accuracy` is that of words; `n_entities` and the other counts are those of the references.

    Raises:
        ValueError: references and predictions differ in the number of sentences or of words in one.
    """
    truth, guess = [list(tags) for tags in references], [list(tags) for tags in predictions]
    if [len(tags) for tags in truth] != [len(tags) for tags in guess]:
        raise ValueError("references and predictions differ in the number of sentences, or of words in a sentence")
    beginnings = "B" if strict else "BI"
    types = sorted({tag[2:] for tags in truth + guess for tag in tags if tag[0] in beginnings})
    report: dict[str, Any] = {}
    if types:  # seqeval cannot report on no entity at all
        mode = {"mode": "strict", "scheme": IOB2} if strict else {}
        report = classification_report(truth, guess, output_dict=True, zero_division=0, **mode)
    n_words = sum(map(len, truth))
    return rates_of(report.get("micro avg", {}), "n_entities") | {
        "accuracy": float(accuracy_score(truth, guess)) if n_words else 0.0,
        "n_sentences": len(truth),
        "n_words": n_words,
        "per_type": {kind: rates_of(report[kind], "n_entities") for kind in types},
    }


def with_sentences(
    scores: Scores, references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], *, strict: bool = False
) -> Scores:
    """The same scores; precision, recall and F1 bring the sentences that they are made of."""
    true, found, both = np.array(
        [_entity_counts(*pair, strict) for pair in zip(references, predictions, strict=True)], dtype=float
    ).reshape(-1, 3).T  # fmt: skip
    parts = {"precision": (both, found), "recall": (both, true), "f1": (2 * both, true + found)}
    return scores | {name: Rate.of(*part, value=scores[name]) for name, part in parts.items()}


def _entity_counts(reference: Sequence[str], prediction: Sequence[str], strict: bool) -> tuple[int, int, int]:
    """Entities of one sentence: in the reference, in the prediction, in both."""
    true, found = (entities(list(tags), strict) for tags in (reference, prediction))
    return len(true), len(found), len(true & found)


def entities(tags: list[str], strict: bool) -> set[Mark]:
    """The entities of a sentence: type, and first and last word."""
    if not strict:
        return set(get_entities(tags))
    (found,) = Entities([tags], IOB2).entities
    return {(one.tag, one.start, one.end - 1) for one in found}


def average(scores: Mapping[str, Scores], rates: Sequence[str] = RATES, counts: Sequence[str] = COUNTS) -> Scores:
    """The unweighted mean of the rates over languages, and the sums of the counts."""
    if not scores:
        raise ValueError("there is no language to average over")
    rows = list(scores.values())
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rates}
    return means | {key: sum(row[key] for row in rows) for key in counts}


def scores_table(scores: Mapping[str, Scores]) -> str:
    """A Markdown table, one row a language and their average last; rates in percent."""
    lines = ["| language | F1 | precision | recall | sentences | entities |", "|---|---:|---:|---:|---:|---:|"]
    for language, row in [*scores.items(), ("average", average(scores))]:
        lines.append(f"| {language} | {_percent(row)} | {row['n_sentences']} | {row['n_entities']} |")
    return "\n".join(lines)


def types_table(scores: Mapping[str, Any]) -> str:
    """A Markdown table of one language's scores, one row a type of entity; rates in percent."""
    lines = ["| type | F1 | precision | recall | entities |", "|---|---:|---:|---:|---:|"]
    for kind, row in scores["per_type"].items():
        lines.append(f"| {kind} | {_percent(row)} | {row['n_entities']} |")
    return "\n".join(lines)


def _percent(row: Mapping[str, Any]) -> str:
    return " | ".join(f"{100 * row[key]:.2f}" for key in ("f1", "precision", "recall"))


def rates_of(row: Mapping[str, Any], counted: str) -> Scores:
    """Plain Python numbers, which go into JSON, from a row of a report; zeros from an empty one.

    `counted`: the name of how many there are of the row's kind.
    """
    keys = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
    rates: Scores = {ours: float(row.get(theirs, 0.0)) for ours, theirs in keys.items()}
    return rates | {counted: int(row.get("support", 0))}


class EntityF1(evaluate.Metric):
    """`entity_scores` as a metric of `evaluate`, which unlike `evaluate.load("seqeval")` needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="Entity precision, recall and F1 by seqeval.",
            citation="",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(
        self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], strict: bool = False
    ) -> Scores:
        return entity_scores(references, predictions, strict=strict)
