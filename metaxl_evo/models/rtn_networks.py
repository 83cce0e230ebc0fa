"""The networks of MetaXL's representation transform (Xia et al., NAACL 2021): each what is added to a hidden state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Network(nn.Module, ABC):
    """One transformation network, (B, T, H) -> (B, T, H); `bottleneck_ratio` x H is its default inner width."""

    bottleneck_ratio: ClassVar[float]

    @abstractmethod
    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Transformed `hidden` (B, T, H), without the residual; `attention_mask` (B, T) is 1 at real tokens."""


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


class GatedTied(Network):
    """A two-layer network whose last output is the gate of the others (MetaXL's `perceptron` with tied weights)."""

    bottleneck_ratio = 0.5

    def __init__(self, hidden_size: int, bottleneck: int, num_attention_heads: int):
        super().__init__()
        self.net = _mlp(hidden_size, bottleneck, hidden_size + 1)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        out = self.net(hidden)  # (B, T, H + 1)
        return torch.sigmoid(out[..., -1:]) * out[..., :-1]


class GatedUntied(Network):
    """Two networks, one for the representation and one for its gate; every language and layer has both to itself."""

    bottleneck_ratio = 0.5

    def __init__(self, hidden_size: int, bottleneck: int, num_attention_heads: int):
        super().__init__()
        self.net = _mlp(hidden_size, bottleneck, hidden_size)
        self.gate = _mlp(hidden_size, bottleneck, 1)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        return torch.sigmoid(self.gate(hidden)) * self.net(hidden)  # (B, T, 1) * (B, T, H)


class Perceptron(Network):
    """A two-layer network without a gate."""

    bottleneck_ratio = 0.25

    def __init__(self, hidden_size: int, bottleneck: int, num_attention_heads: int):
        super().__init__()
        self.net = _mlp(hidden_size, bottleneck, hidden_size)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.net(hidden)


class TransformerLayer(Network):
    """One post-norm transformer encoder layer without dropout; the bottleneck is its feed-forward width.

    The attention is written out: fused kernels lack second derivatives and forward-mode rules.
    """

    bottleneck_ratio = 4.0

    def __init__(self, hidden_size: int, bottleneck: int, num_attention_heads: int):
        super().__init__()
        self.heads = num_attention_heads
        self.query, self.key, self.value, self.output = (nn.Linear(hidden_size, hidden_size) for _ in range(4))
        self.up, self.down = nn.Linear(hidden_size, bottleneck), nn.Linear(bottleneck, hidden_size)
        self.norm_attention, self.norm_output = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        hidden = self.norm_attention(hidden + self.output(self._attend(hidden, attention_mask)))
        return self.norm_output(hidden + self.down(F.gelu(self.up(hidden))))

    def _attend(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Multi-head self-attention, (B, T, H) -> (B, T, H)."""
        query, key, value = (self._split(linear(hidden)) for linear in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (B, N, T, T)
        if attention_mask is not None:
            padding = attention_mask.to(scores.device)[:, None, None, :] == 0  # (B, 1, 1, T)
            scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, T, H / N)


KINDS: dict[str, type[Network]] = {
    "gated_tied": GatedTied,
    "gated_untied": GatedUntied,
    "perceptron": Perceptron,
    "transformer": TransformerLayer,
}


def initialise(module: nn.Module) -> None:
    """Xavier-normal weights and zero biases: a gate starts at one half, and the transform is not zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)
