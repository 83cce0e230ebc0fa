"""Forward mode against closed forms, autograd through written-out steps, and FDS's own recursions written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaxl_evo.bilevel import (
    SGD,
    Adam,
    AdamW,
    BilevelProblem,
    Counts,
    Hypergradient,
    InnerStep,
    PassContext,
    Tree,
    Windowed,
    hypergradient,
    run_episode,
    tree,
)
from metaxl_evo.bilevel.hypergradients import look_ahead
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.estimators import ForwardMode
from metaxl_evo.training.sign_halving import SignHalving
from tests.estimators.problems import Quadratic, Toy, golden, network, quadratic, relative_error, tagger


def episode(toy: Toy, steps: int, estimator: ForwardMode | None = None) -> Hypergradient:
    batches = [toy.train] * steps
    return run_episode(toy.problem, estimator or ForwardMode(), toy.w, toy.lam, batches, toy.val)


def with_lam(toy: Toy, rule: UpdateRule, **numbers: float | list[float]) -> Toy:
    """The toy under another rule, with more entries in lam."""
    more = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return replace(toy, problem=replace(toy.problem, update=rule), lam=toy.lam | more)


# Steps written out: (w, momentum or moments, number of the step, g, lam) -> (w, the next)
Written = Callable[[Tensor, Any, int, Tensor, Tree], tuple[Tensor, Any]]


UNUSED: dict[str, Any] = {"materialize_grads": True, "allow_unused": True}


def by_autograd(toy: Toy, steps: int, written: Written) -> Tree:
    """d outer / d lam by reverse mode through so many steps, in one graph."""
    lam = {n: x.clone().requires_grad_() for n, x in toy.lam.items()}
    w: Tree = {n: x.clone().requires_grad_() for n, x in toy.w.items()}
    memory: dict[str, Any] = dict.fromkeys(w)
    for t in range(steps):
        loss = toy.problem.inner_loss(w, lam, toy.train)
        gradient = torch.autograd.grad(loss, list(w.values()), create_graph=True, **UNUSED)
        for (name, x), g in zip(list(w.items()), gradient, strict=True):
            w[name], memory[name] = written(x, memory[name], t, g, lam)
    outer = toy.problem.outer_loss(w, lam, toy.val)
    found = torch.autograd.grad(outer, list(lam.values()), **UNUSED)
    return dict(zip(lam, found, strict=True))


def sgd(w: Tensor, velocity: Any, t: int, g: Tensor, lam: Tree) -> tuple[Tensor, Any]:
    velocity = 0.8 * (0.0 if velocity is None else velocity) + g + 0.2 * w
    return w - 0.1 * velocity, velocity


def nesterov(w: Tensor, velocity: Any, t: int, g: Tensor, lam: Tree) -> tuple[Tensor, Any]:
    velocity = 0.8 * (0.0 if velocity is None else velocity) + g
    return w - 0.1 * (g + 0.8 * velocity), velocity


def adam(w: Tensor, moments: Any, t: int, g: Tensor, lam: Tree) -> tuple[Tensor, Any]:
    m, s = (torch.zeros_like(w), torch.zeros_like(w)) if moments is None else moments
    m, s = 0.9 * m + 0.1 * g, 0.99 * s + 0.01 * g**2
    return w - 0.1 * (m / (1 - 0.9 ** (t + 1))) / ((s / (1 - 0.99 ** (t + 1))) ** 0.5 + 1e-3), (m, s)


def adamw(w: Tensor, moments: Any, t: int, g: Tensor, lam: Tree) -> tuple[Tensor, Any]:
    return adam(w * (1 - 0.1 * 0.3), moments, t, g, lam)


WRITTEN: dict[str, tuple[UpdateRule, Written]] = {
    "sgd": (SGD(0.1), lambda w, memory, t, g, lam: (w - 0.1 * g, None)),
    "momentum_decay": (SGD(0.1, 0.2, momentum=0.8), sgd),
    "nesterov": (SGD(0.1, momentum=0.8, nesterov=True), nesterov),
    "adam": (Adam(0.1, betas=(0.9, 0.99), eps=1e-3), adam),
    "adamw": (AdamW(0.1, 0.3, betas=(0.9, 0.99), eps=1e-3), adamw),
}


# FMD -----------------------------------------------------------------------------------------------------------------


def test_golden_table() -> None:
    """Section 7.3, row RMD = FMD."""
    found = episode(golden(), 8).grads["lam"]
    expected = torch.tensor([-0.0380749748, 0.0208149496], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_closed_form_on_the_quadratic() -> None:
    """([I - (I - eta A)^T] C)' g_V(theta_T) + the direct term."""
    q, toy = Quadratic.make(), quadratic(torch.float64)
    _, g_val = q.unrolled(toy.w["th"], toy.lam["lam"], 0.1, 20)
    eye = torch.eye(6, dtype=torch.float64)
    jacobian = (eye - torch.linalg.matrix_power(eye - 0.1 * q.A, 20)) @ q.C
    expected = {"lam": jacobian.T @ g_val + q.direct(toy.lam["lam"])}
    assert relative_error(episode(toy, 20).grads, expected) < 1e-12


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("make", [quadratic, lambda dtype, update: golden(dtype, update)], ids=["quadratic", "golden"])
def test_it_is_autograd_through_the_whole_episode(name: str, make: Callable[..., Toy]) -> None:
    rule, written = WRITTEN[name]
    toy = make(torch.float64, update=rule)
    assert relative_error(episode(toy, 8).grads, by_autograd(toy, 8, written)) < 1e-12


