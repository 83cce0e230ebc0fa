"""Unroll and DrMAD against golden numbers, closed forms and autograd through written-out episodes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaxl_evo.bilevel import (
    SGD,
    Adam,
    AdamW,
    Counts,
    Hypergradient,
    InnerStep,
    PassContext,
    Tree,
    hypergradient,
    run_episode,
    tree,
)
from metaxl_evo.bilevel.hypergradients import estimate, look_ahead
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.estimators import DrMAD, Estimator, OneStep, Unroll
from tests.estimators.problems import (
    Quadratic,
    Toy,
    cut_network,
    flat,
    golden,
    logged,
    network,
    numerical_error,
    quadratic,
    random_like,
    relative_error,
    tagger,
    unflat,
)

Memory = dict[str, Any]
Written = Callable[[Tree, Memory, int, Tree, Tree], Tree]  # (w, memory, number of the step, g, lam) -> w after it


def with_lam(toy: Toy, rule: UpdateRule, **numbers: float) -> Toy:
    """The toy under another rule, with more entries in lam."""
    more = {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}
    return replace(toy, problem=replace(toy.problem, update=rule), lam=toy.lam | more)


def golden_batches(toy: Toy, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Three of the four rows, other ones each step."""
    x, y = toy.train
    return [(x.roll(t, 0)[:3], y.roll(t, 0)[:3]) for t in range(steps)]


def episode(toy: Toy, estimator: Estimator, batches: Sequence[Any]) -> Hypergradient:
    return run_episode(toy.problem, estimator, toy.w, toy.lam, batches, toy.val)


def by_autograd(toy: Toy, written: Written, batches: Sequence[Any], horizon: int | None = None) -> Tree:
    """d outer / d lam through the last steps of an episode, in one graph; what is before them is held constant."""
    lam = {n: x.clone().requires_grad_() for n, x in toy.lam.items()}
    w, memory = {n: x.clone().requires_grad_() for n, x in toy.w.items()}, Memory()
    for t, batch in enumerate(batches):
        if len(batches) - t == horizon:
            w = {n: x.detach().requires_grad_() for n, x in w.items()}
            memory = {key: {n: x.detach() for n, x in held.items()} for key, held in memory.items()}
        loss = toy.problem.inner_loss(w, lam, batch)
        found = torch.autograd.grad(loss, list(w.values()), create_graph=True, materialize_grads=True)
        w = written(w, memory, t, dict(zip(w, found, strict=True)), lam)
    found = torch.autograd.grad(toy.problem.outer_loss(w, lam, toy.val), list(lam.values()), materialize_grads=True)
    return dict(zip(lam, found, strict=True))


def sgd(w: Tree, memory: Memory, t: int, g: Tree, lam: Tree) -> Tree:
    """Momentum and coupled decay, all three of its numbers learned."""
    g = {n: x + lam["decay"] * w[n] for n, x in g.items()}
    if t:
        g = {n: lam["mom"] * memory["velocity"][n] + x for n, x in g.items()}
    memory["velocity"] = g
    return {n: x - lam["eta"] * g[n] for n, x in w.items()}


LIMIT = 0.02


def clipped(g: Tree, limit: float) -> Tree:
    norm = torch.stack([(x**2).sum() for x in g.values()]).sum() ** 0.5
    assert float(norm.detach()) > limit, "an active clip is part of what is tested"
    return {n: x * limit / (norm + 1e-6) for n, x in g.items()}


def adam(w: Tree, memory: Memory, t: int, g: Tree, lam: Tree, limit: float = LIMIT) -> Tree:
    """Coupled decay of 0.2 and an active clip, the learning rate learned where lam has one."""
    g = clipped(g, limit)
    return moments(w, memory, t, {n: x + 0.2 * w[n] for n, x in g.items()}, lam.get("eta", 0.05))


def adamw(w: Tree, memory: Memory, t: int, g: Tree, lam: Tree) -> Tree:
    """Decoupled decay and learning rate, both learned, and an active clip."""
    g = clipped(g, LIMIT)
    return moments({n: x * (1 - lam["eta"] * lam["decay"]) for n, x in w.items()}, memory, t, g, lam["eta"])


