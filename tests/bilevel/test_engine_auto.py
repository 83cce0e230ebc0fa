"""Engine auto: the first engine that differentiates the inner loss, checked against another before it is believed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metaxl_evo.bilevel import SGD, BilevelProblem, PassContext, Tree, hypergradient, run_episode
from metaxl_evo.bilevel.products import hessian_product, mixed_product
from metaxl_evo.estimators import Estimator, OneStep, make_estimator
from tests.estimators.problems import once_differentiable, random_like, relative_error

CASES = 5
RATE = 0.1


class Recurrent(nn.Module):
    """Float32 on a CPU runs by a fused kernel without forward AD."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.cells(x)[0].mean(1))
        return logits


class Encoder(nn.Module):
    """A fused layer in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(5 + 3, 2, 16, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.layer(F.pad(x, (0, 3))).mean(1))
        return logits


class OldStyle(torch.autograd.Function):
    """Without `setup_context`, like BLOOM's GELU: beyond torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].exp()


class Wrong(torch.autograd.Function):
    """x^2 whose jvp is another function's: nothing but a comparison shows it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2 * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * 3 * ctx.saved_tensors[0]


class Layer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(5, 6), nn.Linear(6, 3), function

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b(self.function(self.a(x.mean(1))))
        return logits


def normed() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (normed, "_weight_norm_interface"),
    "lstm": (Recurrent, "mkldnn_rnn_layer"),
    "encoder layer": (Encoder, "_transformer_encoder_layer_fwd"),
    "old-style function": (lambda: Layer(OldStyle.apply), "setup_context"),
    "wrong jvp": (lambda: Layer(Wrong.apply), "disagree"),
}


def test_the_cases_are_all_there() -> None:
    assert len(NETWORKS) == CASES


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[BilevelProblem, Tree, Tree, Any, Any]:
    """Weights of examples, learned through one step; (problem, w, lam, train batch, meta batch)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NETWORKS[name][0]().to(dtype).eval()
        x, y = torch.randn(16, 4, 5).to(dtype), torch.randint(0, 3, (16,))

    def losses(w: Tree, batch: Any) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(network, w, batch[0]), batch[1], reduction="none")

    problem = BilevelProblem(
        lambda w, lam, batch: (torch.sigmoid(lam["logit"][batch[2]]) * losses(w, batch)).mean(),
        lambda w, lam, batch: losses(w, batch).mean(),
        SGD(RATE),
    )
    w = {name: p.detach() for name, p in network.named_parameters()}
    lam = {"logit": torch.linspace(-1, 1, 10, dtype=dtype)}
    return problem, w, lam, (x[:10], y[:10], torch.arange(10)), (x[10:], y[10:], torch.arange(6))


