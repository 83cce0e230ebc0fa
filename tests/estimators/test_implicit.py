"""Implicit differentiation (neumann, conjugate_gradient) and SAMA: golden numbers, closed forms, identities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.bilevel import (
    SGD,
    Adam,
    BilevelProblem,
    Counts,
    Hypergradient,
    InnerStep,
    PassContext,
    StepMade,
    Tree,
    gate,
    hypergradient,
    run_episode,
    tree,
)
from metaxl_evo.bilevel.hypergradients import estimate as estimate_step
from metaxl_evo.bilevel.hypergradients import look_ahead
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState
from metaxl_evo.estimators import ConjugateGradient, Estimator, Neumann, OneStep, Sama
from tests.estimators.problems import (
    Quadratic,
    Toy,
    counted,
    golden,
    network,
    one_dimensional,
    quadratic,
    random_like,
    relative_error,
    tagger,
)

EXACT = ("double_backward", "jvp")


def estimate(toy: Toy, estimator: Estimator, **options: Any) -> Hypergradient:
    return hypergradient(toy.problem, estimator, toy.w, toy.lam, toy.train, toy.val, **options)


def step_of(toy: Toy) -> InnerStep:
    """The step from `toy.w`, made."""
    return look_ahead(PassContext(toy.problem), InnerStep(toy.w, toy.lam, toy.train, toy.update_state, None, toy.val))


# The golden table (section 7.3) --------------------------------------------------------------------------------------


def golden_gradient(th: Tensor, toy: Toy) -> Tensor:
    """The inner gradient, by hand."""
    x, y = toy.train
    return x.T @ (x @ th - y) / len(y) + toy.lam["lam"].exp() * th


def golden_optimum() -> Toy:
    """th*, by Newton's method."""
    toy = golden()
    th = toy.w["th"]
    for _ in range(5):
        hessian = torch.autograd.functional.jacobian(partial(golden_gradient, toy=toy), th)
        th = th - torch.linalg.solve(hessian, golden_gradient(th, toy))
    assert float(golden_gradient(th, toy).abs().max()) < 1e-15
    return replace(toy, w={"th": th})


def after_8(estimator: Estimator) -> Hypergradient:
    toy = golden()
    return run_episode(toy.problem, estimator, toy.w, toy.lam, [toy.train] * 8, toy.val)


def at_optimum(estimator: Estimator) -> Hypergradient:
    return estimate(golden_optimum(), estimator)


SOLVE = ConjugateGradient(iterations=2, damping=0.0)
AT_TH_8, AT_OPTIMUM = (-0.0237630742, 0.0221885500), (-0.0267306824, 0.0229130413)
GOLDEN: dict[str, tuple[Callable[[Estimator], Hypergradient], Estimator, tuple[float, float]]] = {
    "neumann J=0": (after_8, Neumann(terms=0, step=0.1), (-0.0477748129, 0.0241893582)),
    "neumann J=3": (after_8, Neumann(terms=3, step=0.1), (-0.0421965158, 0.0227932754)),
    "neumann J=200": (after_8, Neumann(terms=200, step=0.1), AT_TH_8),
    "conjugate gradient": (after_8, SOLVE, AT_TH_8),
    "conjugate gradient, th*": (at_optimum, SOLVE, AT_OPTIMUM),
    "neumann, th*": (at_optimum, Neumann(terms=100), AT_OPTIMUM),
}


@pytest.mark.parametrize("engine", [*EXACT, "finite_difference"])
@pytest.mark.parametrize("row", GOLDEN)
def test_golden_table(row: str, engine: Any) -> None:
    run, estimator, expected = GOLDEN[row]
    found = run(replace(estimator, engine=engine, radius=1e-4)).grads["lam"]  # type: ignore[call-arg]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


# Closed forms (section 7.1) ------------------------------------------------------------------------------------------


