"""One step (T1-T2): differentiate the outer loss through the last inner step, exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import Counts, Inputs, PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, Response, StepMade
from metaxl_evo.bilevel.products import ENGINES, mixed_product
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.base import Estimator, Exactness
from metaxl_evo.messages import unknown


@dataclass(frozen=True)
class OneStep(Estimator):
    """value = Phi(w, lam), vjp(v) = d_lam <Phi(w, lam), v> = -d_lam <grad_w L_T, (du/dg)^T v>.

    Phi is the inner optimiser's real step: bias-corrected moments, clip factor, scheduled learning rate.

    Args:
        engine: how the mixed product is taken: `double_backward` and `jvp` (forward over reverse) are exact,
            `finite_difference` needs first-order passes only; `auto` is `jvp` where the problem can be differentiated
            twice, else `finite_difference`.
        radius: length of the finite-difference perturbation, in the units of w.

    Sources: Luketina et al., ICML 2016 (T1-T2); Liu et al., DARTS, ICLR 2019, eq. 7-8 (finite difference);
    Kemaev et al., MixFlow-MG, ICML 2025 (forward over reverse).

    Raises:
        ValueError: for an unknown engine or a radius that is not a positive number.
    """

    engine: Literal["auto", "double_backward", "jvp", "finite_difference"] = "auto"
    radius: float = 0.01

    def __post_init__(self) -> None:
        if self.engine not in ("auto", *ENGINES):
            raise ValueError(unknown("one_step engine", str(self.engine), ("auto", *ENGINES)))
        if not (self.radius > 0 and math.isfinite(self.radius)):
            raise ValueError(f"one_step: radius must be a positive number, not {self.radius}")

    @property
    def second_order(self) -> bool:
        return self.engine in ("double_backward", "jvp")

    @property
    def needs_forward_ad(self) -> bool:
        return self.engine == "jvp"

    @property
    def exact(self) -> Exactness:
        return "always"

    @property
    def evaluated_at(self) -> Literal["previous", "current"]:
        return "previous"

    @property
    def needs_update_rule(self) -> bool:
        return True

    @property
    def tunes_optimizer(self) -> bool:
        return True

    @property
    def citation(self) -> str:
        return (
            "Luketina et al., Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters, ICML 2016"
        )

    def cost(self, *, step_made: bool) -> Counts:
        counts = Counts(forwards=1, backwards=1) if step_made else Counts(forwards=2, backwards=2)
        if self.engine == "finite_difference":
            counts.forwards, counts.backwards = counts.forwards + 2, counts.backwards + 2
        elif self.engine == "double_backward":
            counts.hvps = 1
        else:
            counts.jvps = 1
        return counts

    def respond(self, passes: PassContext, step: InnerStep, state: Any, diagnostics: dict[str, float]) -> Response:
        rule = passes.problem.update
        made = step.made if step.made is not None else self._look_ahead(passes, step)

        def vjp(v: Tree) -> Tree:
            direction = rule.grad_vjp(v, step.w, made.grad, made.update_state, step.lam)
            diagnostics["direction_norm"] = tree.norm(direction)
            mixed = mixed_product(
                passes, self._engine(passes.problem), step.w, step.lam, step.batch, direction, radius=self.radius
            )
            return tree.add(rule.lam_vjp(v, step.w, step.update_state, made.grad, step.lam), mixed, -1.0)

        return Response(made.w, vjp)

    def _engine(self, problem: BilevelProblem) -> str:
        if self.engine != "auto":
            return self.engine
        return "jvp" if problem.second_order else "finite_difference"

    def _look_ahead(self, passes: PassContext, step: InnerStep) -> StepMade:
        """The step that the optimiser would make; its pass records the stop-gradient inputs on the way."""
        rule = passes.problem.update
        inputs = Inputs.RECORD if passes.problem.stop_gradients else Inputs.LIVE
        _, grad, _ = passes.inner_grad(step.w, step.lam, step.batch, wrt_w=step.w, inputs=inputs)
        before = step.update_state if step.update_state is not None else rule.init(step.w)
        with torch.no_grad():
            after, after_state = rule(step.w, before, grad, step.lam)
        return StepMade(after, grad, after_state)
