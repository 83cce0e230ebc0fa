"""Unroll (RMD; truncated K-RMD): the outer loss differentiated through the trajectory, backwards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, Response
from metaxl_evo.bilevel.products import otherwise, require_double_backward
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.base import EpisodeEstimator
from metaxl_evo.estimators.trajectory import TWICE, Visit, made_again, thinned, walk_back


@dataclass(frozen=True)
class Unroll(EpisodeEstimator):
    """value = w_T, vjp(v) = sum_t B_t^T A_{t+1}^T ... A_T^T v over the last K steps, with the optimiser's state in A.

    Exact for any update rule and for all of its numbers; what lies before the horizon is held constant. Over the whole
    episode first weights that are meta parameters, or computed from them, are learned too (MAML). Memory is the
    weights and the optimiser's state of each step in the horizon and one step's graph, since every step is computed
    again when it is gone back through. A step costs one double backward; with `recompute` a forward and backward more.

    Args:
        horizon: the number K of last steps, which answers at any step; None is the whole episode, and answers at its
            end. K = 1 is one_step; the bias decays like (1 - lr mu)^K where the inner loss is mu-convex.
        recompute: of a whole episode of T steps, keep the weights and states of sqrt(T) only, and make the others
            again on the way back, up to 2 sqrt(T) at a time (Griewank & Walther 2000, one level). The numbers are the
            same, as far as a step that is made again is: a Trainer's is to rounding. Batches are kept in any case.

    Sources: Maclaurin et al., ICML 2015; Franceschi et al., ICML 2017 (RMD); Shaban et al., AISTATS 2019 (K-RMD).

    Raises:
        ValueError: for a horizon that is not a positive integer, or `recompute` with one.
    """

    citation = "Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter Optimization, ICML 2017"
    exact = "always"
    second_order = True
    remembers = "trajectory"
    needs_state_before = True
    tunes_optimizer = True

    horizon: int | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.horizon is not None and (type(self.horizon) is not int or self.horizon < 1):
            raise ValueError(f"unroll: horizon must be an integer of at least 1, or None, not {self.horizon}")
        if self.recompute and self.horizon is not None:
            raise ValueError("unroll: recompute is for whole episodes: leave it out, or the horizon")

    @property
    def online(self) -> bool:
        return self.horizon is not None

    @property
    def learns_initial(self) -> bool:
        return self.horizon is None

    @property
    def repeats_steps(self) -> bool:
        return self.recompute

    def prepare(self, passes: PassContext, w: Tree, lam: Tree, batch: Any) -> None:
        with otherwise("unroll", TWICE):
            require_double_backward(passes, w, lam, batch)

    def init(self, problem: BilevelProblem, w: Tree, lam: Tree, previous: Any = None) -> list[Visit]:
        return []

    def observe(self, passes: PassContext, step: InnerStep, state: list[Visit]) -> list[Visit]:
        visits = [*state, Visit.of(passes, step)]
        if self.recompute:
            return thinned(visits)
        return visits if self.horizon is None else visits[-self.horizon :]

    def end_episode(self, passes: PassContext, step: InnerStep, state: list[Visit]) -> None:
        return None

    def _answer(
        self, passes: PassContext, step: InnerStep, state: list[Visit], diagnostics: dict[str, float]
    ) -> Response:
        assert step.made is not None
        passes.problem.update.check_state(step.made.update_state)
        diagnostics["horizon"] = len(state)
        visits = made_again(passes, state) if self.recompute else reversed(state)
        return Response(step.current, lambda v: reduce(tree.add, walk_back(passes, visits, v)))
