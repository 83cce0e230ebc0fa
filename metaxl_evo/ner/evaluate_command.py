"""Scores of a saved tagger on several languages, and where it errs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from metaxl_evo.messages import unknown
from metaxl_evo.ner.data import evaluated_rows, load_ner_dataset
from metaxl_evo.ner.errors import confusion, errors_text, worst_sentences
from metaxl_evo.ner.layout import LayoutArguments
from metaxl_evo.ner.pretrained import TEXTS, TOKENS
from metaxl_evo.ner.saved_tagger import SavedTagger, SavedTaggerArguments, conll
from metaxl_evo.ner.schemes import PartsOfSpeech, TextLabels
from metaxl_evo.ner.scorers import WordScorer, scorer_of
from metaxl_evo.ner.sources import SPLITS
from metaxl_evo.training.checkpoint import require_writable


@dataclass(kw_only=True)
class EvaluationArguments(SavedTaggerArguments, LayoutArguments):
    """What is evaluated on what.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    dataset: str = field(
        metadata={"help": "Hub id (a configuration a language), a folder LANG/SPLIT, or `synthetic`."}
    )
    languages: list[str] = field(metadata={"help": "Languages to evaluate on, each on its own."})
    split: str = field(default="test", metadata={"help": f"One of {', '.join(SPLITS)}."})
    eval_size: int | None = field(default=None, metadata={"help": "Sentences a language at most (null: all)."})
    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of tags that are integers, from 0 on, e.g. O,B-PER,I-PER."}
    )
    strict: bool = field(default=False, metadata={"help": "Count only well-formed IOB2 entities."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the scores (default: print only)."})
    predictions: str | None = field(
        default=None, metadata={"help": "CoNLL file for each word: token, true and predicted label, confidence."}
    )

    def __post_init__(self) -> None:
        SavedTaggerArguments.__post_init__(self)
        LayoutArguments.__post_init__(self)
        if self.split not in SPLITS:
            raise ValueError(unknown("split", self.split, SPLITS))
        if self.eval_size is not None and self.eval_size < 1:
            raise ValueError(f"eval_size must be at least 1, not {self.eval_size}")
        if not self.languages:
            raise ValueError("languages is empty: name at least one language")


def evaluate_model(settings: EvaluationArguments) -> dict[str, Any]:
    """Score a trained model on each language; prints tables, returns the scores and saves them where asked.

    The result is `{SPLIT: {LANGUAGE: scores, "average": scores}, "settings": {...}}`, as in `results.json` of a run,
    and `"errors"` with the confusion of types and the worst sentences of each language.

    Raises:
        ValueError: for a model without a trained head, data that do not fit it, or a file that exists or cannot be
            written.
    """
    named = {name: settings.new_file(name) for name in ("output_file", "predictions")}
    files = {name: file for name, file in named.items() if file is not None}
    if len(set(files.values())) < len(files):
        raise ValueError(f"output_file and predictions are both {settings.predictions}: name two files")
    head, names = settings.labels((TOKENS, TEXTS))
    scorer, layout = (
        scorer_of(names, strict=settings.strict, of_texts=head is TEXTS),
        settings.layout(settings.label_names),
    )
    if isinstance(scorer, WordScorer):
        layout = replace(layout, scheme=TextLabels() if head is TEXTS else PartsOfSpeech())
    data = load_ner_dataset(settings.dataset, settings.languages, splits=[settings.split], names=names, layout=layout)
    split, size = SPLITS[settings.split], settings.eval_size
    parts = {one: evaluated_rows(splits[split], size, layout) for one, splits in data.items()}
    tagger = SavedTagger(settings, names, parts, scorer)
    for name, file in files.items():
        require_writable(file.parent, name)
    scores, errors, lines = {}, {}, []
    for language, one in tagger.sets.items():
        tokens, found = parts[language]["tokens"][:], tagger.tag(language)
        judged = (one.references, found.labels)
        scores[language] = one.score_words(found.labels)
        errors[language] = {
            "confusion": confusion(*judged, scorer),
            "worst_sentences": worst_sentences(tokens, *judged, scorer),
        }
        lines.append(f"# language = {language}\n{conll(tokens, *judged, found.confidences)}")
    results = {
        settings.split: {**scores, "average": scorer.average(scores)},
        "errors": errors,
        "settings": asdict(settings),
    }
    if tagger.trainer.is_world_process_zero():
        for language in scores:
            print(errors_text(language, scores[language], errors[language], scorer))
        print(scorer.table(scores))
        texts = {"output_file": json.dumps(results, indent=2) + "\n", "predictions": "\n".join(lines)}
        for name, file in files.items():
            file.write_text(texts[name], encoding="utf-8")
    return results
