"""The numbers of an update rule: constants, or entries of lam, the same for all parameters or one for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metaxl_evo.messages import unknown


@dataclass(frozen=True)
class Windowed:
    """A hyperparameter that is a vector of lam, shared over windows of contiguous steps: a learned schedule.

    Args:
        name: the entry of lam, a vector of W values.
        steps: length of the episode; its step t (`state["step"]`, from 0) reads value floor(t W / steps), any later
            step the last one.

    Source: Micaelli & Storkey, NeurIPS 2021 (forward-mode differentiation with hyperparameter sharing).

    Raises:
        ValueError: for a number of steps below 1; where lam[name] is no vector.
    """

    name: str
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Windowed({self.name!r}): steps must be at least 1, not {self.steps}")

    def window(self, lam: Mapping[str, Tensor], step: int) -> int:
        """The index of the value that acts at a step."""
        values = lam[self.name]
        if values.dim() != 1:
            raise ValueError(f"lam[{self.name!r}] is of shape {[*values.shape]}: give a vector, one value a window")
        return min(step * len(values) // self.steps, len(values) - 1)


Entry = str | Windowed  # of lam
Number = float | Entry | Tensor
Hyper = Number | Mapping[str, Number]  # of each parameter, by its name


def of(hyper: Hyper, name: str) -> Number:
    """The number of one parameter, which may be an entry of lam."""
    return hyper[name] if isinstance(hyper, Mapping) else hyper


def value(hyper: Hyper, name: str, lam: Mapping[str, Tensor]) -> float | Tensor:
    """The number that acts on parameter `name`; `lam` as it acts at the step."""
    number = of(hyper, name)
    return lam[entry_name(number)] if isinstance(number, (str, Windowed)) else number


def entries(hyper: object) -> Iterator[Entry]:
    """The entries of lam that a field of a rule names."""
    members = hyper.values() if isinstance(hyper, Mapping) else (hyper,)
    return (member for member in members if isinstance(member, (str, Windowed)))


def entry_name(entry: Entry) -> str:
    return entry if isinstance(entry, str) else entry.name


def is_zero(hyper: Hyper, name: str | None = None) -> bool:
    """Whether it is the number 0, for one parameter or for all of them."""
    if isinstance(hyper, Mapping):
        return all(map(is_zero, hyper.values())) if name is None else is_zero(hyper[name])
    return not isinstance(hyper, (str, Windowed, Tensor)) and hyper == 0


def bound(hyper: object, lam: Mapping[str, Tensor]) -> object:
    """The same with the name of an entry of lam in the place of each tensor that is that very entry."""
    if isinstance(hyper, Mapping):
        return {name: bound(member, lam) for name, member in hyper.items()}
    return next((key for key, entry in lam.items() if entry is hyper), hyper)


def check(field: str, hyper: Hyper, w: Mapping[str, Tensor], lam: Mapping[str, Tensor]) -> None:
    """Refuse a number that a parameter lacks, does not fit, or that nobody would learn.

    Raises:
        ValueError: in one line.
    """
    if isinstance(hyper, Mapping) and (missing := sorted(w.keys() - hyper.keys())):
        raise ValueError(f"the update rule's {field} has no value for {unknown('parameter', missing[0], hyper)}")
    for name, leaf in w.items():
        number = of(hyper, name)
        if isinstance(number, Windowed):
            number.window(lam, 0)
            continue
        if isinstance(number, str):
            what, tensor = f"lam[{number!r}]", lam[number]
        elif isinstance(number, Tensor):
            what, tensor = "a tensor", number
            if number.requires_grad:
                raise ValueError(
                    f"the update rule's {field} is a tensor that requires a gradient and is no entry of lam, so that "
                    "nobody would learn it: put that very tensor into lam (one that is computed from others too, and "
                    "pull its hypergradient back to them by autograd), or detach it"
                )
        else:
            continue
        if tensor.dim() and (not _fits(tensor, leaf) or torch.promote_types(tensor.dtype, leaf.dtype) != leaf.dtype):
            raise ValueError(
                f"the update rule's {field} of {name!r} is {what} of shape {[*tensor.shape]} and {tensor.dtype}: give "
                f"one number, of shape [], or one an element, of shape {[*leaf.shape]} and {leaf.dtype}"
            )


def _fits(tensor: Tensor, leaf: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(tensor.shape, leaf.shape) == leaf.shape
    except RuntimeError:
        return False
