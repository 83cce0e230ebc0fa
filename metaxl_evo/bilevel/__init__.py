"""Bilevel problems in plain torch: trees, update rules, passes, mixed products, hypergradients."""

import warnings
from typing import Any

from metaxl_evo.bilevel.hypergradients import Hypergradient, hypergradient, run_episode
from metaxl_evo.bilevel.passes import Counts, PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, Cut, Examples, InnerStep, Response, StepMade
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.bilevel.replay import Facts, stop_gradient
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import SGD, Adam, AdamW, UpdateRule, Windowed

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BilevelProblem",
    "Counts",
    "Cut",
    "Examples",
    "Facts",
    "Hypergradient",
    "InnerStep",
    "PassContext",
    "Processes",
    "Response",
    "StepMade",
    "Tree",
    "UpdateRule",
    "Windowed",
    "hypergradient",
    "run_episode",
    "stop_gradient",
]


def __getattr__(name: str) -> Any:
    if name == "Split":  # up to 0.1
        warnings.warn("metaxl_evo.bilevel.Split is Cut now", FutureWarning, stacklevel=2)
        return Cut
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
