"""The products d_lam <grad_w L, v> and d_w <grad_w L, v>: engines, closed forms, a transformer, stop-gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaxl_evo.bilevel import SGD, BilevelProblem, Counts, PassContext, Tree, tree
from metaxl_evo.bilevel.products import ENGINES, hessian_product, mixed_product
from tests.estimators.problems import (
    Quadratic,
    Toy,
    flat,
    network,
    once_differentiable,
    quadratic,
    random_like,
    relative_error,
    tagger,
    unflat,
)

EXACT = ("double_backward", "jvp")
KINDS = {"mixed": mixed_product, "hessian": hessian_product}
on_kinds = pytest.mark.parametrize("kind", KINDS)


def product(toy: Toy, engine: str, v: Tree, kind: str = "mixed", **options: Any) -> Tree:
    return KINDS[kind](PassContext(toy.problem, seed=3), engine, toy.w, toy.lam, toy.train, v, **options)


def by_autograd(toy: Toy, v: Tree, kind: str = "mixed") -> Tree:
    """Reverse over reverse, written here, with the math kernel."""
    w = {n: x.clone().requires_grad_() for n, x in toy.w.items()}
    lam = {n: x.clone().requires_grad_() for n, x in toy.lam.items()}
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(
            toy.problem.inner_loss(w, lam, toy.train), list(w.values()), create_graph=True,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        along = torch.stack([(g * v[n]).sum() for n, g in zip(w, grads, strict=True)]).sum()
        target = lam if kind == "mixed" else w
        found = torch.autograd.grad(along, list(target.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(target, found, strict=True))


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


@pytest.mark.parametrize("engine", ENGINES)
def test_the_hessian_of_the_quadratic_is_its_matrix(engine: str) -> None:
    q, toy = Quadratic.make(), quadratic(torch.float64)
    v = random_like(toy.w, 70)
    error = relative_error(product(toy, engine, v, "hessian"), {"th": q.A @ v["th"]})
    assert error < (1e-9 if engine == "finite_difference" else 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_hessian_of_a_network_row_by_row(engine: str) -> None:
    """The whole matrix, by autograd on one flat vector; the meta network's input stands still (stop_gradient)."""
    toy = network(torch.float64)
    weights = flat(toy.w).requires_grad_()
    loss = toy.problem.inner_loss(unflat(weights, toy.w), toy.lam, toy.train)
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, weights, retain_graph=True)[0] for g in gradient])
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-14)
    for seed in range(3):
        v = random_like(toy.w, 70 + seed)
        found = product(toy, engine, v, "hessian", radius=1e-3)
        error = relative_error(found, unflat(hessian @ flat(v), toy.w))
        assert error < (1e-6 if engine == "finite_difference" else 1e-12)


@on_kinds
@pytest.mark.parametrize("engine", EXACT)
def test_exact_engines_on_a_transformer(engine: str, kind: str, transformer: Toy) -> None:
    v = random_like(transformer.w, 80)
    assert relative_error(product(transformer, engine, v, kind), by_autograd(transformer, v, kind)) < 1e-12


@on_kinds
@pytest.mark.parametrize(("radius", "allowed"), [(1e-3, 1e-6), (1e-4, 1e-7)])
def test_finite_differences_on_a_transformer(transformer: Toy, kind: str, radius: float, allowed: float) -> None:
    v = random_like(transformer.w, 80)
    found = product(transformer, "finite_difference", v, kind, radius=radius)
    assert relative_error(found, by_autograd(transformer, v, kind)) < allowed


def test_finite_differences_have_an_error_of_second_order(transformer: Toy) -> None:
    v = random_like(transformer.w, 80)
    exact = by_autograd(transformer, v)
    near, far = (
        relative_error(product(transformer, "finite_difference", v, radius=radius), exact) for radius in (1e-2, 1e-1)
    )
    assert 85 < far / near < 115


def test_one_sided_differences_have_an_error_of_first_order(transformer: Toy) -> None:
    """With what autograd leaves at lam as the other side, and no pass of our own for it."""
    v, passes = random_like(transformer.w, 80), PassContext(transformer.problem, seed=3)
    lam = {name: leaf.clone().requires_grad_() for name, leaf in transformer.lam.items()}
    transformer.problem.inner_loss(transformer.w, lam, transformer.train).backward()
    at_w = {name: leaf.grad for name, leaf in lam.items() if leaf.grad is not None}
    at = transformer.w, transformer.lam, transformer.train, v
    exact = by_autograd(transformer, v)
    near, far = (
        relative_error(mixed_product(passes, "finite_difference", *at, radius=radius, at_w=at_w), exact)
        for radius in (1e-4, 1e-3)
    )
    assert 9.5 < far / near < 10.5
    assert near < 1e-4
    assert passes.counts == Counts(forwards=1 + 2, backwards=2)  # one records


@on_kinds
def test_without_replayed_inputs_finite_differences_estimate_something_else(kind: str, transformer: Toy) -> None:
    v = random_like(transformer.w, 80)
    naive = replace(transformer, problem=replace(transformer.problem, stop_gradients=False))
    exact = by_autograd(transformer, v, kind)
    assert relative_error(product(naive, "finite_difference", v, kind, radius=1e-3), exact) > 1e-2
    assert relative_error(product(transformer, "finite_difference", v, kind, radius=1e-3), exact) < 1e-6


@on_kinds
@pytest.mark.parametrize("engine", ENGINES)
def test_zero_direction_costs_nothing(engine: str, kind: str) -> None:
    toy = network(torch.float64)
    passes = PassContext(toy.problem)
    found = KINDS[kind](passes, engine, toy.w, toy.lam, toy.train, tree.zeros_like(toy.w))
    assert found.keys() == (toy.lam if kind == "mixed" else toy.w).keys()
    assert not any(leaf.any() for leaf in found.values())
    assert not any(passes.counts.as_dict().values())


