"""Known numbers: the golden table, closed forms, EvoGrad's identities, a transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.benchmark.launches import Launches
from metaxl_evo.benchmark.memory import PeakMemory
from metaxl_evo.bilevel import (
    SGD,
    BilevelProblem,
    Counts,
    Cut,
    Hypergradient,
    PassContext,
    StepMade,
    Tree,
    hypergradient,
    run_episode,
    tree,
)
from metaxl_evo.bilevel.products import mixed_product
from metaxl_evo.bilevel.replay import Facts, stop_gradient
from metaxl_evo.bilevel.torch_optimizers import from_optimizer
from metaxl_evo.bilevel.update_state import UpdateState
from metaxl_evo.estimators import Estimator, EvoGrad, FirstOrder, Greedy, OneStep
from metaxl_evo.estimators import copies as copies_module
from metaxl_evo.estimators import noise as noise_module
from tests.estimators.problems import (
    Quadratic,
    Toy,
    cut_network,
    golden,
    known,
    logged,
    network,
    one_dimensional,
    quadratic,
    random_like,
    relative_error,
    tagger,
)

ENGINES = {
    "auto": OneStep(),
    "double_backward": OneStep("double_backward"),
    "jvp": OneStep("jvp"),
    "finite_difference": OneStep("finite_difference", radius=1e-3),
}
HADAMARD_2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def estimate(toy: Toy, estimator: Estimator, **options: Any) -> Hypergradient:
    return hypergradient(toy.problem, estimator, toy.w, toy.lam, toy.train, toy.val, **options)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_noise(rows: Tensor, name: str = "th") -> list[Tree]:
    return [{name: row} for row in rows]


def plus_minus(rows: Tensor) -> Tensor:
    return torch.cat([rows, -rows])


# The golden table (section 7.3) --------------------------------------------------------------------------------------

T1_T2 = (-0.0478783994, 0.0209980686)
K_RMD = (-0.0478188039, 0.0241208200)


def one(estimator: Estimator) -> Hypergradient:
    return estimate(golden(), estimator)


def after_8(estimator: Estimator) -> Hypergradient:
    return episode(golden(), estimator, 8)


def episode(toy: Toy, estimator: Estimator, steps: int) -> Hypergradient:
    return run_episode(toy.problem, estimator, toy.w, toy.lam, [toy.train] * steps, toy.val)


GOLDEN: dict[str, tuple[Callable[[], Hypergradient], tuple[float, float]]] = {
    "first_order": (partial(one, FirstOrder()), (-0.05, 0.025)),
    **{f"one_step {name}": (partial(one, estimator), T1_T2) for name, estimator in ENGINES.items()},
    **{f"one_step {name}, K-RMD K=1": (partial(after_8, estimator), K_RMD) for name, estimator in ENGINES.items()},
    "evograd, two perturbations": (
        lambda: estimate(
            golden(), EvoGrad(temperature=0.05),
            noise=as_noise(torch.tensor([[0.02, -0.01], [-0.01, 0.03]], dtype=torch.float64)),
        ),
        (-0.0499890998, 0.0250405759),
    ),
    "evograd, +-Hadamard": (
        lambda: estimate(golden(), EvoGrad(temperature=0.5), noise=as_noise(plus_minus(0.1 * HADAMARD_2))),
        (-0.0495628371, 0.0241212593),
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", GOLDEN)
def test_golden_table(row: str) -> None:
    run, expected = GOLDEN[row]
    found = run().grads["lam"]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_golden_table_is_whole() -> None:
    assert len(GOLDEN) == 1 + 2 * len(ENGINES) + 2


@pytest.mark.parametrize("name", ENGINES)
def test_golden_learning_rate(name: str) -> None:
    """d L_V(th0 - eta g) / d eta, and the other meta parameters as before."""
    toy = golden(update=SGD("eta"))
    toy = replace(toy, lam=toy.lam | {"eta": torch.tensor(0.1, dtype=torch.float64)})
    found = estimate(toy, ENGINES[name]).grads
    assert abs(float(found["eta"]) + 0.0746070548) < 1e-9
    torch.testing.assert_close(found["lam"], torch.tensor(T1_T2, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("made", [False, True], ids=["lookahead", "step_made"])
def test_learned_rate_decay_and_momentum_in_mid_run(name: str, made: bool) -> None:
    """All of the optimiser's numbers and the loss's own lam at once, against autograd through a written-out step."""
    numbers = {"eta": 0.1, "decay": 0.3, "mom": 0.8}
    toy = golden(update=SGD("eta", "decay", momentum="mom"))
    toy = replace(toy, lam=toy.lam | {k: torch.tensor(x, dtype=torch.float64) for k, x in numbers.items()})
    buffer = torch.tensor([0.4, -0.7], dtype=torch.float64)
    state: UpdateState = {"step": 3, "momentum_buffer": {"th": buffer}}

    th = toy.w["th"].clone().requires_grad_()
    lam = {k: x.clone().requires_grad_() for k, x in toy.lam.items()}
    (g,) = torch.autograd.grad(toy.problem.inner_loss({"th": th}, lam, toy.train), th, create_graph=True)
    moved = lam["mom"] * buffer + g + lam["decay"] * th
    after = th - lam["eta"] * moved
    outer = toy.problem.outer_loss({"th": after}, lam, toy.val)
    expected = dict(zip(lam, torch.autograd.grad(outer, list(lam.values())), strict=True))

    after_state: UpdateState = {"step": 4, "momentum_buffer": {"th": moved.detach()}}
    step = StepMade({"th": after.detach()}, {"th": g.detach()}, after_state) if made else None
    found = estimate(toy, ENGINES[name], update_state=state, made=step).grads
    assert relative_error(found, expected) < (1e-9 if name == "finite_difference" else 1e-12)


def test_an_episode_returns_the_weights_after_its_last_step() -> None:
    q, toy = Quadratic.make(), quadratic(torch.float64)
    result = episode(toy, OneStep(), 5)
    before, _ = q.unrolled(toy.w["th"], toy.lam["lam"], 0.1, 4)
    after, _ = q.unrolled(toy.w["th"], toy.lam["lam"], 0.1, 5)
    assert result.w is not None
    torch.testing.assert_close(result.w["th"], after, rtol=1e-13, atol=0)
    assert relative_error(result.grads, {"lam": q.one_step(before, toy.lam["lam"], 0.1)}) < 1e-12
    with pytest.raises(ValueError, match="at least one"):
        episode(toy, OneStep(), 0)


# Closed forms (sections 7.1, 7.2) ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
def test_one_step_on_the_quadratic(name: str) -> None:
    q, toy = Quadratic.make(), quadratic(torch.float64)
    expected = {"lam": q.one_step(toy.w["th"], toy.lam["lam"], 0.1)}
    tolerance = 1e-9 if name == "finite_difference" else 1e-12
    assert relative_error(estimate(toy, ENGINES[name]).grads, expected) < tolerance


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("x", "expected"), [(-1.0, -0.4), (0.3, 0.0108), (1.0, -0.16)])
def test_one_step_on_the_one_dimensional_problem(name: str, x: float, expected: float) -> None:
    toy = one_dimensional(torch.float64, x, 0.5)
    tolerance = 1e-9 if name == "finite_difference" else 1e-14
    assert abs(float(estimate(toy, ENGINES[name]).grads["lam"]) - expected) < tolerance


@pytest.mark.parametrize("x", [-1.0, 0.3, 1.0])
@pytest.mark.parametrize("lam", [0.1, 0.5, 2.0])
def test_evograd_with_many_copies_is_the_derivative_of_a_proximal_step(x: float, lam: float) -> None:
    """sigma = 1, tau = 0.5; the normal's own quantiles for copies, so that only their number limits the agreement."""
    sigma, tau, copies = 1.0, 0.5, 400
    quantiles = (torch.arange(copies, dtype=torch.float64) + 0.5) / copies
    draws = sigma * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    found = estimate(one_dimensional(torch.float64, x, lam), EvoGrad(temperature=tau), noise=as_noise(draws, "x"))

    precision = 1 / sigma**2 + 2 * (1 + lam) / tau
    pull = x / sigma**2 + 2 / tau
    expected = 2 * (pull / precision - 0.5) * (-(2 / tau) * pull / precision**2)
    assert abs(float(found.grads["lam"]) - expected) < 2e-3


