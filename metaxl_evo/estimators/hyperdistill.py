"""HyperDistill: all past steps in one local term, at an average of the past weights and examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NotRequired, TypedDict, get_args

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.hypergradients import look_ahead
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, Response
from metaxl_evo.bilevel.products import otherwise, require_double_backward
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update_state import counts_before
from metaxl_evo.estimators.base import EpisodeEstimator, Memory
from metaxl_evo.estimators.distillation import Averages, fit_theta
from metaxl_evo.estimators.local import LocalEstimator
from metaxl_evo.estimators.trajectory import Visit, check_straight_line
from metaxl_evo.messages import unknown

Scale = Literal["fit", "fixed", "one", "normalize"]


class Learned(TypedDict):
    """What an episode knows of those before: how many there were, and the theta of the last fit."""

    episode: int
    theta: float


class Distilled(Learned):
    """The state: n_t, w*, D* (None where batches cannot be taken apart), and the steps of an episode that fits."""

    horizon: float
    w: Tree
    batch: Any
    visits: NotRequired[list[Visit]]


@dataclass(frozen=True)
class HyperDistill(EpisodeEstimator, LocalEstimator):
    """value = w_t, vjp(v) = c d_lam <Phi(w*_t, lam; D*_t), v>: one local term that stands for those of all steps.

    The products of base Jacobians between a past step and now are taken for gamma^age. Under these weights, which add
    up to n_t = 1 + gamma + .. + gamma^(t-1), w*_t is the mean of w_0 .. w_(t-1), kept as a running one. D*_t is drawn
    from the batches in the same shares where the problem gives `examples`, else it is D_t; a share of a batch is
    rounded up or down by chance, since 1/n_t of a small batch always rounds to nothing. Exact where the inner Hessian
    is k times the identity, the mixed partial constant, gamma = 1 - lr k and theta = 1. The derivative of the
    optimiser's step is that of the step made; where lam holds its own numbers, that of a step from w* on D*, which
    takes one forward and backward more.

    Args:
        engine, radius: of the local term, as in `one_step`.
        decay: gamma, from 0 (with theta = 1: `one_step`) to 1 (plain means); the paper tries 0.9 to 0.9999.
        scale: the size c of the term. `fit` and `fixed` are c = theta n_t; `one` is c = 1, for an outer loss without a
            direct term, where the size is only a learning rate (the paper's pi = 1); `normalize` gives the pulled-back
            term unit length, and vjp is then not linear.
        fit_every: with `fit`, the first of so many episodes leaves lam alone and learns theta: by least squares on the
            terms of all horizons within the episode, which one walk back along a straight line yields (DrMAD). That
            episode keeps its trajectory.
        theta: that of `fixed`, and of `fit` until there is another; it is logged, and may be negative.

    Source: Lee et al., Online Hyperparameter Meta-Learning with Hypergradient Distillation, ICLR 2022 (alg. 3, 4).

    Raises:
        ValueError: for an unknown engine or scale, or values out of range; with `fit` for what DrMAD does not model.
    """

    citation = "Lee et al., Online Hyperparameter Meta-Learning with Hypergradient Distillation, ICLR 2022"
    exact = "never"
    tunes_optimizer = True

    decay: float = 0.99
    scale: Scale = "fit"
    fit_every: int = 50
    theta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ValueError(f"hyperdistill: decay must be between 0 and 1, not {self.decay}")
        if self.scale not in get_args(Scale):
            raise ValueError(unknown("hyperdistill scale", str(self.scale), get_args(Scale)))
        if type(self.fit_every) is not int or self.fit_every < 2:
            raise ValueError(f"hyperdistill: fit_every must be an integer of at least 2, not {self.fit_every}")
        if not math.isfinite(self.theta):
            raise ValueError(f"hyperdistill: theta must be a finite number, not {self.theta}")

    @property
    def second_order(self) -> bool:
        return super().second_order or self.scale == "fit"

    @property
    def remembers(self) -> Memory:
        return "trajectory" if self.scale == "fit" else "base"

    @property
    def needs_sgd(self) -> bool:
        return self.scale == "fit"

    @property
    def takes_shards(self) -> bool:
        return super().takes_shards and self.scale != "fit"

    def check(self, problem: BilevelProblem, w: Tree, lam: Tree) -> None:
        if self.scale != "fit":
            return super().check(problem, w, lam)
        replace(self, scale="fixed").check(problem, w, lam)
        try:
            super().check(problem, w, lam)
            check_straight_line(type(self).__name__, problem.update)
        except ValueError as reason:
            raise ValueError(f"{reason}, or set scale to fixed, one or normalize, which fit nothing") from None

    def prepare(self, passes: PassContext, w: Tree, lam: Tree, batch: Any) -> None:
        super().prepare(passes, w, lam, batch)
        if self.scale == "fit":
            with otherwise("hyperdistill's fit", "set scale to fixed, one or normalize"):
                require_double_backward(passes, w, lam, batch)

    def init(self, problem: BilevelProblem, w: Tree, lam: Tree, previous: Learned | None = None) -> Distilled:
        learned: Learned = {"episode": 0, "theta": self.theta} if previous is None else previous
        state: Distilled = {**learned, "horizon": 0.0, "w": tree.clone(w), "batch": None}
        if self.scale == "fit" and learned["episode"] % self.fit_every == 0:
            state["visits"] = []
        return state

    def share(self, state: Distilled) -> Any:
        return state["batch"]

    def with_share(self, state: Distilled, share: Any) -> Distilled:
        return {**state, "batch": share}

    def suspended(self, state: Distilled) -> bool:
        return "visits" in state

    def observe(self, passes: PassContext, step: InnerStep, state: Distilled) -> Distilled:
        assert step.made is not None
        horizon, averages = 1 + self.decay * state["horizon"], Averages(state["w"], state["batch"])
        averages = averages.moved(step.w, step.batch, 1 / horizon, passes.problem.examples, passes.seed)
        after: Distilled = {**state, "horizon": horizon, "w": averages.w, "batch": averages.batch}
        if "visits" in state:
            counts = counts_before(step.made.update_state, step.made.grad)
            after["visits"] = [*state["visits"], Visit.of(passes, replace(step, update_state=counts))]
        return after

    def end_episode(self, passes: PassContext, step: InnerStep, state: Distilled) -> Learned:
        """The number of the next episode, and theta."""
        theta = state["theta"]
        if "visits" in state:
            fitted = fit_theta(
                passes, step, state["visits"], self.decay, lambda at, v: self._local(passes, step.lent(), at, v, {})
            )
            theta = fitted if math.isfinite(fitted) else theta  # a row that judges may be NaN: the next fit makes up
        return {"episode": state["episode"] + 1, "theta": theta}

    def _answer(
        self, passes: PassContext, step: InnerStep, state: Distilled, diagnostics: dict[str, float]
    ) -> Response:
        if self.scale == "fit":
            diagnostics["theta"] = state["theta"]

        def vjp(v: Tree) -> Tree:
            local = self._local(passes, step, Averages(state["w"], state["batch"]), v, diagnostics)
            if self.scale == "normalize":  # of the whole, whose length no share knows
                return passes.once(_normalized(passes.all_reduce(local)))
            return tree.scale(local, 1.0 if self.scale == "one" else state["theta"] * state["horizon"])

        return Response(step.current, vjp)

    def _local(
        self, passes: PassContext, step: InnerStep, averages: Averages, v: Tree, diagnostics: dict[str, float]
    ) -> Tree:
        """The local term at (w*, D*), D* that of the step itself where none was drawn."""
        passes = passes.elsewhere()
        step = replace(step, w=averages.w, batch=step.batch if averages.batch is None else averages.batch)
        if passes.problem.update.may_read_lam:
            step = look_ahead(passes, replace(step, made=None))
        return self._pull_back(passes, step, v, diagnostics)


def _normalized(term: Tree) -> Tree:
    """At unit length, where it has one."""
    norm = tree.norm(term)
    return tree.scale(term, 1 / norm if norm else 0.0)