def by_autograd(problem: BilevelProblem, w: Tree, lam: Tree, train: Any, val: Any) -> Tree:
    w, lam = ({n: leaf.clone().requires_grad_() for n, leaf in one.items()} for one in (w, lam))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        slopes = torch.autograd.grad(problem.inner_loss(w, lam, train), list(w.values()), create_graph=True)
        after = {name: leaf - RATE * slope for (name, leaf), slope in zip(w.items(), slopes, strict=True)}
        outer = problem.outer_loss(after, lam, val)
        return dict(zip(lam, torch.autograd.grad(outer, list(lam.values())), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_auto_is_float64_autograd_where_forward_mode_is_missing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    point = made(name)
    exact = by_autograd(*made(name, torch.float64))
    for _ in range(2):
        found = hypergradient(point[0], OneStep(), *point[1:]).grads
        assert relative_error(found, exact) < 1e-5
    assert len(caplog.messages) == 1  # said once
    assert "engine auto takes double_backward here" in caplog.messages[0]
    assert NETWORKS[name][1] in caplog.messages[0]
    assert "\n" not in caplog.messages[0]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("product", [mixed_product, hessian_product])
def test_products_find_their_engine_by_themselves(name: str, product: Any) -> None:
    problem, w, lam, train, _ = made(name)
    v = random_like(w, 5)
    found, expected = (
        product(PassContext(problem), engine, w, lam, train, v) for engine in ("auto", "double_backward")
    )
    assert relative_error(found, expected) < 1e-5


ESTIMATORS: dict[str, dict[str, Any]] = {
    "one_step": {}, "sama": {"engine": "auto"}, "greedy": {}, "neumann": {}, "conjugate_gradient": {"iterations": 3},
    "hyperdistill": {"scale": "one"},
}  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_with_an_engine_takes_it(name: str) -> None:
    problem, w, lam, train, val = made("old-style function")
    auto, named = (
        hypergradient(problem, make_estimator(name, **ESTIMATORS[name] | engine), w, lam, train, val).grads
        for engine in ({"engine": "auto"}, {"engine": "double_backward"})
    )
    assert relative_error(auto, named) < 1e-6


def test_forward_mode_is_taken_where_it_is_right(caplog: pytest.LogCaptureFixture) -> None:
    point = made("lstm", torch.float64)  # other kernels
    assert relative_error(hypergradient(point[0], OneStep(), *point[1:]).grads, by_autograd(*point)) < 1e-10
    assert point[0].facts.engine == "jvp"
    assert not caplog.messages


def test_the_last_resort_are_finite_differences(caplog: pytest.LogCaptureFixture) -> None:
    problem, *point = made("lstm", torch.float64)
    exact = by_autograd(problem, *point)
    once = once_differentiable(problem)
    assert relative_error(hypergradient(once, OneStep(radius=1e-3), *point).grads, exact) < 1e-6
    assert "engine auto takes finite_difference here" in caplog.messages[0]


def test_where_nothing_works_the_first_reason_is_given() -> None:
    problem, w, lam, train, val = made("lstm", torch.float64)

    def severed(w: Tree, lam: Tree, batch: Any) -> Tensor:
        loss: Tensor = problem.inner_loss(w, lam, batch)
        return loss * (1 + loss.data)

    with pytest.raises(ValueError, match=r"\(\.data\) takes .*; no other engine differentiates this loss \(.*jvp"):
        hypergradient(once_differentiable(replace(problem, inner_loss=severed)), OneStep(), w, lam, train, val)


@pytest.mark.parametrize(
    ("estimator", "case", "fix"),
    [
        (make_estimator("forward_mode"), "lstm", "use unroll"),
        (OneStep("jvp"), "lstm", "use engine double_backward, or auto"),
        (OneStep("jvp"), "wrong jvp", "use engine double_backward, or auto"),
        (OneStep("double_backward"), "kernel", "use engine finite_difference, or evograd"),
        (make_estimator("unroll"), "kernel", "use one_step, whose engine auto finds another way, or evograd"),
        (make_estimator("drmad"), "kernel", "use one_step, whose engine auto finds another way, or evograd"),
        (make_estimator("hyperdistill"), "kernel", "set scale to fixed, one or normalize"),
    ],
)
def test_needs_that_are_not_met_are_one_line(estimator: Estimator, case: str, fix: str) -> None:
    problem, w, lam, train, val = made("lstm" if case == "kernel" else case)
    if case == "kernel":
        inner = problem.inner_loss
        problem = replace(problem, inner_loss=lambda *at: flash(inner(*at)))
    with pytest.raises(ValueError, match=f"cannot differentiate this inner loss .*: {fix}$") as error:
        run_episode(problem, estimator, w, lam, [train] * 2, val)
    assert "\n" not in str(error.value)


def flash(loss: Tensor) -> Tensor:
    """Through a kernel without a second derivative, at the same value (a position attends to itself alone)."""
    states = loss.expand(1, 1, 1, 8).contiguous()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(states, states, states).mean()


def test_a_rejected_recomputation_is_no_reason_to_be_wrong() -> None:
    """Forward mode does not go through activation checkpointing; double backward does."""
    problem, *point = made("old-style function", torch.float64)
    inner = problem.inner_loss
    problem = replace(problem, inner_loss=lambda *at: checkpoint(inner, *at, use_reentrant=False))
    assert relative_error(hypergradient(problem, OneStep(), *point).grads, by_autograd(problem, *point)) < 1e-10


def test_out_of_memory_is_no_missing_derivative(caplog: pytest.LogCaptureFixture) -> None:
    problem, *point = made("lstm")

    def exhausted(w: Tree, lam: Tree, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with caplog.at_level(logging.WARNING), pytest.raises(torch.OutOfMemoryError):
        hypergradient(replace(problem, inner_loss=exhausted), OneStep(), *point)
    assert not caplog.messages
