"""Neumann series, conjugate gradients and power iterations against dense linear algebra."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from metaxl_evo.bilevel import Tree, tree
from metaxl_evo.bilevel.solvers import conjugate_gradients, largest_eigenvalue, neumann_series
from tests.estimators.problems import flat, random_like, relative_error, unflat

LIKE: Tree = {"a": torch.zeros(2, 2, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
V = random_like(LIKE, 20)


def with_eigenvalues(*values: float) -> Tensor:
    """A symmetric matrix with those eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


SPD = with_eigenvalues(0.4, 0.7, 1.0, 1.6, 2.5, 4.0)
INDEFINITE = with_eigenvalues(-3.0, -0.5, 0.7, 1.0, 1.6, 2.5)


def product(matrix: Tensor, calls: list[Tree] | None = None) -> Callable[[Tree], Tree]:
    def matvec(x: Tree) -> Tree:
        if calls is not None:
            calls.append(x)
        return unflat(matrix @ flat(x), x)

    return matvec


def solved(matrix: Tensor) -> Tree:
    return unflat(torch.linalg.solve(matrix, flat(V)), V)


# Neumann series ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [0, 1, 3, 20])
def test_neumann_series_is_its_closed_form(terms: int) -> None:
    """A^-1 [I - (I - step A)^(terms + 1)] v, and the size of (I - step A)^terms v for what is left."""
    step, calls = 0.3, list[Tree]()
    found = neumann_series(product(SPD, calls), V, terms=terms, step=step)
    left = torch.eye(6, dtype=torch.float64) - step * SPD
    expected = torch.linalg.solve(SPD, flat(V) - torch.linalg.matrix_power(left, terms + 1) @ flat(V))
    assert relative_error(found.x, unflat(expected, V)) < 1e-12
    last = torch.linalg.matrix_power(left, terms) @ flat(V)
    assert abs(found.residual - float(last.norm() / flat(V).norm())) < 1e-12
    assert found.products == len(calls) == terms
    assert not found.negative_curvature


@pytest.mark.parametrize(("step", "grows"), [(0.49, False), (0.51, True)])  # 2 / lambda_max = 0.5
def test_neumann_series_tells_that_it_diverges(step: float, grows: bool) -> None:
    assert (neumann_series(product(SPD), V, terms=500, step=step).residual > 1) is grows


def test_neumann_series_tells_of_negative_curvature() -> None:
    assert neumann_series(product(INDEFINITE), V, terms=5, step=0.3).negative_curvature
    assert not neumann_series(product(torch.zeros(6, 6, dtype=torch.float64)), V, terms=5, step=0.3).negative_curvature


# Conjugate gradients -------------------------------------------------------------------------------------------------


def test_conjugate_gradients_solve_in_as_many_iterations_as_unknowns() -> None:
    found = conjugate_gradients(product(SPD), V, iterations=6, tolerance=0.0)
    assert relative_error(found.x, solved(SPD)) < 1e-12
    assert found.products == 6
    assert found.residual < 1e-12
    assert not found.negative_curvature


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
def test_conjugate_gradients_are_the_best_of_the_krylov_space(iterations: int) -> None:
    """x_k minimises the A-norm of the error over span{v, A v, .., A^(k-1) v}, solved here directly."""
    powers = torch.stack([torch.linalg.matrix_power(SPD, k) @ flat(V) for k in range(iterations)], dim=1)
    best = powers @ torch.linalg.solve(powers.T @ SPD @ powers, powers.T @ flat(V))
    found = conjugate_gradients(product(SPD), V, iterations=iterations, tolerance=0.0)
    assert relative_error(found.x, unflat(best, V)) < 1e-10
    left = flat(V) - SPD @ best
    assert abs(found.residual - float(left.norm() / flat(V).norm())) < 1e-10


