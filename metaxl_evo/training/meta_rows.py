"""The stream of meta rows: seeded on its own, resumable by one number, the same however a batch is cut up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import datasets
import torch

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.models.bilevel_module import Batch


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


def is_in_order(dataset: Any) -> bool:
    """Whether a data set says (`in_order`) that row i is of a certain step, so that it is to be read as it stands."""
    return bool(getattr(dataset, "in_order", False))


class Window(NamedTuple):
    """The micro-batches of one optimizer step on this process, and those of the meta rows that judge it."""

    train: list[Batch]
    meta: list[Batch]


def make_meta_rows(dataset: Any, batch_size: int, **settings: Any) -> MetaRows | StreamedMetaRows:
    """The stream of meta rows of a map-style or a streaming data set; `settings` as for `MetaRows`.

    Raises:
        ValueError: for a data set that is neither.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset | datasets.IterableDataset):
        return StreamedMetaRows(dataset, batch_size, **settings)
    kind = type(dataset).__name__
    if not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"meta_dataset is a {kind}, whose rows have no numbers: give a list, a map-style data set, or an "
            "IterableDataset of torch or datasets"
        )
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"meta_dataset is a {kind} without __len__: give it one, or make it a torch IterableDataset")
    return MetaRows(dataset, batch_size, **settings)


class MetaRows:
    """Endless passes over a data set, each in a new order; every draw is split into a train and a meta part.

    A draw is of one optimizer step, all its micro-batches on all processes together, and is dealt out to these once it
    is split: 8 x 1 rows are 4 x 2 and 2 processes x 4 x 1. It never mixes two passes, so the last of a pass may be
    shorter, and some micro-batches then get no rows; where it could not be split it is left out. The order depends on
    the seed and the number of the pass alone: the number of rows that went by is the whole state.

    Args:
        dataset: a map-style data set; one that is `DrawnByEpoch` is told the pass before each draw, one that is
            `in_order` is read as it stands in every pass.
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
        self.smallest = _smallest(portion)
        for what, size in (("the target (meta) data set has", len(dataset)), ("a draw of meta rows has", batch_size)):
            if size < self.smallest:
                raise ValueError(_too_few(what, size, portion))

    def draw(self, micro_batches: int = 1) -> list[tuple[list[Any], list[Any]]]:
        """This process's (train rows, meta rows) of the next draw, for each micro-batch of a step."""
        number, position = divmod(self.drawn, len(self.dataset))
        order = self._order(number)
        chosen = order[position : position + self.batch_size * micro_batches]
        left = len(order) - position - len(chosen)
        self.drawn += len(chosen) + (left if left < self.smallest else 0)
        tell_epoch(self.dataset, number)
        return [
            (self._rows(train), self._rows(meta))
            for train, meta in _dealt(chosen, micro_batches, self.portion, self.rank, self.world_size)
        ]

    def state_dict(self) -> dict[str, int]:
        """What resume needs."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the given number of rows."""
        self.drawn = int(state["drawn"])

    def _order(self, number: int) -> Sequence[int]:
        if is_in_order(self.dataset):
            return range(len(self.dataset))
        generator = torch.Generator().manual_seed(mix_seed(self.seed, number))
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def _rows(self, indices: Sequence[int]) -> list[Any]:
        return [self.dataset[index] for index in indices]


class StreamedMetaRows:
    """The same of a streaming data set: endless passes in the order of the stream, which shuffles for itself.

    Every process reads the whole stream and keeps its share. What resume needs is the number of the pass and of its
    rows that went by; they are read again and thrown away. A stream with `set_epoch` is told the pass at its start.

    Args:
        dataset: an IterableDataset of torch or datasets, whose every iteration starts anew.
        batch_size, portion, rank, world_size: as for `MetaRows`; there is no order to seed.

    Raises:
        ValueError: in `draw`, for a pass that is too short for one draw.
    """

    def __init__(
        self, dataset: Any, batch_size: int, *, portion: float, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        self.dataset, self.batch_size, self.portion = dataset, batch_size, portion
        self.rank, self.world_size = rank, world_size
        self.smallest = _smallest(portion)
        if batch_size < self.smallest:
            raise ValueError(_too_few("a draw of meta rows has", batch_size, portion))
        self._pass, self.drawn = 0, 0
        self._rows: Iterator[Any] | None = None

    def draw(self, micro_batches: int = 1) -> list[tuple[list[Any], list[Any]]]:
        """This process's (train rows, meta rows) of the next draw, for each micro-batch of a step."""
        size = self.batch_size * micro_batches
        chosen = self._take(size)
        if len(chosen) < self.smallest:  # the pass is over; what is left of it could not be split
            begun = self.drawn
            self._pass, self.drawn, self._rows = self._pass + 1, 0, None
            chosen = self._take(size)
            if len(chosen) < self.smallest:
                what = f"pass {self._pass if begun else self._pass - 1} of the streamed meta_dataset has"
                advice = "" if not begun else "; every iteration of it has to start anew"
                raise ValueError(_too_few(what, len(chosen), self.portion) + advice)
        self.drawn += len(chosen)
        return _dealt(chosen, micro_batches, self.portion, self.rank, self.world_size)

    def state_dict(self) -> dict[str, int]:
        """What resume needs."""
        return {"pass": self._pass, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the given number of rows of a pass."""
        self._pass, self.drawn, self._rows = int(state["pass"]), int(state["drawn"]), None

    def _take(self, size: int) -> list[Any]:
        """The next rows of the pass, fewer at its end."""
        if self._rows is None:
            tell_epoch(self.dataset, self._pass)
            self._rows = islice(iter(self.dataset), self.drawn, None)
        return list(islice(self._rows, size))


def _smallest(portion: float) -> int:
    """The rows that a draw needs for its parts."""
    return 2 if 0 < portion < 1 else 1


def _too_few(what: str, size: int, portion: float) -> str:
    return f"{what} {size} rows, too few for one step: a step needs {_smallest(portion)} (meta_portion={portion})"


def _dealt(
    chosen: Sequence[Any], micro_batches: int, portion: float, rank: int, world_size: int
) -> list[tuple[list[Any], list[Any]]]:
    """A process's shares of the train and the meta part of a draw; each has its first rows before any its second."""
    cut = _train_size(len(chosen), portion)
    slots = world_size * micro_batches
    places = range(rank, slots, world_size)
    return [(list(chosen[:cut][place::slots]), list(chosen[cut:][place::slots])) for place in places]


def _train_size(rows: int, portion: float) -> int:
    """floor(rows * (1 - portion)), but at least one row for either part."""
    if portion in (0, 1):
        return rows if portion == 0 else 0
    return min(max(int(rows * (1 - portion)), 1), rows - 1)
