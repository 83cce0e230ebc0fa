"""Conjugate gradients: implicit differentiation with an iterative solve of the Hessian's linear system."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metaxl_evo.bilevel.solvers import Matvec, Solution, conjugate_gradients
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.implicit import ImplicitEstimator


@dataclass(frozen=True)
class ConjugateGradient(ImplicitEstimator):
    """value = w, vjp(v) = -d_lam <grad_w L_T, p>, p the solution of (H + damping I) p = v by conjugate gradients.

    Exact where w minimises the inner loss and the solve has converged; until then p, and so vjp, is not linear in v.
    The solve ends early, and says so in the diagnostics, at a direction of negative curvature (met in the first
    iteration: p = 0, and only the direct term is left): raise `damping`.

    Args:
        engine: of the products, as in `one_step`.
        radius: length of the finite-difference perturbation, in the units of w.
        damping: added to the Hessian's eigenvalues; it has to exceed their most negative one.
        parameters: a regular expression on parameter names; only those that it finds respond (default: all).
        iterations: at most so many, one Hessian product each.
        tolerance: the solve ends once |v - (H + damping I) p| is at most this times |v|.

    Sources: Pedregosa, ICML 2016 (HOAG, algorithm 1); Rajeswaran et al., iMAML, NeurIPS 2019 (5 iterations).

    Raises:
        ValueError: for an unknown engine or values out of range.
    """

    citation = "Pedregosa, Hyperparameter Optimization with Approximate Gradient, ICML 2016"

    damping: float = 1e-3
    iterations: int = 5
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.iterations) is not int or self.iterations < 1:
            raise ValueError(f"conjugate_gradient: iterations must be an integer of at least 1, not {self.iterations}")
        if not (self.tolerance >= 0 and math.isfinite(self.tolerance)):
            raise ValueError(f"conjugate_gradient: tolerance must be a number of at least 0, not {self.tolerance}")

    def _solve(self, matvec: Matvec, v: Tree, diagnostics: dict[str, float]) -> Solution:
        return conjugate_gradients(matvec, v, iterations=self.iterations, tolerance=self.tolerance)
