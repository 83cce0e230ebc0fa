"""The stream of meta rows: seeded on its own, resumable by one number, the same however a batch is cut up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from metaxl_evo.bilevel.randomness import mix_seed


@runtime_checkable
class DrawnByEpoch(Protocol):
    """A map-style data set whose rows are drawn anew in every pass: augmented images, episodes.

    A row may depend on its index and the epoch, and on no random state outside: then it is the same on any process, in
    any worker and after resume.
    """

    def set_epoch(self, epoch: int) -> None:
        """The pass, counted from 0, whose rows are read next; the same may be told several times."""


def tell_epoch(dataset: Any, epoch: int) -> None:
    """Tell a data set the pass whose rows are read next, if it is one that asks for it."""
    if isinstance(dataset, DrawnByEpoch):
        dataset.set_epoch(epoch)


class MetaRows:
    """Endless passes over a data set, each in a new order; every draw is split into a train and a meta part.

    A draw is of one optimizer step, all its micro-batches on all processes together, and is dealt out to these once it
    is split: 8 x 1 rows are 4 x 2 and 2 processes x 4 x 1. It never mixes two passes, so the last of a pass may be
    shorter, and some micro-batches then get no rows; where it could not be split it is left out. The order depends on
    the seed and the number of the pass alone: the number of rows that went by is the whole state.

    Args:
        dataset: a map-style data set; one that is `DrawnByEpoch` is told the pass before each draw.
        batch_size: rows a micro-batch, over all processes.
        portion: share of each draw that is meta; 0 and 1 leave the other part empty.
        seed: of the order.
        rank, world_size: which share of each draw this process takes.

    Raises:
        ValueError: for a data set or a batch too small for one draw.
    """

    def __init__(
        self, dataset: Any, batch_size: int, *, portion: float, seed: int, rank: int = 0, world_size: int = 1
    ):
        self.dataset, self.batch_size, self.portion, self.seed = dataset, batch_size, portion, seed
        self.rank, self.world_size = rank, world_size
        self.drawn = 0
        self.smallest = 2 if 0 < portion < 1 else 1
        for what, size in (("the target (meta) data set has", len(dataset)), ("a draw of meta rows has", batch_size)):
            if size < self.smallest:
                raise ValueError(
                    f"{what} {size} rows, too few for one step: a step needs {self.smallest} (meta_portion={portion})"
                )

    def draw(self, micro_batches: int = 1) -> list[tuple[list[Any], list[Any]]]:
        """This process's (train rows, meta rows) of the next draw, for each micro-batch of a step."""
        number, position = divmod(self.drawn, len(self.dataset))
        generator = torch.Generator().manual_seed(mix_seed(self.seed, number))
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        chosen = order[position : position + self.batch_size * micro_batches]
        left = len(order) - position - len(chosen)
        self.drawn += len(chosen) + (left if left < self.smallest else 0)
        tell_epoch(self.dataset, number)
        cut = self._train_size(len(chosen))
        slots = self.world_size * micro_batches
        places = range(self.rank, slots, self.world_size)  # every process has its first rows before any has its second
        return [(self._rows(chosen[:cut][place::slots]), self._rows(chosen[cut:][place::slots])) for place in places]

    def state_dict(self) -> dict[str, int]:
        """What resume needs."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the given number of rows."""
        self.drawn = int(state["drawn"])

    def _train_size(self, rows: int) -> int:
        """floor(rows * (1 - portion)), but at least one row for either part."""
        if self.portion in (0, 1):
            return rows if self.portion == 0 else 0
        return min(max(int(rows * (1 - self.portion)), 1), rows - 1)

    def _rows(self, indices: Sequence[int]) -> list[Any]:
        return [self.dataset[index] for index in indices]
