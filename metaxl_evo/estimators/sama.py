"""SAMA: the one-step term with an identity base Jacobian, at the weights as they are now."""

from __future__ import annotations

from dataclasses import dataclass, replace

from metaxl_evo.bilevel.hypergradients import look_ahead
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import InnerStep, Response
from metaxl_evo.estimators.local import Engine, LocalEstimator


@dataclass(frozen=True)
class Sama(LocalEstimator):
    """value = w, vjp(v) = -d_lam <grad_w L_T(w, lam), (du/dg)^T v>, all at the current weights w.

    du/dg is the diagonal of the adaptive update at the gradient of the step that was made last (or, in the order
    lookahead, of the one to come), with its bias correction and clip factor; the published code leaves out the
    former. After a step the previous weights are not needed, so coupled weight decay is read at the current ones.

    Args:
        engine: of the mixed product, as in `one_step`; the paper's is `finite_difference`.
        radius: length of the finite-difference perturbation, in the units of w. The paper takes 1.0, which on
            networks is beyond the reach of the difference's own linearisation.

    Source: Choe et al., Making Scalable Meta Learning Practical, NeurIPS 2023.

    Raises:
        ValueError: for an unknown engine or a radius that is not a positive number.
    """

    citation = "Choe et al., Making Scalable Meta Learning Practical, NeurIPS 2023"
    exact = "never"

    engine: Engine = "finite_difference"

    def respond(self, passes: PassContext, step: InnerStep, state: None, diagnostics: dict[str, float]) -> Response:
        w = step.current
        if step.made is None:
            step = look_ahead(passes, step)
        else:
            passes = passes.elsewhere()  # its recorded inputs are those before the step
        return Response(w, lambda v: self._pull_back(passes, replace(step, w=w), v, diagnostics))