# EvoGrad's identities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [quadratic, network], ids=["quadratic", "network"])
def test_guided_antithetic_copies_are_finite_difference_t1_t2(make: Callable[[torch.dtype], Toy]) -> None:
    """eps = +-R g/|g|, equal weights: the indirect term is (R^2 / tau) times T1-T2's at a unit learning rate."""
    toy, radius, tau = make(torch.float64), 1e-2, 1e9
    leaves = {n: x.clone().requires_grad_() for n, x in toy.w.items()}
    g = dict(
        zip(
            leaves,
            torch.autograd.grad(toy.problem.outer_loss(leaves, toy.lam, toy.val), list(leaves.values())),
            strict=True,
        )
    )
    guided = tree.scale(g, radius / tree.norm(g))
    problem = toy.problem
    toy = replace(
        toy, problem=replace(problem, outer_loss=lambda w, lam, batch: problem.outer_loss(w, tree.detach(lam), batch))
    )
    found = estimate(toy, EvoGrad(temperature=tau), noise=[guided, tree.scale(guided, -1.0)]).grads
    mixed = mixed_product(PassContext(problem), "finite_difference", toy.w, toy.lam, toy.train, g, radius=radius)
    assert relative_error(found, tree.scale(mixed, -(radius**2) / tau)) < 1e-9


