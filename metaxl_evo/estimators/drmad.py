"""DrMAD: reverse mode along the straight line from the first weights of an episode to its last ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, TypedDict

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, Response
from metaxl_evo.bilevel.products import otherwise, require_double_backward
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update_state import counts_before
from metaxl_evo.estimators.base import EpisodeEstimator
from metaxl_evo.estimators.trajectory import TWICE, Visit, check_straight_line, straight_line, walk_back


class Trajectory(TypedDict):
    """The state: the first weights, and the steps without theirs."""

    start: Tree
    steps: list[Visit]


@dataclass(frozen=True)
class DrMAD(EpisodeEstimator):
    """value = w_T, vjp(v) = sum_t B_t^T A_{t+1}^T ... A_T^T v with (1 - s/T) w_0 + (s/T) w_T in place of every w_s.

    The batches and learning rates are those of the steps, of the weights only the two ends are kept. It is exact where
    A and B do not depend on w (a quadratic), and unroll for an episode of one step. SGD is modelled, with momentum
    (the cotangent of its buffers is carried along) and weight decay; of what is learned all but what multiplies a
    buffer, which the line does not know: a learning rate with momentum, or the momentum.

    Source: Fu et al., DrMAD, IJCAI 2016.

    Raises:
        ValueError: for another inner optimiser, a clipped gradient, or a learned number that multiplies a buffer.
    """

    citation = "Fu et al., DrMAD: Distilling Reverse-Mode Automatic Differentiation, IJCAI 2016"
    exact = "never"
    second_order = True
    online = False
    remembers = "trajectory"
    needs_sgd = True
    tunes_optimizer = True

    def check(self, problem: BilevelProblem, w: Tree, lam: Tree) -> None:
        super().check(problem, w, lam)
        check_straight_line(type(self).__name__, problem.update)

    def prepare(self, passes: PassContext, w: Tree, lam: Tree, batch: Any) -> None:
        with otherwise("drmad", TWICE):
            require_double_backward(passes, w, lam, batch)

    def init(self, problem: BilevelProblem, w: Tree, lam: Tree, previous: Any = None) -> Trajectory:
        return {"start": tree.clone(w), "steps": []}

    def observe(self, passes: PassContext, step: InnerStep, state: Trajectory) -> Trajectory:
        assert step.made is not None
        stepped = frozenset(step.made.grad)
        counts = counts_before(step.made.update_state, stepped)
        rule, lam = passes.problem.update, step.lam  # lam stands still
        visit = Visit({}, lam, step.batch, counts, rule, passes.seed, stepped)
        return {"start": state["start"], "steps": [*state["steps"], visit]}

    def end_episode(self, passes: PassContext, step: InnerStep, state: Trajectory) -> None:
        return None

    def _answer(
        self, passes: PassContext, step: InnerStep, state: Trajectory, diagnostics: dict[str, float]
    ) -> Response:
        visits = straight_line(state["steps"], state["start"], step.current)
        return Response(step.current, lambda v: reduce(tree.add, walk_back(passes, visits, v)))
