"""Norms with running statistics: in meta passes as in training, and no trace is left of the passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaxl_evo.bilevel import SGD, hypergradient
from metaxl_evo.estimators import EvoGrad, OneStep
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.models.norms import running_statistics
from tests.estimators.problems import relative_error


class Centred(nn.Module):
    """A norm of somebody's own, with a running mean and an update in place."""

    running_mean: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.running_mean[:, None]
        mean = x.mean((0, 2))
        with torch.no_grad():
            self.running_mean.mul_(0.9).add_(0.1 * mean)
        return x - mean[:, None]


class Activated(nn.BatchNorm1d):
    """A batch norm and what comes behind it in one, as timm's; here it is another function in training."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x) * (2 if self.training else 1))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "own": lambda: Centred(4),
    "subclass": lambda: Activated(4),
    "without statistics": lambda: Activated(4, track_running_stats=False),
}


class Weighted(BilevelModule):
    def costs(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.base(batch["x"]), batch["y"], reduction="none")

    def inner_loss(self, batch: Batch) -> Tensor:
        return (torch.sigmoid(self.meta.logit) * self.costs(batch)).mean()

    def outer_loss(self, batch: Batch) -> Tensor:
        return self.costs(batch).mean()

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"rows": len(batch["y"])}

    def save_meta(self, folder: str | Path) -> None: ...

    def load_meta(self, folder: str | Path) -> None: ...


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.linspace(-1, 1, 10))


def module(norm: str) -> tuple[Weighted, Batch]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv1d(2, 4, 3), NORMS[norm](), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)]
        task = Weighted(nn.Sequential(*layers), Logits()).double().train()
        return task, {"x": torch.randn(10, 2, 6).double(), "y": torch.randint(0, 3, (10,))}


def estimate(task: Weighted, estimator: Any, batch: Batch, **options: Any) -> Any:
    return hypergradient(
        task.problem(SGD(0.1)), estimator, task.base_parameters(), task.meta_parameters(), batch, batch, **options
    ).grads


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("engine", ["auto", "double_backward", "finite_difference"])
def test_meta_passes_are_those_of_training(norm: str, engine: Any) -> None:
    """The oracle: autograd through functional calls of the network in train mode, without dropout."""
    task, batch = module(norm)
    found = estimate(task, OneStep(engine, radius=1e-3), batch)
    reference, _ = module(norm)
    reference.base[4].p = 0.0
    w = {name: p.detach().requires_grad_() for name, p in reference.base_parameters().items()}
    logit = reference.meta.logit.detach().requires_grad_()

    def costs(w: Any) -> Tensor:
        buffers = {name: b.clone() for name, b in reference.base.named_buffers()}
        logits = torch.func.functional_call(reference.base, (w, buffers), batch["x"])
        return F.cross_entropy(logits, batch["y"], reduction="none")

    slopes = torch.autograd.grad((torch.sigmoid(logit) * costs(w)).mean(), list(w.values()), create_graph=True)
    after = {name: leaf - 0.1 * slope for (name, leaf), slope in zip(w.items(), slopes, strict=True)}
    (expected,) = torch.autograd.grad(costs(after).mean(), logit)
    error = relative_error(found, {"logit": expected})
    assert error < (1e-5 if engine == "finite_difference" else 1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("estimator", [OneStep(), OneStep("finite_difference"), EvoGrad()])
def test_statistics_and_modes_are_left_as_they_were(norm: str, estimator: Any) -> None:
    task, batch = module(norm)
    task.base(batch["x"])  # so that the statistics are no longer those of the start
    before = {name: b.clone() for name, b in task.named_buffers()}
    held = {name: b.data_ptr() for name, b in task.named_buffers()}
    estimate(task, estimator, batch)
    assert all(torch.equal(b, before[name]) for name, b in task.named_buffers())
    assert {name: b.data_ptr() for name, b in task.named_buffers()} == held
    assert all(one.training for one in task.modules())


@pytest.mark.parametrize("norm", NORMS)
def test_a_loss_may_evaluate(norm: str) -> None:
    """Within a pass, by the running statistics."""
    task, batch = module(norm)
    task.base(batch["x"])
    with task.problem(SGD(0.1)).scope():
        task.base.eval()
        evaluated = task.base(batch["x"])
        task.base.train()
    task.base.eval()
    torch.testing.assert_close(evaluated, task.base(batch["x"]))


@pytest.mark.parametrize("norm", NORMS)
def test_one_that_is_in_evaluation_mode_stays_there(norm: str) -> None:
    task, batch = module(norm)
    task.base(batch["x"])
    task.base[1].eval()
    problem = task.problem(SGD(0.1))
    w, lam = task.base_parameters(), task.meta_parameters()
    with problem.scope():
        loss = problem.inner_loss(w, lam, batch)
    task.base.eval()
    with torch.no_grad():
        costs = F.cross_entropy(task.base(batch["x"]), batch["y"], reduction="none")
    torch.testing.assert_close(loss, (torch.sigmoid(task.meta.logit) * costs).mean())


def test_what_has_running_statistics() -> None:
    assert {name: len(running_statistics(make())) for name, make in NORMS.items()} == {
        "batch norm": 2, "instance norm": 2, "own": 1, "subclass": 2, "without statistics": 0,
    }  # fmt: skip
    without = [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4), nn.Dropout(), nn.Sequential(Centred(4))]
    for layer in without:
        assert not running_statistics(layer)