def moments(w: Tree, memory: Memory, t: int, g: Tree, lr: Tensor | float) -> Tree:
    nothing = {n: torch.zeros_like(x) for n, x in w.items()}
    first = {n: 0.9 * memory.get("m", nothing)[n] + 0.1 * x for n, x in g.items()}
    second = {n: 0.99 * memory.get("s", nothing)[n] + 0.01 * x**2 for n, x in g.items()}
    memory.update(m=first, s=second)
    root = {n: (x / (1 - 0.99 ** (t + 1))).clamp_min(1e-60).sqrt() for n, x in second.items()}  # rows never read
    return {n: x - lr * (first[n] / (1 - 0.9 ** (t + 1))) / (root[n] + 1e-3) for n, x in w.items()}


MOMENTS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-3}
RULES: dict[str, tuple[UpdateRule, Written, dict[str, float]]] = {
    "momentum": (SGD("eta", "decay", momentum="mom"), sgd, {"eta": 0.1, "decay": 0.2, "mom": 0.7}),
    "adam": (Adam("eta", 0.2, max_grad_norm=LIMIT, **MOMENTS), adam, {"eta": 0.05}),
    "adamw": (AdamW("eta", "decay", max_grad_norm=LIMIT, **MOMENTS), adamw, {"eta": 0.05, "decay": 0.3}),
}


