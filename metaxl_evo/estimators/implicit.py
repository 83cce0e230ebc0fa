"""What estimators share that solve the linear system of the implicit function theorem."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, Response
from metaxl_evo.bilevel.products import hessian_product, mixed_product
from metaxl_evo.bilevel.solvers import Matvec, Solution
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.local import EngineEstimator
from metaxl_evo.estimators.named import found_by, require_pattern


@dataclass(frozen=True)
class ImplicitEstimator(EngineEstimator):
    """value = w, vjp(v) = -d_lam <grad_w L_T(w, lam), p> with p ~ (H + damping I)^-1 v, H the Hessian of L_T at w.

    With `parameters` all of this is of the weights that the pattern finds, and the others are constants.
    """

    exact = "at optimum"

    damping: float = 0.0
    parameters: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"{type(self).__name__}: damping must be a number of at least 0, not {self.damping}")
        require_pattern(type(self).__name__, self.parameters)

    def check(self, problem: BilevelProblem, w: Tree, lam: Tree) -> None:
        super().check(problem, w, lam)
        found_by(type(self).__name__, self.parameters, w)

    @property
    def takes_shards(self) -> bool:  # the tangent of the gradient to w is of whole weights
        return not self.second_order

    def respond(self, passes: PassContext, step: InnerStep, state: None, diagnostics: dict[str, float]) -> Response:
        w, lam, batch, engine = step.current, step.lam, step.batch, self._engine(passes.problem)
        names = found_by(type(self).__name__, self.parameters, w)
        here = passes if step.made is None else passes.elsewhere()  # its recorded inputs are those before the step

        def whole(x: Tree) -> Tree:  # the other weights are constants
            return {name: x[name] if name in names else torch.zeros_like(leaf) for name, leaf in w.items()}

        def matvec(x: Tree) -> Tree:
            product = hessian_product(here, engine, w, lam, batch, whole(x), radius=self.radius)
            return tree.add({name: product[name] for name in x}, x, self.damping)

        def vjp(v: Tree) -> Tree:
            solution = self._solve(matvec, passes.all_reduce(v), diagnostics)
            diagnostics["solver_products"] = float(solution.products)
            diagnostics["solver_residual"] = solution.residual
            diagnostics["negative_curvature"] = float(solution.negative_curvature)
            return tree.scale(mixed_product(here, engine, w, lam, batch, whole(solution.x), radius=self.radius), -1.0)

        return Response(w, vjp, wrt=names)

    @abstractmethod
    def _solve(self, matvec: Matvec, v: Tree, diagnostics: dict[str, float]) -> Solution:
        """x with `matvec(x)` ~ v."""