def test_hadamard_copies_are_t1_t2_up_to_the_square_of_sigma() -> None:
    q = Quadratic.make(rho=0.0, m=8)
    toy = Toy(q.problem(SGD(0.1)), {"th": q.b + 0.5 * q.c}, {"lam": q.lam0}, None, None, direct=False)
    rows = torch.kron(HADAMARD_2, torch.kron(HADAMARD_2, HADAMARD_2))

    def error(sigma: float) -> float:
        found = estimate(toy, EvoGrad(temperature=0.05), noise=as_noise(plus_minus(sigma * rows))).grads
        return relative_error(found, {"lam": sigma**2 / 0.05 * q.C.T @ q.A @ q.g_val(toy.w["th"])})

    assert error(1e-4) < 1e-3
    assert 90 < error(1e-4) / error(1e-5) < 110


def by_autograd(toy: Toy, noise: list[Tree], tau: float, copies_form: bool) -> Tree:
    """All copies in one graph: softmax over their losses, the outer loss at the weighted copies."""
    lam = {n: x.clone().requires_grad_() for n, x in toy.lam.items()}
    copies = [tree.add(toy.w, one) for one in noise]
    weights = torch.softmax(-torch.stack([toy.problem.inner_loss(w, lam, toy.train) for w in copies]) / tau, dim=0)
    if copies_form:
        value = {n: sum(a * w[n] for a, w in zip(weights, copies, strict=True)) for n in toy.w}
    else:
        value = {n: x + sum(a * e[n] for a, e in zip(weights, noise, strict=True)) for n, x in toy.w.items()}
    outer = toy.problem.outer_loss(value, lam, toy.val)
    found = torch.autograd.grad(outer, list(lam.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(lam, found, strict=True))


@pytest.mark.parametrize("make", [quadratic, golden, cut_network], ids=["quadratic", "golden", "cut_network"])
@pytest.mark.parametrize("copies", [2, 5])
@pytest.mark.parametrize("sigma", [1e-3, 0.1])
def test_evograd_is_autograd_over_all_copies(make: Callable[[torch.dtype], Toy], copies: int, sigma: float) -> None:
    toy = make(torch.float64)
    noise = [tree.scale(random_like(toy.w, 50 * (k + 1)), sigma) for k in range(copies)]
    found = estimate(toy, EvoGrad(temperature=0.5), noise=noise).grads
    assert relative_error(found, by_autograd(toy, noise, 0.5, copies_form=False)) < 1e-10
    assert relative_error(found, by_autograd(toy, noise, 0.5, copies_form=True)) < 1e-9


HEAD: dict[str, Any] = {"parameters": r"^head\.", "sigma": 0.05, "temperature": 0.5}


@pytest.mark.parametrize(
    "settings", [{"copies": 2}, {"copies": 5, "noise": "gaussian"}, {"copies": 4, "antithetic": True}]
)
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "two_parts"])
def test_the_cut_path_is_the_full_path(settings: dict[str, Any], parts: bool) -> None:
    toy = cut_network(torch.float64)
    if parts:
        x, y = toy.train
        halves = [(x[:3], y[:3]), (x[3:], y[3:])]
        toy = replace(toy, train=halves, val=[toy.val], problem=replace(toy.problem, parts=lambda batch: batch))
    estimator = EvoGrad(**HEAD, **settings)
    full = replace(toy, problem=replace(toy.problem, cut=None))
    cheap, whole = (estimate(one, estimator, generator=seeded(3)) for one in (toy, full))
    assert relative_error(cheap.grads, whole.grads) < 1e-10
    torch.testing.assert_close(cheap.outer_loss, whole.outer_loss, rtol=1e-13, atol=0)
    count, copies = 2 if parts else 1, estimator.copies
    # one graph at a time: with several parts each is made again for its backward
    suffixes = 2 * (copies + 1) * count if parts else copies + 1
    assert cheap.counts == Counts(count + 1, count + 1, suffixes=suffixes)
    assert (whole.counts.forwards, whole.counts.suffixes) == (copies * count + 1, 0)


