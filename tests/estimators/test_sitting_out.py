"""Parameters without a gradient in a step: a head for each task, whose batches leave the other head out.

The oracle is the very episode in one graph, each parameter stepped by torch.optim's algebra where autograd reaches it,
and left alone, its moments and its count too, where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.bilevel import SGD, Adam, AdamW, BilevelProblem, Tree, hypergradient, run_episode, tree
from metaxl_evo.bilevel.hypergradients import look_ahead
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import InnerStep
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.bilevel.torch_optimizers import from_optimizer
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.bilevel.update_state import own_steps
from metaxl_evo.estimators import DrMAD, Estimator, EvoGrad, ForwardMode, OneStep, Unroll
from tests.processes import on_processes

Batch = tuple[int, Tensor, Tensor]  # which head, x, y
LAM = {"v": torch.tensor([0.3, -0.2], dtype=torch.float64), "eta": torch.tensor(0.05, dtype=torch.float64)}
PATTERNS = ([0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0])


def batch(head: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    return head, x, torch.randn(3, generator=generator, dtype=torch.float64)


def weights() -> Tree:
    generator = torch.Generator().manual_seed(1)
    shapes = {"trunk": (2, 3), "head0": (3,), "head1": (3,), "never": (2,)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def inner(w: Tree, lam: Tree, batch: Batch) -> Tensor:
    head, x, y = batch
    errors = torch.tanh(x @ w["trunk"]) @ w[f"head{head}"] - y
    return (torch.sigmoid(x @ lam["v"]) * errors.square()).mean()


def outer(w: Tree, lam: Tree, batch: Batch) -> Tensor:
    _, x, y = batch
    return (torch.tanh(x @ w["trunk"]) @ (w["head0"] + 0.3 * w["head1"]) - y).square().mean()


@dataclass
class Memory:
    """What one parameter's optimiser keeps."""

    steps: int = 0
    held: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> Memory:
        return Memory(self.steps, tree.detach(self.held))


Step = Callable[[Tensor, Tensor, Memory, Tree], Tensor]  # (w, g, memory, lam) -> w after


def momentum(
    w: Tensor, g: Tensor, memory: Memory, lam: Tree, dampening: float = 0.0, nesterov: bool = False
) -> Tensor:
    g = g + 0.1 * w
    buffer = 0.9 * memory.held["b"] + (1 - dampening) * g if memory.steps else g
    memory.steps, memory.held = memory.steps + 1, {"b": buffer}
    return w - lam["eta"] * (g + 0.9 * buffer if nesterov else buffer)


def moments(w: Tensor, g: Tensor, memory: Memory, lam: Tree) -> Tensor:
    memory.steps, zero = memory.steps + 1, torch.zeros_like(g)
    m = 0.9 * memory.held.get("m", zero) + 0.1 * g
    s = 0.99 * memory.held.get("s", zero) + 0.01 * g**2
    memory.held = {"m": m, "s": s}
    return w - lam["eta"] * (m / (1 - 0.9**memory.steps)) / ((s / (1 - 0.99**memory.steps)) ** 0.5 + 1e-3)


NUMBERS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-3}
RULES: dict[str, tuple[UpdateRule, Step]] = {
    "momentum": (SGD("eta", 0.1, momentum=0.9), momentum),
    "dampened": (
        SGD("eta", 0.1, momentum=0.9, dampening=0.4),
        lambda w, g, memory, lam: momentum(w, g, memory, lam, dampening=0.4),
    ),
    "nesterov": (
        SGD("eta", 0.1, momentum=0.9, nesterov=True),
        lambda w, g, memory, lam: momentum(w, g, memory, lam, nesterov=True),
    ),
    "adam": (Adam("eta", 0.2, **NUMBERS), lambda w, g, memory, lam: moments(w, g + 0.2 * w, memory, lam)),
    "adamw": (
        AdamW("eta", 0.2, **NUMBERS),
        lambda w, g, memory, lam: moments(w * (1 - 0.2 * lam["eta"]), g, memory, lam),
    ),
}
LIMIT = 0.3


