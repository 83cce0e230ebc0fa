"""The value test: what is out of the graph and moves with the weights is replayed, or refused with its line."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metaxl_evo.bilevel import SGD, BilevelProblem, PassContext, Tree, gate, hypergradient, run_episode, stop_gradient
from metaxl_evo.bilevel.products import NoDerivative
from metaxl_evo.bilevel.replay import IDLE, Facts
from metaxl_evo.bilevel.value_test import differs
from metaxl_evo.estimators import Estimator, EvoGrad, Greedy, Neumann, OneStep, Sama, make_estimator
from tests.estimators.problems import relative_error

Severed = Callable[[Tensor], Tensor]
RATE = 0.1


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, LABELS = draw(20, 6, seed=1), torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(2))
BATCH = {"x": X[:12], "y": LABELS[:12]}
JUDGE = {"x": X[12:], "y": LABELS[12:]}
W = {"a": 0.6 * draw(6, 8, seed=3), "b": 0.6 * draw(8, 3, seed=4)}
LAM = {"hidden": draw(1, 5, seed=5), "out": 0.5 * draw(5, seed=6)}


def costs(w: Tree, batch: Any) -> Tensor:
    return F.cross_entropy(torch.tanh(batch["x"] @ w["a"]) @ w["b"], batch["y"], reduction="none")


def weights(lam: Tree, of: Tensor) -> Tensor:
    return torch.sigmoid(torch.tanh(of.unsqueeze(1) @ lam["hidden"]) @ lam["out"])


def weight_net(severed: Severed, **options: Any) -> BilevelProblem:
    """Meta-Weight-Net: each example's loss times a weight that is read off the loss itself."""

    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        losses = costs(w, batch)
        return (weights(lam, severed(losses)) * losses).mean()

    return BilevelProblem(inner, lambda w, lam, batch: costs(w, batch).mean(), SGD(RATE), **options)


def through_the_step(live: bool = False, rate: float = RATE) -> Tree:
    """Float64 autograd through the step, written here."""
    w = {name: leaf.clone().requires_grad_() for name, leaf in W.items()}
    lam = {name: leaf.clone().requires_grad_() for name, leaf in LAM.items()}
    losses = costs(w, BATCH)
    loss = (weights(lam, losses if live else losses.detach()) * losses).mean()
    slopes = torch.autograd.grad(loss, list(w.values()), create_graph=True)
    after = {name: leaf - rate * slope for (name, leaf), slope in zip(w.items(), slopes, strict=True)}
    return dict(zip(lam, torch.autograd.grad(costs(after, JUDGE).mean(), list(lam.values())), strict=True))


def estimate(problem: BilevelProblem, estimator: Estimator, **options: Any) -> Tree:
    return hypergradient(problem, estimator, W, LAM, BATCH, JUDGE, **options).grads


def no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 1


def inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = x * 1
    return y.clone()


def straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(4 * x) / 4 - x).detach()


REPLAYED: dict[str, Severed] = {
    "detach": lambda x: x.detach(),
    "torch.detach": lambda x: torch.detach(x),
    "numpy of a detach": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "stop_gradient": stop_gradient,
    "stop_gradient with a key": lambda x: stop_gradient(x, key="costs"),
}
REFUSED: dict[str, Severed] = {
    ".data": lambda x: x.data,
    "detach_": lambda x: x.clone().detach_(),
    "no_grad": no_grad,
    "inference_mode": inference_mode,
    ".tolist()": lambda x: torch.tensor(x.tolist(), dtype=x.dtype),
    ".item()": lambda x: torch.stack([torch.tensor(one.item(), dtype=x.dtype) for one in x]),
    "float()": lambda x: torch.tensor([float(one) for one in x], dtype=x.dtype),
}
PERTURBING: dict[str, Estimator] = {
    "finite_difference": OneStep("finite_difference"),
    "evograd": EvoGrad(),
    "evograd of a part": EvoGrad(parameters="a"),
    "sama": Sama(),
    "greedy": Greedy("finite_difference"),
    "neumann": Neumann("finite_difference"),
}
OTHERS = [name for name in PERTURBING if name != "finite_difference"]


