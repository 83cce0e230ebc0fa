"""A loss at several weights in one pass, where torch can vectorise it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from metaxl_evo.bilevel.passes import is_out_of_memory
from metaxl_evo.bilevel.replay import Facts
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.messages import first_line

logger = logging.getLogger(__name__)


def at_once(loss: Callable[[Tree], Tensor], points: Tree, restart: Callable[[], None], facts: Facts) -> Tensor:
    """The losses at points (K, *shape) each, (K,); all of them draw the same random numbers.

    Made one after the other where `torch.vmap` refuses the loss (which asks for the value of a tensor, say) or, when
    first used, gives other numbers. That is found out once a run.

    Args:
        restart: puts the random numbers back to their start.
    """
    if facts.batched is False:
        return _one_by_one(loss, points, restart)
    restart()
    try:
        found = torch.vmap(loss, randomness="same")(points)
    except Exception as error:  # of any kind: what is wrong with the loss itself is raised again below
        if is_out_of_memory(error):
            raise
        facts.batched = False
        logger.info("the copies are evaluated one by one: %s", first_line(error))
        return _one_by_one(loss, points, restart)
    if facts.batched is None:
        with torch.no_grad():
            expected = _one_by_one(loss, points, restart)
        facts.batched = _same(found, expected)
        return found if facts.batched else _one_by_one(loss, points, restart)
    return found


def _one_by_one(loss: Callable[[Tree], Tensor], points: Tree, restart: Callable[[], None]) -> Tensor:
    found = []
    for leaves in zip(*points.values(), strict=True):
        restart()
        found.append(loss(dict(zip(points, leaves, strict=True))))
    return torch.stack(found)


def _same(found: Tensor, expected: Tensor) -> bool:
    """To rounding; losses at which both are no numbers are the same."""
    close = 1e3 * torch.finfo(found.dtype).eps
    return torch.allclose(found, expected, rtol=close, atol=close * 1e-3, equal_nan=True)
