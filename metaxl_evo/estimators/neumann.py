"""Neumann series: implicit differentiation with a truncated series for the inverse Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metaxl_evo.bilevel.solvers import Matvec, Solution, largest_eigenvalue, neumann_series
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.implicit import ImplicitEstimator


@dataclass(frozen=True)
class Neumann(ImplicitEstimator):
    """value = w, vjp(v) = -d_lam <grad_w L_T, p>, p = step * sum_{j=0..terms} (I - step (H + damping I))^j v.

    Exact where w minimises the inner loss and the series has converged. With j = 0 alone it is the one-step term with
    an identity Hessian and the learning rate `step`; with `terms` = K - 1 and `step` the learning rate it is, on a
    quadratic, the unroll of K steps. `terms: 0` with the head's `parameters` is FastMix's form (ICLR 2026): for shares
    p_k of sources, d outer / d p_k = -step <g_outer, g_k>, gradients of the head alone. The diagnostics tell the step,
    the size of the last term relative to the first (`solver_residual`: above 1 the series diverges) and whether a term
    met negative curvature.

    Args:
        engine: of the products, as in `one_step`.
        radius: length of the finite-difference perturbation, in the units of w.
        damping: added to the Hessian's eigenvalues; it has to exceed their most negative one.
        parameters: a regular expression on parameter names; only those that it finds respond (default: all).
        terms: further terms after the first, one Hessian product each.
        step: below 2 / lambda_max for the series to converge; default: 1 / lambda_max by power iterations.
        power_iterations: their number, one Hessian product each.

    Source: Lorraine et al., AISTATS 2020, algorithm 3.

    Raises:
        ValueError: for an unknown engine or values out of range; where `step` has to be found and H + damping I is 0.
    """

    citation = "Lorraine et al., Optimizing Millions of Hyperparameters by Implicit Differentiation, AISTATS 2020"

    terms: int = 3
    step: float | None = None
    power_iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in (("terms", 0), ("power_iterations", 1)):
            value = getattr(self, field)
            if type(value) is not int or value < least:
                raise ValueError(f"neumann: {field} must be an integer of at least {least}, not {value}")
        if self.step is not None and not (self.step > 0 and math.isfinite(self.step)):
            raise ValueError(f"neumann: step must be a positive number, or None, not {self.step}")

    def _solve(self, matvec: Matvec, v: Tree, diagnostics: dict[str, float]) -> Solution:
        step = self._step_below_the_bound(matvec, v) if self.step is None else self.step
        diagnostics["step"] = step
        return neumann_series(matvec, v, terms=self.terms, step=step)

    def _step_below_the_bound(self, matvec: Matvec, like: Tree) -> float:
        # Always the same start: the estimate is linear in the cotangent, and no draw of noise moves it.
        bound = largest_eigenvalue(matvec, like, iterations=self.power_iterations, seed=0)
        if bound == 0:
            raise ValueError(
                "neumann: the inner loss has no curvature here, which the series would invert: set damping"
            )
        return 1 / bound