@pytest.mark.parametrize("kind", REPLAYED)
def test_finite_differences_are_float64_autograd(kind: str) -> None:
    found = estimate(weight_net(REPLAYED[kind]), OneStep("finite_difference", radius=1e-3))
    assert relative_error(found, through_the_step()) < 1e-6
    assert relative_error(found, through_the_step(live=True)) > 0.1


def test_evograd_is_float64_autograd_in_expectation() -> None:
    """To first order its copies make an SGD step of size sigma^2 / temperature."""
    estimator = EvoGrad(copies=1024, sigma=1e-2, temperature=0.05, noise="gaussian", antithetic=True)
    expected, problem = through_the_step(rate=1e-4 / 0.05), weight_net(REPLAYED["detach"])

    def by(problem: BilevelProblem) -> Tree:
        return estimate(problem, estimator, generator=torch.Generator().manual_seed(0))

    assert relative_error(by(problem), expected) < 0.2
    live = replace(problem, stop_gradients=False, straight_through=True)
    assert relative_error(by(live), expected) > 0.3


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, "finite_difference") for kind in REFUSED] + [(".data", name) for name in OTHERS]
)
def test_what_cannot_be_replayed_is_refused_with_its_line(kind: str, name: str) -> None:
    severed = REFUSED[kind]
    what = "no_grad" if kind == "inference_mode" else kind
    with pytest.raises(
        ValueError, match=rf"test_gate\.py:\d+ \({re.escape(what)}\) .*stop_gradient.*double_backward"
    ) as error:
        estimate(weight_net(severed), PERTURBING[name])
    assert "\n" not in str(error.value)
    first = severed.__code__.co_firstlineno
    assert first <= int(str(error.value).split(".py:")[1].split()[0]) <= first + 4


@pytest.mark.parametrize("kind", [*REPLAYED, *REFUSED])
def test_exact_engines_are_right_or_say_that_they_are_not(kind: str) -> None:
    """torch.func.jvp carries tangents through no_grad and .data: `auto` takes double backward there."""
    problem, expected = weight_net((REPLAYED | REFUSED)[kind]), through_the_step()
    for engine in ("double_backward", "auto"):
        assert relative_error(estimate(problem, make_estimator("one_step", engine=engine)), expected) < 1e-6
    refused = kind in (".data", "detach_", "no_grad", "numpy of a detach")
    try:
        found = estimate(problem, OneStep("jvp"))
    except NoDerivative as said:
        lists = kind == ".tolist()" and "storage" in str(said)  # torch 2.8 makes none of a tensor with a tangent
        assert refused or lists, said  # noqa: PT017
        assert "use engine double_backward" in str(said)  # noqa: PT017
    else:
        assert not refused
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("kind", ["no_grad", ".data"])
def test_forward_mode_says_that_tangents_go_through(kind: str) -> None:
    with pytest.raises(ValueError, match=r"forward_mode cannot .*disagree.*: use unroll"):
        run_episode(weight_net(REFUSED[kind]), make_estimator("forward_mode"), W, LAM, [BATCH] * 2, JUDGE)


def test_a_value_that_the_loss_does_not_read_is_no_fault() -> None:
    seen = []

    def logged(x: Tensor) -> Tensor:
        seen.append(x.mean().item())
        seen.append(float(x.detach().sum()))
        return x

    found = estimate(weight_net(logged), OneStep("finite_difference", radius=1e-3))
    assert relative_error(found, through_the_step(live=True)) < 1e-6
    assert seen


def test_the_blame_falls_on_the_value_that_is_read() -> None:
    def logged(x: Tensor) -> Tensor:
        x.mean().item()
        return no_grad(x)

    with pytest.raises(ValueError, match=r"\(no_grad\)"):
        estimate(weight_net(logged), EvoGrad())


def test_the_replay_of_detaches_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    problem = weight_net(REPLAYED["detach"])
    with caplog.at_level(logging.INFO, logger="metaxl_evo"):
        for _ in range(2):
            estimate(problem, EvoGrad())
    assert len(caplog.messages) == 1
    assert "test_gate.py:" in caplog.messages[0]


