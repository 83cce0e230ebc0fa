"""The weighting network of Meta-Weight-Net, for any task: a weight is read off a loss, or off features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from metaxl_evo.models.network_files import load_network, save_network

SUBFOLDER = "weight_net"
MODEL_TYPE = "metaxl_weight_net"


class WeightNet(nn.Module):
    """V(loss): one hidden layer with ReLU and a sigmoid, (B,) -> (B,) in (0, 1); 3 `hidden` + 1 parameters.

    Args:
        inputs: numbers that an example is weighed by; of several, V takes (B, inputs).
        floor: weights are in (floor, 1).

    Source: Shu et al., Meta-Weight-Net, NeurIPS 2019, section 3.1.
    """

    def __init__(self, hidden: int = 100, inputs: int = 1, floor: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.out = nn.Linear(hidden, 1)
        self.floor = floor

    def forward(self, seen: Tensor) -> Tensor:
        seen = seen.unsqueeze(1) if seen.dim() == 1 else seen
        weights: Tensor = torch.sigmoid(self.out(torch.relu(self.hidden(seen)))).squeeze(1)
        return above_floor(weights, self.floor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into the folder itself."""
        sizes = {"hidden": self.hidden.out_features, "inputs": self.hidden.in_features}
        save_network(folder, MODEL_TYPE, {**sizes, "floor": self.floor}, self)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WeightNet:
        """The network of a run's folder, or of its subfolder `weight_net`.

        Raises:
            ValueError: for a file that is missing or damaged, named.
        """
        inside = Path(folder) / SUBFOLDER
        return load_network(inside if inside.is_dir() else folder, MODEL_TYPE, cls)


def above_floor(weights: Tensor, floor: float) -> Tensor:
    """Weights of at least 0, pressed together above `floor`; bit for bit the same where that is 0."""
    return weights if floor == 0 else floor + (1 - floor) * weights
