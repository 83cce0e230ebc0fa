"""The state of an inner optimiser: its step count, and trees of tensors with the keys of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from metaxl_evo.bilevel.tree import Tree

# {"step": int, "exp_avg": Tree, ...}; where parameters sat steps out, "missed": {name: how many of them} as well
UpdateState = dict[str, Any]

MISSED = "missed"


def trees(state: UpdateState) -> dict[str, Tree]:
    """The tensors of an optimiser's state: its entries that are trees."""
    return {key: held for key, held in state.items() if key != MISSED and isinstance(held, dict)}


def map_trees(fn: Callable[[Tree], Tree], state: UpdateState) -> UpdateState:
    """The state with `fn` of each of its trees."""
    return state | {key: fn(held) for key, held in trees(state).items()}


def own_steps(state: UpdateState, name: str) -> int:
    """How many steps a parameter has made: all but those in which it had no gradient."""
    return state["step"] - state.get(MISSED, {}).get(name, 0)


def counts_before(after: UpdateState, stepped: Iterable[str]) -> UpdateState:
    """The counts of a state as they were before its last step, which moved the parameters `stepped`."""
    had = frozenset(stepped)
    missed = {name: count - (name not in had) for name, count in after.get(MISSED, {}).items()}
    return counted(after["step"] - 1, missed)


def counted(step: int, missed: Mapping[str, int]) -> UpdateState:
    missed = {name: count for name, count in missed.items() if count}
    return {"step": step, MISSED: missed} if missed else {"step": step}