def test_a_straight_through_estimator_is_replayed_or_allowed_by_name() -> None:
    problem = weight_net(straight_through)
    exact = estimate(problem, OneStep("double_backward"))
    assert relative_error(estimate(problem, OneStep("finite_difference", radius=1e-4)), exact) < 1e-5
    problem = weight_net(no_grad, straight_through=True)
    assert relative_error(estimate(problem, OneStep("finite_difference", radius=1e-4)), through_the_step(True)) > 1e-2


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_backward_that_is_no_derivative_is_refused() -> None:
    with pytest.raises(ValueError, match="straight_through = True"):
        estimate(weight_net(Sign.apply), EvoGrad())


def test_a_flag_that_contradicts_the_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="stop_gradients = False says that it does not"):
        estimate(weight_net(stop_gradient, stop_gradients=False), OneStep("finite_difference"))


@pytest.mark.parametrize("name", PERTURBING)
def test_the_flag_changes_nothing(name: str) -> None:
    plain, flagged = (
        estimate(weight_net(stop_gradient, stop_gradients=flag), PERTURBING[name]) for flag in (None, True)
    )
    assert all(torch.equal(plain[key], flagged[key]) for key in LAM)


def test_rows_that_call_stop_gradient_later_are_recorded() -> None:
    """A first batch without a source row says nothing about the others."""

    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        losses = costs(w, batch)
        read = stop_gradient(losses) if "source" in batch else losses.new_ones(len(losses))
        return (weights(lam, read) * losses).mean()

    problem = BilevelProblem(inner, lambda w, lam, batch: costs(w, batch).mean(), SGD(RATE))
    for name in ("finite_difference", "evograd"):
        estimate(problem, PERTURBING[name])
    with_source = BATCH | {"source": torch.ones(12)}
    found = hypergradient(problem, OneStep("finite_difference", radius=1e-3), W, LAM, with_source, JUDGE).grads
    assert relative_error(found, through_the_step()) < 1e-6


QUIET: dict[str, Callable[[Tensor, Tree], Tensor]] = {
    "no loss": lambda losses, lam: 0.0 * losses,
    "no lam": lambda losses, lam: losses,
    "other keys": lambda losses, lam: lam["out"].sum() * losses,
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("finite_difference", kind) for kind in QUIET]
    + [("jvp", "no loss"), ("sama", "no lam"), ("evograd", "other keys")],
)
def test_a_part_that_shows_nothing_speaks_for_no_other(name: str, kind: str) -> None:
    """One without a labelled token, without a row that reads lam, of another source."""

    def inner(w: Tree, lam: Tree, part: Any) -> Tensor:
        losses = costs(w, part)
        weighted = bool(part["noisy"].any()) if "noisy" in part else True
        return (weights(lam, losses.data) * losses if weighted else QUIET[kind](losses, lam)).mean()

    problem = BilevelProblem(
        inner, lambda w, lam, part: costs(w, part).mean(), SGD(RATE), parts=lambda batch: batch
    )  # a batch is a list of parts
    quiet, loud = BATCH | {"noisy": torch.zeros(12)}, BATCH | {"noisy": torch.ones(12)}
    loud = BATCH if kind == "other keys" else loud
    estimator = {**PERTURBING, "jvp": OneStep("jvp")}[name]
    for windows in ([[quiet, loud]], [[quiet], [quiet], [loud]]):
        problem = replace(problem, facts=Facts(problem.facts.loss))
        for window in windows[:-1]:
            hypergradient(problem, estimator, W, LAM, window, [JUDGE])
        with pytest.raises(ValueError, match="disagree" if name == "jvp" else r"\.data"):
            hypergradient(problem, estimator, W, LAM, windows[-1], [JUDGE])


def test_what_never_shows_anything_is_tested_a_few_times_only() -> None:
    calls: list[int] = []

    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        calls.append(1)
        return costs(w, batch).mean() + 0.0 * lam["out"].sum()

    problem = BilevelProblem(inner, lambda w, lam, batch: costs(w, batch).mean(), SGD(RATE))
    for _ in range(IDLE):
        gate.record(PassContext(problem), W, LAM, BATCH)
    tested = len(calls)
    gate.record(PassContext(problem), W, LAM, BATCH)
    assert len(calls) == tested