# Unroll: known numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (Unroll(horizon=1), (-0.0478188039, 0.0241208200)),
        (Unroll(horizon=2), (-0.0458727272, 0.0233941889)),
        (Unroll(horizon=4), (-0.0426015412, 0.0222683935)),
        (Unroll(horizon=8), (-0.0380749748, 0.0208149496)),
        (Unroll(), (-0.0380749748, 0.0208149496)),
        (DrMAD(), (-0.0382780249, 0.0197980836)),
    ],
    ids=["K-RMD K=1", "K-RMD K=2", "K-RMD K=4", "K-RMD K=8", "RMD", "DrMAD"],
)
def test_golden_table(estimator: Estimator, expected: tuple[float, float]) -> None:
    toy = golden()
    found = episode(toy, estimator, [toy.train] * 8)
    torch.testing.assert_close(found.grads["lam"], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", [Unroll(), Unroll(horizon=5), DrMAD()], ids=["unroll", "truncated", "drmad"])
def test_closed_form_on_the_quadratic(estimator: Estimator) -> None:
    """([I - (I - eta A)^K] C)' g_V(theta_T) + the direct term, for DrMAD's line as well: A and B are constant."""
    q, toy = Quadratic.make(), quadratic(torch.float64)
    _, g_val = q.unrolled(toy.w["th"], toy.lam["lam"], 0.1, 20)
    eye, steps = torch.eye(6, dtype=torch.float64), getattr(estimator, "horizon", None) or 20
    jacobian = (eye - torch.linalg.matrix_power(eye - 0.1 * q.A, steps)) @ q.C
    expected = {"lam": jacobian.T @ g_val + q.direct(toy.lam["lam"])}
    assert relative_error(episode(toy, estimator, [None] * 20).grads, expected) < 1e-12


@pytest.mark.parametrize("horizon", [None, 1, 3])
@pytest.mark.parametrize("name", RULES)
def test_unroll_is_autograd_through_the_steps(name: str, horizon: int | None) -> None:
    """Curved in w and lam, other batches each step, the optimiser's own numbers learned."""
    rule, written, numbers = RULES[name]
    toy = with_lam(golden(), rule, **numbers)
    batches = golden_batches(toy, 9)
    found = episode(toy, Unroll(horizon), batches).grads
    assert relative_error(found, by_autograd(toy, written, batches, horizon)) < 1e-12


@pytest.mark.parametrize("estimator", [Unroll(), DrMAD()], ids=["unroll", "drmad"])
def test_a_loss_without_second_derivatives(estimator: Estimator) -> None:
    """L_T = <c, w>: w_T = w_0 - T eta c, so d L_V / d eta = -T <c, g_V(w_T)>."""
    c = torch.tensor([0.3, -0.4], dtype=torch.float64)
    toy = with_lam(golden(), SGD("eta"), eta=0.1)
    toy = replace(toy, problem=replace(toy.problem, inner_loss=lambda w, lam, batch: w["th"] @ c))
    end = (toy.w["th"] - 4 * 0.1 * c).requires_grad_()
    (g_val,) = torch.autograd.grad(toy.problem.outer_loss({"th": end}, toy.lam, toy.val), end)
    found = episode(toy, estimator, [toy.train] * 4).grads
    assert abs(float(found["eta"] + 4 * c @ g_val)) < 1e-14
    assert torch.equal(found["lam"], 0.05 * toy.lam["lam"])  # the direct term


@pytest.mark.parametrize("horizon", [None, 2])
def test_a_network_behind_a_stop_gradient(horizon: int | None) -> None:
    """The stop-gradient input is a constant of every step, for autograd as well."""
    rule, written, _ = RULES["adam"]
    toy = with_lam(network(torch.float64), replace(rule, lr=0.05))
    x, y = toy.train
    batches = [(x.roll(t, 0)[:5], y.roll(t, 0)[:5]) for t in range(4)]
    found = episode(toy, Unroll(horizon), batches).grads
    assert relative_error(found, by_autograd(toy, written, batches, horizon)) < 1e-12


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_transformer(attention: str) -> None:
    """Three clipped Adam steps of a tiny tagger; sdpa's own kernels have no second derivative."""
    eager, toy = tagger("eager"), tagger(attention)
    words, labels = toy.train
    batches = [(words.roll(t, 0)[:2], labels.roll(t, 0)[:2]) for t in range(3)]
    rule = Adam(0.05, 0.2, max_grad_norm=0.5, **MOMENTS)
    expected = by_autograd(eager, partial(adam, limit=0.5), batches)
    found = episode(with_lam(toy, rule), Unroll(), batches).grads
    assert relative_error(found, expected) < 1e-10


def test_an_episode_with_dropout_is_differentiated_at_its_own_masks() -> None:
    """Each step's passes draw what the step itself drew: the estimate is the derivative of that very episode."""
    toy = golden(update=SGD(0.1, momentum=0.5))
    problem = toy.problem

    def noisy(w: Tree, lam: Tree, batch: Any) -> Tensor:
        return problem.inner_loss({"th": F.dropout(w["th"] + 0.1 * torch.randn(2), 0.3)}, lam, batch)

    def run(lam: Tree) -> Hypergradient:
        noisy_problem = replace(problem, inner_loss=noisy)
        batches, generator = golden_batches(toy, 5), torch.Generator().manual_seed(1)
        return run_episode(noisy_problem, Unroll(), toy.w, lam, batches, toy.val, generator=generator)

    assert numerical_error(run(toy.lam).grads, lambda lam: float(run(lam).outer_loss), toy.lam) < 1e-8


# Micro-batches -------------------------------------------------------------------------------------------------------


def in_parts(toy: Toy) -> Toy:
    """Losses that are sums over rows, a batch as a list of micro-batches."""
    x, y = toy.train
    inner = toy.problem.inner_loss

    def summed(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return inner(w, lam, batch) * len(batch[1]) / len(y)

    problem = replace(toy.problem, inner_loss=summed, parts=lambda batch: batch)
    return replace(toy, problem=problem, train=[(x[:2], y[:2]), (x[2:], y[2:])], val=[toy.val])


@pytest.mark.parametrize("horizon", [None, 2])
@pytest.mark.parametrize("name", RULES)
def test_the_parts_of_a_batch_are_the_batch(name: str, horizon: int | None) -> None:
    """The clip factor and Adam's moments read the gradient of the whole batch."""
    rule, _, numbers = RULES[name]
    whole = with_lam(network(torch.float64), rule, **numbers)
    parts = in_parts(whole)
    expected = episode(whole, Unroll(horizon), [whole.train] * 4)
    found = episode(parts, Unroll(horizon), [parts.train] * 4)
    assert relative_error(found.grads, expected.grads) < 1e-12
    assert (found.counts.hvps, expected.counts.hvps) == (2 * (horizon or 4), horizon or 4)


# DrMAD ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        SGD(0.1),
        SGD(0.1, 0.3, momentum=0.8),
        SGD(0.1, 0.3, momentum=0.8, nesterov=True),
        SGD(0.1, momentum=0.8, dampening=0.4),
        SGD({"th": 0.05}, momentum=0.8),
    ],
    ids=["plain", "momentum", "nesterov", "dampening", "groups"],
)
def test_drmad_is_unroll_where_second_derivatives_are_constant(rule: UpdateRule) -> None:
    toy = quadratic(torch.float64, update=rule)
    found, expected = (episode(toy, estimator, [None] * 12).grads for estimator in (DrMAD(), Unroll()))
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [
        (SGD("eta", "decay"), {"eta": 0.1, "decay": 0.3}),
        (SGD(0.1, "decay", momentum=0.7), {"decay": 0.3}),
        (SGD(0.1, "decay", momentum=0.7, nesterov=True), {"decay": 0.3}),
    ],
    ids=["learned_rate", "momentum", "nesterov"],
)
def test_drmad_is_a_product_of_jacobians_along_the_line(rule: SGD, numbers: dict[str, float]) -> None:
    """Whole Jacobians of (w, velocity, lam) -> (w', velocity') by autograd, at the line's points, with the batches."""
    toy, steps = with_lam(golden(), rule, **numbers), 6
    batches, lam, mu = golden_batches(toy, steps), flat(toy.lam), float(rule.momentum)  # type: ignore[arg-type]
    size, start = len(lam), toy.w["th"]

    def written(point: Tensor, batch: Any) -> Tensor:
        w, velocity, entries = point.split([2, 2, size])
        lam = unflat(entries, toy.lam)
        (g,) = torch.autograd.grad(toy.problem.inner_loss({"th": w}, lam, batch), w, create_graph=True)
        g = g + lam["decay"] * w
        velocity = mu * velocity + g
        moved = g + mu * velocity if rule.nesterov else velocity
        return torch.cat([w - lam.get("eta", 0.1) * moved, velocity, entries])

    end = torch.cat([start, torch.zeros(2, dtype=torch.float64), lam])
    for batch in batches:
        end = written(end.requires_grad_(), batch).detach()
    product = torch.eye(len(end), dtype=torch.float64)
    for t, batch in enumerate(batches):
        w = start + t / steps * (end[:2] - start)
        point = torch.cat([w, torch.zeros(2, dtype=torch.float64), lam])
        product = torch.autograd.functional.jacobian(partial(written, batch=batch), point) @ product

    at = torch.cat([end[:2], lam]).requires_grad_()
    outer = toy.problem.outer_loss({"th": at[:2]}, unflat(at[2:], toy.lam), toy.val)
    (found,) = torch.autograd.grad(outer, at)
    expected = {"all": found[2:] + found[:2] @ product[:2, 4:]}
    grads = episode(toy, DrMAD(), batches).grads
    assert relative_error({"all": flat(grads)}, expected) < 1e-12
    assert relative_error({"all": flat(episode(toy, Unroll(), batches).grads)}, expected) > 1e-3, "the line is not it"


