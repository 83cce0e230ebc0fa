"""Rows of a distribution of tasks: an epoch is an episode of one meta-batch, a row what one task has in one step.

What a task holds is a function of its number, and the tasks of a meta-batch are numbered on from those of the one
before: they do not depend on how many processes there are, or where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from transformers import EvalPrediction

from metaxl_evo.models.task_batch import SLOT, TASK

Rows = dict[str, Tensor]  # tensors (rows, ...)
INTERVAL = "interval"


class Tasks(Protocol):
    """Numbered tasks, endlessly many."""

    def train(self, task: int, step: int) -> Rows:
        """The rows that a task is adapted to in a step, counted from 0."""

    def judge(self, task: int, step: int) -> Rows:
        """The rows that judge behind a step of training."""

    def test(self, task: int) -> Rows:
        """The rows that an adapted task is measured by."""


class TaskRows(Dataset[Rows]):
    """A row is (step, slot), the slots of a step behind each other; an epoch has the next meta-batch.

    Args:
        rows: (task, step) -> its rows.
        tasks: of a meta-batch.
        steps: of an episode.
    """

    in_order = True

    def __init__(self, rows: Callable[[int, int], Rows], *, tasks: int, steps: int):
        self.rows, self.tasks, self.steps, self.epoch = rows, tasks, steps, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the tasks of this meta-batch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.tasks * self.steps

    def __getitem__(self, index: int) -> Rows:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        step, slot = divmod(index, self.tasks)
        return {SLOT: torch.tensor(slot), **self.rows(self.epoch * self.tasks + slot, step)}


class HeldOutTasks(Dataset[dict[str, Any]]):
    """Whole tasks, as `MetaLearner.adapted` takes them: task 0 to `count` - 1.

    Args:
        tasks: of which they are.
        steps: of the adaptation.
    """

    def __init__(self, tasks: Tasks, count: int, *, steps: int):
        self.tasks, self.count, self.steps = tasks, count, steps

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(f"task {index} of {self.count}")
        train = default_collate([self.tasks.train(index, step) for step in range(self.steps)])
        return {TASK: torch.tensor(index), "train": train, "judge": self.tasks.test(index)}


def measures_of(names: Sequence[str], prediction: Any) -> dict[str, np.ndarray]:
    """What was measured of each task, (tasks,) by name, from the outputs of `Trainer.predict`."""
    held = prediction.predictions
    return dict(zip(names, held if isinstance(held, tuple) else (held,), strict=True))


def mean_measures(names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics`: the mean of each measure over the tasks, and half its 95 % interval (`..._interval`)."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        held = measures_of(names, prediction)
        means = {name: float(values.mean()) for name, values in held.items()}
        return means | {f"{name}_{INTERVAL}": half_interval(values) for name, values in held.items()}

    return compute


def half_interval(values: np.ndarray) -> float:
    """Half the 95 % interval of a mean of many independent numbers."""
    return float(1.96 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("inf")
