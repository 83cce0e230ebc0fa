"""From token logits to entity scores: of one data set inside a Trainer, or of a saved model on several languages."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from metaxl_evo.ner.encoding import IGNORED, encode, lost_words, plain_labels
from metaxl_evo.ner.metrics import Scores, numbers_of, word_predictions
from metaxl_evo.ner.pretrained import longest_input, require_padding_unseen, require_readable
from metaxl_evo.ner.scorers import Scorer


class EvaluationSet:
    """A language's dev or test sentences, encoded, with the words that their predictions are scored against.

    Each word has a number, which is part of its label and comes back with its prediction: scores depend on no order of
    the rows, no batch and no padding.

    Args:
        sentences: `tokens` and `ner_tags`.
        max_length: sub-tokens a sentence; the words beyond are predicted O, and counted in `n_truncated_words`.
        scorer: what the words are judged by.
    """

    def __init__(
        self,
        sentences: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        names: Sequence[str],
        scorer: Scorer,
    ):
        self.names, self.scorer = list(names), scorer
        self.references = [[self.names[tag] for tag in tags] for tags in sentences["ner_tags"]]
        self.rows = encode(sentences, tokenizer, max_length, numbered=True)
        self.lost = lost_words(sentences, tokenizer, max_length)
        self._labels = np.sort(numbers_of([row or [IGNORED] for row in self.rows["labels"]]))

    def score(self, predictions: Any, labels: Any) -> Scores:
        """The scores of (n, L) predicted label ids, and what came back with them: the labels of `rows`.

        Raises:
            ValueError: where these are not the labels of all words.
        """
        return self.score_words(self.words(predictions, labels))

    def words(self, predictions: Any, labels: Any) -> list[list[str]]:
        """The predicted label of each word, from what `score` takes.

        Raises:
            ValueError: where these are not the labels of all words.
        """
        if not np.array_equal(np.unique(numbers_of(labels)), self._labels):
            raise ValueError(
                f"the labels that came back are not those of the {len(self._labels)} words to score: evaluate the "
                "rows of this set, all of them, by a trainer of its kind"
            )
        return word_predictions(predictions, labels, list(map(len, self.references)), self.names, self.scorer.unread)

    def score_words(self, words: Sequence[Sequence[str]]) -> Scores:
        """The scores of the predicted labels of all words."""
        counts = {
            "n_truncated_words": self.lost.truncated,
            "n_words_without_sub_token": self.lost.without_sub_token,
        }
        return self.scorer.scores(self.references, words) | counts

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The rates, for the Trainer's log and model selection."""
        words = self.words(prediction.predictions, prediction.label_ids)
        scores = self.scorer.scores(self.references, words)
        return {key: float(scores[key]) for key in self.scorer.units}

    def predict(self, trainer: Trainer) -> Scores:
        """Run the trainer's model over the sentences and score it."""
        previous, trainer.compute_metrics = trainer.compute_metrics, None
        try:
            found = trainer.predict(self.rows)
        finally:
            trainer.compute_metrics = previous
        return self.score(found.predictions, found.label_ids)


def evaluation_sets(
    parts: Mapping[str, Dataset | None],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size: int,
    *,
    names: Sequence[str],
    scorer: Scorer,
) -> dict[str, EvaluationSet]:
    """Those of `parts` that there are, of at most `max_length` sub-tokens or what the model can read.

    Raises:
        ValueError: for sentences that the model cannot read, or reads with their padding.
    """
    longest = min(max_length, longest_input(base))
    found = {
        name: EvaluationSet(sentences, tokenizer, longest, names, scorer)
        for name, sentences in parts.items()
        if sentences is not None
    }
    for one in found.values():
        require_readable(base, one.rows, "eval_max_length")
        require_padding_unseen(base, one.rows, tokenizer.pad_token_id, "per_device_eval_batch_size", batch_size)
    return found


class WordTrainer(Trainer):
    """A Trainer whose evaluation leaves no row out, and brings label ids back beside the numbered labels of words.

    Attributes:
        with_confidence: the predictions are pairs of the label ids and their probabilities.
        of_texts: the model labels a row as a whole; its label stands at the row's one word.
    """

    with_confidence = False
    of_texts = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label_names = ["labels"]  # whatever the arguments call so

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """The loss of the plain labels; (B, T) predicted label ids and numbered labels, padded alike."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        plain = plain_labels(labels)
        inputs = {**inputs, "labels": plain.amax(1) if self.of_texts else plain}
        loss, found, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        logits: Any = found  # with whatever else the model returns behind them
        if logits is None:
            return loss, None, None
        logits = logits[0] if isinstance(logits, tuple) else logits
        if self.of_texts:
            logits = logits[:, None].expand(-1, labels.shape[1], -1)
        if not self.with_confidence:
            return loss, logits.argmax(-1), labels
        confidence, found = logits.float().softmax(-1).max(-1)
        return loss, (found, confidence), labels

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All rows, in their order."""
        with self._every_row():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """All rows, in their order."""
        with self._every_row():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _every_row(self) -> Iterator[None]:
        """Without what training asks of its own batches."""
        args, self.args = self.args, copy.copy(self.args)
        self.args.dataloader_drop_last, self.args.train_sampling_strategy = False, "random"
        self.args.dataloader_persistent_workers = False  # it would keep the rows of another evaluation set
        self.args.dataloader_in_order = True  # gathering cuts the last batch to the size of the shortest one
        try:
            yield
        finally:
            self.args = args