def test_drmad_in_parts() -> None:
    whole = with_lam(network(torch.float64), SGD(0.1, momentum=0.7))
    parts = in_parts(whole)
    found, expected = (episode(toy, DrMAD(), [toy.train] * 3) for toy in (parts, whole))
    assert relative_error(found.grads, expected.grads) < 1e-12
    assert (found.counts.hvps, expected.counts.hvps) == (6, 3)


@pytest.mark.parametrize(
    ("rule", "numbers", "said"),
    [
        (Adam(0.1), {}, "Adam.*SGD.*unroll"),
        (AdamW(0.1), {}, "AdamW.*SGD.*unroll"),
        (SGD(0.1, max_grad_norm=1.0), {}, "max_grad_norm.*unroll"),
        (SGD(0.1, max_grad_value=1.0), {}, "max_grad_value.*unroll"),
        (SGD("eta", momentum=0.9), {"eta": 0.1}, "eta.*momentum=0.*unroll"),
        (SGD(0.1, momentum="mom"), {"mom": 0.9}, "mom.*momentum=0.*unroll"),
    ],
    ids=["adam", "adamw", "clip", "clamp", "rate_with_momentum", "momentum"],
)
def test_drmad_refuses_what_the_line_does_not_know(rule: UpdateRule, numbers: dict[str, float], said: str) -> None:
    toy = with_lam(golden(), rule, **numbers)
    with pytest.raises(ValueError, match=f"DrMAD.*{said}"):
        episode(toy, DrMAD(), [toy.train])
    assert episode(toy, Unroll(), [toy.train]).grads["lam"].any()


