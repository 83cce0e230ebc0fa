"""Meta-Weight-Net: a small network weighs each training example by its loss, and clean images judge the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from metaxl_evo.bilevel import stop_gradient
from metaxl_evo.messages import unknown
from metaxl_evo.models.bilevel_module import Batch, totals_of
from metaxl_evo.models.network_files import load_network, save_network
from vision_tasks.classification import ImageTask

SUBFOLDER = "weight_net"
MODEL_TYPE = "metaxl_weight_net"
NORMALISATIONS = ("sum", "mean")


class WeightNet(nn.Module):
    """V(loss): one hidden layer with ReLU and a sigmoid, (B,) -> (B,) in (0, 1); 3 `hidden` + 1 parameters.

    Source: Shu et al., Meta-Weight-Net, NeurIPS 2019, section 3.1.
    """

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, costs: Tensor) -> Tensor:
        weights: Tensor = torch.sigmoid(self.out(torch.relu(self.hidden(costs.unsqueeze(1))))).squeeze(1)
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


class WeightedClassifier(ImageTask):
    """inner loss = sum of w_i cost_i, w_i = V(cost_i) / sum_j V(cost_j), V on the detached costs of a micro-batch.

    V sees the costs after the network, so that a derivative by its parameters needs no graph of the network: EvoGrad's
    copies, finite differences and `one_step` with engine `jvp` run the network for its values (and tangents) alone.

    Args:
        base: a classifier whose configuration names `image_mean` and `image_std`.
        meta: the weighting network.
        weighted: False trains on the plain mean (the baseline).
        normalisation: `sum` divides the weights of a micro-batch by their sum (the paper), `mean` by their number; a
            sum is of one micro-batch, so that 8 x 1 images are 4 x 2 with `mean` alone.

    Source: Shu et al., Meta-Weight-Net, NeurIPS 2019, equations 2 and 4 to 9.
    """

    stop_gradients = True

    def __init__(self, base: nn.Module, meta: WeightNet, *, weighted: bool = True, normalisation: str = "sum") -> None:
        super().__init__(base, meta)
        if normalisation not in NORMALISATIONS:
            raise ValueError(unknown("weight_normalisation", normalisation, NORMALISATIONS))
        self.meta: WeightNet = meta
        self.weighted, self.normalisation = weighted, normalisation

    def inner_loss(self, batch: Batch) -> Tensor:
        costs, images = self.costs(batch["images"], batch["labels"]), totals_of(self, batch)["images"]
        if not self.weighted:
            return costs.sum() / images
        weights = self.meta(stop_gradient(costs))
        if self.normalisation == "mean":
            return (weights * costs).sum() / images
        total = weights.sum()
        total = torch.where(total > 0, total, torch.ones_like(total))
        share = torch.full_like(total, len(costs)) / images  # of the window, whose count may be a whole-number tensor
        return (weights / total * costs).sum() * share

    def save_meta(self, folder: str | Path) -> None:
        self.meta.save_pretrained(Path(folder) / SUBFOLDER)

    def load_meta(self, folder: str | Path) -> None:
        self.meta.load_state_dict(WeightNet.from_pretrained(Path(folder) / SUBFOLDER).state_dict())
