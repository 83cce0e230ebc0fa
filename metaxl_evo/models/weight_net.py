"""The weighting network of Meta-Weight-Net, for any task: an example's weight is read off its loss."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from metaxl_evo.models.network_files import load_network, save_network

SUBFOLDER = "weight_net"
MODEL_TYPE = "metaxl_weight_net"


class WeightNet(nn.Module):
    """V(loss): one hidden layer with ReLU and a sigmoid, (B,) -> (B,) in (0, 1); 3 `hidden` + 1 parameters.

    Source: Shu et al., Meta-Weight-Net, NeurIPS 2019, section 3.1.
    """

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, losses: Tensor) -> Tensor:
        weights: Tensor = torch.sigmoid(self.out(torch.relu(self.hidden(losses.unsqueeze(1))))).squeeze(1)
        return weights

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into the folder itself."""
        save_network(folder, MODEL_TYPE, {"hidden": self.hidden.out_features}, self)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WeightNet:
        """The network of a run's folder, or of its subfolder `weight_net`.

        Raises:
            ValueError: for a file that is missing or damaged, named.
        """
        inside = Path(folder) / SUBFOLDER
        return load_network(inside if inside.is_dir() else folder, MODEL_TYPE, cls)