# One step ------------------------------------------------------------------------------------------------------------

ONE_STEP: dict[str, tuple[Estimator, Callable[[torch.dtype], Toy]]] = {
    "unroll": (Unroll(), network),
    "unroll, horizon 1": (Unroll(horizon=1), network),
    "unroll, horizon 3": (Unroll(horizon=3), network),
    "drmad": (DrMAD(), cut_network),
}


@pytest.mark.parametrize("made", [False, True], ids=["lookahead", "step_made"])
@pytest.mark.parametrize("name", ONE_STEP)
def test_over_one_step_it_is_one_step(name: str, made: bool) -> None:
    """In mid-run, with an optimiser's state before the step: Adam's with an active clip, or a momentum buffer."""
    estimator, make = ONE_STEP[name]
    toy = make(torch.float64)
    buffer = {"step": 3, "momentum_buffer": tree.scale(random_like(toy.w, 70), 0.1)}
    state = toy.update_state if toy.update_state is not None else buffer
    step = look_ahead(PassContext(toy.problem), InnerStep(toy.w, toy.lam, toy.train, state))
    options: dict[str, Any] = {"update_state": state} | ({"made": step.made} if made else {})
    found, expected = (
        hypergradient(toy.problem, one, toy.w, toy.lam, toy.train, toy.val, **options).grads
        for one in (estimator, OneStep("double_backward"))
    )
    assert relative_error(found, expected) < 1e-12


# The state -----------------------------------------------------------------------------------------------------------


def steps_of(toy: Toy, rules: Sequence[UpdateRule], lams: Sequence[Tree], observers: Sequence[Estimator]) -> list[Any]:
    """An online episode by hand, as a trainer runs it: the caller's tensors are changed in place at every step.

    -> for each observer the answers after each step
    """
    problem, w = toy.problem, {n: x.clone() for n, x in toy.w.items()}
    held, lam = rules[0].init(w), {n: x.clone() for n, x in toy.lam.items()}
    states: list[Any] = [one.init(problem, w, lam) for one in observers]
    answers: list[list[Tree]] = [[] for _ in observers]
    for t, (rule, now) in enumerate(zip(rules, lams, strict=True)):
        for name, leaf in lam.items():
            leaf.copy_(now[name])
        passes = PassContext(replace(problem, update=rule), seed=t)
        before = {key: tree.clone(x) if isinstance(x, dict) else x for key, x in held.items()}
        step = look_ahead(passes, InnerStep(tree.clone(w), lam, golden_batches(toy, t + 1)[-1], before))
        assert step.made is not None
        for live, after in [(w, step.made.w)] + [
            (held[k], x) for k, x in step.made.update_state.items() if k != "step"
        ]:
            for name, leaf in after.items():
                live[name].copy_(leaf)
        held["step"] = step.made.update_state["step"]
        step = replace(step, val_batch=toy.val, made=replace(step.made, w=w, update_state=held))
        for index, observer in enumerate(observers):
            states[index] = observer.observe(passes, step, states[index])
            answers[index].append(estimate(passes, observer, step, states[index]).grads)
        for leaf in [*step.w.values(), *(x for key in before if key != "step" for x in before[key].values())]:
            leaf.fill_(torch.nan)  # the step's own copies are the caller's, too
    return answers


