"""Bilevel problems in plain torch: trees, update rules, passes, mixed products, hypergradients."""

from metaxl_evo.bilevel.hypergradients import Hypergradient, hypergradient, run_episode
from metaxl_evo.bilevel.passes import Counts, PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, Cut, Examples, InnerStep, Response, StepMade
from metaxl_evo.bilevel.processes import Processes, Traffic
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
    "Traffic",
    "Tree",
    "UpdateRule",
    "Windowed",
    "hypergradient",
    "run_episode",
    "stop_gradient",
]
