"""The rows of windows one by one, for an estimator that draws one batch of several (HyperDistill's D*).

Rows are numbered over the whole window, however it is cut into micro-batches and dealt out to processes, so that N
processes draw what one draws: the first micro-batch of every process comes before any second one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from metaxl_evo.bilevel.problem import Examples
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.models.losses import HELD, MICRO_BATCHES, TOTALS, Batch, HasCounts, rows_of, set_totals, view_of


class HasRows(HasCounts, Protocol):
    """What is needed of a task (a `BilevelModule`) besides, whose batches are taken apart and put together."""

    def parameters(self) -> Iterator[Tensor]: ...

    def take_rows(self, batch: Batch, rows: Tensor) -> Batch: ...

    def join(self, batch: Batch, extra: Batch) -> Batch: ...


def examples_of(task: HasRows, processes: Processes) -> Examples:
    """How the windows of a task are taken apart, by its `take_rows`, and put together, by its `join` where it can."""
    device = next(task.parameters()).device

    def summed(numbers: list[int]) -> list[Tensor]:
        return list(processes.all_reduce({"": torch.tensor(numbers, device=device)})[""].unbind())

    def placed(window: Any) -> list[Batch]:
        """The micro-batches with the numbers of their rows."""
        parts = list(window) if isinstance(window, (list, tuple)) else [window]
        if parts and all(HELD in part for part in parts):
            return parts
        sizes = [rows_of(view_of(part)) for part in parts]
        most = max(int(one) for one in summed([0] * processes.rank + [len(sizes)] + [0] * _after(processes)))
        table = torch.zeros(most, processes.size, dtype=torch.int64)  # (micro-batch, process)
        table[: len(sizes), processes.rank] = torch.tensor(sizes)
        flat = torch.stack(summed(table.flatten().tolist())).cpu()
        starts = (flat.cumsum(0) - flat).view_as(table)[:, processes.rank].tolist()
        held = {"of": int(flat.sum()), "most": max(sizes, default=0)}
        return [
            {**part, HELD: {**held, "places": torch.arange(start, start + size)}}
            for part, size, start in zip(parts, sizes, starts, strict=False)
        ]

    def size(window: Any) -> int:
        return int(placed(window)[0][HELD]["of"])

    def take(window: Any, numbers: Tensor) -> list[Batch]:
        return [_taken(task, part, numbers) for part in placed(window)]

    def concat(windows: Sequence[Any]) -> list[Batch]:
        parts, of = [], 0
        for window in windows:
            held = placed(window)
            parts += [_shifted(part, of) for part in held]
            of += held[0][HELD]["of"]
        names = tuple(parts[0][TOTALS]) if TOTALS in parts[0] else None
        for part in parts:
            part[HELD]["of"] = of
        full = _packed(task, [part for part in parts if len(part[HELD]["places"])])
        if names is not None:
            set_totals(task, full, names, summed)
        return full or [_without_rows(parts[0])]

    return Examples(size, take, concat)


def _after(processes: Processes) -> int:
    return processes.size - processes.rank - 1


def _taken(task: HasRows, part: Batch, numbers: Tensor) -> Batch:
    held = part[HELD]
    new = torch.full((held["of"],), -1)
    new[numbers] = torch.arange(len(numbers))
    places = new[held["places"]]
    rows = (places >= 0).nonzero().flatten()
    taken = task.take_rows(view_of(part), rows) if len(rows) else {}
    return {**taken, **_totals(part), HELD: {**held, "of": len(numbers), "places": places[rows]}}


def _totals(part: Batch) -> Batch:
    return {TOTALS: part[TOTALS]} if TOTALS in part else {}


def _shifted(part: Batch, by: int) -> Batch:
    return {**part, HELD: {**part[HELD], "places": part[HELD]["places"] + by}}


def _packed(task: HasRows, parts: Sequence[Batch]) -> list[Batch]:
    """Pieces joined as far as they fit a micro-batch, and as far as the task can join them."""
    packed: list[Batch] = []
    for part in parts:
        last = packed[-1][HELD] if packed else None
        if last is None or len(last["places"]) + len(part[HELD]["places"]) > last["most"]:
            packed.append(part)
            continue
        try:
            joined = task.join(view_of(packed[-1]), view_of(part))
        except ValueError:
            packed.append(part)
            continue
        places = torch.cat([last["places"], part[HELD]["places"]])
        packed[-1] = {**joined, **_totals(part), HELD: {**last, "places": places}}
    return packed


def _without_rows(part: Batch) -> Batch:
    """What a process holds that has none of the rows: their number, and the names of the means."""
    return {key: part[key] for key in (HELD, TOTALS, MICRO_BATCHES) if key in part}


def take_rows(batch: Mapping[str, Any], rows: Tensor) -> Batch:
    """These rows of a batch: of each tensor and list that has as many entries as there are rows."""
    count, taken = rows_of(batch), dict[str, Any]()
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == count:
            taken[key] = value[rows.to(value.device)]
        elif isinstance(value, (list, tuple)) and len(value) == count:
            taken[key] = [value[row] for row in rows.tolist()]
        else:
            taken[key] = value
    return taken


def _fit(one: Tensor, other: Tensor) -> bool:
    """Whether both have rows, of one shape."""
    return 0 < one.dim() == other.dim() and one.shape[1:] == other.shape[1:]


def join_rows(name: str, batch: Mapping[str, Any], extra: Mapping[str, Any]) -> Batch:
    """Both batches' rows in one, where their rows are of one shape.

    Raises:
        ValueError: for rows that would have to be padded, or other keys.
    """
    joined: Batch = {}
    for key, value in batch.items():
        other = extra.get(key)
        if isinstance(value, list) and isinstance(other, list):
            joined[key] = [*value, *other]
        elif isinstance(value, Tensor) and isinstance(other, Tensor) and _fit(value, other):
            joined[key] = torch.cat([value, other])
        else:
            raise ValueError(
                f"{name} cannot join rows whose {key!r} differ in shape, or are no rows: write join(batch, extra), "
                "which pads them, or set meta_portion to 1"
            )
    return joined
