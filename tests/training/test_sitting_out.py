"""A head for each task in the MetaTrainer: what a window of batches leaves out sits its optimizer step out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import SequentialSampler

from metaxl_evo.bilevel import Tree
from metaxl_evo.models.bilevel_module import Batch, BilevelModule, totals_of
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import on_processes
from tests.training.tiny import meta_weights, minus, stack

LR, STEPS = 0.05, 4
HEADS = [[0, 1], [1, 1], [0, 0], [1, 0]]  # of each step's two micro-batches
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch"},
    "momentum": {"optimizer_class": "SGD", "optimizer_kwargs": {"momentum": 0.9}},
}
ESTIMATORS = ("one_step", "unroll")


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 1) for _ in range(3)])

    def forward(self, x: Tensor, head: Tensor) -> Tensor:
        return self.heads[int(head[0])](torch.tanh(self.trunk(x)))[:, 0]


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x[:, 0] * self.v[0] + self.v[1])


class Task(BilevelModule):
    def outer_loss(self, batch: Batch) -> Tensor:
        return (self.base(batch["x"], batch["head"]) - batch["y"]).square().sum() / totals_of(self, batch)["rows"]

    def inner_loss(self, batch: Batch) -> Tensor:
        errors = (self.base(batch["x"], batch["head"]) - batch["y"]).square()
        return (self.meta(batch["x"]) * errors).sum() / totals_of(self, batch)["rows"]

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"rows": len(batch["y"])}


class InOrder(MetaTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def rows(count: int, seed: int, head: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (3, 1))
    return [{"x": one, "y": target[0], "head": torch.tensor(head)} for one, target in zip(x, y, strict=True)]


PARTS = [rows(2, 10 * step + i, head) for step, heads in enumerate(HEADS) for i, head in enumerate(heads)]
JUDGES = rows(4, 77, 0)


def task() -> Task:
    torch.manual_seed(0)
    return Task(Heads().double(), Weights())


def trained(estimator: str, optimizer: str) -> Tree:
    """How far plain meta descent at the rate 1 moves lam, once, at the end; a window is two micro-batches."""
    fields: dict[str, Any] = {"episode_length": STEPS} if estimator == "unroll" else {"meta_every": STEPS}
    with tempfile.TemporaryDirectory() as folder:
        args = MetaTrainingArguments(
            output_dir=folder, estimator=estimator, max_steps=STEPS, per_device_train_batch_size=2, report_to=[],
            gradient_accumulation_steps=2 // int(os.environ.get("WORLD_SIZE", "1")), per_device_meta_batch_size=2,
            learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=0.4, weight_decay=0.1, meta_portion=1.0,
            meta_optim="SGD", meta_learning_rate=1.0, meta_lr_scheduler_type="constant", save_strategy="no",
            use_cpu=True, disable_tqdm=True, meta_history=False, ddp_find_unused_parameters=True, **fields,
            **CASES[optimizer],
        )  # fmt: skip
        train = [row for part in PARTS for row in part]
        trainer = InOrder(task(), args, train_dataset=train, meta_dataset=JUDGES, data_collator=stack)
        before = meta_weights(trainer)
        trainer.train()
        return minus(before, meta_weights(trainer))


def stepped(optimizer: str, w: Tree, grads: Tree, memory: dict[str, Any]) -> Tree:
    """torch's step, of the parameters that have a gradient."""
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    after = dict(w)
    for name, g in grads.items():
        g, decayed = g * (0.4 / (norm + 1e-6)).clamp(max=1.0), not name.endswith("bias")
        t, *held = memory.get(name, (0, torch.zeros_like(g), torch.zeros_like(g)))
        if optimizer == "momentum":
            held = [0.9 * held[0] + g + 0.1 * w[name], held[1]]  # this one decays the biases as well
            after[name] = w[name] - LR * held[0]
        else:
            held = [0.9 * held[0] + 0.1 * g, 0.999 * held[1] + 0.001 * g**2]
            step = held[0] / (1 - 0.9 ** (t + 1)) / ((held[1] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            after[name] = w[name] * (1 - LR * 0.1 * decayed) - LR * step
        memory[name] = (t + 1, *held)
    return after


def by_autograd(estimator: str, optimizer: str) -> Tensor:
    model = task()
    w = {n: p.detach().requires_grad_() for n, p in model.base.named_parameters()}
    v, memory = model.meta.v.detach().requires_grad_(), dict[str, Any]()

    def losses(batch: dict[str, Tensor]) -> Tensor:
        return (functional_call(model.base, w, (batch["x"], batch["head"])) - batch["y"]).square()

    for step in range(STEPS):
        if estimator == "one_step":  # the last step alone is differentiated
            w = {n: leaf.detach().requires_grad_() for n, leaf in w.items()}
            memory = {n: (t, *(leaf.detach() for leaf in held)) for n, (t, *held) in memory.items()}
        parts = [stack(part) for part in PARTS[2 * step : 2 * step + 2]]
        weighted = [functional_call(model.meta, {"v": v}, (part["x"],)) * losses(part) for part in parts]
        loss = torch.cat(weighted).mean()
        found = torch.autograd.grad(loss, list(w.values()), create_graph=True, allow_unused=True)
        w = stepped(optimizer, w, {n: g for n, g in zip(w, found, strict=True) if g is not None}, memory)
    return torch.autograd.grad(losses(stack(JUDGES)).mean(), v)[0]


@pytest.mark.parametrize("optimizer", CASES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_hypergradient_is_autograd_through_torchs_own_steps(estimator: str, optimizer: str) -> None:
    found, expected = trained(estimator, optimizer)["v"], by_autograd(estimator, optimizer)
    assert float(expected.abs().min()) > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def worker(run: Callable[[str, str], Tree]) -> list[Tree]:
    return [run(estimator, optimizer) for estimator in ESTIMATORS for optimizer in CASES]


@pytest.mark.distributed
def test_two_processes_with_a_head_each_are_one() -> None:
    expected = worker(trained)
    for found in on_processes(2, worker, trained):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
