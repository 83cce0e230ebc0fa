"""The loss contract: a task's loss returns the losses of its items; their mean over the whole window is taken here.

A window is what one optimizer step is made of: the micro-batches of all processes. A micro-batch contributes its share
of the window's mean, sum(losses) / total, so that 8 x 1 = 4 x 2 = 2 processes x 4 x 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metaxl_evo.bilevel.replay import plain_detaches

Batch = dict[str, Any]
Items = Tensor | tuple[Tensor, Tensor]  # the losses of items, or losses and a mask of those that count
Losses = Items | Mapping[str, Items]
ItemCounts = dict[str, int]

TOTALS = "totals"  # batch key: the counts of the whole accumulation window, over all ranks
MICRO_BATCHES = "micro_batches"  # batch key: their number in the window, over all ranks
HELD = "held"  # batch key: where these rows stand among those of a batch that was drawn (models/examples.py)
ITEMS = "items"  # the one mean of a task that names none

_KEPT = (TOTALS, MICRO_BATCHES, HELD)


class HasCounts(Protocol):
    """What the loss contract needs of a task (a `BilevelModule`)."""

    base: Any

    @property
    def counts_rows(self) -> bool: ...

    def counts(self, batch: Batch) -> int | dict[str, int]: ...


@dataclass
class _Evaluation:
    """A running evaluation of a loss: the window's totals, and whether the loss divided by them itself."""

    totals: Mapping[str, Any]
    read: bool = False


_RUNNING: ContextVar[_Evaluation | None] = ContextVar("metaxl_evo_loss", default=None)


class LossBatch(dict[str, Any]):
    """A micro-batch as a loss sees it: a copy that it may take keys from; `totals` is no key, but can be asked for."""

    totals: Mapping[str, Any] | None = None

    def __missing__(self, key: str) -> Any:
        if key != TOTALS or self.totals is None:
            raise KeyError(key)
        _note_reading()
        return self.totals


def view_of(batch: Any) -> Any:
    """The batch without what the framework keeps in it, its containers copied; what is no mapping stays as it is."""
    if not isinstance(batch, Mapping):
        return batch
    view = LossBatch({key: _copied(value) for key, value in batch.items() if key not in _KEPT})
    view.totals = batch.get(TOTALS)
    return view


def totals_of(task: HasCounts, batch: Batch) -> Mapping[str, Any]:
    """The totals of the window of `batch`, or its own counts. Deprecated: return losses of items instead.

    A loss that returns a 0-d tensor and has read its totals is taken for a sum divided by them, as it was up to 0.1.
    """
    _note_reading()
    if TOTALS in batch:
        totals: Mapping[str, Any] = batch[TOTALS]
        return totals
    running = _RUNNING.get()
    if running is not None:
        return running.totals
    held = batch.totals if isinstance(batch, LossBatch) else None
    return counts_of(task, batch) if held is None else held


def counts_of(task: HasCounts, batch: Batch) -> ItemCounts:
    """The numbers of items of a micro-batch, by the names of their means."""
    counts = task.counts(batch)
    named = counts if isinstance(counts, Mapping) else {ITEMS: counts}
    return {name: int(count) for name, count in named.items()}


