"""One step (T1-T2): differentiate the outer loss through the last inner step, exactly."""

from __future__ import annotations

from dataclasses import dataclass

from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import InnerStep, Response
from metaxl_evo.estimators.local import StepEstimator


@dataclass(frozen=True)
class OneStep(StepEstimator):
    """value = Phi(w, lam), vjp(v) = d_lam <Phi(w, lam), v> = -d_lam <grad_w L_T, (du/dg)^T v>.

    Phi is the inner optimiser's real step: bias-corrected moments, clip factor, scheduled learning rate.

    Args:
        engine: how the mixed product is taken: `double_backward` and `jvp` (forward over reverse) are exact,
            `finite_difference` needs first-order passes only; `auto` is the first of `jvp`, `double_backward` and
            `finite_difference` that the inner loss allows (said once where it is not `jvp`).
        radius: length of the finite-difference perturbation, in the units of w.
        differences: `central`, at both sides of w, has an error O(radius^2); `one_sided`, with engine
            `finite_difference`, has O(radius), and saves a pass where the step's own backward was asked for the
            gradient at lam (`StepMade.lam_grad`; elsewhere that takes a pass).

    Sources: Luketina et al., ICML 2016 (T1-T2); Liu et al., DARTS, ICLR 2019, eq. 7-8 (finite difference);
    Kemaev et al., MixFlow-MG, ICML 2025 (forward over reverse).

    Raises:
        ValueError: for an unknown engine, a radius that is not a positive number, or one-sided differences of another
            engine than `finite_difference`.
    """

    citation = (
        "Luketina et al., Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters, ICML 2016"
    )
    exact = "always"
    evaluated_at = "previous"
    tunes_optimizer = True

    def respond(self, passes: PassContext, step: InnerStep, state: None, diagnostics: dict[str, float]) -> Response:
        step = step if step.made is not None else self._look_ahead(passes, step)
        return Response(step.current, lambda v: self._pull_back(passes, step, v, diagnostics))
