"""From token logits to entity scores: of one data set inside a Trainer, or of a saved model on several languages."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from metaxl_evo.messages import unknown
from metaxl_evo.ner.arguments import SHORTEST
from metaxl_evo.ner.data import encode, load_ner_dataset
from metaxl_evo.ner.metrics import Scores, average, entity_scores, scores_table, word_predictions
from metaxl_evo.ner.pretrained import load_classifier, trained_labels
from metaxl_evo.ner.sources import SPLITS
from metaxl_evo.training.checkpoint import require_writable


@dataclass
class EvaluationArguments:
    """What is evaluated on what.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a trained token classifier."})
    dataset: str = field(
        metadata={"help": "Hub id (a configuration a language), a folder LANG/SPLIT, or `synthetic`."}
    )
    languages: list[str] = field(metadata={"help": "Languages to evaluate on, each on its own."})
    split: str = field(default="test", metadata={"help": f"One of {', '.join(SPLITS)}."})
    strict: bool = field(default=False, metadata={"help": "Count only well-formed IOB2 entities."})
    batch_size: int = field(default=32, metadata={"help": "Sentences per device and pass."})
    max_length: int = field(
        default=512, metadata={"help": "Sub-tokens of a sentence at most; words beyond count as O."}
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the scores (default: print only)."})
    overwrite: bool = field(default=False, metadata={"help": "Replace output_file where it exists."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(unknown("split", self.split, SPLITS))
        for name, least in (("batch_size", 1), ("max_length", SHORTEST)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.languages:
            raise ValueError("languages is empty: name at least one language")


class EvaluationSet:
    """A language's dev or test sentences, encoded, with the words that their predictions are scored against.

    Args:
        sentences: `tokens` and `ner_tags`.
        max_length: sub-tokens a sentence; the words beyond are predicted O, and counted in `n_truncated_words`.
        strict: count only well-formed IOB2 entities.
    """

    def __init__(
        self,
        sentences: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        names: Sequence[str],
        strict: bool,
    ):
        encoded = encode(sentences, tokenizer, max_length, keep_words=True)
        self.names, self.strict = list(names), strict
        self.positions: list[list[int]] = encoded["word_positions"][:]
        self.references = [[self.names[tag] for tag in tags] for tags in sentences["ner_tags"]]
        self.rows = encoded.remove_columns("word_positions")

    def score(self, predictions: Any) -> Scores:
        """Entity scores of (n, L) predicted label ids."""
        words = word_predictions(predictions, self.positions, self.names)
        truncated = sum(position < 0 for row in self.positions for position in row)
        return entity_scores(self.references, words, strict=self.strict) | {"n_truncated_words": truncated}

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The three rates, for the Trainer's log and model selection."""
        scores = self.score(prediction.predictions)
        return {key: scores[key] for key in ("precision", "recall", "f1")}

    def predict(self, trainer: Trainer) -> Scores:
        """Run the trainer's model over the sentences and score it."""
        previous, trainer.compute_metrics = trainer.compute_metrics, None
        try:
            return self.score(trainer.predict(self.rows).predictions)
        finally:
            trainer.compute_metrics = previous


def label_ids(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """(B, T, C) -> (B, T): keeps label ids instead of logits (`preprocess_logits_for_metrics`)."""
    return torch.argmax(logits[0] if isinstance(logits, tuple) else logits, dim=-1)


def evaluate_model(settings: EvaluationArguments) -> dict[str, Any]:
    """Score a trained model on each language; prints a table, returns the scores and saves them where asked.

    The result is `{SPLIT: {LANGUAGE: scores, "average": scores}, "settings": {...}}`, as in `results.json` of a run.

    Raises:
        ValueError: for a model without a trained head, data that do not fit it, or an output file that exists or
            cannot be written.
    """
    output = None if settings.output_file is None else Path(settings.output_file)
    if output is not None and output.is_dir():
        raise ValueError(f"output_file: {output} is a folder: name a file in it")
    if output is not None and output.exists() and not settings.overwrite:
        raise ValueError(f"output_file: {output} exists: choose another name, or set overwrite: true")
    names = trained_labels(settings.model_name_or_path)
    if names is None:
        raise ValueError(
            f"{settings.model_name_or_path} has no trained token-classification head: train one with "
            "scripts/train_ner.py and give its output folder"
        )
    data = load_ner_dataset(settings.dataset, settings.languages, splits=[settings.split], names=names)
    base, tokenizer = load_classifier(settings.model_name_or_path, names)
    if output is not None:
        require_writable(output.parent, "output_file")
    scores: dict[str, Scores] = {}
    with tempfile.TemporaryDirectory() as scratch:  # a Trainer wants a folder even where it writes nothing
        trainer = Trainer(
            base,
            TrainingArguments(
                scratch, per_device_eval_batch_size=settings.batch_size, use_cpu=settings.use_cpu, report_to="none"
            ),
            data_collator=DataCollatorForTokenClassification(tokenizer),
            preprocess_logits_for_metrics=label_ids,
        )
        for language, splits in data.items():
            sentences = splits[SPLITS[settings.split]]
            evaluation = EvaluationSet(sentences, tokenizer, settings.max_length, names, settings.strict)
            scores[language] = evaluation.predict(trainer)
    results = {settings.split: {**scores, "average": average(scores)}, "settings": asdict(settings)}
    if trainer.is_world_process_zero():
        print(scores_table(scores))
        if output is not None:
            output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results