def by_autograd(step: Step, batches: Sequence[Batch], limit: float | None, horizon: int | None) -> tuple[Tree, Tree]:
    """The weights at the end, and the hypergradient through the last steps."""
    lam, memories = tree.leaves(LAM, LAM), {name: Memory() for name in weights()}
    w = tree.leaves(weights(), weights())
    for t, one in enumerate(batches):
        if len(batches) - t == horizon:
            w = tree.leaves(w, w)
            memories = {name: memory.detached() for name, memory in memories.items()}
        found = torch.autograd.grad(inner(w, lam, one), list(w.values()), create_graph=True, allow_unused=True)
        grads = {name: g for name, g in zip(w, found, strict=True) if g is not None}
        if limit is not None:
            norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
            grads = {name: g * (limit / (norm + 1e-6)).clamp(max=1.0) for name, g in grads.items()}
        w = w | {name: step(w[name], g, memories[name], lam) for name, g in grads.items()}
    found = torch.autograd.grad(outer(w, lam, batch(0, 9)), list(lam.values()), materialize_grads=True)
    return tree.detach(w), dict(zip(lam, found, strict=True))


EXACT: dict[str, tuple[Estimator, int | None]] = {
    "one_step": (OneStep(), 1),
    "one_step double_backward": (OneStep("double_backward"), 1),
    "unroll": (Unroll(), None),
    "unroll horizon 2": (Unroll(2), 2),
    "forward_mode": (ForwardMode(), None),
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_exact_estimators_are_autograd_through_the_episode(name: str, pattern: list[int]) -> None:
    """Clipped or not, by turns."""
    rule, step = RULES[name]
    limit = LIMIT if (list(RULES).index(name) + PATTERNS.index(pattern)) % 2 else None
    problem = BilevelProblem(inner, outer, replace(rule, max_grad_norm=limit))
    batches = [batch(head, seed) for seed, head in enumerate(pattern)]
    for estimator, horizon in EXACT.values():
        found = run_episode(problem, estimator, weights(), LAM, batches, batch(0, 9))
        w, expected = by_autograd(step, batches, limit, horizon)
        torch.testing.assert_close(found.w, w, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.grads, expected, rtol=1e-9, atol=1e-13)
    assert torch.equal(w["never"], weights()["never"])


def test_drmad_is_unroll_where_it_is_exact() -> None:
    """On a quadratic, whatever sits out; the dampening of a first step as well."""
    diagonal = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def quadratic(w: Tree, lam: Tree, head: int) -> Tensor:
        return (diagonal * (w[f"head{head}"] - lam["v"]).square()).sum()

    problem = BilevelProblem(
        quadratic, lambda w, lam, _: (w["head0"] * w["head1"]).sum(), SGD(0.1, momentum=0.9, dampening=0.4)
    )
    w = {name: torch.tensor([0.4, -0.7], dtype=torch.float64) for name in ("head0", "head1")}
    results = [run_episode(problem, e, w, {"v": LAM["v"]}, [0, 1, 1, 0, 1], None) for e in (Unroll(), DrMAD())]
    torch.testing.assert_close(results[1].grads, results[0].grads, rtol=1e-12, atol=0)


OPTIMIZERS: dict[str, tuple[UpdateRule, Any]] = {
    "momentum": (SGD(0.1, 0.2, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.2)),
    "adam": (Adam(0.1, 0.2), lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.2)),
    "adamw": (AdamW(0.1, 0.2, max_grad_norm=0.5), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_torchs_and_so_are_the_counts_read_off_it(name: str) -> None:
    rule, make = OPTIMIZERS[name]
    w = {n: torch.randn(3, generator=torch.Generator().manual_seed(i)).double() for i, n in enumerate("abc")}
    params = {n: torch.nn.Parameter(leaf.clone()) for n, leaf in w.items()}
    optimizer, state = make(list(params.values())), rule.init(w)
    for step, present in enumerate(["ab", "a", "b", "ab", "abc"]):
        grad = {n: torch.cos((step + 1) * w[n]) for n in present}
        for n, p in params.items():
            p.grad = grad[n].clone() if n in grad else None
        if rule.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), rule.max_grad_norm)
        optimizer.step()
        w, state = rule(w, state, grad, {})
        torch.testing.assert_close(w, {n: p.detach() for n, p in params.items()}, rtol=1e-13, atol=1e-15)
        _, read = from_optimizer(optimizer, {p: n for n, p in params.items()}, steps=step + 1)
        if name != "momentum":  # torch's SGD keeps no counts, and without dampening needs none
            assert [own_steps(read, n) for n in w] == [own_steps(state, n) for n in w]
    assert [own_steps(state, n) for n in w] == [4, 4, 1]
    assert "missed" not in rule(w, rule.init(w), w, {})[1]


