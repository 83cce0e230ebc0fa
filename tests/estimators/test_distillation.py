"""Greedy and HyperDistill against golden numbers, closed forms and their own definitions written out with autograd."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.bilevel import (
    SGD,
    Adam,
    AdamW,
    BilevelProblem,
    Examples,
    Hypergradient,
    InnerStep,
    PassContext,
    Tree,
    Windowed,
    run_episode,
    tree,
)
from metaxl_evo.bilevel.hypergradients import estimate, look_ahead
from metaxl_evo.bilevel.replay import Facts, kind_of
from metaxl_evo.estimators import Estimator, Greedy, HyperDistill, OneStep
from metaxl_evo.estimators.trajectory import Visit
from tests.estimators.problems import (
    Quadratic,
    Toy,
    counted,
    golden,
    network,
    quadratic,
    relative_error,
    tagger,
)

ENGINES = ("double_backward", "jvp", "finite_difference")
Batch = tuple[Tensor, Tensor]


def double(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def episode(toy: Toy, estimator: Estimator, batches: Sequence[Any]) -> Hypergradient:
    return run_episode(toy.problem, estimator, toy.w, toy.lam, batches, toy.val)


def walk(
    toy: Toy, estimator: Estimator, batches: Sequence[Any], previous: Any = None
) -> Iterator[tuple[PassContext, InnerStep, Any]]:
    """The steps of an episode as they are observed: the pass context of each, the step, and the state after it."""
    w, update_state = toy.w, toy.problem.update.init(toy.w)
    state = estimator.init(toy.problem, w, toy.lam, previous)
    for index, batch in enumerate(batches):
        passes = PassContext(toy.problem, seed=index)
        step = look_ahead(passes, InnerStep(w, toy.lam, batch, update_state, val_batch=toy.val))
        assert step.made is not None
        state = estimator.observe(passes, step, state)
        yield passes, step, state
        w, update_state = step.current, step.made.update_state


def answer(estimator: Estimator, passes: PassContext, step: InnerStep, state: Any) -> Hypergradient:
    """The estimate at a step, whose gradient is not taken over."""
    return estimate(passes, estimator, step.lent(), state)


def batches_of(toy: Toy, steps: int) -> list[Batch]:
    """Half of the rows, other ones each step."""
    x, y = toy.train
    half = len(x) // 2 + 1
    return [(x.roll(t, 0)[:half], y.roll(t, 0)[:half]) for t in range(steps)]


# SGD with momentum and weight decay on the golden problem, written out; its numbers are in lam, or these
NUMBERS = {"eta": 0.1, "mom": 0.6, "decay": 0.3}


def momentum_toy(*learned: str) -> Toy:
    value: dict[str, Any] = {name: name if name in learned else number for name, number in NUMBERS.items()}
    toy = golden(update=SGD(value["eta"], value["decay"], momentum=value["mom"]))
    return replace(toy, lam=toy.lam | {name: double(NUMBERS[name]) for name in learned})


def schedule_toy() -> Toy:
    """Three learned learning rates over nine steps, no momentum."""
    toy = golden(update=SGD(Windowed("schedule", 9), NUMBERS["decay"]))
    return replace(toy, lam=toy.lam | {"schedule": double(0.05, 0.1, 0.15)})


def phi(toy: Toy, th: Tensor, velocity: Tensor, lam: Tree, batch: Batch, t: int) -> tuple[Tensor, Tensor]:
    """Step t as a graph in all of its arguments."""
    number = {name: lam.get(name, double(value)) for name, value in NUMBERS.items()}
    if "schedule" in lam:
        number |= {"eta": lam["schedule"][t // 3], "mom": double(0.0)}
    th = th if th.requires_grad else th.clone().requires_grad_()
    (g,) = torch.autograd.grad(toy.problem.inner_loss({"th": th}, lam, batch), th, create_graph=True)
    velocity = number["mom"] * velocity + g + number["decay"] * th
    return th - number["eta"] * velocity, velocity


def trajectory(toy: Toy, batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
    """(w_t, velocity_t) for t = 0 .. T."""
    at = [(toy.w["th"], torch.zeros(2, dtype=torch.float64))]
    for t, batch in enumerate(batches):
        th, velocity = phi(toy, *at[-1], toy.lam, batch, t)
        at.append((th.detach(), velocity.detach()))
    return at


def outer_grad(toy: Toy, th: Tensor) -> Tensor:
    th = th.clone().requires_grad_()
    return torch.autograd.grad(toy.problem.outer_loss({"th": th}, toy.lam, toy.val), th)[0]


def direct_term(toy: Toy, th: Tensor) -> Tree:
    lam = {n: x.clone().requires_grad_() for n, x in toy.lam.items()}
    outer = toy.problem.outer_loss({"th": th}, lam, toy.val)
    return dict(zip(lam, torch.autograd.grad(outer, list(lam.values()), materialize_grads=True), strict=True))


def local_term(toy: Toy, th: Tensor, velocity: Tensor, batch: Batch, alpha: Tensor, t: int = 0) -> Tree:
    """d_lam <Phi_t(th, lam; batch), alpha>."""
    lam = {n: x.clone().requires_grad_() for n, x in toy.lam.items()}
    after, _ = phi(toy, th, velocity, lam, batch, t)
    found = torch.autograd.grad(after, list(lam.values()), alpha, materialize_grads=True)
    return dict(zip(lam, found, strict=True))


def mean_of_past(past: Sequence[Tensor], gamma: float) -> Tensor:
    """sum gamma^age w / sum gamma^age, the last of `past` at age 0 (eq. 12, and 17 on the last s)."""
    weights = double(*[gamma**age for age in reversed(range(len(past)))]).reshape(-1)
    return (weights[:, None] * torch.stack(list(past))).sum(0) / weights.sum()


# The golden table ----------------------------------------------------------------------------------------------------

K_RMD_1 = (-0.0478188039, 0.0241208200)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (Greedy(decay=0.9), (-0.0376164857, 0.0153329803)),
        (Greedy(decay=0.0), K_RMD_1),
        (HyperDistill(decay=0.9, scale="fixed"), (-0.0385657490, 0.0171434617)),
        (HyperDistill(decay=0.9, scale="fixed", theta=0.9538493107), (-0.0390934476, 0.0175060464)),
        (HyperDistill(decay=0.9), (-0.0390934476, 0.0175060464)),
        (HyperDistill(decay=0.0), (-0.0423167223, 0.0219030827)),
        (HyperDistill(decay=0.0, scale="fixed"), K_RMD_1),
    ],
    ids=["greedy", "greedy 0", "theta 1", "theta given", "fitted", "gamma 0, fitted", "gamma 0, theta 1"],
)
def test_golden_table(estimator: Estimator, expected: tuple[float, float]) -> None:
    toy = golden()
    found = episode(toy, estimator, [toy.train] * 8)
    torch.testing.assert_close(found.grads["lam"], double(*expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("gamma", "theta"), [(0.9, 0.9538493107), (0.0, 3.5225066136)])
def test_golden_theta(gamma: float, theta: float) -> None:
    toy = golden()
    found = episode(toy, HyperDistill(decay=gamma), [toy.train] * 8)
    assert abs(found.diagnostics["theta"] - theta) < 1e-9


# Greedy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_greedy_is_the_geometric_sum_of_one_step_terms_on_the_quadratic(decay: float) -> None:
    q, toy, steps = Quadratic.make(), quadratic(torch.float64), 12
    lam, expected = toy.lam["lam"], q.direct(toy.lam["lam"])
    for t in range(1, steps + 1):
        before, _ = q.unrolled(toy.w["th"], lam, 0.1, t - 1)
        expected = expected + decay ** (steps - t) * (q.one_step(before, lam, 0.1) - q.direct(lam))
    assert relative_error(episode(toy, Greedy(decay=decay), [None] * steps).grads, {"lam": expected}) < 1e-12


@pytest.mark.parametrize("learned", [(), ("eta", "mom", "decay")], ids=["given", "learned"])
def test_greedy_over_momentum_and_the_optimisers_own_numbers(learned: tuple[str, ...]) -> None:
    toy = momentum_toy(*learned)
    batches = batches_of(toy, 7)
    at = trajectory(toy, batches)
    expected = tree.zeros_like(toy.lam)
    for t, batch in enumerate(batches):
        term = local_term(toy, *at[t], batch, outer_grad(toy, at[t + 1][0]))
        expected = tree.add(term, expected, 0.8)
    expected = tree.add(expected, direct_term(toy, at[-1][0]))
    assert relative_error(episode(toy, Greedy(decay=0.8), batches).grads, expected) < 1e-12


def test_greedy_without_memory_is_one_step() -> None:
    toy = network(torch.float64)
    batches = batches_of(toy, 4)
    found, expected = (episode(toy, one, batches).grads for one in (Greedy(decay=0.0), OneStep()))
    assert relative_error(found, expected) < 1e-14


def test_greedy_keeps_each_term_at_the_lam_of_its_own_step() -> None:
    toy, estimator, one_step = golden(), Greedy(decay=0.5), OneStep()
    moved = {"lam": toy.lam["lam"] + 0.3}
    first = replace(toy, problem=replace(toy.problem, outer_loss=without_direct_term(toy.problem)))
    ((_, step, state),) = walk(first, estimator, [toy.train])
    assert step.made is not None
    second = InnerStep(step.current, moved, toy.train, step.made.update_state, val_batch=toy.val)
    passes = PassContext(first.problem)
    found = estimate(passes, estimator, second, state).grads
    terms = [estimate(passes, one_step, one, None).grads for one in (replace(step, made=None), second)]
    assert relative_error(found, tree.add(terms[1], terms[0], 0.5)) < 1e-13


def without_direct_term(problem: BilevelProblem) -> Callable[..., Tensor]:
    return lambda w, lam, batch: problem.outer_loss(w, tree.detach(lam), batch)


def test_the_costs_of_an_episode() -> None:
    toy = golden()
    batches = [toy.train] * 8
    assert episode(toy, Greedy(), batches).counts == counted("9F 9B 8J")  # a term a step
    assert episode(toy, Greedy("finite_difference"), batches).counts == counted("25F 25B")
    assert episode(toy, HyperDistill(scale="one"), batches).counts == counted("1F 1B 1J")
    walk_and_samples = "1F 1B 8D 8J"
    assert episode(toy, HyperDistill(), batches).counts == counted("1F 1B 1J", walk_and_samples)


# HyperDistill: identities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [quadratic, network])
def test_without_memory_hyperdistill_is_one_step(make: Callable[[torch.dtype], Toy]) -> None:
    toy = make(torch.float64)
    batches = [None] * 5 if toy.train is None else batches_of(toy, 5)
    one = HyperDistill(decay=0.0, scale="fixed")
    assert relative_error(episode(toy, one, batches).grads, episode(toy, OneStep(), batches).grads) < 1e-12


@pytest.mark.parametrize("scale", ["fixed", "fit"])
@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_reverse_mode_where_the_hessian_is_a_multiple_of_the_identity(scale: Any, engine: Any) -> None:
    k, eta, steps = 0.8, 0.1, 20
    q, toy = replace(Quadratic.make(), A=k * torch.eye(6, dtype=torch.float64)), quadratic(torch.float64)
    toy = replace(toy, problem=q.problem(SGD(eta)))
    lam = toy.lam["lam"].clone().requires_grad_()
    th, _ = q.unrolled(toy.w["th"], lam, eta, steps)
    (expected,) = torch.autograd.grad(q.outer({"th": th}, {"lam": lam}, None), lam)
    estimator = HyperDistill(engine, decay=1 - eta * k, scale=scale)
    found = episode(toy, estimator, [None] * steps)
    assert relative_error(found.grads, {"lam": expected}) < 1e-10
    assert abs(found.diagnostics.get("theta", 1.0) - 1) < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_the_running_mean_is_the_mean_of_the_past_weights(gamma: float) -> None:
    """Eq. 12 (the sum) = 13 (p_t = (gamma - gamma^t) / (1 - gamma^t), at gamma = 1 its limit (t - 1) / t)."""
    toy = golden()
    estimator, past = HyperDistill(decay=gamma, scale="fixed"), list[Tensor]()
    sequential = toy.w["th"]
    for t, (_, step, state) in enumerate(walk(toy, estimator, batches_of(toy, 12)), start=1):
        past.append(step.w["th"])
        p = (gamma - gamma**t) / (1 - gamma**t) if gamma < 1 else (t - 1) / t
        sequential = p * sequential + (1 - p) * step.w["th"]
        torch.testing.assert_close(state["w"]["th"], mean_of_past(past, gamma), rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(state["w"]["th"], sequential, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("learned", [(), ("eta", "mom", "decay")], ids=["given", "learned"])
def test_the_estimate_is_its_definition(gamma: float, learned: tuple[str, ...]) -> None:
    """theta sum_i gamma^i times the derivative of a momentum step from w* on the last batch; lam may hold its numbers.

    Learned, these read the gradient at w*, and the momentum buffer before the step.
    """
    toy = momentum_toy(*learned)
    batches = batches_of(toy, 6)
    at = trajectory(toy, batches)
    w_star = mean_of_past([th for th, _ in at[:-1]], gamma)
    term = local_term(toy, w_star, at[-2][1], batches[-1], outer_grad(toy, at[-1][0]))
    expected = tree.add(direct_term(toy, at[-1][0]), term, 1.3 * sum(gamma**i for i in range(6)))
    found = episode(toy, HyperDistill(decay=gamma, scale="fixed", theta=1.3), batches)
    assert relative_error(found.grads, expected) < 1e-12


@pytest.mark.parametrize("scale", ["fixed", "fit"])
def test_the_limit_of_no_decay(scale: Any) -> None:
    toy = golden()
    batches = batches_of(toy, 10)
    at_one, near = (episode(toy, HyperDistill(decay=g, scale=scale), batches).grads for g in (1.0, 1 - 1e-9))
    assert relative_error(near, at_one) < 1e-7


# HyperDistill: the size ----------------------------------------------------------------------------------------------


def fitted_theta(toy: Toy, batches: Sequence[Batch], gamma: float) -> float:
    """Algorithm 4 written out: autograd step by step along the straight line, every mean as a sum."""
    at, last = trajectory(toy, batches), len(batches)
    (start, _), (end, _) = at[0], at[-1]
    alpha = outer_grad(toy, end)
    on_w, on_velocity, term = alpha, torch.zeros_like(alpha), tree.zeros_like(toy.lam)
    x, y = [], []
    for s in range(1, last + 1):
        t = last - s  # the step from w_t to w_{t+1}
        th = (start + t / last * (end - start)).requires_grad_()
        velocity = torch.zeros_like(th, requires_grad=True)
        lam = {n: leaf.clone().requires_grad_() for n, leaf in toy.lam.items()}
        found = torch.autograd.grad(
            phi(toy, th, velocity, lam, batches[t], t), [th, velocity, *lam.values()], [on_w, on_velocity]
        )
        on_w, on_velocity = found[:2]
        term = tree.add(term, dict(zip(lam, found[2:], strict=True)))
        w_star = mean_of_past([w for w, _ in at[t:last]], gamma)
        v = torch.cat(
            [leaf.reshape(-1) for leaf in local_term(toy, w_star, at[-2][1], batches[-1], alpha, last - 1).values()]
        )
        x.append(v.norm() * sum(gamma**i for i in range(s)))
        y.append(v / v.norm() @ torch.cat([leaf.reshape(-1) for leaf in term.values()]))
    return float(torch.stack(x) @ torch.stack(y) / (torch.stack(x) @ torch.stack(x)))


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "make",
    [momentum_toy, partial(momentum_toy, "decay"), schedule_toy],
    ids=["momentum", "learned_decay", "learned_schedule"],
)
def test_the_fit_is_its_definition(gamma: float, make: Callable[[], Toy]) -> None:
    toy = make()
    batches = batches_of(toy, 9)
    expected = fitted_theta(toy, batches, gamma)
    assert abs(expected - 1) > 1e-2
    assert abs(episode(toy, HyperDistill(decay=gamma), batches).diagnostics["theta"] / expected - 1) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_the_fit_with_any_engine(engine: Any) -> None:
    toy = momentum_toy()
    batches = batches_of(toy, 9)
    found = episode(toy, HyperDistill(engine, radius=1e-3, decay=0.7), batches).diagnostics["theta"]
    assert abs(found / fitted_theta(toy, batches, 0.7) - 1) < (1e-6 if engine == "finite_difference" else 1e-12)


def test_the_fit_is_an_episode_of_its_own() -> None:
    toy, estimator = golden(), HyperDistill(decay=0.5, fit_every=3, theta=2.0)
    suspended, theta, previous = [], [], None
    for number in range(7):
        batches = [toy.train] * (3 + number)  # of other lengths, so that every fit finds another theta
        *_, (passes, step, state) = walk(toy, estimator, batches, previous)
        suspended.append(estimator.suspended(state))
        theta.append(answer(estimator, passes, step, state).diagnostics["theta"])
        previous = estimator.end_episode(passes, step, state)
        assert previous == {"episode": number + 1, "theta": previous["theta"]}
    assert suspended == [True, False, False, True, False, False, True]
    assert theta[0] == 2.0
    assert theta[1] == theta[2] == theta[3]
    assert theta[4] == theta[5] == theta[6] != theta[1]
    assert 2.0 not in theta[1:]


@pytest.mark.parametrize("scale", ["fixed", "one", "normalize"])
def test_without_a_fit_no_episode_is_suspended(scale: Any) -> None:
    toy, estimator = golden(), HyperDistill(scale=scale)
    assert (estimator.remembers, estimator.needs_sgd, estimator.second_order) == ("base", False, False)
    ((_, _, state),) = walk(toy, estimator, [toy.train])
    assert not estimator.suspended(state)
    assert "visits" not in state
    fitting = HyperDistill("finite_difference")
    assert (fitting.remembers, fitting.needs_sgd, fitting.second_order) == ("trajectory", True, True)


def test_a_fit_that_sees_no_term_keeps_theta() -> None:
    toy = golden()
    problem = replace(toy.problem, outer_loss=lambda w, lam, batch: torch.ones((), dtype=torch.float64))
    found = episode(replace(toy, problem=problem), HyperDistill(theta=1.5), [toy.train] * 3)
    assert found.diagnostics["theta"] == 1.5
    assert not found.grads["lam"].any()


def indirect(toy: Toy, batches: Sequence[Any], **settings: Any) -> Tensor:
    toy = replace(toy, problem=replace(toy.problem, outer_loss=without_direct_term(toy.problem)))
    return episode(toy, HyperDistill(decay=0.8, **settings), batches).grads["lam"]


def test_the_other_sizes() -> None:
    toy = golden()
    batches = batches_of(toy, 6)
    one = indirect(toy, batches, scale="one")
    fixed = indirect(toy, batches, scale="fixed", theta=0.7)
    torch.testing.assert_close(fixed, 0.7 * sum(0.8**i for i in range(6)) * one, rtol=1e-14, atol=0)
    normalized = indirect(toy, batches, scale="normalize")
    torch.testing.assert_close(normalized, one / one.norm(), rtol=1e-14, atol=0)
    assert abs(float(normalized.norm()) - 1) < 1e-14


def test_a_term_of_length_zero_stays_zero() -> None:
    toy = golden()
    problem = replace(toy.problem, outer_loss=lambda w, lam, batch: lam["lam"].sum())
    found = episode(replace(toy, problem=problem), HyperDistill(scale="normalize"), [toy.train] * 2)
    assert torch.equal(found.grads["lam"], torch.ones(2, dtype=torch.float64))


# HyperDistill: the examples ------------------------------------------------------------------------------------------

EXAMPLES = Examples(size=len, take=lambda batch, numbers: batch[numbers], concat=lambda batches: torch.cat([*batches]))


def numbered(count: int = 400) -> Toy:
    """The golden losses on numbered rows; a batch is a tensor of their numbers."""
    toy, generator = golden(), torch.Generator().manual_seed(5)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(count, generator=generator, dtype=torch.float64)
    inner = toy.problem.inner_loss
    problem = replace(
        toy.problem, inner_loss=lambda w, lam, rows: inner(w, lam, (x[rows], y[rows])), examples=EXAMPLES
    )
    return replace(toy, problem=problem, train=torch.arange(count))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_drawn_examples_keep_the_size_of_a_batch_and_come_of_those_seen(gamma: float) -> None:
    toy, estimator = numbered(), HyperDistill(decay=gamma, scale="fixed")
    batches = toy.train.split(8)
    drawn = [state["batch"] for _, _, state in walk(toy, estimator, batches)]
    assert torch.equal(drawn[0], batches[0])
    for t, batch in enumerate(drawn):
        assert len(batch) == len(batch.unique()) == 8
        assert int(batch.max()) < 8 * (t + 1)
        if gamma == 0:
            assert torch.equal(batch.sort().values, batches[t])


@pytest.mark.parametrize(("gamma", "steps"), [(0.8, 10), (1.0, 30)])
def test_drawn_examples_come_in_the_shares_of_the_weights(gamma: float, steps: int) -> None:
    """On average 8 gamma^age / n_t of a batch of 8, also where that is far less than one example."""
    toy, estimator, runs = numbered(), HyperDistill(decay=gamma, scale="fixed"), 1500
    observed = [(passes, step) for passes, step, _ in walk(toy, estimator, toy.train[: 8 * steps].split(8))]
    counts = torch.zeros(runs, steps, dtype=torch.float64)
    for run in range(runs):
        state = estimator.init(toy.problem, toy.w, toy.lam)
        for passes, step in observed:
            state = estimator.observe(replace(passes, seed=1000 * run + passes.seed), step, state)
        counts[run] = torch.bincount(state["batch"] // 8, minlength=steps)
    weights = double(*[gamma**age for age in reversed(range(steps))])
    error = (counts.mean(0) - 8 * weights / weights.sum()).abs() / (counts.std(0) / runs**0.5)
    assert float(error.max()) < 4


def test_drawn_examples_of_batches_of_other_sizes() -> None:
    """Half of each where their shares are equal."""
    toy = numbered()
    *_, (_, _, state) = walk(toy, HyperDistill(decay=1.0, scale="fixed"), toy.train[:12].split([8, 4]))
    assert torch.bincount(state["batch"] // 8).tolist() == [4, 2]


def watched(toy: Toy, calls: list[tuple[Tensor, Tensor]]) -> BilevelProblem:
    """The problem, which notes where its inner loss is taken: copies of the weights, and the rows."""
    inner = toy.problem.inner_loss

    def noted(w: Tree, lam: Tree, rows: Tensor) -> Tensor:
        calls.append((w["th"].detach().clone(), rows))
        return inner(w, lam, rows)

    facts = Facts(evaluated=True)  # nothing is to be found out about it
    facts.trusted.note(kind_of(toy.train), frozenset(toy.w), True)
    return replace(toy.problem, inner_loss=noted, facts=facts)


def test_the_term_is_taken_at_the_mean_on_what_was_drawn() -> None:
    toy, estimator = numbered(), HyperDistill("finite_difference", decay=0.9, scale="fixed")
    *_, (passes, step, state) = walk(toy, estimator, toy.train[:80].split(8))
    calls: list[tuple[Tensor, Tensor]] = []
    answer(estimator, replace(passes, problem=watched(toy, calls)), step, state)
    (plus, rows), (minus, again) = calls
    assert torch.equal(rows, state["batch"])
    assert torch.equal(again, rows)
    torch.testing.assert_close((plus + minus) / 2, state["w"]["th"], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("examples", [None, EXAMPLES], ids=["last_batch", "drawn"])
@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0])
def test_where_the_fit_samples(gamma: float, examples: Examples | None) -> None:
    """Eq. 17: the mean of the last s weights of the true trajectory; examples of the last s batches."""
    toy, estimator = numbered(), HyperDistill("finite_difference", decay=gamma)
    toy = replace(toy, problem=replace(toy.problem, examples=examples))
    batches = toy.train[:80].split(8)
    observed = list(walk(toy, estimator, batches))
    passes, step, state = observed[-1]
    calls: list[tuple[Tensor, Tensor]] = []
    estimator.end_episode(replace(passes, problem=watched(toy, calls)), step, state)
    assert len(calls) == 3 * len(batches)  # of each sample: a step of the walk back, and a finite difference
    past = [step.w["th"] for _, step, _ in observed]
    for s, ((plus, rows), (minus, _)) in enumerate(zip(calls[1::3], calls[2::3], strict=True), start=1):
        mean = mean_of_past(past[-s:], gamma)
        torch.testing.assert_close((plus + minus) / 2, mean, rtol=1e-13, atol=1e-15)
        assert len(rows) == len(rows.unique()) == 8
        assert int(rows.min()) >= 80 - 8 * s
        if s == 1 or examples is None or gamma == 0:
            assert torch.equal(rows.sort().values, batches[-1])
    assert examples is None or gamma == 0 or int(rows.min()) < 40, "the last sample should reach far back"


# Both: engines, state, surroundings ----------------------------------------------------------------------------------

BOTH: dict[str, Callable[..., Estimator]] = {
    "greedy": lambda engine="auto": Greedy(engine, radius=1e-3, decay=0.7),
    "hyperdistill": lambda engine="auto": HyperDistill(engine, radius=1e-3, decay=0.7, scale="fixed"),
    "normalized": lambda engine="auto": HyperDistill(engine, radius=1e-3, decay=0.7, scale="normalize"),
}


@pytest.mark.parametrize(
    "make", [golden, network, lambda dtype: tagger(dtype=dtype)], ids=["golden", "network", "tagger"]
)
@pytest.mark.parametrize("name", ["greedy", "hyperdistill"])
def test_engines_agree(name: str, make: Callable[[torch.dtype], Toy]) -> None:
    """Over mini-batches; on the networks a stop-gradient input is recorded where the local term is taken."""
    toy = make(torch.float64)
    batches = batches_of(toy, 4)
    exact, jvp, difference = (episode(toy, BOTH[name](engine), batches).grads for engine in ENGINES)
    assert tree.norm(exact) > 1e-6
    assert relative_error(jvp, exact) < 1e-12
    assert relative_error(difference, exact) < 1e-6


@pytest.mark.parametrize("name", BOTH)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(name: str) -> None:
    toy, estimator = numbered(), BOTH[name]()
    resumed: Any = None
    for t, (passes, step, state) in enumerate(walk(toy, estimator, toy.train[:80].split(8))):
        if t == 4:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            resumed = torch.load(file, weights_only=True)
        elif t > 4:
            resumed = estimator.observe(passes, step, resumed)
        if t >= 4:
            found, expected = (answer(estimator, passes, step, one).grads["lam"] for one in (resumed, state))
            assert torch.equal(found, expected)


def test_what_the_next_episode_knows_is_saved_with_a_run() -> None:
    toy, estimator = golden(), HyperDistill()
    *_, last = walk(toy, estimator, [toy.train] * 3)
    file = io.BytesIO()
    learned = estimator.end_episode(*last)
    torch.save(learned, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == learned


@pytest.mark.parametrize("estimator", [Greedy(), HyperDistill()], ids=["greedy", "hyperdistill"])
def test_observing_leaves_the_step_and_the_state_alone(estimator: Estimator) -> None:
    """And what is kept does not change with the caller's tensors."""
    toy = golden()
    (_, _, _), (passes, step, state) = walk(toy, estimator, [toy.train] * 2)
    assert step.made is not None
    held = {"w": step.w, "now": step.made.w, "grad": step.made.grad, "state": tensors(state)}
    before = {key: tree.clone(one) for key, one in held.items()}
    after = estimator.observe(passes, step, state)
    estimator.end_episode(passes, step, after)
    for key, one in held.items():
        assert one.keys() == before[key].keys()
        assert all(torch.equal(one[n], before[key][n]) for n in one), key
    kept = tree.clone(tensors(after))
    for leaf in [*step.w.values(), *step.made.w.values(), *step.made.grad.values()]:
        leaf += 1.0
    assert all(torch.equal(leaf, kept[n]) for n, leaf in tensors(after).items())


