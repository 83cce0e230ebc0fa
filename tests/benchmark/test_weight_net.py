"""The loss-weighting task: what its losses are, and which way their gradients go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

from metaxl_evo.benchmark.weight_net import WeightedClassifier
from metaxl_evo.models.bilevel_module import Batch


@pytest.fixture
def module() -> WeightedClassifier:
    torch.manual_seed(0)
    return WeightedClassifier(hidden=8)


def batch_of(module: WeightedClassifier, rows: int, label_noise: float = 0.0) -> Batch:
    return default_collate([module.image(label_noise) for _ in range(rows)])


def test_the_weights_are_constants_of_the_base_gradient(module: WeightedClassifier) -> None:
    batch = batch_of(module, 6)
    costs = F.cross_entropy(module.base(batch["images"]), batch["labels"], reduction="none")
    weights = module.meta(costs.detach()[:, None])[:, 0].detach()
    assert weights.std() > 1e-3
    loss = module.inner_loss(batch)
    torch.testing.assert_close(loss, (weights * costs).mean())
    parameters = list(module.base.parameters())
    expected = torch.autograd.grad((weights * costs).mean(), parameters)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), expected)


def test_off_it_is_the_outer_loss(module: WeightedClassifier) -> None:
    batch = batch_of(module, 6)
    module.weighted = False
    torch.testing.assert_close(module.inner_loss(batch), module.outer_loss(batch))


def test_labels_are_wrong_as_often_as_asked(module: WeightedClassifier) -> None:
    """A class's images lie around its prototype; a random label is right one time in ten."""

    def wrong(label_noise: float) -> float:
        batch = batch_of(module, 1000, label_noise)
        distance = (batch["images"][:, None] - module.prototypes[None]).square().sum((2, 3, 4))  # (B, classes)
        return float((distance.argmin(1) != batch["labels"]).float().mean())

    assert wrong(0.0) < 0.01
    assert 0.31 < wrong(0.4) < 0.41


def test_save_and_load(module: WeightedClassifier, tmp_path: Path) -> None:
    module.save_meta(tmp_path)
    other = WeightedClassifier(hidden=8)
    other.load_meta(tmp_path)
    assert all(
        torch.equal(one, two) for one, two in zip(module.meta.parameters(), other.meta.parameters(), strict=True)
    )