def test_a_network_behind_a_stop_gradient() -> None:
    """Curved in w and lam; the stop-gradient input is a constant of every step, for autograd and forward mode."""
    rule, written = WRITTEN["adam"]
    toy = with_lam(network(torch.float64), rule)
    assert relative_error(episode(toy, 4).grads, by_autograd(toy, 4, written)) < 1e-11


def test_a_clipped_step() -> None:
    """The factor of an active clip depends on the whole gradient, and moves with it."""
    toy = golden(update=SGD(0.1, max_grad_norm=0.05))

    def clipped(w: Tensor, memory: Any, t: int, g: Tensor, lam: Tree) -> tuple[Tensor, Any]:
        norm = (g**2).sum() ** 0.5
        assert float(norm.detach()) > 0.05
        return w - 0.1 * g * 0.05 / (norm + 1e-6), None

    assert relative_error(episode(toy, 6).grads, by_autograd(toy, 6, clipped)) < 1e-12


def rows_toy(update: UpdateRule) -> Toy:
    """Logistic regression on noisy rows with a quartic penalty, sums over rows, so that a batch may come in parts."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(40, generator=generator, dtype=torch.float64)
    y = (x @ torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64) + noise > 0).double()

    def inner(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        fit = F.binary_cross_entropy_with_logits(batch[0] @ w["th"], batch[1], reduction="sum") / 8
        return fit + len(batch[0]) / 8 * 0.01 * w["th"].pow(4).sum()

    def outer(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(batch[0] @ w["th"], batch[1])

    w = {"th": torch.tensor([0.9, -1.2, 0.7], dtype=torch.float64)}
    return Toy(BilevelProblem(inner, outer, update), w, {}, (x[:8], y[:8]), (x[8:], y[8:]), direct=False)


NUMBERS: dict[str, Any] = {"lr": [0.3, 0.2, 0.1], "mom": 0.6, "wd": 0.05}
STEPS = 10
WINDOW = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]  # floor(3 t / 10)


def fds_toy(**limits: float) -> Toy:
    rule = SGD(Windowed("lr", STEPS), "wd", momentum="mom", **limits)  # type: ignore[arg-type]
    return with_lam(rows_toy(rule), rule, **NUMBERS)


def test_the_parts_of_a_batch_add_up() -> None:
    toy = fds_toy()
    x, y = toy.train
    parted = replace(
        toy, train=[(x[:5], y[:5]), (x[5:], y[5:])], val=[toy.val], problem=replace(toy.problem, parts=lambda b: b)
    )
    whole, found = episode(toy, STEPS), episode(parted, STEPS)
    assert relative_error(found.grads, whole.grads) < 1e-12
    assert found.counts.jvps == 2 * whole.counts.jvps


def test_it_may_answer_at_any_step_made_or_to_come() -> None:
    """Online: after each step the hypergradient of all steps so far; looking ahead, that and of the one to come."""
    toy, estimator = fds_toy(), ForwardMode(windows=3)
    w, update_state = toy.w, toy.problem.update.init(toy.w)
    state = estimator.init(toy.problem, w, toy.lam)
    for t in range(5):
        expected = episode(toy, t + 1).grads
        common = (toy.problem, estimator, w, toy.lam, toy.train, toy.val)
        assert relative_error(hypergradient(*common, state=state, update_state=update_state).grads, expected) < 1e-12

        passes = PassContext(toy.problem)
        step = look_ahead(passes, InnerStep(w, toy.lam, toy.train, update_state))
        assert step.made is not None
        kept = {key: tree.clone(columns) for key, columns in state.items()}
        after = estimator.observe(passes, step, state)
        torch.testing.assert_close(state, kept, rtol=0, atol=0)  # functional
        state = after
        found = hypergradient(*common, state=state, update_state=update_state, made=step.made)
        assert relative_error(found.grads, expected) < 1e-12
        assert found.diagnostics["tangent_norm"] == tree.norm(state["w"]) > 0
        w, update_state = step.made.w, step.made.update_state
    assert estimator.end_episode(passes, step, state) is None  # the columns are not kept for the next episode


def test_a_state_that_was_saved_goes_on_as_before(tmp_path: Path) -> None:
    toy, estimator = fds_toy(), ForwardMode()
    passes = PassContext(toy.problem)
    step = look_ahead(passes, InnerStep(toy.w, toy.lam, toy.train))
    state = estimator.observe(passes, step, estimator.init(toy.problem, toy.w, toy.lam))
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert step.made is not None
    further = look_ahead(passes, InnerStep(step.made.w, toy.lam, toy.train, step.made.update_state))
    found, expected = (estimator.observe(passes, further, one) for one in (again, state))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert {key: {n: x.shape for n, x in columns.items()} for key, columns in found.items()} == {
        "w": {"th": (5, 3)}, "momentum_buffer": {"th": (5, 3)}
    }  # fmt: skip


def test_state_tensors_that_the_rule_does_not_use_are_left_alone() -> None:
    """torch's SGD without momentum, read off, comes with buffers of zeros."""
    toy = golden()
    before = {"step": 0, "momentum_buffer": tree.zeros_like(toy.w)}
    args = toy.problem, ForwardMode(), toy.w, toy.lam, toy.train, toy.val
    assert relative_error(hypergradient(*args, update_state=before).grads, hypergradient(*args).grads) == 0.0