@on_kinds
@pytest.mark.parametrize("engine", ENGINES)
def test_parts_add_up(engine: str, kind: str) -> None:
    toy = network(torch.float64)
    v = random_like(toy.w, 90)
    x, y = toy.train
    two = replace(toy.problem, parts=lambda batch: batch)
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = KINDS[kind](PassContext(two), engine, toy.w, toy.lam, halves, v, radius=1e-3)
    one = tree.scale(product(toy, engine, v, kind, radius=1e-3), 2.0)  # the joined loss is the mean of the two halves'
    assert relative_error(found, one) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_where_w_and_lam_do_not_meet(engine: str) -> None:
    problem = BilevelProblem(lambda w, lam, batch: w["x"].square().sum() + lam["y"].square().sum(), None, SGD(0.1))  # type: ignore[arg-type]
    w, lam = {"x": torch.ones(3)}, {"y": torch.ones(2)}
    found = mixed_product(PassContext(problem), engine, w, lam, None, {"x": torch.ones(3)})
    assert not found["y"].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_without_curvature(engine: str) -> None:
    problem = BilevelProblem(lambda w, lam, batch: (w["x"] * lam["y"]).sum(), None, SGD(0.1))  # type: ignore[arg-type]
    w, lam = {"x": torch.ones(3)}, {"y": torch.ones(3)}
    found = hessian_product(PassContext(problem), engine, w, lam, None, {"x": torch.ones(3)})
    assert torch.equal(found["x"], torch.zeros(3))


@on_kinds
@pytest.mark.parametrize("engine", ENGINES)
def test_unused_base_weights_do_not_matter(engine: str, kind: str) -> None:
    toy = network(torch.float64)
    v = random_like(toy.w, 90)
    expected = product(toy, engine, v, kind)
    wider = replace(toy, w=toy.w | {"idle": torch.ones(2, dtype=torch.float64)})
    zero = {"idle": torch.zeros(2, dtype=torch.float64)}
    found = product(wider, engine, v | zero, kind)
    if kind == "hessian":
        expected |= zero
    assert relative_error(found, expected) < 1e-12


@on_kinds
@pytest.mark.parametrize("engine", EXACT)
def test_a_once_differentiable_function_is_refused_and_not_taken_for_a_constant(engine: str, kind: str) -> None:
    toy = network(torch.float64)
    v = random_like(toy.w, 90)
    hidden = replace(toy, problem=once_differentiable(toy.problem))
    with pytest.raises(RuntimeError):
        product(hidden, engine, v, kind)
    expected = product(toy, "finite_difference", v, kind)
    assert relative_error(product(hidden, "finite_difference", v, kind), expected) < 1e-12


@on_kinds
@pytest.mark.parametrize("engine", ENGINES)
def test_results_carry_no_graph_and_keep_the_dtype(engine: str, kind: str) -> None:
    toy = network(torch.float32)
    found = product(toy, engine, random_like(toy.w, 90), kind)
    assert not any(leaf.requires_grad for leaf in found.values())
    assert {leaf.dtype for leaf in found.values()} == {torch.float32}
    assert list(found) == list(toy.lam if kind == "mixed" else toy.w)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_do_not_read_lam_have_curvature_all_the_same(engine: str) -> None:
    """L = 1/2 sum_i (1 + flag_i lam) (x_i w)^2: the mixed product may leave out the rows without a flag."""
    x = random_like({"x": torch.zeros(5, 3, dtype=torch.float64)}, 40)["x"]
    flag = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)

    def inner(w: Tree, lam: Tree, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return 0.5 * ((1 + batch[1] * lam["y"]) * (batch[0] @ w["w"]).square()).sum()

    problem = BilevelProblem(
        inner, inner, SGD(0.1), reads_lam=lambda part: (part[0][part[1] > 0], part[1][part[1] > 0])
    )
    point = random_like({"w": torch.zeros(3, dtype=torch.float64), "y": torch.zeros((), dtype=torch.float64)}, 50)
    toy = Toy(problem, {"w": point["w"]}, {"y": point["y"]}, (x, flag), None, direct=True)
    v = random_like(toy.w, 60)
    hessian = x.T @ torch.diag(1 + flag * point["y"]) @ x
    mixed = (flag * (x @ point["w"]) * (x @ v["w"])).sum()
    assert relative_error(product(toy, engine, v, "hessian"), {"w": hessian @ v["w"]}) < 1e-9
    assert relative_error(product(toy, engine, v, "mixed"), {"y": mixed}) < 1e-9


@on_kinds
@pytest.mark.parametrize("engine", ENGINES)
def test_every_part_is_counted(engine: str, kind: str) -> None:
    toy = network(torch.float64)
    x, y = toy.train
    passes = PassContext(replace(toy.problem, parts=lambda batch: batch))
    KINDS[kind](passes, engine, toy.w, toy.lam, [(x[:4], y[:4]), (x[4:], y[4:])], random_like(toy.w, 90))
    recorded_and_two_sides = Counts(forwards=2 + 4, backwards=4)
    exact = Counts(hvps=2) if engine == "double_backward" else Counts(jvps=2)
    assert passes.counts == (recorded_and_two_sides if engine == "finite_difference" else exact)


def test_unknown_engine_lists_the_valid_ones() -> None:
    toy = quadratic(torch.float64)
    with pytest.raises(
        ValueError, match=r"finite_differences.*did you mean 'finite_difference'.*double_backward, jvp"
    ):
        product(toy, "finite_differences", toy.w)
