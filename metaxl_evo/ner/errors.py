"""What a tagger gets wrong: which types it takes for which, and the sentences with the most wrong entities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from metaxl_evo.ner.metrics import Scores
from metaxl_evo.ner.scorers import EntityScorer, Scorer, Tags

WORST = 10  # sentences
SHOWN = 12  # words of one that are printed

ENTITIES = EntityScorer()


def confusion(references: Tags, predictions: Tags, scorer: Scorer = ENTITIES) -> dict[str, dict[str, int]]:
    """How many entities of each type (rows) were predicted as which, with the same words; O is none of these words.

    So a row adds up to the entities of a type, a column to those predicted, and what is right stands in the diagonal.
    Where words are scored, the same of their labels.
    """
    counts: Counter[tuple[str, str]] = Counter()
    none = scorer.unread
    for pair in zip(references, predictions, strict=True):
        true, found = ({(*words,): kind for kind, *words in scorer.marks(tags)} for tags in pair)
        counts.update((true.get(words, none), found.get(words, none)) for words in true.keys() | found.keys())
    types = [*sorted({kind for pair in counts for kind in pair} - {none}), none]
    return {true: {found: counts[true, found] for found in types if {true, found} != {none}} for true in types}


def worst_sentences(
    tokens: Tags, references: Tags, predictions: Tags, scorer: Scorer = ENTITIES
) -> list[dict[str, Any]]:
    """The sentences, numbered from 1, with the most entities that are missed or wrongly found; ten at most."""
    wrong = [
        len(scorer.marks(reference) ^ scorer.marks(prediction))
        for reference, prediction in zip(references, predictions, strict=True)
    ]
    order = sorted(filter(wrong.__getitem__, range(len(wrong))), key=lambda row: -wrong[row])[:WORST]
    return [
        {
            "sentence": row + 1,
            "wrong": wrong[row],
            "tokens": list(tokens[row]),
            "references": list(references[row]),
            "predictions": list(predictions[row]),
        }
        for row in order
    ]


def errors_text(language: str, scores: Scores, errors: Mapping[str, Any], scorer: Scorer = ENTITIES) -> str:
    """Markdown: the rates of each type in percent, what is taken for what, and the words of the worst sentences."""
    lines = [f"{language}, by type:", "", scorer.details(scores)]
    types = list(errors["confusion"])
    lines += ["", f"{language}, {scorer.marked} that are (rows) and were found to be:", ""]
    lines += [f"| | {' | '.join(types)} |", f"|---|{'---:|' * len(types)}"]
    for true, row in errors["confusion"].items():
        lines.append(f"| {true} | {' | '.join(str(row.get(found, '')) for found in types)} |")
    lines += ["", *(_sentence_text(language, one) for one in errors["worst_sentences"]), ""]
    return "\n".join(lines)


def _sentence_text(language: str, one: Mapping[str, Any]) -> str:
    """`sw, sentence 12, 2 wrong: Ada B-PER/O, Rome B-LOC/B-ORG`, the words whose label is another."""
    words = [
        f"{word} {true}/{found}"
        for word, true, found in zip(one["tokens"], one["references"], one["predictions"], strict=True)
        if true != found
    ]
    more = ", ..." if len(words) > SHOWN else ""
    return f"{language}, sentence {one['sentence']}, {one['wrong']} wrong: {', '.join(words[:SHOWN])}{more}"
