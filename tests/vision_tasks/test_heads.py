"""Metric heads: the relation network's layers, both losses, and prototypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_tasks.heads import HEADS, PrototypeHead, RelationHead, RelationMSEHead

WAY, SHOT, QUERIES = 3, 2, 6


def maps(channels: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(WAY, SHOT, channels, side, side, generator=generator, dtype=torch.float64)
    return support, torch.randn(QUERIES, channels, side, side, generator=generator, dtype=torch.float64)


def test_relation_layers_are_the_papers() -> None:
    with torch.device("meta"):
        head = RelationHead(512)
        shapes: list[tuple[int, ...]] = []
        for module in (*head.blocks, *(m for m in head.modules() if isinstance(m, nn.Conv2d | nn.Linear))):
            module.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[1:])))
        scores = head(torch.empty(5, 1, 512, 7, 7), torch.empty(10, 512, 7, 7))
    assert shapes == [(512, 7, 7), (512, 3, 3), (512, 3, 3), (512, 1, 1), (8,), (1,)]
    assert scores.shape == (10, 5)
    found = {name: tuple(p.shape) for name, p in head.named_parameters() if p.dim() > 1}
    assert list(found.values()) == [(512, 1024, 3, 3), (512, 512, 3, 3), (8, 512), (1, 8)]
    assert sum(p.numel() for p in head.parameters()) == 1024 * 512 * 9 + 512 * 512 * 9 + 6 * 512 + 8 * 513 + 9


def by_hand(head: Any, prototype: Tensor, query: Tensor) -> Tensor:
    """Pairs (N, 2C, 7, 7) through the layers one after another."""
    x = torch.cat([prototype, query], 1)
    for conv, norm in ((b[0], b[1]) for b in head.blocks):
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        x = (x - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        x = F.max_pool2d(x.clamp(min=0), 2)
    first, last = head.score[0], head.score[2]
    return (x.flatten(1) @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias


@pytest.mark.parametrize("training", [True, False])
def test_relation_scores_are_the_closed_form(training: bool) -> None:
    torch.manual_seed(0)
    head = RelationHead(4).double().train(training)
    nn.init.normal_(head.get_parameter("blocks.0.1.bias"))
    support, query = maps(4, 7)
    pairs = [(support[c].mean(0), query[q]) for q in range(QUERIES) for c in range(WAY)]
    expected = by_hand(head, torch.stack([p for p, _ in pairs]), torch.stack([q for _, q in pairs]))
    torch.testing.assert_close(head(support, query), expected.view(QUERIES, WAY))


def test_the_relation_head_is_transductive_and_remembers_nothing() -> None:
    head = RelationHead(4).double().eval()
    assert not list(head.buffers())
    support, query = maps(4, 7)
    assert not torch.allclose(head(support, query)[:3], head(support, query[:3]))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 14])
@pytest.mark.parametrize("name", HEADS)
def test_every_map_size_is_served(name: str, side: int) -> None:
    scores = HEADS[name](4).double()(*maps(4, side))
    assert scores.shape == (QUERIES, WAY)
    assert bool(scores.isfinite().all())


def test_softmax_and_mse_losses() -> None:
    torch.manual_seed(0)
    head, mse = RelationHead(4).double(), RelationMSEHead(4).double()
    mse.load_state_dict(head.state_dict())
    support, query = maps(4, 7)
    labels = torch.arange(WAY).repeat_interleave(QUERIES // WAY)
    scores, squashed = head(support, query), mse(support, query)
    torch.testing.assert_close(squashed, 1 / (1 + torch.exp(-scores)))
    chosen = scores.exp()[torch.arange(QUERIES), labels] / scores.exp().sum(1)
    torch.testing.assert_close(head.loss(scores, labels), -chosen.log().mean())
    target = torch.eye(WAY, dtype=torch.float64)[labels]
    torch.testing.assert_close(mse.loss(squashed, labels), ((squashed - target) ** 2).mean())


def test_prototype_scores_are_the_closed_form() -> None:
    support, query = maps(4, 3)
    expected = torch.empty(QUERIES, WAY, dtype=torch.float64)
    for q in range(QUERIES):
        for c in range(WAY):
            centre = torch.stack([support[c, s].flatten(1).mean(1) for s in range(SHOT)]).mean(0)
            expected[q, c] = -((query[q].flatten(1).mean(1) - centre) ** 2).sum()
    torch.testing.assert_close(PrototypeHead(4)(support, query), expected)


def test_the_nearest_prototype_wins() -> None:
    support, _ = maps(4, 3)
    assert torch.equal(PrototypeHead(4)(support, support.mean(1)).argmax(1), torch.arange(WAY))
