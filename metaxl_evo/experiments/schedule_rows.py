"""Which rows train and which judge in each of many trainings, and in what order: functions of the seed alone."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Splits:
    """Training rows of which another part judges each training.

    Args:
        rows: all of them.
        judging: how many judge.
        seed: of the splits and of the order.
    """

    rows: Sized
    judging: int
    seed: int

    @lru_cache(maxsize=2)  # noqa: B019 (as long as the run)
    def of(self, training: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the rows that train in this training, and of those that judge it."""
        order = np.random.default_rng([self.seed, 0, training]).permutation(len(self.rows))
        return order[self.judging :], order[: self.judging]

    @lru_cache(maxsize=2)  # noqa: B019
    def shuffled(self, training: int, epoch: int) -> np.ndarray:
        """Those that train, in the order of an epoch of this training."""
        train, _ = self.of(training)
        return np.random.default_rng([self.seed, 1, training, epoch]).permutation(train)

    def whole(self, batch: int) -> int:
        """How many rows an epoch of whole batches has.

        Raises:
            ValueError: for fewer rows than a batch has.
        """
        train = len(self.rows) - self.judging
        if train < batch:
            raise ValueError(
                f"{train} rows train, fewer than the {batch} of a batch: lower per_device_train_batch_size or "
                "validation_share"
            )
        return train // batch * batch

    def number(self, training: int, index: int, whole: int) -> int:
        """The number of the row that comes at place `index` of a training, whose epochs have `whole` rows."""
        epoch, place = divmod(index, whole)
        return int(self.shuffled(training, epoch)[place])


class Training(Protocol):
    """The rows of the training that is being made, and its number."""

    splits: Splits
    epoch: int


class JudgingRows:
    """The numbers of the rows that judge the training which is being made: few meta steps read them.

    Args:
        training: the rows of the trainings.
    """

    def __init__(self, training: Training) -> None:
        self.training = training

    def __len__(self) -> int:
        return self.training.splits.judging

    def __getitem__(self, index: int) -> dict[str, int]:
        _, judges = self.training.splits.of(self.training.epoch)
        return {"judge": int(judges[index])}