def implicit(q: Quadratic, toy: Toy, damping: float = 0.0) -> Tree:
    """C' A (A + damping I)^-1 g_V + direct term."""
    solved = torch.linalg.solve(q.A + damping * torch.eye(6, dtype=torch.float64), q.g_val(toy.w["th"]))
    return {"lam": q.C.T @ q.A @ solved + q.direct(toy.lam["lam"])}


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize(("terms", "step"), [(0, 0.1), (3, 0.1), (10, 0.3)])
@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_neumann_on_the_quadratic(engine: Any, terms: int, step: float, damping: float) -> None:
    """C' A M^-1 [I - (I - step M)^(terms + 1)] g_V with M = A + damping I."""
    q, toy = Quadratic.make(), quadratic(torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    matrix = q.A + damping * eye
    series = eye - torch.linalg.matrix_power(eye - step * matrix, terms + 1)
    expected = q.C.T @ q.A @ torch.linalg.solve(matrix, series @ q.g_val(toy.w["th"])) + q.direct(toy.lam["lam"])
    found = estimate(toy, Neumann(engine, terms=terms, step=step, damping=damping)).grads
    assert relative_error(found, {"lam": expected}) < 1e-12


@pytest.mark.parametrize(("terms", "allowed"), [(100, 1e-5), (200, 1e-9)])
def test_neumann_with_many_terms_is_the_implicit_gradient(terms: int, allowed: float) -> None:
    """Every eigenvalue above 0.6 here, so that 0.88^101 = 2.5e-6 and 0.88^201 = 7e-12 bound what is left."""
    q, toy = Quadratic.make(), quadratic(torch.float64)
    q = replace(q, A=q.A + 0.1 * torch.eye(6, dtype=torch.float64))
    found = estimate(replace(toy, problem=q.problem(SGD(0.1))), Neumann(terms=terms, step=0.2)).grads
    assert relative_error(found, implicit(q, toy)) < allowed


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("damping", [0.0, 1e-3, 2.0])
def test_conjugate_gradients_in_six_dimensions(engine: Any, damping: float) -> None:
    toy = quadratic(torch.float64)
    found = estimate(toy, ConjugateGradient(engine, iterations=6, damping=damping, tolerance=0.0))
    assert relative_error(found.grads, implicit(Quadratic.make(), toy, damping)) < 1e-10
    assert found.diagnostics["solver_products"] == 6
    assert found.diagnostics["solver_residual"] < 1e-10
    assert found.diagnostics["negative_curvature"] == 0


@pytest.mark.parametrize("horizon", [1, 2, 4, 7])
def test_truncated_reverse_mode_is_neumann(horizon: int) -> None:
    """K-RMD(K) = Neumann(J = K - 1, step = learning rate), at the weights after the episode (Shaban 2019)."""
    q, toy, lr, steps = Quadratic.make(), quadratic(torch.float64), 0.1, 9
    start, _ = q.unrolled(toy.w["th"], toy.lam["lam"], lr, steps - horizon)
    lam = toy.lam["lam"].clone().requires_grad_()
    end = q.unrolled(start, lam, lr, horizon)[0]
    (expected,) = torch.autograd.grad(q.outer({"th": end}, {"lam": lam}, None), lam)
    found = run_episode(toy.problem, Neumann(terms=horizon - 1, step=lr), toy.w, toy.lam, [None] * steps, None).grads
    assert relative_error(found, {"lam": expected}) < 1e-12


@pytest.mark.parametrize("estimator", [Neumann(terms=300), ConjugateGradient(iterations=2, damping=0.0)])
def test_a_proximal_centre_as_meta_parameter(estimator: Estimator) -> None:
    """iMAML: L_T = f(w) + reg/2 |w - lam|^2 has the meta-gradient (I + H_f / reg)^-1 g_V, f not quadratic."""
    reg, w = 2.0, torch.tensor([0.3, -0.8], dtype=torch.float64)
    target = torch.tensor([0.5, 0.1], dtype=torch.float64)

    def f(w: Tensor) -> Tensor:
        return w[0].cosh() + 0.5 * (w[0] * w[1]).square() + w[1].square()

    problem = BilevelProblem(
        lambda w, lam, batch: f(w["w"]) + 0.5 * reg * (w["w"] - lam["centre"]).square().sum(),
        lambda w, lam, batch: (w["w"] - target).square().sum(),
        SGD(0.1),
    )
    hessian = torch.autograd.functional.hessian(f, w)
    expected = torch.linalg.solve(torch.eye(2, dtype=torch.float64) + hessian / reg, 2 * (w - target))
    found = hypergradient(problem, estimator, {"w": w}, {"centre": torch.zeros(2, dtype=torch.float64)}, None, None)
    assert relative_error(found.grads, {"centre": expected}) < 1e-10


# Neumann's own step --------------------------------------------------------------------------------------------------


def test_the_default_step_is_the_inverse_of_the_largest_eigenvalue() -> None:
    toy = quadratic(torch.float64)
    largest = float(torch.linalg.eigvalsh(Quadratic.make().A)[-1])
    for damping in (0.0, 0.5):
        found = estimate(toy, Neumann(power_iterations=300, damping=damping)).diagnostics["step"]
        assert abs(found * (largest + damping) - 1) < 1e-8
    few = estimate(toy, Neumann()).diagnostics["step"]
    assert 1 / largest < few < 2 / largest  # an eigenvalue from below, and yet a series that converges


@pytest.mark.parametrize("make", [quadratic, golden])
def test_with_the_default_step_the_series_converges(make: Callable[[torch.dtype], Toy]) -> None:
    """On convex toys, to the implicit gradient."""
    toy = make(torch.float64)
    found = estimate(toy, Neumann(terms=300))
    solved = estimate(toy, ConjugateGradient(iterations=20, damping=0.0, tolerance=1e-12))
    assert found.diagnostics["solver_residual"] < 1e-8
    assert relative_error(found.grads, solved.grads) < 1e-7


def test_a_step_that_is_too_long_shows() -> None:
    largest = float(torch.linalg.eigvalsh(Quadratic.make().A)[-1])
    toy = quadratic(torch.float64)
    short, long = (estimate(toy, Neumann(terms=100, step=step / largest)).diagnostics for step in (1.9, 2.1))
    assert short["solver_residual"] < 1 < long["solver_residual"]
    assert long["step"] == 2.1 / largest


def bilinear(curvature: tuple[float, float]) -> Toy:
    """L_T = 1/2 w' diag(curvature) w + lam' w, L_V = 1/2 |w - 1|^2."""
    diagonal = torch.tensor(curvature, dtype=torch.float64)
    problem = BilevelProblem(
        lambda w, lam, batch: 0.5 * (diagonal * w["w"].square()).sum() + (lam["lam"] * w["w"]).sum(),
        lambda w, lam, batch: 0.5 * (w["w"] - 1).square().sum(),
        SGD(0.1),
    )
    w, lam = torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([0.2, 0.5], dtype=torch.float64)
    return Toy(problem, {"w": w}, {"lam": lam}, None, None, direct=False)


def test_without_curvature_there_is_no_default_step() -> None:
    toy = bilinear((0.0, 0.0))
    with pytest.raises(ValueError, match=r"no curvature.*damping"):
        estimate(toy, Neumann())
    found = estimate(toy, Neumann(damping=0.5)).grads
    assert relative_error(found, {"lam": -(toy.w["w"] - 1) / 0.5}) < 1e-12


@pytest.mark.parametrize(
    "estimator", [Neumann(terms=5), ConjugateGradient(iterations=5, tolerance=1e-10)], ids=["neumann", "cg"]
)
def test_an_indefinite_hessian_is_told_and_damping_cures_it(estimator: Any) -> None:
    toy = bilinear((1.0, -2.0))
    assert estimate(toy, estimator).diagnostics["negative_curvature"] == 1
    damped = replace(estimator, damping=3.0)
    if isinstance(damped, Neumann):
        damped = replace(damped, terms=100)
    found = estimate(toy, damped)
    assert found.diagnostics["negative_curvature"] == 0
    shifted = torch.tensor([4.0, 1.0], dtype=torch.float64)
    assert relative_error(found.grads, {"lam": -(toy.w["w"] - 1) / shifted}) < 1e-9


def test_negative_curvature_at_once_leaves_the_direct_term() -> None:
    q, toy = Quadratic.make(), quadratic(torch.float64)
    problem = toy.problem
    upside_down = replace(problem, inner_loss=lambda w, lam, batch: -problem.inner_loss(w, lam, batch))
    found = estimate(replace(toy, problem=upside_down), ConjugateGradient())
    assert torch.equal(found.grads["lam"], q.direct(toy.lam["lam"]))
    assert found.diagnostics["negative_curvature"] == 1


# Engines, counts, points ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer() -> Toy:
    return tagger("sdpa")


@pytest.mark.parametrize(
    "estimator",
    [Neumann(step=0.1), ConjugateGradient(iterations=3, damping=20.0), Sama()],
    ids=["neumann", "cg", "sama"],
)
def test_engines_on_a_transformer(transformer: Toy, estimator: Any) -> None:
    """The exact pair to rounding, finite differences to their O(radius^2); SAMA with Adam's state."""
    double, jvp, difference = (
        estimate(transformer, replace(estimator, engine=engine, radius=1e-4)).grads
        for engine in (*EXACT, "finite_difference")
    )
    assert tree.norm(double) > 1e-4
    assert relative_error(jvp, double) < 1e-12
    assert relative_error(difference, double) < 1e-7


@pytest.mark.parametrize("engine", [*EXACT, "finite_difference"])
@pytest.mark.parametrize(
    ("estimator", "products"),
    [
        (Neumann(terms=3, step=0.1), 4),
        (Neumann(terms=3), 9),
        (ConjugateGradient(iterations=3, damping=20.0, tolerance=0.0), 4),
        (Sama(), 1),
    ],
    ids=["neumann", "neumann_own_step", "cg", "sama"],
)
def test_counts(estimator: Any, products: int, engine: Any) -> None:
    """After a step: the outer pass, the products, and one more to record the inputs where they are replayed."""
    toy = network(torch.float64)
    estimator = replace(estimator, engine=engine)
    each = {"double_backward": "1D", "jvp": "1J"}.get(engine, "2F 2B")
    recording = "1F" if engine == "finite_difference" else ""
    counts = estimate(toy, estimator, made=step_of(toy).made).counts
    assert counts == counted("1F 1B", *[each] * products, recording)


@pytest.mark.parametrize(
    "estimator", [Neumann(step=0.1), ConjugateGradient(damping=2.0), Sama()], ids=["neumann", "cg", "sama"]
)
def test_inputs_recorded_before_the_step_are_not_replayed_after_it(estimator: Any) -> None:
    toy = network(torch.float64)
    estimator = replace(estimator, engine="finite_difference")
    recorded, fresh = PassContext(toy.problem), PassContext(toy.problem)
    gate.record(recorded, toy.w, toy.lam, toy.train)
    one, other = (estimate_step(passes, estimator, step_of(toy), None).grads for passes in (recorded, fresh))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("estimator", [Neumann(terms=7, step=0.1), ConjugateGradient(damping=20.0)])
def test_parts_add_up(estimator: Any) -> None:
    toy = network(torch.float64)
    x, y = toy.train
    problem = toy.problem
    halves = replace(
        problem,
        inner_loss=lambda w, lam, batch: 0.5 * problem.inner_loss(w, lam, batch),
        parts=lambda batch: batch if isinstance(batch, list) else [batch],
    )
    split = replace(toy, problem=halves, train=[(x[:4], y[:4]), (x[4:], y[4:])])
    assert relative_error(estimate(split, estimator).grads, estimate(toy, estimator).grads) < 1e-10


# SAMA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [False, True], ids=["lookahead", "step_made"])
@pytest.mark.parametrize("engine", ["finite_difference", *EXACT])
def test_sama_on_the_quadratic(engine: Any, made: bool) -> None:
    """lr C' A g_V + direct term, both at the current weights."""
    q, toy = Quadratic.make(), quadratic(torch.float64)
    step = step_of(toy)
    now = step.current["th"] if made else toy.w["th"]
    expected = 0.1 * q.C.T @ q.A @ q.g_val(now) + q.direct(toy.lam["lam"])
    found = estimate(toy, Sama(engine), made=step.made if made else None)
    assert relative_error(found.grads, {"lam": expected}) < (1e-9 if engine == "finite_difference" else 1e-12)
    torch.testing.assert_close(found.outer_loss, toy.problem.outer_loss({"th": now}, toy.lam, None))


def adam_direction(toy: Toy, step: InnerStep, v: Tree) -> Tree:
    """(du/dg)^T v by autograd through a clipped Adam step from `step.w`, written out."""
    rule = toy.problem.update
    assert isinstance(rule, Adam)
    assert isinstance(rule.lr, float)
    assert rule.max_grad_norm is not None
    assert toy.update_state is not None
    assert step.made is not None
    g = {name: leaf.clone().requires_grad_() for name, leaf in step.made.grad.items()}
    norm = torch.cat([leaf.flatten() for leaf in g.values()]).norm()
    assert float(norm.detach()) > rule.max_grad_norm, "the clip is part of what is tested"
    t, state, total = toy.update_state["step"] + 1, toy.update_state, torch.zeros((), dtype=torch.float64)
    for name, leaf in g.items():
        clipped = leaf * rule.max_grad_norm / (norm + 1e-6)
        m = 0.9 * state["exp_avg"][name] + 0.1 * clipped
        s = 0.999 * state["exp_avg_sq"][name] + 0.001 * clipped**2
        update = rule.lr * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + rule.eps)
        total = total + (update * v[name]).sum()
    return dict(zip(g, torch.autograd.grad(total, list(g.values())), strict=True))