def dropping_cut_network(asks: bool) -> tuple[Toy, list[Any]]:
    """With dropout in the suffix, which may also ask for the value of its loss. -> (problem, calls of the suffix)"""
    toy, calls = cut_network(torch.float64), list[Any]()
    cut = toy.problem.cut
    assert cut is not None
    head = cut.loss

    def loss(w: Tree, hidden: Tensor, batch: Any) -> Tensor:
        dropped = torch.nn.functional.dropout(hidden, 0.5)
        found: Tensor = head(w, torch.tanh(dropped), batch)
        return found * 1.0 if asks and found.item() < 0 else found

    problem = replace(toy.problem, cut=replace(cut, loss=logged(loss, calls)), facts=known())
    return replace(toy, problem=problem), calls


def test_copies_in_one_pass_are_copies_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch cannot vectorise the suffix they are; dropout masks are shared either way."""
    found = {}
    for asks, together, first, later in ((False, 2**20, 7, 1), (True, 2**20, 6, 10), (False, 2**6, 9, 6)):
        toy, calls = dropping_cut_network(asks)
        monkeypatch.setattr(copies_module, "TOGETHER", together)
        noise = [tree.scale(random_like(toy.w, 50 * (k + 1)), 0.1) for k in range(5)]
        for expected in (first, later):
            calls.clear()
            found[asks, together] = estimate(toy, EvoGrad(**HEAD), noise=noise, generator=seeded(3)).grads
            assert len(calls) == expected
    one_by_one = found.pop((True, 2**20))
    assert all(relative_error(other, one_by_one) < 1e-12 for other in found.values())


def test_a_hook_in_the_suffix_is_heeded() -> None:
    """It is passed over where copies are evaluated together, at the same losses."""
    toy = cut_network(torch.float64)
    cut = toy.problem.cut
    assert cut is not None
    head = cut.loss

    def hooked(w: Tree, hidden: Tensor, batch: Any) -> Tensor:
        seen = hidden * 1.0
        if seen.requires_grad:
            seen.register_hook(lambda slope: -slope)
        found: Tensor = head(w, seen, batch)
        return found

    def grads(loss: Any, batched: bool | None) -> Tree:
        facts = replace(known(), batched=batched)
        problem = replace(toy.problem, cut=replace(cut, loss=loss), straight_through=True, facts=facts)
        return estimate(replace(toy, problem=problem), EvoGrad(**HEAD), generator=seeded(3)).grads

    assert relative_error(grads(hooked, None), grads(hooked, False)) < 1e-12
    assert relative_error(grads(hooked, None), grads(head, None)) > 1e-6


def odd_network(kind: str) -> tuple[Toy, list[Any]]:
    """A network that stops a gradient; it may have dropout, ask for its loss or hold a hook. -> (problem, calls)"""
    toy, calls = cut_network(torch.float64), list[Any]()
    assert toy.problem.cut is not None
    prefix, hidden, head = toy.problem.cut.prefix, toy.problem.cut.hidden, toy.problem.cut.loss
    assert prefix is not None

    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        below = prefix(w, batch)
        changed = hidden(w, lam, stop_gradient(below), batch) + below
        if kind == "drops":
            changed = torch.nn.functional.dropout(changed, 0.5)
        if kind == "hooked" and changed.requires_grad:
            changed.register_hook(lambda slope: -slope)
        found: Tensor = head(w, changed, batch)
        return found * 1.0 if kind == "asks" and found.item() < 0 else found

    problem = replace(toy.problem, inner_loss=logged(inner, calls), cut=None, straight_through=kind == "hooked")
    return replace(toy, problem=problem), calls


@pytest.mark.parametrize(
    ("kind", "share", "together", "passes"),
    [
        ("plain", True, 2**20, 1),
        ("plain", False, 2**20, 1),
        ("drops", True, 2**20, 1),
        ("drops", False, 2**20, 5),  # a mask each
        ("asks", True, 2**20, 5),
        ("hooked", True, 2**20, 5),  # in a batched pass hooks are passed over
        ("plain", True, 2**9, 2),
        ("plain", True, 2**6, 5),
    ],
)
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "two_parts"])
def test_whole_copies_in_one_pass_are_copies_one_by_one(
    kind: str, share: bool, together: int, passes: int, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are made one by one where torch cannot vectorise the loss, or gives other numbers."""
    toy, calls = odd_network(kind)
    if parts:
        x, y = toy.train
        halves = [(x[:3], y[:3]), (x[3:], y[3:])]
        toy = replace(toy, train=halves, val=[toy.val], problem=replace(toy.problem, parts=lambda batch: batch))
    noise = [tree.scale(random_like(toy.w, 50 * (k + 1)), 0.1) for k in range(5)]
    estimator = EvoGrad(temperature=0.5, share_randomness=share)
    alone = replace(toy, problem=replace(toy.problem, facts=Facts(batched_whole=False)))
    expected = estimate(alone, estimator, noise=noise, generator=seeded(3))
    monkeypatch.setattr(copies_module, "WHOLE_TOGETHER_ON_CPU", together)
    for _ in ("finds out", "knows"):
        calls.clear()
        found = estimate(toy, estimator, noise=noise, generator=seeded(3))
        assert relative_error(found.grads, expected.grads) < 1e-12
        assert found.counts == expected.counts
    assert len(calls) == (1 + parts) * (1 + passes)  # with the one that records


