"""HyperDistill: all past steps in one local term, at an average of the past weights and examples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.hypergradients import look_ahead
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, Examples, InnerStep, Response
from metaxl_evo.bilevel.products import otherwise, require_double_backward
from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update_state import counts_before
from metaxl_evo.estimators.base import EpisodeEstimator, Memory
from metaxl_evo.estimators.local import LocalEstimator
from metaxl_evo.estimators.trajectory import Visit, check_straight_line, straight_line, walk_back
from metaxl_evo.messages import unknown

Scale = Literal["fit", "fixed", "one", "normalize"]
_STREAM = 0xD157  # keeps the seeds of the drawn examples apart from those of the passes


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

    def init(self, problem: BilevelProblem, w: Tree, lam: Tree, previous: Any = None) -> dict[str, Any]:
        learned = {"episode": 0, "theta": self.theta} if previous is None else previous
        state = learned | {"horizon": 0.0, "w": tree.clone(w), "batch": None}
        fits = self.scale == "fit" and learned["episode"] % self.fit_every == 0
        return state | {"visits": []} if fits else state

    def share(self, state: dict[str, Any]) -> Any:
        return state["batch"]

    def with_share(self, state: dict[str, Any], share: Any) -> dict[str, Any]:
        return state | {"batch": share}

    def suspended(self, state: dict[str, Any]) -> bool:
        return "visits" in state

    def observe(self, passes: PassContext, step: InnerStep, state: dict[str, Any]) -> dict[str, Any]:
        assert step.made is not None
        horizon, examples = 1 + self.decay * state["horizon"], passes.problem.examples
        state = state | {
            "horizon": horizon,
            "w": _moved(state["w"], step.w, 1 / horizon),
            "batch": _drawn(examples, state["batch"], step.batch, 1 / horizon, passes.seed),
        }
        if not self.suspended(state):
            return state
        counts = counts_before(step.made.update_state, step.made.grad)
        return state | {"visits": [*state["visits"], Visit.of(passes, replace(step, update_state=counts))]}

    def end_episode(self, passes: PassContext, step: InnerStep, state: dict[str, Any]) -> dict[str, Any]:
        """The number of the next episode, and theta."""
        theta = self._fit(passes, step, state) if self.suspended(state) else state["theta"]
        return {"episode": state["episode"] + 1, "theta": theta}

    def _fit(self, passes: PassContext, step: InnerStep, state: dict[str, Any]) -> float:
        """Least squares of <v_s / |v_s|, g_s> = theta n_s |v_s|, the last s steps giving v_s at (w*_s, D*_s) and g_s.

        The walk back finds g_s, the indirect term of horizon s, on its way.
        """
        made, visits, horizon, weight = step.made, state["visits"], 0.0, 1.0
        assert made is not None
        _, alpha, _, _ = passes.outer_grad(step.current, step.lam, step.val_batch, wrt_w=step.w, wrt_lam=())
        walk = walk_back(passes, straight_line(visits, visits[0].w, step.current), alpha)
        found, w, batch, xy, xx = tree.zeros_like(step.lam), step.w, None, 0.0, 0.0
        for visit, term in zip(reversed(visits), walk, strict=True):
            found, horizon = tree.add(found, passes.whole(term)), horizon + weight
            w = _moved(w, visit.w, weight / horizon)
            batch = _drawn(passes.problem.examples, batch, visit.batch, weight / horizon, visit.seed)
            last = replace(step, made=replace(made, grad=dict(made.grad)))  # it is emptied, like the cotangent
            local = passes.whole(self._local(passes, last, w, batch, dict(alpha), {}))
            xy += horizon * tree.dot(local, found).item()
            xx += (horizon * tree.norm(local)) ** 2
            weight *= self.decay
        theta = xy / xx if xx else math.nan  # a row that judges may be NaN: the next fit makes up for it
        return theta if math.isfinite(theta) else state["theta"]

    def _answer(
        self, passes: PassContext, step: InnerStep, state: dict[str, Any], diagnostics: dict[str, float]
    ) -> Response:
        if self.scale == "fit":
            diagnostics["theta"] = state["theta"]

        def vjp(v: Tree) -> Tree:
            local = self._local(passes, step, state["w"], state["batch"], v, diagnostics)
            if self.scale == "normalize":  # of the whole, whose length no share knows
                return passes.once(_normalized(passes.whole(local)))
            return tree.scale(local, 1.0 if self.scale == "one" else state["theta"] * state["horizon"])

        return Response(step.current, vjp)

    def _local(
        self, passes: PassContext, step: InnerStep, w: Tree, batch: Any, v: Tree, diagnostics: dict[str, float]
    ) -> Tree:
        """The local term at (w*, D*), D* that of the step itself where none was drawn."""
        passes = passes.elsewhere()
        step = replace(step, w=w, batch=step.batch if batch is None else batch)
        if passes.problem.update.may_read_lam:
            step = look_ahead(passes, replace(step, made=None))
        return self._pull_back(passes, step, v, diagnostics)


def _normalized(term: Tree) -> Tree:
    """At unit length, where it has one."""
    norm = tree.norm(term)
    return tree.scale(term, 1 / norm if norm else 0.0)


def _moved(mean: Tree, w: Tree, share: float) -> Tree:
    """The mean weights with a share of new ones."""
    return tree.tree_map(lambda old, new: torch.lerp(old, new.detach(), share), mean, w)


def _drawn(examples: Examples | None, held: Any, batch: Any, share: float, seed: int) -> Any:
    """What is held with a share of it replaced by as large a share of `batch`, at random; None without `examples`."""
    if examples is None:
        return None
    if held is None:
        return batch
    generator = torch.Generator().manual_seed(mix_seed(seed, _STREAM))
    chance = torch.rand((), generator=generator).item()
    leave, enter = (int(examples.size(one) * share + chance) for one in (held, batch))
    stay, come = (torch.randperm(examples.size(one), generator=generator) for one in (held, batch))
    return examples.concat([examples.take(held, stay[leave:]), examples.take(batch, come[:enter])])
