"""What is right on the CPU is right where a backward runs in a thread of its own, as on CUDA."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from metaxl_evo.bilevel import SGD, BilevelProblem, hypergradient, stop_gradient, tree
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators import EvoGrad, OneStep
from tests.processes import on_processes

ESTIMATORS = (OneStep("finite_difference", radius=1e-3), EvoGrad(copies=8, temperature=1.0))


def errors_of_recomputed_stop_gradients() -> list[tuple[float, int]]:
    """Of hypergradients through a checkpointed layer on the device, beside the CPU without checkpoints; threads."""
    from tests.pretend_gpu import pretend_gpu, to_cpu, to_gpu  # from here on torch knows the device

    def grads(estimator: OneStep | EvoGrad, kept: bool, x: torch.Tensor, y: torch.Tensor, w: Tree, lam: Tree) -> Tree:
        def layer(hidden: torch.Tensor, transform: torch.Tensor) -> torch.Tensor:
            return torch.tanh(hidden + torch.tanh(stop_gradient(hidden, key="layer") @ transform))

        def inner(w: Tree, lam: Tree, batch: None) -> torch.Tensor:
            hidden = x @ w["a"]
            if kept:
                hidden = layer(hidden, lam["l"])
            else:
                hidden = checkpoint(layer, hidden, lam["l"], use_reentrant=False)
            return (hidden @ w["b"] - y).square().mean()

        def outer(w: Tree, lam: Tree, batch: None) -> torch.Tensor:
            return (torch.tanh(x @ w["a"]) @ w["b"] - y).square().mean()

        problem = BilevelProblem(inner_loss=inner, outer_loss=outer, update=SGD(0.1), stop_gradients=True)
        return hypergradient(problem, estimator, w, lam, None, None, generator=torch.Generator().manual_seed(0)).grads

    draw = torch.Generator().manual_seed(0)
    x, y, a, b, transform = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((16, 4), (16,), (4, 6), (6,), (6, 6))
    )
    given = (x, y, {"a": a, "b": b}, {"l": 0.3 * transform})
    found = []
    with pretend_gpu() as device:
        on_device = [to_cpu(grads(estimator, False, *to_gpu(given))) for estimator in ESTIMATORS]
    for estimator, computed in zip(ESTIMATORS, on_device, strict=True):
        expected = grads(estimator, True, *given)
        found.append((float(tree.norm(tree.add(computed, expected, -1.0)) / tree.norm(expected)), len(device.threads)))
    return found


def test_stop_gradient_in_what_a_backward_computes_again() -> None:
    [found] = on_processes(1, errors_of_recomputed_stop_gradients)
    assert len(found) == len(ESTIMATORS)
    for error, threads in found:
        assert threads == 2
        assert error <= 1e-12
