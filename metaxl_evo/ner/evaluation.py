"""From token logits to entity scores of one data set, inside a Trainer or alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer

from metaxl_evo.ner.data import encode
from metaxl_evo.ner.metrics import Scores, entity_scores, word_predictions


class EvaluationSet:
    """A language's dev or test sentences, encoded, with the words that their predictions are scored against.

    Args:
        sentences: `tokens` and `ner_tags`.
        max_length: sub-tokens a sentence; the words beyond are predicted O, and counted in `n_truncated_words`.
        strict: count only well-formed IOB2 entities.
    """

    def __init__(
        self, sentences: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, names: Sequence[str], strict: bool
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