def tensors(state: Any) -> Tree:
    """The tensors of a state by their place in it."""
    if isinstance(state, Tensor):
        return {"": state}
    if isinstance(state, list):
        state = dict(enumerate(state))
    if isinstance(state, Visit):
        state = vars(state)
    nested = state.items() if isinstance(state, dict) else ()
    return {f"{key}/{path}": leaf for key, one in nested for path, leaf in tensors(one).items()}


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Adam(0.1), "models SGD.*Adam.*scale to fixed, one or normalize"),
        (AdamW(0.1), "models SGD.*AdamW.*scale to fixed, one or normalize"),
        (SGD(0.1, max_grad_norm=1.0), "clipping.*scale to fixed, one or normalize"),
        (SGD("eta", momentum="mom"), "buffers.*scale to fixed, one or normalize"),
    ],
    ids=["adam", "adamw", "clipped", "learned_momentum"],
)
def test_what_the_fit_does_not_model_is_refused(rule: Any, said: str) -> None:
    toy = golden(update=rule)
    toy = replace(toy, lam=toy.lam | {name: double(NUMBERS[name]) for name in rule.tunes})
    with pytest.raises(ValueError, match=said):
        episode(toy, HyperDistill(), [toy.train] * 3)
    for scale in ("fixed", "one", "normalize"):  # the way out that the message names
        assert tree.all_finite(episode(toy, HyperDistill(scale=scale), [toy.train] * 3).grads)


def test_the_fit_differentiates_twice_whatever_the_engine() -> None:
    toy = golden().once()
    with pytest.raises(ValueError, match=r"differentiates the inner loss twice.*scale to fixed, one or normalize"):
        episode(toy, HyperDistill("finite_difference"), [toy.train] * 3)
    with pytest.raises(ValueError, match="differentiates the inner loss twice") as error:
        episode(toy, HyperDistill("jvp"), [toy.train] * 3)
    assert "scale" not in str(error.value), "another scale would not help"
    assert tree.all_finite(episode(toy, HyperDistill(scale="one"), [toy.train] * 3).grads)