@pytest.mark.parametrize("made", [False, True], ids=["lookahead", "step_made"])
@pytest.mark.parametrize("engine", ["finite_difference", *EXACT])
def test_sama_with_adams_state(engine: Any, made: bool) -> None:
    """-d_lam <grad_w L_T(w), (du/dg)^T g_V(w)>: w the current weights, du/dg that of the step."""
    toy = network(torch.float64)
    toy = replace(toy, problem=replace(toy.problem, update=replace(toy.problem.update, weight_decay=0.0)))
    step = step_of(toy)
    now = step.current if made else toy.w
    w = {name: leaf.clone().requires_grad_() for name, leaf in now.items()}
    lam = {name: leaf.clone().requires_grad_() for name, leaf in toy.lam.items()}
    outer = toy.problem.outer_loss(w, lam, toy.val)
    g_val = dict(zip(w, torch.autograd.grad(outer, list(w.values())), strict=True))
    direction = adam_direction(toy, step, g_val)
    inner = toy.problem.inner_loss(w, lam, toy.train)
    grads = torch.autograd.grad(inner, list(w.values()), create_graph=True)
    along = torch.stack([(g * direction[n]).sum() for n, g in zip(w, grads, strict=True)]).sum()
    found = torch.autograd.grad(-along, list(lam.values()), allow_unused=True, materialize_grads=True)
    expected = dict(zip(lam, found, strict=True))

    options: dict[str, Any] = {"made": step.made} if made else {"update_state": toy.update_state}
    estimator = Sama(engine, radius=1e-3)
    result = estimate(toy, estimator, **options)
    allowed = 1e-6 if engine == "finite_difference" else 1e-12
    assert relative_error(result.grads, expected) < allowed
    assert abs(result.diagnostics["direction_norm"] / tree.norm(direction) - 1) < 1e-12
    if made:  # the weights before the step are not needed
        assert relative_error(estimate(replace(toy, w=step.current), estimator, **options).grads, expected) < allowed