def test_a_last_layer_of_zeros_hides_nothing() -> None:
    """lam is moved before the test: at zero the network's output does not move with what it reads."""

    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        hidden = torch.tanh(batch["x"] @ w["a"])
        with torch.no_grad():
            read = torch.tanh(batch["x"] @ w["a"])
        return F.cross_entropy((hidden + read * lam["scale"]) @ w["b"], batch["y"])

    problem = BilevelProblem(inner, lambda w, lam, batch: costs(w, batch).mean(), SGD(RATE))
    lam = {"scale": torch.zeros(8, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"\(no_grad\)"):
        hypergradient(problem, EvoGrad(), W, lam, BATCH, JUDGE)


# Activation checkpointing --------------------------------------------------------------------------------------------


def recomputed(severed: Callable[[Tensor, str], Tensor], on: bool = True) -> BilevelProblem:
    """Two layers with a meta network each, which the backward computes again."""

    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        def layer(h: Tensor, name: str) -> Tensor:
            h = torch.tanh(h @ w[name])
            return h + torch.tanh(severed(h, name) @ lam[name])

        h = batch["x"]
        for name in ("first", "second"):
            h = checkpoint(layer, h, name, use_reentrant=False) if on else layer(h, name)
        return F.cross_entropy(h @ w["head"], batch["y"])

    def outer(w: Tree, lam: Tree, batch: Any) -> Tensor:
        h = torch.tanh(torch.tanh(batch["x"] @ w["first"]) @ w["second"])
        return F.cross_entropy(h @ w["head"], batch["y"])

    return BilevelProblem(inner, outer, SGD(RATE), second_order=not on)


LAYERS = {"first": 0.5 * draw(6, 6, seed=7), "second": 0.5 * draw(6, 6, seed=8), "head": draw(6, 3, seed=9)}
NETS = {"first": 0.3 * draw(6, 6, seed=10), "second": 0.3 * draw(6, 6, seed=11)}


@pytest.mark.parametrize("name", ["finite_difference", "auto", "evograd"])
def test_a_detach_that_is_computed_again_is_refused(name: str) -> None:
    estimator = OneStep() if name == "auto" else PERTURBING[name]
    problem = recomputed(lambda h, name: h.detach())
    with pytest.raises(ValueError, match=r"test_gate\.py:\d+ \(detach\) .*stop_gradient\(x, key=\.\.\.\)"):
        hypergradient(problem, estimator, LAYERS, NETS, BATCH, JUDGE)


def test_without_a_key_it_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="with a key where activation checkpointing repeats them"):
        hypergradient(recomputed(lambda h, name: stop_gradient(h)), EvoGrad(), LAYERS, NETS, BATCH, JUDGE)


def test_what_is_kept_from_lam_is_no_fault() -> None:
    """Nor is it where something else is replayed."""

    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        losses = costs(w, batch)
        size = float(lam["out"].detach().norm())
        return (weights(lam, stop_gradient(losses)) * losses).mean() * size

    problem = replace(weight_net(stop_gradient), inner_loss=inner)
    exact = estimate(problem, OneStep("double_backward"))
    assert relative_error(estimate(problem, OneStep("finite_difference", radius=1e-3)), exact) < 1e-6


def test_with_a_key_it_is_right() -> None:
    exact = hypergradient(
        recomputed(lambda h, name: h.detach(), on=False), OneStep("double_backward"), LAYERS, NETS, BATCH, JUDGE
    ).grads
    problem = recomputed(lambda h, name: stop_gradient(h, key=name))
    for estimator in (OneStep(radius=1e-3), OneStep("finite_difference", radius=1e-3)):
        assert relative_error(hypergradient(problem, estimator, LAYERS, NETS, BATCH, JUDGE).grads, exact) < 1e-6


# No false alarms -----------------------------------------------------------------------------------------------------


