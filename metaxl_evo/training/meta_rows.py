"""The stream of meta rows: seeded on its own, resumable by one number, the same on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from metaxl_evo.bilevel.passes import mix_seed


class MetaRows:
    """Endless passes over a data set, each in a new order, every draw split into a train and a meta part.

    A draw never mixes two passes, so the last of a pass may be shorter; where it could not be split it is left out.
    The order
    depends on the seed and the number of the pass alone: the number of draws is the whole state. With several
    processes all make the same draw and each takes its share of both parts.

    Args:
        dataset: a map-style data set.
        batch_size: rows a draw, over all processes.
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
        parts = 2 if 0 < portion < 1 else 1
        smallest = parts * world_size
        for what, size in (("the target (meta) data set has", len(dataset)), ("a draw of meta rows has", batch_size)):
            if size < smallest:
                raise ValueError(
                    f"{what} {size} rows, too few for one step: a step needs {smallest} (meta_portion={portion})"
                )
        full, rest = divmod(len(dataset), batch_size)
        self.draws_per_pass = full + (rest >= smallest)

    def __iter__(self) -> Iterator[tuple[list[Any], list[Any]]]:
        return self

    def __next__(self) -> tuple[list[Any], list[Any]]:
        """This process's (train rows, meta rows) of the next draw."""
        number, position = divmod(self.drawn, self.draws_per_pass)
        self.drawn += 1
        generator = torch.Generator().manual_seed(mix_seed(self.seed, number))
        order = torch.randperm(len(self.dataset), generator=generator)
        chosen = order[position * self.batch_size : (position + 1) * self.batch_size].tolist()
        cut = self._train_size(len(chosen))
        return self._share(chosen[:cut]), self._share(chosen[cut:])

    def state_dict(self) -> dict[str, int]:
        """What resume needs."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the given number of draws."""
        self.drawn = int(state["drawn"])

    def _train_size(self, rows: int) -> int:
        """floor(rows * (1 - portion)), but at least one row a process for either part."""
        if self.portion in (0, 1):
            return rows if self.portion == 0 else 0
        return min(max(int(rows * (1 - self.portion)), self.world_size), rows - self.world_size)

    def _share(self, indices: Sequence[int]) -> list[Any]:
        return [self.dataset[index] for index in indices[self.rank :: self.world_size]]
