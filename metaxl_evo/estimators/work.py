"""The work of an estimator, counted by running it on a tiny problem: its passes, and what several processes sum."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.bilevel import SGD, BilevelProblem, Counts, InnerStep, PassContext, Processes, Tree, Windowed
from metaxl_evo.bilevel.hypergradients import estimate, look_ahead
from metaxl_evo.estimators.base import Estimator


@dataclass(frozen=True)
class Work:
    """The passes, and how many trees like `w` and like `lam`, and single numbers (`""`), are summed over processes."""

    passes: Counts
    sent: Counter[str]


@cache
def work(estimator: Estimator, steps: int) -> Work:
    """The work along an episode of so many steps and at its end, for a lam of one number (or one schedule).

    The inner steps themselves do not count, nor does an episode in which lam stands still.
    """
    problem, w, lam = _problem(asdict(estimator).get("windows"), steps)
    estimator.check(problem, w, lam)

    def episode(previous: Any = None) -> tuple[PassContext, InnerStep, Any]:
        passes, step = PassContext(replace(problem, processes=_Tally())), InnerStep(w, lam, None)
        state = estimator.init(problem, w, lam, previous)
        for _ in range(steps):
            before = None if step.made is None else step.made.update_state
            step = InnerStep(step.current, lam, None, before)
            step = look_ahead(PassContext(problem), step, lam_grad=estimator.needs_lam_grad)
            state = estimator.observe(passes, step, state)
        return passes, step, state

    passes, step, state = episode()
    if estimator.suspended(state):
        passes, step, state = episode(estimator.end_episode(passes, step, state))
    estimate(passes, estimator, step, state)
    tally = passes.problem.processes
    assert isinstance(tally, _Tally)
    return Work(passes.counts, tally.sent)


@dataclass(frozen=True)
class _Tally(Processes):
    """One of two processes, of which the other has nothing to add; notes what is summed."""

    size: int = 2
    sent: Counter[str] = field(default_factory=Counter)

    def all_reduce(self, shares: Tree) -> Tree:
        for name, leaf in shares.items():
            self.sent[name] += 1 if name else leaf.numel()
        return shares


def _problem(windows: int | None, steps: int) -> tuple[BilevelProblem, Tree, Tree]:
    """A quadratic that both losses read lam in: a number, or the schedule of the learning rate."""
    rule = SGD(Windowed("lam", steps)) if windows else SGD(0.1)
    problem = BilevelProblem(_inner_loss, _outer_loss, rule, stop_gradients=False)
    return problem, {"w": torch.zeros(8)}, {"lam": torch.full((windows or 1,), 0.1)}


def _inner_loss(w: Tree, lam: Tree, batch: Any) -> Tensor:
    curvatures = torch.arange(1.0, 1 + len(w["w"]))  # more of them than a default solve has iterations
    return 0.5 * (curvatures * (w["w"] - lam["lam"].sum()).square()).sum()


def _outer_loss(w: Tree, lam: Tree, batch: Any) -> Tensor:
    return (w["w"] - 1).square().sum() + lam["lam"].square().sum()
