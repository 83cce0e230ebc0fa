"""The mixed product d_lam <grad_w L, v>: three engines, closed forms, a transformer, the stop-gradient trap."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaxl_evo.bilevel import SGD, BilevelProblem, PassContext, Tree, tree
from metaxl_evo.bilevel.products import ENGINES, mixed_product
from tests.estimators.problems import (
    Quadratic,
    Toy,
    network,
    once_differentiable,
    quadratic,
    random_like,
    relative_error,
    tagger,
)

EXACT = ("double_backward", "jvp")


def product(toy: Toy, engine: str, v: Tree, **options: Any) -> Tree:
    return mixed_product(PassContext(toy.problem, seed=3), engine, toy.w, toy.lam, toy.train, v, **options)


def by_autograd(toy: Toy, v: Tree) -> Tree:
    """Reverse over reverse, written here, with the math kernel."""
    w = {n: x.clone().requires_grad_() for n, x in toy.w.items()}
    lam = {n: x.clone().requires_grad_() for n, x in toy.lam.items()}
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(
            toy.problem.inner_loss(w, lam, toy.train), list(w.values()), create_graph=True,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        along = torch.stack([(g * v[n]).sum() for n, g in zip(w, grads, strict=True)]).sum()
        found = torch.autograd.grad(along, list(lam.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(lam, found, strict=True))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def transformer(request: pytest.FixtureRequest) -> Toy:
    return tagger(request.param)


def test_the_engines_are_the_three() -> None:
    assert ENGINES == ("double_backward", "jvp", "finite_difference")


@pytest.mark.parametrize("engine", ENGINES)
def test_closed_form_on_the_quadratic(engine: str) -> None:
    """B v = -C' A v; the lambda-gradient is linear in theta, so that differences are exact at any radius."""
    q, toy = Quadratic.make(), quadratic(torch.float64)
    v = random_like(toy.w, 70)
    expected = {"lam": -q.C.T @ q.A @ v["th"]}
    for radius in (1e-1, 1e-2, 1e-3) if engine == "finite_difference" else (1.0,):
        error = relative_error(product(toy, engine, v, radius=radius), expected)
        assert error < (1e-9 if engine == "finite_difference" else 1e-12)


@pytest.mark.parametrize("engine", EXACT)
def test_exact_engines_on_a_transformer(engine: str, transformer: Toy) -> None:
    v = random_like(transformer.w, 80)
    assert relative_error(product(transformer, engine, v), by_autograd(transformer, v)) < 1e-12


@pytest.mark.parametrize(("radius", "allowed"), [(1e-3, 1e-6), (1e-4, 1e-7)])
def test_finite_differences_on_a_transformer(transformer: Toy, radius: float, allowed: float) -> None:
    v = random_like(transformer.w, 80)
    found = product(transformer, "finite_difference", v, radius=radius)
    assert relative_error(found, by_autograd(transformer, v)) < allowed


def test_finite_differences_have_an_error_of_second_order(transformer: Toy) -> None:
    v = random_like(transformer.w, 80)
    exact = by_autograd(transformer, v)
    near, far = (
        relative_error(product(transformer, "finite_difference", v, radius=radius), exact) for radius in (1e-2, 1e-1)
    )
    assert 85 < far / near < 115


def test_without_replayed_inputs_finite_differences_estimate_something_else(transformer: Toy) -> None:
    v = random_like(transformer.w, 80)
    naive = replace(transformer, problem=replace(transformer.problem, stop_gradients=False))
    exact = by_autograd(transformer, v)
    assert relative_error(product(naive, "finite_difference", v, radius=1e-3), exact) > 1e-2
    assert relative_error(product(transformer, "finite_difference", v, radius=1e-3), exact) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_zero_direction_costs_nothing(engine: str) -> None:
    toy = network(torch.float64)
    passes = PassContext(toy.problem)
    found = mixed_product(passes, engine, toy.w, toy.lam, toy.train, tree.zeros_like(toy.w))
    assert not any(leaf.any() for leaf in found.values())
    assert not any(passes.counts.as_dict().values())


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_add_up(engine: str) -> None:
    toy = network(torch.float64)
    v = random_like(toy.w, 90)
    x, y = toy.train
    two = replace(toy.problem, parts=lambda batch: batch)
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = mixed_product(PassContext(two), engine, toy.w, toy.lam, halves, v, radius=1e-3)
    one = tree.scale(product(toy, engine, v, radius=1e-3), 2.0)  # the joined loss is the mean of the two halves'
    assert relative_error(found, one) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_where_w_and_lam_do_not_meet(engine: str) -> None:
    problem = BilevelProblem(lambda w, lam, batch: w["x"].square().sum() + lam["y"].square().sum(), None, SGD(0.1))  # type: ignore[arg-type]
    w, lam = {"x": torch.ones(3)}, {"y": torch.ones(2)}
    found = mixed_product(PassContext(problem), engine, w, lam, None, {"x": torch.ones(3)})
    assert not found["y"].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_unused_base_weights_do_not_matter(engine: str) -> None:
    toy = network(torch.float64)
    v = random_like(toy.w, 90)
    expected = product(toy, engine, v)
    wider = replace(toy, w=toy.w | {"idle": torch.ones(2, dtype=torch.float64)})
    zero = {"idle": torch.zeros(2, dtype=torch.float64)}
    assert relative_error(product(wider, engine, v | zero), expected) < 1e-12


@pytest.mark.parametrize("engine", EXACT)
def test_a_once_differentiable_function_is_refused_and_not_taken_for_a_constant(engine: str) -> None:
    toy = network(torch.float64)
    v = random_like(toy.w, 90)
    hidden = replace(toy, problem=once_differentiable(toy.problem))
    with pytest.raises(RuntimeError):
        product(hidden, engine, v)
    expected = product(toy, "finite_difference", v)
    assert relative_error(product(hidden, "finite_difference", v), expected) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_results_carry_no_graph_and_keep_the_dtype(engine: str) -> None:
    toy = network(torch.float32)
    found = product(toy, engine, random_like(toy.w, 90))
    assert not any(leaf.requires_grad for leaf in found.values())
    assert {leaf.dtype for leaf in found.values()} == {torch.float32}
    assert list(found) == list(toy.lam)


def test_unknown_engine_lists_the_valid_ones() -> None:
    toy = quadratic(torch.float64)
    with pytest.raises(
        ValueError, match=r"finite_differences.*did you mean 'finite_difference'.*double_backward, jvp"
    ):
        product(toy, "finite_differences", toy.w)
