"""Metric heads of few-shot classifiers: scores of queries for the classes of an episode, and the loss on them.

A head takes the feature maps of an episode's support images (way, shot, C, H, W) and queries (Q, C, H, W) and gives
scores (Q, way), of which the highest is the answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MetricHead(nn.Module, ABC):
    """A head on feature maps of `channels` channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    @abstractmethod
    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        """Scores (Q, way) of `query` (Q, C, H, W) for the classes of `support` (way, shot, C, H, W)."""

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the queries, 0-d, of scores (Q, way) and labels (Q,)."""
        return F.cross_entropy(scores, labels)


class _RelationBlock(nn.Sequential):
    """A 3x3 convolution, batch norm on the statistics of the batch at hand, and ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs, track_running_stats=False),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Halves the map, (B, C, H, W) -> (B, C', H // 2, W // 2), as long as it is at least 2 wide."""
        x = super().forward(x)
        return F.max_pool2d(x, 2) if min(x.shape[-2:]) >= 2 else x


class RelationHead(MetricHead):
    """RelationNet: a small network compares each query's map with each class's mean map; cross-entropy of its scores.

    On maps of 512 x 7 x 7 the layers are 1024x7x7 -> 512x3x3 -> 512x1x1 -> 8 -> 1. What is larger than 1 x 1 at the
    end is averaged, so one set of weights serves all image sizes.

    The batch norms never keep running statistics, as in the published code: also in evaluation the score of a query
    depends on the other queries of its episode (the head is transductive).

    Source: Sung et al., Learning to Compare: Relation Network for Few-Shot Learning, CVPR 2018; Tseng et al. 2020.
    """

    hidden = 8

    def __init__(self, channels: int):
        super().__init__(channels)
        self.blocks = nn.Sequential(_RelationBlock(2 * channels, channels), _RelationBlock(channels, channels))
        self.score = nn.Sequential(nn.Linear(channels, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        prototypes = support.mean(1)  # (way, C, H, W)
        shape = (len(query), len(prototypes), *query.shape[1:])
        pairs = torch.cat([prototypes.expand(shape), query[:, None].expand(shape)], dim=2).flatten(0, 1)
        maps = self.blocks(pairs)  # (Q * way, C, H', W')
        return self.score(maps.mean((-2, -1))).view(shape[:2])


class RelationMSEHead(RelationHead):
    """RelationNet as first published: a sigmoid on the scores, and their squared distance to 1 and 0."""

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        return super().forward(support, query).sigmoid()

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(scores, F.one_hot(labels, scores.shape[1]).to(scores))


class PrototypeHead(MetricHead):
    """ProtoNet: minus the squared distance of a query's pooled features to each class's mean. It has no parameters.

    Source: Snell et al., Prototypical Networks for Few-shot Learning, NeurIPS 2017.
    """

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        prototypes = support.mean((1, -2, -1))  # (way, C)
        features = query.mean((-2, -1))  # (Q, C)
        return -(features[:, None] - prototypes).square().sum(-1)


HEADS: dict[str, type[MetricHead]] = {
    "relation": RelationHead,
    "relation_mse": RelationMSEHead,
    "prototype": PrototypeHead,
}