@pytest.mark.parametrize("settings", [HEAD, {"temperature": 0.5}], ids=["suffix", "whole"])
def test_more_copies_are_no_more_launches(settings: dict[str, Any]) -> None:
    toy, launched = cut_network(torch.float32), []
    estimate(toy, EvoGrad(**settings))  # finds out what there is to know of the loss
    for copies in (2, 64):
        with Launches() as launches:
            estimate(toy, EvoGrad(copies=copies, **settings))
        launched.append(launches.launched.total())
    assert launched[0] == launched[1]


@pytest.mark.parametrize("settings", [{"share_randomness": False}, {"parameters": "weight"}])
def test_the_cut_is_left_alone_where_it_does_not_fit(settings: dict[str, Any]) -> None:
    toy = cut_network(torch.float64)
    counts = estimate(toy, EvoGrad(**(HEAD | settings))).counts
    assert (counts.forwards, counts.suffixes) == (3, 0)


def test_head_only_noise_moves_the_head_only() -> None:
    toy = cut_network(torch.float64)
    estimator = EvoGrad(**HEAD)
    calls: list[Any] = []
    problem = replace(toy.problem, outer_loss=logged(toy.problem.outer_loss, calls))
    estimate(replace(toy, problem=problem), estimator)
    ((value, _, _),) = calls
    assert {n for n, x in toy.w.items() if not torch.equal(x, value[n])} == {"head.weight", "head.bias"}