def test_a_transformer_on_the_default_attention() -> None:
    """sdpa has neither a second derivative nor forward mode on most kernels; the oracle runs on eager attention."""

    def two_numbers(attention: str) -> Toy:
        toy = tagger(attention)
        inner, meta, rule = toy.problem.inner_loss, toy.lam, SGD("lr", momentum=0.8)

        def sized(w: Tree, lam: Tree, batch: Any) -> Tensor:
            return inner(w, tree.tree_map(lambda leaf: lam["size"] * leaf, meta), batch)

        toy = replace(toy, problem=replace(toy.problem, inner_loss=sized), lam={})
        return with_lam(toy, rule, lr=0.05, size=1.5)

    def written(w: Tensor, velocity: Any, t: int, g: Tensor, lam: Tree) -> tuple[Tensor, Any]:
        velocity = g if velocity is None else 0.8 * velocity + g
        return w - lam["lr"] * velocity, velocity

    expected = by_autograd(two_numbers("eager"), 3, written)
    assert relative_error(episode(two_numbers("sdpa"), 3).grads, expected) < 1e-10


# FDS -----------------------------------------------------------------------------------------------------------------


def test_fds_is_autograd_through_the_whole_episode() -> None:
    def written(w: Tensor, velocity: Any, t: int, g: Tensor, lam: Tree) -> tuple[Tensor, Any]:
        velocity = lam["mom"] * (0.0 if velocity is None else velocity) + g + lam["wd"] * w
        return w - lam["lr"][WINDOW[t]] * velocity, velocity

    toy = fds_toy()
    expected = by_autograd(toy, STEPS, written)
    for estimator in (ForwardMode(), ForwardMode(windows=3)):
        found = episode(toy, STEPS, estimator).grads
        for name in NUMBERS:
            assert relative_error({name: found[name]}, {name: expected[name]}) < 1e-11