@pytest.mark.parametrize(("values", "distinct"), [((2.0,) * 6, 1), ((1.0, 1.0, 1.0, 3.0, 3.0, 3.0), 2)])
def test_conjugate_gradients_end_once_the_system_is_solved(values: tuple[float, ...], distinct: int) -> None:
    """As many iterations as there are distinct eigenvalues."""
    calls = list[Tree]()
    found = conjugate_gradients(product(with_eigenvalues(*values), calls), V, iterations=6, tolerance=1e-10)
    assert found.products == len(calls) == distinct
    assert relative_error(found.x, solved(with_eigenvalues(*values))) < 1e-12


def test_the_tolerance_is_relative() -> None:
    by_size = [
        conjugate_gradients(product(SPD), tree.scale(V, size), iterations=6, tolerance=0.05) for size in (1e-9, 1.0)
    ]
    assert by_size[0].products == by_size[1].products < 6
    assert by_size[1].residual <= 0.05
    before = conjugate_gradients(product(SPD), V, iterations=by_size[1].products - 1, tolerance=0.05)
    assert before.residual > 0.05


def test_conjugate_gradients_end_at_negative_curvature_with_what_they_have() -> None:
    found = conjugate_gradients(product(INDEFINITE), V, iterations=6, tolerance=0.0)
    assert found.negative_curvature
    assert found.products < 6
    before = conjugate_gradients(product(INDEFINITE), V, iterations=found.products - 1, tolerance=0.0)
    assert not before.negative_curvature
    assert relative_error(found.x, before.x) == 0
    at_once = conjugate_gradients(product(-SPD), V, iterations=6, tolerance=0.0)
    assert (at_once.negative_curvature, at_once.products, at_once.residual) == (True, 1, 1.0)
    assert not flat(at_once.x).any()


def test_without_curvature_there_is_no_solution() -> None:
    found = conjugate_gradients(product(torch.zeros(6, 6, dtype=torch.float64)), V, iterations=6, tolerance=0.0)
    assert found.negative_curvature
    assert not flat(found.x).any()


def test_zero_needs_no_products() -> None:
    zero, calls = tree.zeros_like(V), list[Tree]()
    found = conjugate_gradients(product(SPD, calls), zero, iterations=6, tolerance=1e-6)
    assert (found.residual, len(calls)) == (0.0, 0)
    assert not flat(found.x).any()
    assert neumann_series(product(SPD), zero, terms=2, step=0.1).residual == 0.0


# Power iterations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", [SPD, INDEFINITE], ids=["definite", "indefinite"])
def test_power_iterations_find_the_largest_magnitude(matrix: Tensor) -> None:
    expected = float(torch.linalg.eigvalsh(matrix).abs().max())
    assert abs(largest_eigenvalue(product(matrix), LIKE, iterations=300, seed=0) / expected - 1) < 1e-10


def test_power_iterations_approach_it_from_below_with_a_product_each() -> None:
    calls = list[Tree]()
    found = [largest_eigenvalue(product(SPD, calls), LIKE, iterations=n, seed=0) for n in (1, 2, 4, 8)]
    assert found == sorted(found)
    assert 0.0 < found[0] < found[-1] < 4.0
    assert len(calls) == 15
    assert all(abs(tree.norm(x) - 1) < 1e-12 for x in calls)


def test_power_iterations_start_from_their_seed() -> None:
    first, again, other = (largest_eigenvalue(product(SPD), LIKE, iterations=2, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_largest_eigenvalue_of_nothing() -> None:
    assert largest_eigenvalue(tree.zeros_like, LIKE, iterations=3, seed=0) == 0.0


def test_solvers_keep_the_dtype() -> None:
    v = {name: leaf.float() for name, leaf in V.items()}
    for found in (
        neumann_series(product(SPD), v, terms=2, step=0.1),
        conjugate_gradients(product(SPD), v, iterations=4, tolerance=0.0),
    ):
        assert {leaf.dtype for leaf in found.x.values()} == {torch.float32}
    assert abs(largest_eigenvalue(product(SPD), v, iterations=200, seed=0) - 4.0) < 1e-5
