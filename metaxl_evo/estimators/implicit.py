"""What estimators share that solve the linear system of the implicit function theorem."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import InnerStep, Response
from metaxl_evo.bilevel.products import hessian_product, mixed_product
from metaxl_evo.bilevel.solvers import Matvec, Solution
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.local import EngineEstimator


@dataclass(frozen=True)
class ImplicitEstimator(EngineEstimator):
    """value = w, vjp(v) = -d_lam <grad_w L_T(w, lam), p> with p ~ (H + damping I)^-1 v, H the Hessian of L_T at w."""

    exact = "at optimum"

    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"{type(self).__name__}: damping must be a number of at least 0, not {self.damping}")

    @property
    def takes_shards(self) -> bool:  # the tangent of the gradient to w is of whole weights
        return not self.second_order

    def respond(self, passes: PassContext, step: InnerStep, state: None, diagnostics: dict[str, float]) -> Response:
        w, lam, batch, engine = step.current, step.lam, step.batch, self._engine(passes.problem)
        here = passes if step.made is None else passes.elsewhere()  # its recorded inputs are those before the step

        def matvec(x: Tree) -> Tree:
            return tree.add(hessian_product(here, engine, w, lam, batch, x, radius=self.radius), x, self.damping)

        def vjp(v: Tree) -> Tree:
            solution = self._solve(matvec, passes.all_reduce(v), diagnostics)
            diagnostics["solver_products"] = float(solution.products)
            diagnostics["solver_residual"] = solution.residual
            diagnostics["negative_curvature"] = float(solution.negative_curvature)
            return tree.scale(mixed_product(here, engine, w, lam, batch, solution.x, radius=self.radius), -1.0)

        return Response(w, vjp)

    @abstractmethod
    def _solve(self, matvec: Matvec, v: Tree, diagnostics: dict[str, float]) -> Solution:
        """x with `matvec(x)` ~ v."""
