"""First order: only the direct term d_lam outer_loss(w, lam), the weights held constant."""

from __future__ import annotations

from dataclasses import dataclass

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import InnerStep, Response
from metaxl_evo.estimators.base import Estimator


@dataclass(frozen=True)
class FirstOrder(Estimator):
    """value = w, vjp(v) = 0: what goes through the inner step is dropped.

    Source: the rows FO of HyperDistill, Lee et al., ICLR 2022.

    Raises:
        ValueError: where the outer loss does not read lam, since every estimate would be zero.
    """

    citation = "Lee et al., Online Hyperparameter Meta-Learning with Hypergradient Distillation, ICLR 2022 (row FO)"
    exact = "never"
    requires_direct_term = True
    takes_shards = True

    def respond(self, passes: PassContext, step: InnerStep, state: None, diagnostics: dict[str, float]) -> Response:
        return Response(step.current, lambda v: tree.zeros_like(step.lam), wrt=())
