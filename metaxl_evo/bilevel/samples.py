"""What a test of the inner loss runs on: a few rows of one part of a batch, and that part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.replay import Tested, kind_of

ROWS = 8  # of a part are enough


def untested(
    passes: PassContext, batch: Any, known: Tested, names: frozenset[Any]
) -> Iterator[tuple[Hashable, Any, int | None]]:
    """Parts of kinds that `known` does not cover, and their numbers of rows; of each those that read lam, if any do.

    They come until one of a kind has shown something; parts where nothing reads lam come last.
    """
    due = [part for part in passes.problem.parts(batch) if not known.covers(kind_of(part), names)]
    reading = [(kind_of(part), part, passes.problem.reads_lam(part)) for part in due]
    some = [(kind, read, _rows(read)) for kind, _, read in reading]
    rest = [
        (kind, part, _rows(part)) for (kind, part, _), (_, _, size) in zip(reading, some, strict=True) if size == 0
    ]
    for kind, part, size in (*some, *rest):
        if size != 0 and not known.covers(kind, names):
            yield kind, part, size


def alone(passes: PassContext) -> PassContext:
    """A context for single parts in full precision, whose passes are not counted."""
    problem = replace(passes.problem, parts=lambda part: (part,), reads_lam=lambda part: part)
    return replace(passes.elsewhere(), problem=problem, precision="float32", counts=type(passes.counts)())


def first_part(passes: PassContext, batch: Any) -> tuple[Any, int | None] | None:
    """The first part that has rows which read lam (else any rows), and their number where that is known."""
    parts = passes.problem.parts(batch)
    for part in (*map(passes.problem.reads_lam, parts), *parts):
        size = _rows(part)
        if size != 0:
            return part, size
    return None


def smaller(part: Any, size: int | None) -> list[Any]:
    """A few rows spread over a part, where it can be cut, and the part."""
    if size is None or size <= ROWS:
        return [part]
    places = torch.linspace(0, size - 1, ROWS).long()
    return [mapped(lambda x: x[places.to(x.device)] if x.dim() else x, part), part]


def mapped(fn: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch with `fn` of its tensors."""
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, Mapping):
        changed: Any = copy.copy(batch)
        for key, value in batch.items():
            changed[key] = mapped(fn, value)
        return changed
    if isinstance(batch, (list, tuple)):
        items = [mapped(fn, one) for one in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def shapes_of(batch: Any) -> tuple[torch.Size, ...]:
    """The shapes of its tensors, in order."""
    found: list[torch.Size] = []

    def look(x: Tensor) -> Tensor:
        found.append(x.shape)
        return x

    mapped(look, batch)
    return tuple(found)


def _rows(batch: Any) -> int | None:
    """The number of rows that all tensors of a batch lead with; None where they do not, or something is no tensor."""
    sizes: set[int | None] = set()

    def look(held: Any) -> None:
        if isinstance(held, Tensor):
            sizes.update(held.shape[:1])
        elif isinstance(held, Mapping):
            for one in held.values():
                look(one)
        elif isinstance(held, (list, tuple)) and any(isinstance(one, (Tensor, Mapping, list, tuple)) for one in held):
            for one in held:
                look(one)
        elif not isinstance(held, (int, float, str, type(None))):
            sizes.add(None)

    look(batch)
    return sizes.pop() if len(sizes) == 1 else None