def test_online_with_a_schedule_and_moving_lam() -> None:
    """Every step is differentiated at its own weights, velocity, lam, batch and learning rate."""
    toy, horizon, rates = with_lam(golden(), SGD(0.1), mom=0.7), 3, [0.2, 0.15, 0.1, 0.12, 0.05]
    rules = [SGD(rate, 0.2, momentum="mom") for rate in rates]
    lams = [tree.tree_map(lambda x, t=t: x + 0.05 * t, toy.lam) for t in range(len(rules))]
    truncated, whole = steps_of(toy, rules, lams, [Unroll(horizon), Unroll()])

    def expected(last: int, start: int) -> Tree:
        """The derivative along a shift of every lam from step `start` on at once."""
        shift = {n: torch.zeros_like(x).requires_grad_() for n, x in toy.lam.items()}
        w, velocity = toy.w["th"].clone().requires_grad_(), torch.zeros(2, dtype=torch.float64)
        for t in range(last + 1):
            if t == start:
                w, velocity = w.detach().requires_grad_(), velocity.detach()
            lam = tree.add(lams[t], shift) if t >= start else lams[t]
            loss = toy.problem.inner_loss({"th": w}, lam, golden_batches(toy, len(rules))[t])
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            velocity = lam["mom"] * velocity + g + 0.2 * w
            w = w - rates[t] * velocity
        outer = toy.problem.outer_loss({"th": w}, tree.add(lams[last], shift), toy.val)
        found = torch.autograd.grad(outer, list(shift.values()), materialize_grads=True)
        return dict(zip(shift, found, strict=True))

    for last in range(len(rules)):
        assert relative_error(truncated[last], expected(last, max(0, last + 1 - horizon))) < 1e-12
        assert relative_error(whole[last], expected(last, 0)) < 1e-12


def test_drmad_keeps_where_the_episode_began() -> None:
    toy = with_lam(golden(), SGD(0.1, momentum=0.7))
    (found,) = steps_of(toy, [toy.problem.update] * 4, [toy.lam] * 4, [DrMAD()])
    assert relative_error(found[-1], episode(toy, DrMAD(), golden_batches(toy, 4)).grads) < 1e-12


@pytest.mark.parametrize("estimator", [Unroll(), Unroll(horizon=2), DrMAD()], ids=["unroll", "truncated", "drmad"])
def test_observing_leaves_the_state_before_as_it_was(estimator: Estimator) -> None:
    """Two answers from the same state agree, whatever was observed from it in between."""
    toy = with_lam(golden(), SGD(0.1, momentum=0.6))
    passes, w, held = PassContext(toy.problem), toy.w, toy.problem.update.init(toy.w)
    state = estimator.init(toy.problem, w, toy.lam)
    for batch in golden_batches(toy, 3):
        step = look_ahead(passes, InnerStep(w, toy.lam, batch, held, val_batch=toy.val))
        assert step.made is not None
        state, w, held = estimator.observe(passes, step, state), step.made.w, step.made.update_state
    first = estimate(passes, estimator, step, state).grads
    ahead = InnerStep(w, toy.lam, toy.train, held, val_batch=toy.val)
    looked = estimate(passes, estimator, ahead, state).grads
    estimator.observe(passes, look_ahead(passes, ahead), state)
    assert torch.equal(estimate(passes, estimator, step, state).grads["lam"], first["lam"])
    assert relative_error(looked, first) > 1e-3
    assert estimator.end_episode(passes, step, state) is None, "a trajectory is not for the next episode"


def test_a_horizon_keeps_so_many_steps() -> None:
    toy, kept = golden(), []
    passes, state = PassContext(toy.problem), Unroll(horizon=3).init(toy.problem, toy.w, toy.lam)
    step = look_ahead(passes, InnerStep(toy.w, toy.lam, toy.train))
    for _ in range(5):
        state = Unroll(horizon=3).observe(passes, step, state)
        kept.append(len(state))
    assert kept == [1, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("estimator", "online"), [(Unroll(), False), (Unroll(horizon=2), True), (DrMAD(), False)]
)  # fmt: skip
def test_only_a_horizon_answers_at_any_step(estimator: Estimator, online: bool) -> None:
    assert estimator.online is online


