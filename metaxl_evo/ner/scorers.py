"""What a tagger is scored by: the entities that its labels make, or each label of a word or a text by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from metaxl_evo.experiments.scores import Rate
from metaxl_evo.ner.metrics import (
    COUNTS,
    RATES,
    Mark,
    Scores,
    average,
    entities,
    entity_scores,
    rates_of,
    scores_table,
    types_table,
    with_sentences,
)
from metaxl_evo.ner.schemes import POS_TAGS

Tags = Sequence[Sequence[str]]


class Scorer(ABC):
    """How labels of words are judged.

    Attributes:
        units: score -> its unit, of those that a log and a table have; the first is compared and chooses a checkpoint.
        unread: the label of a word that the model has not read, which marks nothing that can be right.
        marked: what a label marks, in the plural.
    """

    units: ClassVar[Mapping[str, str]]
    unread: str
    marked: str

    @abstractmethod
    def marks(self, tags: Sequence[str]) -> set[Mark]:
        """What the labels of a sentence mark: kind, and first and last word."""

    @abstractmethod
    def scores(self, references: Tags, predictions: Tags) -> Scores:
        """All scores of a test set, fractions in 0..1; those that are ratios over sentences bring these."""

    @abstractmethod
    def average(self, scores: Mapping[str, Scores]) -> Scores:
        """The unweighted mean of the rates over languages, and the sums of the counts."""

    @abstractmethod
    def table(self, scores: Mapping[str, Scores]) -> str:
        """A Markdown table, one row a language and their average last; rates in percent."""

    @abstractmethod
    def details(self, scores: Scores) -> str:
        """A Markdown table of one language's scores, one row a kind; rates in percent."""


@dataclass(frozen=True)
class EntityScorer(Scorer):
    """Micro-averaged precision, recall and F1 of entities, by seqeval.

    Args:
        strict: count only well-formed IOB2 entities.
    """

    units = dict.fromkeys(("f1", "precision", "recall"), "%")
    unread = "O"
    marked = "entities"

    strict: bool = False

    def marks(self, tags: Sequence[str]) -> set[Mark]:
        return entities(list(tags), self.strict)

    def scores(self, references: Tags, predictions: Tags) -> Scores:
        found = entity_scores(references, predictions, strict=self.strict)
        return with_sentences(found, references, predictions, strict=self.strict)

    def average(self, scores: Mapping[str, Scores]) -> Scores:
        return average(scores, RATES, COUNTS)

    def table(self, scores: Mapping[str, Scores]) -> str:
        return scores_table(scores)

    def details(self, scores: Scores) -> str:
        return types_table(scores)


@dataclass(frozen=True)
class WordScorer(Scorer):
    """The share of words with the right label, and the mean F1 of all labels that occur, each counting the same."""

    units = dict.fromkeys(("accuracy", "macro_f1"), "%")
    unread = "-"
    marked = "words"
    counted = "n_words"
    counts: ClassVar = {"sentences": "n_sentences", "words": "n_words"}  # of a table

    def marks(self, tags: Sequence[str]) -> set[Mark]:
        return {(tag, place, place) for place, tag in enumerate(tags)}

    def scores(self, references: Tags, predictions: Tags) -> Scores:
        from sklearn.metrics import classification_report  # slow to import, and entities do without

        pairs = [list(zip(*pair, strict=True)) for pair in zip(references, predictions, strict=True)]
        true, found = zip(*(pair for row in pairs for pair in row), strict=True)
        labels = sorted({*true, *found} - {self.unread})
        report = classification_report(true, found, labels=labels, output_dict=True, zero_division=0)
        right = [sum(here == there for here, there in row) for row in pairs]
        return {
            "accuracy": Rate.of(right, list(map(len, pairs))),
            "macro_f1": float(report["macro avg"]["f1-score"]),
            "n_sentences": len(pairs),
            self.counted: len(true),
            "per_type": {label: rates_of(report[label], self.counted) for label in labels},
        }

    def average(self, scores: Mapping[str, Scores]) -> Scores:
        counts = [name for name in ("n_sentences", self.counted) if all(name in row for row in scores.values())]
        return average(scores, tuple(self.units), counts)

    def table(self, scores: Mapping[str, Scores]) -> str:
        lines = [
            f"| language | accuracy | macro F1 | {' | '.join(self.counts)} |",
            f"|---|---:|---:|{'---:|' * len(self.counts)}",
        ]
        for language, row in [*scores.items(), ("average", self.average(scores))]:
            rates = " | ".join(f"{100 * row[name]:.2f}" for name in self.units)
            lines.append(f"| {language} | {rates} | {' | '.join(str(row[name]) for name in self.counts.values())} |")
        return "\n".join(lines)

    def details(self, scores: Scores) -> str:
        lines = [f"| label | F1 | precision | recall | {self.marked} |", "|---|---:|---:|---:|---:|"]
        for label, row in scores["per_type"].items():
            rates = " | ".join(f"{100 * row[name]:.2f}" for name in ("f1", "precision", "recall"))
            count = row.get(self.counted, row.get("n_words"))  # files of before called texts words
            lines.append(f"| {label} | {rates} | {count} |")
        return "\n".join(lines)


@dataclass(frozen=True)
class TextScorer(WordScorer):
    """The share of texts with the right label, and the mean F1 of all labels that occur, each counting the same."""

    marked = "texts"
    counted = "n_texts"
    counts: ClassVar = {"texts": "n_sentences"}


def scorer_of(names: Sequence[str], *, strict: bool = False, of_texts: bool = False) -> Scorer:
    """What a model with these labels is scored by: texts, or words where the labels are parts of speech."""
    if of_texts:
        return TextScorer()
    return WordScorer() if set(names) <= set(POS_TAGS) else EntityScorer(strict)