class Norm32(nn.Module):
    """Computes in float32 whatever it is given, as transformers' RMSNorm does."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.Sequential(nn.Linear(6, 500), nn.ReLU(), nn.Linear(500, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 3)),
    "float32 inside": lambda: nn.Sequential(nn.Linear(6, 8), Norm32(), nn.GELU(), Norm32(), nn.Linear(8, 3)),
    "dead": lambda: nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(-1e-3, 1e-3), nn.Linear(8, 3)),
    "steep": lambda: nn.Sequential(nn.Linear(6, 8), nn.Softplus(50.0), nn.LayerNorm(8), nn.Linear(8, 3)),
    "hard gumbel": lambda: nn.Sequential(nn.Linear(6, 8), Gumbel(), nn.Linear(8, 3)),
}


class Gumbel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gumbel_softmax(x, hard=True)


@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, 0), (torch.float32, 1), (torch.float64, 2)])
@pytest.mark.parametrize("name", NETWORKS)
def test_clean_losses_pass(name: str, dtype: torch.dtype, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name]().to(dtype)
    x = BATCH["x"].to(dtype)  # a constant that the loss brings along: float64 may be beyond it

    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        losses = F.cross_entropy(torch.func.functional_call(network, w, x), BATCH["y"], reduction="none")
        return (torch.sigmoid(lam["logit"]) * losses).mean()

    problem = BilevelProblem(inner, inner, SGD(RATE))
    w, lam = {n: p.detach() for n, p in network.named_parameters()}, {"logit": torch.zeros(12, dtype=dtype)}
    hypergradient(problem, EvoGrad(), w, lam, None, None)
    assert problem.facts.trusted.covers(type(None), frozenset(w))
    assert problem.facts.replay_detach is (name == "hard gumbel")


def test_the_test_leaves_the_world_as_it_was_and_runs_once() -> None:
    calls: list[int] = []
    problem = weight_net(lambda x: calls.append(1) or x.detach())  # type: ignore[func-returns-value]
    before = torch.get_rng_state(), {name: leaf.clone() for name, leaf in (W | LAM).items()}
    passes = PassContext(problem)
    gate.record(passes, W, LAM, BATCH)
    once = len(calls)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(leaf, before[1][name]) for name, leaf in (W | LAM).items())
    assert passes.counts.forwards == 1  # that of the recorded inputs
    gate.record(PassContext(problem), W, LAM, BATCH)
    assert len(calls) == once + 1


def test_another_loss_is_another_matter() -> None:
    problem = weight_net(stop_gradient)
    estimate(problem, EvoGrad())
    assert problem.facts.trusted.names
    with pytest.raises(ValueError, match="no_grad"):
        estimate(replace(problem, inner_loss=weight_net(no_grad).inner_loss), EvoGrad())


# Random numbers of the loss's own ------------------------------------------------------------------------------------


def noisy(draw: Callable[[], float]) -> BilevelProblem:
    return weight_net(lambda x: stop_gradient(x) * (1 + 0.1 * draw()))


@pytest.mark.parametrize("name", ["finite_difference", "evograd"])
def test_numpy_and_python_are_seeded_and_restored(name: str) -> None:
    for draw, state in ((np.random.rand, lambda: np.random.get_state()[1].tolist()), (random.random, random.getstate)):  # noqa: NPY002
        before = state()
        first, second = (estimate(noisy(draw), PERTURBING[name]) for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in LAM)
        assert state() == before


def test_a_generator_of_its_own_is_refused_where_passes_are_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    problem = noisy(lambda: float(torch.rand((), generator=generator)))
    for estimator in PERTURBING.values():
        with pytest.raises(ValueError, match=r"the same pass of the inner loss gave .*: it draws random numbers"):
            estimate(problem, estimator)
    own, seeded = (PassContext(one) for one in (problem, noisy(np.random.rand)))
    assert differs(*(float(own.inner_value(W, LAM, BATCH)) for _ in range(2)))
    assert not differs(*(float(seeded.inner_value(W, LAM, BATCH)) for _ in range(2)))
    assert estimate(problem, OneStep("double_backward"))
