"""A small image classifier whose losses a network weighs: Meta-Weight-Net on generated images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from metaxl_evo.bilevel import stop_gradient
from metaxl_evo.models.bilevel_module import Batch, BilevelModule, totals_of

CLASSES, SIDE, WIDTH = 10, 16, 16


class WeightedClassifier(BilevelModule):
    """inner loss = mean of v(cost) cost, v a perceptron with one hidden layer and a sigmoid on the detached costs.

    outer loss = mean cost of clean images. Batches hold `images` (B, 1, H, W) and `labels` (B,).

    Attributes:
        weighted: False leaves the costs as they are.

    Source: Shu et al., Meta-Weight-Net, NeurIPS 2019.
    """

    stop_gradients = True

    def __init__(self, hidden: int = 100) -> None:
        base = nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        base.add_module("head", nn.Linear(2 * WIDTH * (SIDE // 4) ** 2, CLASSES))
        super().__init__(base, nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid()))
        self.weighted = True
        self.prototypes = torch.randn(CLASSES, 1, SIDE, SIDE)

    def image(self, label_noise: float = 0.0) -> dict[str, Tensor]:
        """A generated image: its class's pattern under noise; its label is another one with this probability."""
        label = torch.randint(CLASSES, ())
        wrong = torch.rand(()) < label_noise
        return {
            "images": self.prototypes[label] + 2 * torch.randn(1, SIDE, SIDE),
            "labels": torch.where(wrong, torch.randint(CLASSES, ()), label),
        }

    def inner_loss(self, batch: Batch) -> Tensor:
        costs = self._costs(batch)
        if self.weighted:
            costs = costs * self.meta(stop_gradient(costs).unsqueeze(1)).squeeze(1)
        return costs.sum() / totals_of(self, batch)["images"]

    def outer_loss(self, batch: Batch) -> Tensor:
        return self._costs(batch).sum() / totals_of(self, batch)["images"]

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"images": len(batch["labels"])}

    def save_meta(self, folder: str | Path) -> None:
        save_file(self.meta.state_dict(), Path(folder) / "weight_net.safetensors")

    def load_meta(self, folder: str | Path) -> None:
        self.meta.load_state_dict(load_file(Path(folder) / "weight_net.safetensors"))

    def _costs(self, batch: Batch) -> Any:
        return F.cross_entropy(self.base(batch["images"]), batch["labels"], reduction="none")  # (B,)