def rows_of(batch: Mapping[str, Any]) -> int:
    """The number of rows of a batch: the first dimension of its tensors, or that of its labels where they differ.

    Raises:
        ValueError: where the tensors do not say it.
    """
    sizes = {key: len(value) for key, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    if not sizes:
        sizes = {key: len(value) for key, value in batch.items() if isinstance(value, (list, tuple))}
    if "labels" in sizes:
        return sizes["labels"]
    if len(set(sizes.values())) == 1:
        return next(iter(sizes.values()))
    raise ValueError(
        f"the number of rows of a batch is not to be seen ({sizes or 'no tensors'}): define counts(batch)"
    )


def set_totals(
    task: HasCounts,
    window: Sequence[Any],
    names: Sequence[str],
    over_processes: Callable[[list[int]], Sequence[Any]] = list,
) -> None:
    """Hand the counts of the whole window to each of its micro-batches, in place; a process may have none.

    Args:
        names: of the means.
        over_processes: sums numbers over the processes.
    """
    counts = [counts_of(task, view_of(batch)) for batch in window]
    *totals, micro_batches = over_processes([*(sum(count[name] for count in counts) for name in names), len(window)])
    for batch in window:
        batch[TOTALS] = dict(zip(names, totals, strict=True))
        batch[MICRO_BATCHES] = int(micro_batches)


def as_window(task: HasCounts, batch: Any) -> Sequence[Any]:
    """A batch as micro-batches with totals: those that they have, or their own."""
    parts = batch if isinstance(batch, (list, tuple)) else (batch,)
    parts = [part for part in parts if not (isinstance(part, Mapping) and HELD in part) or len(part[HELD]["places"])]
    if len(parts) < 2 or any(not isinstance(part, Mapping) or TOTALS in part for part in parts):
        return parts
    window = [dict(part) for part in parts]
    set_totals(task, window, tuple(counts_of(task, view_of(window[0]))))
    return window


def mean_share(task: HasCounts, name: str, loss: Callable[..., Losses], batch: Any, *before: Any) -> Tensor:
    """What a micro-batch adds to the window's mean, a 0-d tensor: of `loss(*before, batch)` by the loss contract.

    Args:
        name: of the loss, for messages.

    Raises:
        ValueError: for losses that are not those of the items that were counted, a mean whose total is not known, or a
            loss that changes its batch.
    """
    held = batch if isinstance(batch, Mapping) else {}
    view, counts = view_of(batch), counts_of(task, view_of(batch))
    evaluation = _Evaluation(held.get(TOTALS, counts))
    versions = [(tensor, tensor._version) for tensor in _tensors(view) if not tensor.is_inference()]
    token = _RUNNING.set(evaluation)
    try:
        with plain_detaches():
            found = loss(*before, view)
    finally:
        _RUNNING.reset(token)
    called = f"{type(task).__name__}.{name}"
    if any(tensor._version != version for tensor, version in versions):
        raise ValueError(f"{called} changes a tensor of its batch in place, which other passes read: clone it first")
    if evaluation.read and not (isinstance(found, Tensor) and found.dim() == 0):
        raise ValueError(
            f"{called} reads the totals of its window (totals_of) and returns losses of items, which are divided by "
            "them as well: leave totals_of out"
        )
    if isinstance(found, Mapping):
        return _sum_of_means(called, found, counts, evaluation.totals)
    if isinstance(found, Tensor) and found.dim() == 0:
        if evaluation.read:
            _warn_of_sums(type(task))
            return found
        return _scalar(task, called, found, counts, evaluation.totals, held.get(MICRO_BATCHES, 1))
    if len(counts) > 1:
        raise ValueError(f"{called} returned losses of one mean, and counts are of {sorted(counts)}: return a dict")
    return _sum_of_means(called, {next(iter(counts)): found}, counts, evaluation.totals, task.counts_rows)


def _sum_of_means(
    called: str, losses: Mapping[str, Items], counts: ItemCounts, totals: Mapping[str, Any], rows: bool = False
) -> Tensor:
    shares = []
    for name, found in losses.items():
        if name not in counts:
            raise ValueError(f"{called} returned losses of {name!r}, of which counts(batch) knows {sorted(counts)}")
        items = found[0][found[1].bool()] if isinstance(found, tuple) else found
        if not isinstance(items, Tensor) or items.numel() != counts[name] or (rows and items.dim() != 1):
            raise ValueError(_mismatch(called, name, items, counts[name], rows))
        total = totals[name]
        shares.append(items.sum() / (total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)))
    return torch.stack(shares).sum() if len(shares) != 1 else shares[0]


def _mismatch(called: str, name: str, items: Any, count: int, rows: bool) -> str:
    if not isinstance(items, Tensor):
        return f"{called} returned {type(items).__name__}: return the losses of its items, a tensor"
    shape = list(items.shape)
    if rows:
        return (
            f"{called} returned losses of shape {shape} for a batch of {count} rows: return one a row, shape "
            f"[{count}], or define counts(batch), the number of items"
        )
    return (
        f"{called} returned {items.numel()} losses of {name!r} (shape {shape}), and counts(batch) says {count}: leave "
        "ignored items out (losses[mask], or the pair losses, mask), or correct counts"
    )


def _scalar(
    task: HasCounts, called: str, mean: Tensor, counts: ItemCounts, totals: Mapping[str, Any], micro_batches: int
) -> Tensor:
    """A mean that the loss took itself: over `counts` where the task has one, else of the one micro-batch there is."""
    if len(counts) == 1 and not task.counts_rows:
        ((name, count),) = counts.items()
        if count == 0:  # the mean of nothing is not a number; every parameter takes part, as DDP asks
            firsts = [p.flatten()[:1].sum().to(mean) for p in task.base.parameters()]
            return torch.stack(firsts).sum() * 0.0
        return mean * (count / totals[name])
    if micro_batches > 1:
        raise ValueError(
            f"{called} returned a mean of its own (a 0-d tensor), and a step has {micro_batches} micro-batches: "
            "return the losses of the items, shape (rows,), or define counts(batch), over what it is the mean"
        )
    return mean


_WARNED: set[type] = set()


def _warn_of_sums(kind: type) -> None:
    if kind not in _WARNED:
        _WARNED.add(kind)
        warnings.warn(
            f"{kind.__name__} divides its losses by totals_of, which goes after the next release: return the losses "
            "of the items (docs/adding_a_task.md)",
            FutureWarning,
            stacklevel=2,
        )


def _note_reading() -> None:
    running = _RUNNING.get()
    if running is not None:
        running.read = True


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one)
