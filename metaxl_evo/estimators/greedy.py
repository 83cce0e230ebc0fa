"""Greedy: the one-step terms of all inner steps so far, each judged when it was made, decayed with their age."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, Response
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.base import EpisodeEstimator
from metaxl_evo.estimators.local import StepEstimator


@dataclass(frozen=True)
class Greedy(EpisodeEstimator, StepEstimator):
    """value = w_t, offset = G_t = decay G_{t-1} + d_lam <Phi(w_{t-1}, lam), grad_w L_V(w_t)>, vjp = 0.

    The products of base Jacobians between a past step and now are taken for decay^age, and each step keeps the outer
    gradient of its own time. So a step's term is complete when the step is observed, nothing is left for the cotangent
    at the end, and the memory is one tree like lam; a term that is not finite is left out. With lam held still it is
    heavy-ball momentum (buffer G <- decay G + g, no dampening) on the indirect one-step term.

    Args:
        engine, radius, differences: of the local term, as in `one_step`.
        decay: gamma, from 0 (`one_step`) to 1 (the plain sum).

    Source: generalized greedy gradients, ICLR 2025 submission 6297 (decays 0.9, 0.99, 0.999).

    Raises:
        ValueError: for an unknown engine or values out of range.
    """

    citation = "Generalized Greedy Gradient-Based Hyperparameter Optimization, ICLR 2025 submission 6297"
    exact = "never"
    remembers = "meta"
    tunes_optimizer = True

    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ValueError(f"greedy: decay must be between 0 and 1, not {self.decay}")

    def init(self, problem: BilevelProblem, w: Tree, lam: Tree, previous: Any = None) -> Tree:
        return tree.zeros_like(lam)

    def observe(self, passes: PassContext, step: InnerStep, state: Tree) -> Tree:
        _, cotangent, _, _ = passes.outer_grad(step.current, step.lam, step.val_batch, wrt_w=step.w, wrt_lam=())
        term = passes.all_reduce(self._pull_back(passes, step.lent(), cotangent, {}))
        decayed = tree.scale(state, self.decay)
        return tree.add(term, decayed) if tree.all_finite(term) else decayed  # one NaN would stay for good

    def _answer(self, passes: PassContext, step: InnerStep, state: Tree, diagnostics: dict[str, float]) -> Response:
        diagnostics["accumulated_norm"] = tree.norm(state)
        return Response(step.current, lambda v: tree.zeros_like(step.lam), offset=state, wrt=())