@pytest.mark.parametrize("update", [SGD(0.1), SGD(0.1, momentum=0.9), Adam(0.1)], ids=["sgd", "momentum", "adam"])
def test_sama_is_one_step_where_the_curvature_vanishes(update: UpdateRule) -> None:
    """An inner loss linear in w: the mixed partial is the same before and after the step, and H = 0."""
    coefficients = random_like({"c": torch.zeros(4, 3, dtype=torch.float64)}, 5)["c"]
    problem = BilevelProblem(
        lambda w, lam, batch: (torch.tanh(coefficients @ lam["lam"]) * w["w"]).sum(),
        lambda w, lam, batch: (w["w"].sin() * lam["lam"].sum()).sum(),
        update,
    )
    like = {"w": torch.zeros(4, dtype=torch.float64), "lam": torch.zeros(3, dtype=torch.float64)}
    point = random_like(like, 6)
    toy = Toy(problem, {"w": point["w"]}, {"lam": point["lam"]}, None, None, direct=True)
    state: UpdateState = {
        "step": 4, "momentum_buffer": random_like(toy.w, 8), "exp_avg": random_like(toy.w, 8),
        "exp_avg_sq": {"w": random_like(toy.w, 9)["w"].square()},
    }  # fmt: skip
    made = step_of(replace(toy, update_state={key: state[key] for key in update.init(toy.w)})).made
    one, sama = (estimate(toy, estimator("jvp"), made=made).grads for estimator in (OneStep, Sama))
    assert relative_error(sama, one) < 1e-12
    bent = golden()
    assert made is not None
    options: dict[str, StepMade | None] = {"made": step_of(bent).made}
    assert (
        relative_error(estimate(bent, Sama("jvp"), **options).grads, estimate(bent, OneStep("jvp"), **options).grads)
        > 1e-4
    )


def test_sama_takes_differences_by_default() -> None:
    assert (Sama().engine, Sama().radius) == ("finite_difference", 0.01)
    counts = estimate(one_dimensional(torch.float64), Sama()).counts
    assert counts == Counts(forwards=4, backwards=4)
