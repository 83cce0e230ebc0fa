"""What weighs: a number for each example or domain, or a network of an example's loss or features."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from metaxl_evo.messages import unknown
from metaxl_evo.models.network_files import CONFIG_FILE, MODEL_TYPE, load_network, save_network
from metaxl_evo.models.weight_net import MODEL_TYPE as WEIGHT_NET
from metaxl_evo.models.weight_net import WeightNet, above_floor

WEIGHT_TABLE = "metaxl_weight_table"
FORMS = ("sigmoid", "softmax")
NORMALISATIONS = ("sum", "mean", "label")


class WeightTable(nn.Module):
    """A number for each of `entries`, and their weights: row numbers (B,) -> (B,).

    `sigmoid` weights are apart from each other and in (floor, 1); `softmax` weights are a mixture p, scaled by the
    number of entries, so that their mean is 1 and the least is `floor`.

    Args:
        entries: examples or domains.
        start: the logit that all begin with; the mixture then begins uniform.

    Raises:
        ValueError: for an unknown form, or a floor outside [0, 1).
    """

    def __init__(self, entries: int, form: str = "sigmoid", floor: float = 0.0, start: float = 0.0) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(unknown("form", form, FORMS))
        if not 0 <= floor < 1:
            raise ValueError(f"floor must be at least 0 and below 1, not {floor}")
        self.form, self.floor = form, floor
        self.logits = nn.Parameter(torch.full((entries,), start))

    def forward(self, numbers: Tensor) -> Tensor:
        if self.form == "softmax":
            return self.weights()[numbers]
        return above_floor(self.logits[numbers].sigmoid(), self.floor)

    def weights(self) -> Tensor:
        """Of all entries."""
        raw = len(self.logits) * self.logits.softmax(0) if self.form == "softmax" else self.logits.sigmoid()
        return above_floor(raw, self.floor)

    def mixture(self) -> Tensor:
        """Shares that sum to 1."""
        weights = self.weights()
        return weights / weights.sum()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into the folder itself."""
        config = {"entries": len(self.logits), "form": self.form, "floor": self.floor}
        save_network(folder, WEIGHT_TABLE, config, self)


def give_weigher(weigher: WeightTable | WeightNet, folder: str | Path) -> None:
    """Give a weigher the numbers of a saved one.

    Raises:
        ValueError: for one of other sizes, or what `load_weigher` cannot read.
    """
    saved = load_weigher(folder).state_dict()
    sizes = [{name: tuple(one.shape) for name, one in state.items()} for state in (saved, weigher.state_dict())]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{folder} holds a weigher of {sizes[0]}, here is one of {sizes[1]}: give its settings")
    weigher.load_state_dict(saved)


def normalised(weights: Tensor, how: str, labels: Tensor) -> Tensor:
    """The weights (B,) of a micro-batch as its losses are multiplied by them.

    `mean` leaves them as they are; `sum` divides by their mean; `label` divides by the mean of those with the same
    label, so that each label counts as much as without weights, and what is learned is which examples of it count.

    Args:
        labels: (B,) class numbers, read for `label` alone.

    Source: Shu et al., Meta-Weight-Net, NeurIPS 2019, section 3.2 (`sum`).
    """
    if how == "mean":
        return weights
    if how == "sum":
        return weights / _or_one(weights.sum()) * len(weights)
    found, groups = labels.unique(return_inverse=True)
    sums = weights.new_zeros(len(found)).index_add(0, groups, weights)
    return weights / _or_one(sums)[groups] * groups.bincount()[groups]


def _or_one(sums: Tensor) -> Tensor:
    return torch.where(sums > 0, sums, torch.ones_like(sums))


def load_weigher(folder: str | Path) -> WeightTable | WeightNet:
    """The weigher that a run has left in its subfolder `weigher`, or another folder with both its files.

    Raises:
        ValueError: for a file that is missing, damaged or of another kind of network, named.
    """
    try:
        kind = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))[MODEL_TYPE]
    except (OSError, ValueError, KeyError, TypeError):
        kind = WEIGHT_NET  # whose reader says what is wrong
    if kind == WEIGHT_TABLE:
        return load_network(folder, WEIGHT_TABLE, WeightTable)
    return load_network(folder, WEIGHT_NET, WeightNet)
