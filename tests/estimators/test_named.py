"""Implicit estimators of some of the base parameters, the others held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.bilevel import SGD, BilevelProblem, Tree, hypergradient
from metaxl_evo.estimators import ConjugateGradient, Neumann

A = torch.tensor([[3.0, 0.5, 0.2, 0.1], [0.5, 2.0, 0.3, 0.4], [0.2, 0.3, 4.0, 0.6], [0.1, 0.4, 0.6, 2.5]]).double()
B = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2], [0.4, 0.9]]).double()
GOAL = torch.tensor([0.5, -1.0, 0.3, 0.7]).double()
W = {"body": torch.tensor([0.2, -0.1]).double(), "head": torch.tensor([0.6, 0.4]).double()}
LAM = {"lam": torch.tensor([0.3, -0.2]).double()}


def whole(w: Tree) -> Tensor:
    return torch.cat([w["body"], w["head"]])


def problem() -> BilevelProblem:
    """inner = w'Aw / 2 - w'B lam, outer = |w - goal|^2 / 2."""
    return BilevelProblem(
        lambda w, lam, _: whole(w) @ A @ whole(w) / 2 - whole(w) @ B @ lam["lam"],
        lambda w, lam, _: (whole(w) - GOAL).square().sum() / 2,
        SGD(lr=0.1),
        direct_term=False,
    )


def gradient(estimator: Any) -> Tensor:
    return hypergradient(problem(), estimator, W, LAM, None, None).grads["lam"]


def test_the_first_term_alone_is_the_response_of_sgd() -> None:
    """FastMix's form: -step <g_outer, g_k> of the head alone, g_k the derivative of the inner gradient by lam_k."""
    cotangent = (whole(W) - GOAL)[2:]
    torch.testing.assert_close(gradient(Neumann(terms=0, step=0.7, parameters="^head")), 0.7 * B[2:].T @ cotangent)


@pytest.mark.parametrize("engine", ["jvp", "double_backward", "finite_difference"])
def test_the_solve_is_of_those_parameters(engine: str) -> None:
    """The other rows and columns of the Hessian take no part."""
    cotangent = (whole(W) - GOAL)[2:]
    exact = B[2:].T @ torch.linalg.solve(A[2:, 2:], cotangent)
    solve: dict[str, Any] = {"engine": engine, "parameters": "head", "damping": 0.0}
    torch.testing.assert_close(gradient(ConjugateGradient(iterations=4, **solve)), exact)
    torch.testing.assert_close(gradient(Neumann(terms=200, **solve)), exact)


def test_all_of_them_are_the_default() -> None:
    assert torch.equal(gradient(Neumann(parameters=".")), gradient(Neumann()))


@pytest.mark.parametrize(
    ("pattern", "line"),
    [("tail", "finds none of the base parameters, such as body, head"), ("(", "is not a regular expression")],
)
def test_patterns_that_cannot_serve(pattern: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        gradient(Neumann(parameters=pattern))