def recursion(toy: Toy, bound: float = 1e9, limit: float = 1e9) -> tuple[Tree, float]:
    """Section 2.8: C = mom C + H Z + wd Z + e, Z = Z - lr C - [of a learning rate] vel, with FDS's two clamps.

    The columns are the three learning rates, momentum, weight decay. -> (hypergradient, largest entry of H Z)
    """
    lr, mom, wd = (toy.lam[name] for name in NUMBERS)
    theta, velocity = toy.w["th"], torch.zeros(3, dtype=torch.float64)
    Z, C, largest = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64), 0.0

    def loss(th: Tensor) -> Tensor:
        return toy.problem.inner_loss({"th": th}, {}, toy.train)

    for t in range(STEPS):
        i = WINDOW[t]
        g = torch.autograd.functional.jacobian(loss, theta)
        HZ = torch.autograd.functional.hessian(loss, theta) @ Z
        largest = max(largest, float(HZ.abs().max()))
        HZ[g.abs() > limit] = 0.0
        g = g.clamp(-limit, limit)
        e = torch.zeros(3, 5, dtype=torch.float64)
        e[:, 3], e[:, 4] = velocity, theta
        C = mom * C + HZ.clamp(-bound, bound) + wd * Z + e
        velocity = mom * velocity + g + wd * theta
        Z = Z - lr[i] * C
        Z[:, i] -= velocity
        theta = theta - lr[i] * velocity
    end = theta.clone().requires_grad_()
    (g_val,) = torch.autograd.grad(toy.problem.outer_loss({"th": end}, {}, toy.val), end)
    h = g_val @ Z
    return {"lr": h[:3], "mom": h[3], "wd": h[4]}, largest


def test_fds_is_the_recursion_of_its_paper() -> None:
    toy = fds_toy()
    assert relative_error(episode(toy, STEPS, ForwardMode(windows=3)).grads, recursion(toy)[0]) < 1e-11


def test_the_clamps_of_fds() -> None:
    exact, largest = recursion(fds_toy())
    bounds = [0.3 * largest, 0.1 * largest]
    for bound in bounds:
        found = episode(fds_toy(), STEPS, ForwardMode(windows=3, clamp=bound)).grads
        assert relative_error(found, recursion(fds_toy(), bound=bound)[0]) < 1e-11
        assert relative_error(found, exact) > 1e-2
    idle = episode(fds_toy(), STEPS, ForwardMode(windows=3, clamp=2 * largest)).grads
    assert relative_error(idle, exact) < 1e-11

    limited = fds_toy(max_grad_value=0.2)
    expected, _ = recursion(limited, bound=bounds[0], limit=0.2)
    assert relative_error(expected, recursion(fds_toy(), bound=bounds[0])[0]) > 1e-2
    found = episode(limited, STEPS, ForwardMode(windows=3, clamp=bounds[0])).grads
    assert relative_error(found, expected) < 1e-11


def test_a_clamp_gives_up_the_derivative() -> None:
    assert (ForwardMode().exact, ForwardMode(clamp=1.0).exact) == ("always", "never")