# Passes and memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "steps"), [(Unroll(), 6), (Unroll(horizon=4), 4), (Unroll(horizon=9), 6), (DrMAD(), 6)]
)  # fmt: skip
def test_passes_of_an_episode(estimator: Estimator, steps: int) -> None:
    """A double backward a step. Of 2T - 1 products the last, which nobody reads, is left out."""
    toy, calls, reached = golden(), list[Any](), list[Any]()
    inner = toy.problem.inner_loss

    def watched(w: Tree, lam: Tree, batch: Any) -> Tensor:
        if w["th"].requires_grad:
            w["th"].register_hook(reached.append)
        return inner(w, lam, batch)

    problem = replace(toy.problem, inner_loss=logged(watched, calls))
    for _ in range(2):  # the first finds out about the loss as well
        calls.clear()
        reached.clear()
        counts = episode(replace(toy, problem=problem), estimator, [toy.train] * 6).counts
    assert counts == Counts(forwards=1, backwards=1, hvps=steps)
    assert len(calls) == 6 + steps  # the episode itself, the walk back
    assert len(reached) == 6 + 2 * steps - 1


class Saved:
    """One tensor that a graph keeps for its backward."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def most_saved(run: Callable[[], object]) -> int:
    """The most tensors that graphs have kept at one time."""
    alive, most = weakref.WeakSet[Saved](), 0

    def pack(x: Tensor) -> Saved:
        nonlocal most
        saved = Saved(x)
        alive.add(saved)
        most = max(most, len(alive))
        return saved

    gc.disable()  # a graph that waits for the collector is alive
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.x):
            run()
    finally:
        gc.enable()
    return most


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("estimator", [Unroll(), Unroll(horizon=5), DrMAD()], ids=["unroll", "truncated", "drmad"])
def test_one_graph_is_alive_at_a_time(estimator: Estimator, parts: bool) -> None:
    """A long episode needs no more than a single double backward, one of several parts no more than one part."""
    whole = with_lam(network(torch.float64), SGD(0.1, momentum=0.5))
    toy = in_parts(whole) if parts else whole
    local = most_saved(lambda: episode(whole, OneStep("double_backward"), [whole.train]))
    assert most_saved(lambda: episode(toy, estimator, [toy.train] * 6)) <= 1.2 * local


def test_the_counter_would_see_the_graphs_of_a_whole_episode() -> None:
    toy = with_lam(network(torch.float64), SGD("eta", "decay", momentum="mom"), eta=0.1, decay=0.2, mom=0.5)
    one, six = (most_saved(partial(by_autograd, toy, sgd, [toy.train] * steps)) for steps in (1, 6))
    assert six > 5 * one


# Steps that are made again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 17])
@pytest.mark.parametrize("rule", [SGD(0.1, momentum=0.9), AdamW(0.05, weight_decay=0.1)], ids=["sgd", "adamw"])
def test_steps_made_again_give_the_same_bits(rule: UpdateRule, steps: int) -> None:
    """Dropout and all: a step has its seed."""
    toy, _ = golden(), None
    masked = replace(toy.problem, update=rule, inner_loss=_dropping(toy.problem.inner_loss))
    batches = golden_batches(toy, steps)
    kept, again = (
        run_episode(masked, estimator, toy.w, toy.lam, batches, toy.val, generator=torch.Generator().manual_seed(1))
        for estimator in (Unroll(), Unroll(recompute=True))
    )
    assert tree.norm(kept.grads) > 0
    assert all(torch.equal(again.grads[name], leaf) for name, leaf in kept.grads.items())
    assert again.counts.forwards - kept.counts.forwards <= steps


def _dropping(loss: Any) -> Any:
    return lambda w, lam, batch: loss(w, lam, (F.dropout(batch[0], 0.25), batch[1]))


def test_weights_are_kept_of_the_square_root_of_the_steps() -> None:
    toy, estimator = golden(), Unroll(recompute=True)
    passes = PassContext(toy.problem)
    state, step = estimator.init(toy.problem, toy.w, toy.lam), InnerStep(toy.w, toy.lam, None)
    for count, batch in enumerate(golden_batches(toy, 150), start=1):
        before = None if step.made is None else step.made.update_state
        step = look_ahead(passes, InnerStep(step.current, toy.lam, batch, before))
        state = estimator.observe(passes, step, state)
        held = [bool(visit.w) for visit in state]
        assert sum(held) <= count**0.5 + 1
        gaps = "".join("w" if one else "." for one in held).split("w")
        assert max(map(len, gaps)) < 2 * count**0.5
