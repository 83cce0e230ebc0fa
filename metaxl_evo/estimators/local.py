"""What estimators share that take second derivatives of the inner loss, and those that pull back through one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep
from metaxl_evo.bilevel.products import ENGINES, mixed_product, prepare
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.base import Estimator
from metaxl_evo.messages import unknown

Engine = Literal["auto", "double_backward", "jvp", "finite_difference"]
Differences = Literal["central", "one_sided"]


@dataclass(frozen=True)
class EngineEstimator(Estimator):
    """An estimator made of products with second derivatives, by any engine (fields documented in `OneStep`)."""

    engine: Engine = "auto"
    radius: float = 0.01

    def __post_init__(self) -> None:
        if self.engine not in ("auto", *ENGINES):
            raise ValueError(unknown(f"{type(self).__name__} engine", str(self.engine), ("auto", *ENGINES)))
        if not (self.radius > 0 and math.isfinite(self.radius)):
            raise ValueError(f"{type(self).__name__}: radius must be a positive number, not {self.radius}")

    @property
    def second_order(self) -> bool:
        return self.engine in ("double_backward", "jvp")

    @property
    def takes_shards(self) -> bool:
        return self.engine != "double_backward"

    def prepare(self, passes: PassContext, w: Tree, lam: Tree, batch: Any) -> None:
        prepare(passes, self._engine(passes.problem), w, lam, batch, radius=self.radius)

    def _engine(self, problem: BilevelProblem) -> str:
        exact = problem.second_order and not problem.weights.sharded
        return self.engine if self.engine != "auto" or exact else "finite_difference"


@dataclass(frozen=True)
class LocalEstimator(EngineEstimator):
    """An estimator made of local terms d_lam <Phi(w, lam), v>."""

    needs_update_rule = True

    def _pull_back(self, passes: PassContext, step: InnerStep, v: Tree, diagnostics: dict[str, float]) -> Tree:
        """d_lam <Phi(step.w, lam), v> of a step made, share for share; takes v and the step's gradient over."""
        assert step.made is not None
        rule, grad = passes.problem.update, step.made.take_grad()
        through_rule = rule.lam_vjp(v, step.w, step.update_state, grad, step.lam)
        after, norm = step.made.update_state, step.made.grad_norm
        direction = rule.grad_vjp(v, step.w, grad, after, step.lam, before=step.update_state, norm=norm)
        del grad  # its memory serves the product
        direction = passes.all_reduce(direction)
        diagnostics["direction_norm"] = length = tree.norm(direction)
        return tree.add(through_rule, self._mixed_product(passes, step, direction, length), -1.0)

    def _mixed_product(
        self, passes: PassContext, step: InnerStep, v: Tree, length: float, at_w: Tree | None = None
    ) -> Tree:
        engine, at = self._engine(passes.problem), (step.w, step.lam, step.batch)
        return mixed_product(passes, engine, *at, v, radius=self.radius, length=length, at_w=at_w)


@dataclass(frozen=True)
class StepEstimator(LocalEstimator):
    """Local terms at the step's own weights and batch: what its backward left there serves the product."""

    differences: Differences = "central"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.differences not in get_args(Differences):
            raise ValueError(unknown(f"{name} differences", str(self.differences), get_args(Differences)))
        if self.differences == "one_sided" and self.engine != "finite_difference":
            raise ValueError(
                f"{name}: differences: one_sided is a way of engine finite_difference, and engine is {self.engine}: "
                "set engine: finite_difference, or leave differences at central"
            )

    @property
    def needs_lam_grad(self) -> bool:
        return self.differences == "one_sided"

    @property
    def reuses_graph(self) -> bool:
        return self.engine == "double_backward"

    def _mixed_product(
        self, passes: PassContext, step: InnerStep, v: Tree, length: float, at_w: Tree | None = None
    ) -> Tree:
        assert step.made is not None
        if step.made.product is not None:
            return step.made.product(v)
        if self.needs_lam_grad:
            at_w = step.made.lam_grad
            at_w = passes.lam_grad(step.w, step.lam, step.batch) if at_w is None else at_w
        return super()._mixed_product(passes, step, v, length, at_w)