def test_dampened_sgd_that_left_a_parameter_out_is_refused() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(params, 0.1, momentum=0.9, dampening=0.1)
    params[0].grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match=r"'b' had no gradient in a step.*dampening=0"):
        from_optimizer(optimizer, dict(zip(params, "ab", strict=True)), steps=1)


def test_a_step_that_was_made_without_some_parameters() -> None:
    """`made` from outside, its gradient without a key; EvoGrad's advice on a head that sat out."""
    rule, step = RULES["adamw"]
    problem, batches = BilevelProblem(inner, outer, rule), [batch(1, 0), batch(0, 1)]
    first = look_ahead(PassContext(problem), InnerStep(weights(), LAM, batches[0]))
    assert first.made is not None
    second = look_ahead(PassContext(problem), InnerStep(first.current, LAM, batches[1], first.made.update_state))
    assert second.made is not None
    assert second.made.grad.keys() == {"trunk", "head0"}
    before = first.made.update_state
    _, expected = by_autograd(step, batches, None, 1)
    found = hypergradient(
        problem, OneStep(), first.current, LAM, batches[1], batch(0, 9), update_state=before, made=second.made
    )
    torch.testing.assert_close(found.grads, expected, rtol=1e-9, atol=1e-13)
    diagnostics = {"effective_copies": 2.0}
    assert EvoGrad(parameters="head1").advise(second.made.grad, diagnostics) is None
    assert diagnostics["noise_scale"] == 0.0


# Several processes ---------------------------------------------------------------------------------------------------

SPREAD = ([0, 1], [0, 0], [1, 1], [0, 1])  # the heads of each step's two parts


def spread_episode(estimator: Estimator) -> Tree:
    """An episode of two parts a step: one process has both, of two each has one."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if size > 1 else 0

    def half(loss: Any) -> Any:
        return lambda w, lam, part: 0.5 * loss(w, lam, part)

    problem = BilevelProblem(
        half(inner), half(outer), replace(RULES["adamw"][0], max_grad_norm=LIMIT),
        parts=lambda parts: parts, processes=Processes(rank, size),
    )  # fmt: skip
    windows = [[batch(head, 10 * t + i) for i, head in enumerate(heads)] for t, heads in enumerate(SPREAD)]
    mine = [window[rank : rank + 2 // size] for window in windows]
    judges = [batch(0, 9), batch(0, 8)][rank : rank + 2 // size]
    return run_episode(problem, estimator, weights(), LAM, mine, judges).grads


def worker() -> dict[str, Tree]:
    torch.distributed.init_process_group("gloo")
    return {name: spread_episode(estimator) for name, (estimator, _) in EXACT.items()}


@pytest.mark.distributed
def test_what_no_process_reached_sits_out() -> None:
    for found in on_processes(2, worker):
        for name, (estimator, _) in EXACT.items():
            torch.testing.assert_close(found[name], spread_episode(estimator), rtol=1e-10, atol=1e-14)
