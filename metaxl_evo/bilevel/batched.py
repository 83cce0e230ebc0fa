"""A loss at several weights in one pass, where torch can vectorise it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metaxl_evo.bilevel.passes import is_out_of_memory
from metaxl_evo.bilevel.replay import Facts
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.messages import first_line

logger = logging.getLogger(__name__)


Loss = Callable[[Tree, Tensor], Tensor]  # of weights and hidden states


def at_once(loss: Loss, points: Tree, hidden: Tensor, restart: Callable[[], None], facts: Facts) -> Tensor:
    """The losses at points (K, *shape) each and the same hidden states, (K,); all draw the same random numbers.

    Made one after the other where `torch.vmap` refuses the loss (which asks for the value of a tensor, say) or, when
    first used, gives other losses or slopes at the hidden states (it passes hooks over). That is found out once a run.

    Args:
        restart: puts the random numbers back to their start.
    """
    if facts.batched is None:
        facts.batched = _agrees(loss, points, hidden.detach(), restart)
    if facts.batched:
        try:
            return _batched(loss, points, hidden, restart)
        except Exception as error:  # of any kind: what is wrong with the loss itself is raised again below
            say_one_by_one(error)
            facts.batched = False
    return torch.stack([loss(leaves, hidden) for leaves in _each(points, restart)])


def _batched(loss: Loss, points: Tree, hidden: Tensor, restart: Callable[[], None]) -> Tensor:
    restart()
    return vectorised(lambda leaves: loss(leaves, hidden), points)


def vectorised(loss: Callable[..., Tensor], *points: Tree, randomness: str = "same") -> Tensor:
    """The losses at points (K, *shape) each, (K,), in one call.

    What is kept to be computed again in the backward (activation checkpointing) raises an error: the levels of `vmap`
    are of this thread, and that backward may run in another, where it would end the process.
    """
    with torch.autograd.graph.disable_saved_tensors_hooks("a checkpointed loss is not evaluated at several weights"):
        return torch.vmap(loss, randomness=randomness)(*points)


def _each(points: Tree, restart: Callable[[], None]) -> Iterator[Tree]:
    for leaves in zip(*points.values(), strict=True):
        restart()
        yield dict(zip(points, leaves, strict=True))


@torch.enable_grad()
def _agrees(loss: Loss, points: Tree, hidden: Tensor, restart: Callable[[], None]) -> bool:
    """Whether losses and slopes made together are those made one by one, to rounding."""
    leaf = hidden.requires_grad_()
    try:
        together = _batched(loss, points, leaf, restart)
        weights = torch.arange(1, len(together) + 1).to(together)
        slope = _slope(together, leaf, weights)
    except Exception as error:
        say_one_by_one(error)
        return False
    losses, expected = list[Tensor](), torch.zeros_like(leaf)
    for leaves, weight in zip(_each(points, restart), weights, strict=True):
        losses.append(loss(leaves, leaf))
        expected += _slope(losses[-1], leaf, weight)
    return agree(together.detach(), torch.stack(losses).detach()) and agree(slope, expected)


def _slope(losses: Tensor, leaf: Tensor, weights: Tensor) -> Tensor:
    if not losses.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(losses, leaf, weights, allow_unused=True, materialize_grads=True)[0]


class Made(TorchDispatchMode):
    """Counts, while it is entered, the numbers that operators make: what a graph keeps of them is no more."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        outputs = found if isinstance(found, (list, tuple)) else (found,)
        if not func.is_view:
            self.numbers += sum(one.numel() for one in outputs if isinstance(one, Tensor))
        return found


def say_one_by_one(error: Exception) -> None:
    """Say why copies are not evaluated together.

    Raises:
        Exception: the error itself, where it is about memory.
    """
    if is_out_of_memory(error):
        raise error
    logger.info("the copies are evaluated one by one: %s", first_line(error))


def agree(found: Tensor, expected: Tensor) -> bool:
    """To rounding, of the largest entry; places where both are no numbers are the same."""
    close = min(1e3 * torch.finfo(found.dtype).eps, 0.1)
    size = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=close, atol=close * size, equal_nan=True)
