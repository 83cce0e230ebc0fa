"""What leaves doubtful labels out without learning weights: small losses, and confident learning.

The baselines of learned weights. Neither sees the clean texts, both train for as many steps as any other method.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import log_softmax
from torch import Tensor
from transformers import set_seed

from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.weighting.trainer import WeightingTrainer
from metaxl_evo.weighting.weighted_text import WeightedText

FOLDS = 3


class SmallLossText(WeightedText):
    """inner loss = mean of the smallest losses of a micro-batch: of its items, or of the tokens of whole rows.

    Source: Han et al., Co-teaching, NeurIPS 2018, Algorithm 1, with one network.

    Attributes:
        left_out: the share of a micro-batch, its largest losses, that does not count now.
    """

    left_out = 0.0

    def inner_loss(self, batch: Batch) -> Tensor:
        losses = self.losses(batch, tokens=self.tokens)
        if self.per_token or not self.tokens:
            return smallest(losses.detach(), self.left_out) * losses
        of_rows = smallest(self._row_means(batch, losses.detach()), self.left_out)
        kept = of_rows[self.token_rows(batch)] > 0
        return kept * losses * (len(losses) / kept.sum().clamp(min=1))


def smallest(losses: Tensor, left_out: float) -> Tensor:
    """Weights (N,), 0 for a share of the largest losses, else alike, with mean 1; at least one loss counts."""
    kept = max(1, round(len(losses) * (1 - left_out)))
    chosen = losses.argsort(stable=True)[:kept]
    return torch.zeros_like(losses).index_fill(0, chosen, len(losses) / kept)


class SmallLossTrainer(WeightingTrainer):
    """Trains a `SmallLossText`: the share that is left out grows to `drop_rate`, then stays.

    Args:
        drop_rate: share of a micro-batch, 0 to below 1.
        drop_warmup: the part of the steps, above 0, in which it grows.
    """

    def __init__(self, *given: Any, drop_rate: float, drop_warmup: float = 0.1, **further: Any) -> None:
        super().__init__(*given, **further)
        self.drop_rate, self.drop_warmup = drop_rate, drop_warmup

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        done = self.state.global_step / (self.drop_warmup * self.state.max_steps)
        self.model.left_out = self.drop_rate * min(done, 1.0)  # type: ignore[assignment]
        return super().training_step(model, inputs, num_items_in_batch)


class ConfidentTrainer(WeightingTrainer):
    """Trains on the rows whose labels confident learning does not doubt.

    Each of three parts is told by a copy of the model that trained on the two others, with the same settings; cleanlab
    reads these probabilities. What it doubts has the weight 0 in `said`, all else 1; `loss` there is that of the
    copies. It takes the time of four trainings.

    Source: Northcutt et al., Confident Learning, JAIR 2021.

    Raises:
        ValueError: where too few texts are left to train on.
    """

    def train(self, *given: Any, **further: Any) -> Any:
        rows: Any = self.train_dataset
        labels = np.asarray(rows["labels"])
        logits = self._told(rows, labels)
        kept = ~doubted(labels, logits)
        if len(np.unique(labels[kept])) < len(np.unique(labels)):
            raise ValueError(
                f"method confident doubts all labels of a class, and keeps {kept.sum()} of {len(kept)} texts: train "
                "longer, or use another method"
            )
        losses = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
        self.said = pd.DataFrame({"weight": kept.astype(float), "loss": losses})
        self.train_dataset = rows.select(np.flatnonzero(kept))
        set_seed(self.args.seed)  # whatever the copies drew
        return super().train(*given, **further)

    def _told(self, rows: Any, labels: np.ndarray) -> np.ndarray:
        """Logits (N, K) of each row by the copy that did not train on it."""
        told, parts = None, folds(labels, self.args.seed)
        for number in range(FOLDS):
            inside, outside = np.flatnonzero(parts != number), np.flatnonzero(parts == number)
            found = self._trained_on(rows.select(inside), rows.select(outside))
            told = np.zeros((len(labels), found.shape[1])) if told is None else told
            told[outside] = found
        assert told is not None
        return told

    def _trained_on(self, inside: Any, outside: Any) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            args = copy.copy(self.args)
            args.output_dir, args.report_to, args.save_strategy, args.eval_strategy = folder, [], "no", "no"
            args.load_best_model_at_end, args.push_to_hub = False, False
            further: Any = {"processing_class": self.processing_class, "data_collator": self.data_collator}
            trainer = WeightingTrainer(copy.deepcopy(self.model), args, train_dataset=inside, **further)
            trainer.train()
            predictions: Any = trainer.predict(outside).predictions
        return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions, np.float64)


def folds(labels: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each row, (N,), each with its part of every class."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    parts = np.empty(len(labels), int)
    parts[by_class] = np.arange(len(labels)) % FOLDS
    return parts


def doubted(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Whether cleanlab takes a label for wrong, (N,), by logits (N, K) of rows that were not trained on."""
    from cleanlab.filter import find_label_issues

    probabilities = np.exp(log_softmax(logits, axis=1))
    found: np.ndarray = find_label_issues(labels, probabilities, n_jobs=1)  # one process: ours may be one of several
    return found


def refuse_drops(method: str, drop_rate: float | None, drop_warmup: float, left_out: float | None) -> None:
    """Refuse shares that cannot be, and small losses of which none is left out.

    Raises:
        ValueError: one line.
    """
    if drop_rate is not None and not 0 < drop_rate < 1:
        raise ValueError(f"drop_rate must be above 0 and below 1, not {drop_rate}")
    if not 0 < drop_warmup <= 1:
        raise ValueError(f"drop_warmup must be above 0 and at most 1, not {drop_warmup}")
    if method == "small_loss" and not left_out:
        raise ValueError("method small_loss leaves out drop_rate of a batch: set it to the share of wrong labels")


def refuse_lone_rows(method: str, normalisation: str, per_token: bool, args: MetaTrainingArguments) -> None:
    """Refuse batches with one row, where rows are compared: small losses, and weights that are divided by a mean.

    Raises:
        ValueError: one line.
    """
    if per_token or args.per_device_train_batch_size > 1:
        return
    if method == "weighted" and normalisation != "mean":
        raise ValueError("weights of a micro-batch of one are 1 once divided: set weight_normalisation to mean")
    if method == "small_loss":
        raise ValueError("small_loss compares the losses of a batch: set per_device_train_batch_size above 1")


def require_cleanlab() -> None:
    """Raises the error of a package that is not installed."""
    if importlib.util.find_spec("cleanlab") is None:
        raise ValueError("method confident is cleanlab's: pip install metaxl_evo[cleanlab], or use small_loss")
