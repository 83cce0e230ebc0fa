"""The value test in a run: before the first base step, once, and with no trace in what is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaxl_evo import BilevelModule, MetaTrainer, MetaTrainingArguments
from metaxl_evo.bilevel import stop_gradient
from metaxl_evo.models.bilevel_module import Batch, totals_of
from tests.training.tiny import stack

ESTIMATORS: dict[str, dict[str, Any]] = {
    "finite_difference": {"estimator": "one_step", "estimator_kwargs": {"engine": "finite_difference"}},
    "evograd": {"estimator": "evograd", "estimator_kwargs": {"copies": 4}},
    "sama": {"estimator": "sama"},
}
on_estimators = pytest.mark.parametrize("name", ESTIMATORS)


class Weigher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(1, 8), nn.Linear(8, 1)

    def forward(self, costs: Tensor) -> Tensor:
        weights: Tensor = torch.sigmoid(self.out(torch.tanh(self.hidden(costs[:, None]))))[:, 0]
        return weights


class Reweight(BilevelModule):
    severed: Callable[[Tensor], Tensor]

    def costs(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.base(batch["x"]), batch["labels"], reduction="none")

    def inner_loss(self, batch: Batch) -> Tensor:
        costs = self.costs(batch)
        return (self.meta(self.severed(costs)) * costs).sum() / totals_of(self, batch)["rows"]

    def outer_loss(self, batch: Batch) -> Tensor:
        return self.costs(batch).sum() / totals_of(self, batch)["rows"]

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"rows": len(batch["labels"])}


def no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 1


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [{"x": one, "labels": one[:3].argmax()} for one in x]


def trainer(folder: Path, severed: Callable[[Tensor], Tensor], name: str, **fields: Any) -> MetaTrainer:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    task = Reweight(base, Weigher())
    task.severed = severed
    args = MetaTrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        per_device_meta_batch_size=4, meta_portion=1, save_strategy="no", use_cpu=True, report_to=[],
        learning_rate=1e-2, meta_learning_rate=1e-2, meta_history=False, **ESTIMATORS[name], **fields,
    )  # fmt: skip
    return MetaTrainer(task, args, train_dataset=rows(40, 1), meta_dataset=rows(20, 2), data_collator=stack)


def weights(one: MetaTrainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in one.model.parameters()]


@on_estimators
def test_a_plain_detach_learns_what_stop_gradient_does(tmp_path: Path, name: str) -> None:
    learned = []
    for severed in (lambda x: x.detach(), stop_gradient):
        one = trainer(tmp_path, severed, name)
        before = weights(one)
        one.train()
        learned.append(weights(one))
        assert not any(torch.equal(a, b) for a, b in zip(before, learned[-1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*learned, strict=True))


@on_estimators
@pytest.mark.parametrize("order", ["after_step", "lookahead"])
def test_what_cannot_be_replayed_is_refused_before_the_first_step(tmp_path: Path, name: str, order: str) -> None:
    one = trainer(tmp_path, no_grad, name, meta_order=order)
    before = weights(one)
    with pytest.raises(ValueError, match=r"test_severed\.py:\d+ \(no_grad\) .*stop_gradient"):
        one.train()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(one), strict=True))