def test_seeds_of_the_generator_are_the_seeds_of_the_estimate() -> None:
    toy, estimator = golden(), EvoGrad(noise="gaussian")
    first, again, other = (estimate(toy, estimator, generator=seeded(s)).grads["lam"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    moving = seeded(1)
    assert not torch.equal(*(estimate(toy, estimator, generator=moving).grads["lam"] for _ in range(2)))


# Memory --------------------------------------------------------------------------------------------------------------


def wide_problem(cut: bool) -> tuple[Toy, int]:
    """A body far larger than lam, and lam far larger than a number. -> (problem, bytes of lam)"""
    w = {
        "body": torch.randn(64, 256, generator=seeded(1)) / 8,
        "head": torch.randn(256, 150, generator=seeded(2)) / 15,
    }
    lam = {"gate": torch.ones(256), "shift": torch.zeros(256)}
    batch = torch.randn(16, 64, generator=seeded(3))

    def hidden(w: Tree, lam: Tree, below: Tensor | None, x: Tensor) -> Tensor:
        return torch.tanh(x @ w["body"]) * lam["gate"] + lam["shift"]

    def loss(w: Tree, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(h @ w["head"]).square().mean()

    pieces = Cut(frozenset({"head"}), hidden, loss) if cut else None
    problem = BilevelProblem(
        lambda w, lam, x: loss(w, hidden(w, lam, None, x), x),
        lambda w, lam, x: (torch.tanh(torch.tanh(x @ w["body"]) @ w["head"]) - 1).square().mean(),
        SGD(0.1),
        cut=pieces,
    )
    return Toy(problem, w, lam, batch, batch, direct=False), 4 * tree.size(lam)


def peak(toy: Toy, estimator: Estimator) -> int:
    with PeakMemory() as memory:
        estimate(toy, estimator)
    return memory.peak


@pytest.mark.parametrize("cut", [False, True], ids=["full", "cut"])
def test_memory_is_flat_in_the_number_of_copies(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond those that are drawn or evaluated together."""
    monkeypatch.setattr(noise_module, "_BLOCK", 2**10)  # in proportion to the small network
    for limit in ("TOGETHER", "WHOLE_TOGETHER_ON_CPU"):
        monkeypatch.setattr(copies_module, limit, 2**16)
    toy, lam_bytes = wide_problem(cut)
    settings: dict[str, Any] = {"parameters": "head"} if cut else {}
    few, many = (peak(toy, EvoGrad(copies=copies, **settings)) for copies in (4, 32))
    small = 4 * 1024
    assert few > 4 * tree.size(toy.w), "the counter must see at least one perturbed copy"
    assert many - few <= (0 if cut else 28) * lam_bytes + small


def test_the_counter_would_see_a_graph_for_every_copy() -> None:
    toy, lam_bytes = wide_problem(cut=False)

    def all_at_once(copies: int) -> int:
        noise = [random_like(toy.w, k) for k in range(copies)]
        with PeakMemory() as memory:
            by_autograd(toy, noise, 0.5, copies_form=False)
        return memory.peak

    assert all_at_once(16) - all_at_once(2) > 100 * lam_bytes


# A transformer -------------------------------------------------------------------------------------------------------

STATES = ("first_step", "later_step")


def warm_state(toy: Toy) -> UpdateState:
    first = tree.scale(random_like(toy.w, 500), 0.01)
    second = {n: 1e-4 + x.square() for n, x in tree.scale(random_like(toy.w, 600), 0.01).items()}
    return {"step": 4, "exp_avg": first, "exp_avg_sq": second}


def through_adam(toy: Toy, state: UpdateState) -> Tree:
    """d outer(w'(lam)) / d lam by autograd through a clipped Adam step, written out."""
    w = {n: x.clone().requires_grad_() for n, x in toy.w.items()}
    lam = {n: x.clone().requires_grad_() for n, x in toy.lam.items()}
    inner = toy.problem.inner_loss(w, lam, toy.train)
    found = torch.autograd.grad(inner, list(w.values()), create_graph=True, allow_unused=True, materialize_grads=True)
    norm = torch.sqrt(sum((g.square().sum() for g in found), torch.zeros(())))
    limit, t = 1.0, state["step"] + 1
    assert float(norm.detach()) > limit, "the clip is part of what is tested"
    after = {}
    for (name, x), g in zip(w.items(), found, strict=True):
        g = g * limit / (norm + 1e-6)
        m = 0.9 * state["exp_avg"][name] + 0.1 * g
        s = 0.999 * state["exp_avg_sq"][name] + 0.001 * g**2
        root = (s / (1 - 0.999**t)).clamp_min(1e-60).sqrt()  # rows of the embedding that no token uses
        after[name] = x - 1e-2 * (m / (1 - 0.9**t)) / (root + 1e-4)
    outer = toy.problem.outer_loss(after, lam, toy.val)
    return dict(zip(lam, torch.autograd.grad(outer, list(lam.values())), strict=True))


@pytest.fixture(scope="module")
def transformer() -> Toy:
    return tagger("eager")


@pytest.mark.parametrize("when", STATES)
def test_one_step_engines_on_a_transformer(transformer: Toy, when: str) -> None:
    state = warm_state(transformer) if when == "later_step" else transformer.problem.update.init(transformer.w)
    expected = through_adam(transformer, state)
    assert tree.norm(expected) > 1e-6
    found = {name: estimate(transformer, estimator, update_state=state).grads for name, estimator in ENGINES.items()}
    assert relative_error(found["jvp"], found["double_backward"]) < 1e-12
    assert relative_error(found["double_backward"], expected) < 1e-10
    assert relative_error(found["finite_difference"], expected) < 1e-6
    assert torch.equal(found["auto"]["up"], found["jvp"]["up"])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "estimator", [OneStep("double_backward"), Greedy("double_backward")], ids=["one_step", "greedy"]
)
def test_a_step_to_come_shares_its_graph_with_the_double_backward(estimator: OneStep | Greedy, parts: int) -> None:
    """The one part of a batch is evaluated once, several are twice; the numbers are those of forward over reverse."""
    toy, calls = network(torch.float64), list[Any]()
    x, y = toy.train
    train = [(x, y)] if parts == 1 else [(x[:4], y[:4]), (x[4:], y[4:])]
    problem = replace(toy.problem, parts=lambda batch: batch)
    toy = replace(toy, problem=problem, train=train, val=[toy.val])
    expected = estimate(toy, replace(estimator, engine="jvp")).grads
    toy = replace(toy, problem=replace(problem, inner_loss=logged(problem.inner_loss, calls)))
    found = estimate(toy, estimator).grads
    assert len(calls) == {1: 1, 2: 4}[parts]
    assert relative_error(found, expected) < 1e-12
    episode, other = (
        run_episode(toy.problem, one, toy.w, toy.lam, [train, train], toy.val)
        for one in (estimator, replace(estimator, engine="jvp"))
    )
    assert relative_error(episode.grads, other.grads) < 1e-12
    assert episode.counts.hvps == other.counts.jvps


@pytest.mark.parametrize("when", STATES)
@pytest.mark.parametrize("name", ENGINES)
def test_a_step_that_torch_made(transformer: Toy, name: str, when: str) -> None:
    """torch's own Adam and clip_grad_norm_ make the step; rule and state are read off the optimiser after it."""
    params = {n: torch.nn.Parameter(x.clone()) for n, x in transformer.w.items()}
    optimizer = torch.optim.Adam(list(params.values()), lr=1e-2, eps=1e-4)
    state = transformer.problem.update.init(transformer.w)
    if when == "later_step":
        state = warm_state(transformer)
        for n, p in params.items():
            held = {key: state[key][n].clone() for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(4.0), **held}
    transformer.problem.inner_loss(dict(params), transformer.lam, transformer.train).backward()
    grad = {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in params.items()}
    for n, p in params.items():
        p.grad = grad[n].clone()
    torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
    optimizer.step()

    rule, after_state = from_optimizer(optimizer, {p: n for n, p in params.items()}, max_grad_norm=1.0)
    toy = replace(transformer, problem=replace(transformer.problem, update=rule))
    made = StepMade(tree.detach(params), grad, after_state)
    result = estimate(toy, ENGINES[name], made=made)
    assert result.counts.forwards <= (4 if name == "finite_difference" else 1)
    allowed = 1e-6 if name == "finite_difference" else 1e-9
    assert relative_error(result.grads, through_adam(transformer, state)) < allowed


def test_evograd_on_a_transformer_replays_the_meta_networks_input(transformer: Toy) -> None:
    """Guided copies are T1-T2 only if the stop-gradient input stays where it was recorded."""
    leaves = {n: x.clone().requires_grad_() for n, x in transformer.w.items()}
    outer = transformer.problem.outer_loss(leaves, transformer.lam, transformer.val)
    found = torch.autograd.grad(outer, list(leaves.values()), allow_unused=True, materialize_grads=True)
    g = dict(zip(leaves, found, strict=True))
    guided = tree.scale(g, 1e-4 / tree.norm(g))
    exact = mixed_product(
        PassContext(transformer.problem), "double_backward", transformer.w, transformer.lam, transformer.train, g
    )
    expected = tree.scale(exact, -(1e-4**2) / 1e7)
    noise = [guided, tree.scale(guided, -1.0)]
    replayed, live = (
        estimate(transformer, EvoGrad(temperature=1e7, share_meta_inputs=share), noise=noise).grads
        for share in (True, False)
    )
    assert relative_error(replayed, expected) < 1e-7
    assert relative_error(live, expected) > 1e-2
