"""A text classifier whose optimiser follows a schedule, and the rows of its trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from datasets import Dataset
from torch import Tensor, nn

from metaxl_evo.experiments.schedule_rows import Splits
from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.schedule import Schedule
from metaxl_evo.models.scheduled import Scheduled


class ScheduledText(Scheduled):
    """Both losses are those of the head; the meta parameters are numbers of the optimiser.

    A batch that judges has the numbers, `judge` (B,), of its rows. The base never drops out: a mask of a step would be
    no part of the training that a hypergradient goes through.

    Args:
        rows: encoded texts with their labels, of which some judge.
        collate: rows -> a batch.
        steps: of a training.
        ranges: kind -> the least and the largest value.
    """

    def __init__(
        self,
        base: nn.Module,
        meta: Schedule,
        rows: Dataset,
        collate: Callable[[Any], Any],
        *,
        steps: int,
        ranges: Mapping[str, tuple[float, float]],
    ) -> None:
        super().__init__(base, meta)
        self.rows, self.collate = rows, collate
        self.follow(steps, ranges)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.base.eval()
        return self

    def inner_loss(self, batch: Batch) -> Tensor:
        return self.losses(batch)

    def outer_loss(self, batch: Batch) -> Tensor:
        numbers = batch["judge"]
        taken = self.collate([self.rows[number] for number in numbers.tolist()])
        return self.losses({name: leaf.to(numbers.device) for name, leaf in taken.items()})


class TextTrainingRows:
    """All rows of a training in their order: epochs of whole batches, each shuffled; an epoch of the trainer is one.

    Row i of training k is a function of (seed, k, i) alone.

    Args:
        splits: of the encoded texts.
        steps: of a training.
        batch: rows a step.

    Raises:
        ValueError: for fewer texts than a batch has.
    """

    def __init__(self, splits: Splits, rows: Dataset, steps: int, batch: int) -> None:
        self.splits, self.rows, self.epoch = splits, rows, 0
        self.length, self.whole = steps * batch, splits.whole(batch)

    def set_epoch(self, epoch: int) -> None:
        """Told the number of the training by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[self.splits.number(self.epoch, index, self.whole)]
        return row