def test_the_gradient_of_a_window_is_the_sum_over_its_steps() -> None:
    shared = episode(fds_toy(), STEPS, ForwardMode(windows=3)).grads
    lr = [NUMBERS["lr"][window] for window in WINDOW]
    rule = SGD(Windowed("lr", STEPS), "wd", momentum="mom")
    apart = episode(with_lam(rows_toy(rule), rule, **NUMBERS | {"lr": lr}), STEPS, ForwardMode(windows=STEPS)).grads
    summed = torch.zeros(3, dtype=torch.float64).index_add(0, torch.tensor(WINDOW), apart["lr"])
    assert relative_error(shared, apart | {"lr": summed}) < 1e-12


def test_windows_to_come_cost_nothing() -> None:
    whole, skipping = episode(fds_toy(), STEPS), episode(fds_toy(), STEPS, ForwardMode(windows=3))
    assert all(torch.equal(skipping.grads[n], whole.grads[n]) for n in NUMBERS)
    schedule = 4 * 1 + 3 * 2 + 3 * 3
    assert whole.counts == Counts(forwards=1, backwards=1, jvps=5 * STEPS)
    assert skipping.counts.jvps == schedule + 2 * STEPS


def test_schedules_of_momentum_and_decay() -> None:
    """Every family in windows: the numbers above, repeated, add up to the gradient of the shared one."""
    one = episode(fds_toy(), STEPS).grads
    rule = SGD(Windowed("lr", STEPS), Windowed("wd", STEPS), momentum=Windowed("mom", STEPS))
    numbers = NUMBERS | {"mom": [NUMBERS["mom"]] * 3, "wd": [NUMBERS["wd"]] * 3}
    result = episode(with_lam(rows_toy(rule), rule, **numbers), STEPS, ForwardMode(windows=3))
    assert relative_error({n: x.sum() for n, x in result.grads.items()}, {n: x.sum() for n, x in one.items()}) < 1e-12
    assert result.counts.jvps == 3 * (4 * 1 + 3 * 2 + 3 * 3)


@pytest.mark.parametrize(("eps", "sharing"), [(0.0, 40), (0.08, 40), (0.08, 1)])
def test_the_theorem_on_sharing(eps: float, sharing: int) -> None:
    """The mean squared error of a shared hypergradient: sigma^2 / W, plus eps^2 (W^2 - 1) / 12 where it drifts.

    The inner loss is <g_t, w>, g_t = eps t + noise: the hypergradient of the rate of step t is then -g_t, in each of
    10,000 independent coordinates. Shared over W steps and divided by W, it is compared with the true -eps t.
    """
    sigma, seeds, steps = 0.25, 10_000, max(sharing, 4)
    generator = torch.Generator().manual_seed(5)
    noise = sigma * torch.randn(steps, seeds, generator=generator, dtype=torch.float64)
    true = eps * torch.arange(steps, dtype=torch.float64)
    rule, estimator = SGD(Windowed("lr", steps)), ForwardMode(windows=steps // sharing)
    problem = BilevelProblem(lambda w, lam, g: (w["th"] * g).sum(), lambda w, lam, _: w["th"].sum(), rule)
    w, lam = {"th": torch.ones(seeds).double()}, {"lr": torch.full((steps // sharing,), 0.1).double()}
    passes, state, before = PassContext(problem), estimator.init(problem, w, lam), rule.init(w)
    for t in range(steps):
        step = look_ahead(passes, InnerStep(w, lam, true[t] + noise[t], before))
        assert step.made is not None
        state = estimator.observe(passes, step, state)
        w, before = step.made.w, step.made.update_state
    shared = -state["w"]["th"] / sharing  # (windows, seeds)
    error = (shared.repeat_interleave(sharing, 0) - true[:, None]).square().mean()
    expected = sigma**2 / sharing + eps**2 * (sharing**2 - 1) / 12
    assert float(error) == pytest.approx(expected, rel=0.05)  # 10,000 draws: a deviation of 1.4 %


def test_schedules_of_adamw() -> None:
    """Rate and decoupled decay, of unequal numbers of windows, through both moments."""
    rule = AdamW(Windowed("lr", STEPS), Windowed("wd", STEPS), betas=(0.9, 0.99), eps=1e-3)
    toy = with_lam(rows_toy(rule), rule, lr=NUMBERS["lr"], wd=[0.2, 0.1])

    def written(w: Tensor, moments: Any, t: int, g: Tensor, lam: Tree) -> tuple[Tensor, Any]:
        rate, decay = lam["lr"][WINDOW[t]], lam["wd"][t // 5]
        m, s = (0.0, 0.0) if moments is None else moments
        m, s = 0.9 * m + 0.1 * g, 0.99 * s + 0.01 * g**2
        step = (m / (1 - 0.9 ** (t + 1))) / ((s / (1 - 0.99 ** (t + 1))) ** 0.5 + 1e-3)
        return w * (1 - rate * decay) - rate * step, (m, s)

    expected = by_autograd(toy, STEPS, written)
    found = episode(toy, STEPS, ForwardMode(windows={"lr": 3, "wd": 2}))
    for name in ("lr", "wd"):
        assert relative_error({name: found.grads[name]}, {name: expected[name]}) < 1e-11
    assert found.counts.jvps == 4 * 1 + 3 * 2 + 3 * 3 + 5 * 1 + 5 * 2


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(toy: Toy, estimator: ForwardMode, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        episode(toy, 2, estimator)
    assert "\n" not in str(error.value)


def test_a_lam_of_the_size_of_a_network_is_refused() -> None:
    said = "ForwardMode is meant for at most 64 meta parameters, here are 208: use unroll, hyperdistill or one_step"
    refused(tagger(), ForwardMode(), said)


@pytest.mark.parametrize("windows", [3, {"lr": 3}, {"lr": 2, "wd": 1}])
@pytest.mark.parametrize("rule", [SGD("lr"), SGD(Windowed("lr", 4))], ids=["no_schedule", "another_size"])
def test_fds_needs_a_schedule_of_its_windows(rule: UpdateRule, windows: Any) -> None:
    lr: Any = [0.1, 0.2] if rule.windowed else 0.1
    said = r"\{'lr': 2\}" if rule.windowed else "none"
    refused(with_lam(rows_toy(rule), rule, lr=lr), ForwardMode(windows=windows), f"reads {said}: change windows")


def test_losses_that_can_be_differentiated_once_are_refused() -> None:
    refused(golden().once(), ForwardMode(), "differentiates the inner loss twice")


# From nothing to a schedule ------------------------------------------------------------------------------------------


def test_sign_halving_learns_a_schedule_from_zero() -> None:
    """Ten outer steps of FDS: three learning rates, momentum and weight decay, all from 0, the run restarted each."""
    rule = SGD(Windowed("lr", 12), "wd", momentum="mom", max_grad_value=3.0)
    toy = with_lam(rows_toy(rule), rule, lr=[0.0, 0.0, 0.0], mom=0.0, wd=0.0)
    lam = {name: torch.nn.Parameter(value) for name, value in toy.lam.items()}
    optimizer = SignHalving([{"params": [lam["lr"], lam["mom"]]}, {"params": [lam["wd"]], "lr": 4e-4}], lr=0.1)
    losses = []
    for outer_step in range(10):
        result = episode(replace(toy, lam=dict(lam)), 12, ForwardMode(windows=3, clamp=1.0))
        losses.append(float(result.outer_loss))
        for name, p in lam.items():
            p.grad = result.grads[name]
        optimizer.step()
        if outer_step == 0:  # nothing moves yet, so the other two have no effect
            assert {n: p.tolist() for n, p in lam.items()} == {"lr": [0.1, 0.1, 0.1], "mom": 0.0, "wd": 0.0}
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    assert all((p > 0).all() for p in lam.values())
    assert not optimizer.converged
