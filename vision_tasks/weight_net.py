"""Meta-Weight-Net: a small network weighs each training example by its loss, and clean images judge the weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from metaxl_evo.bilevel import stop_gradient
from metaxl_evo.messages import unknown
from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.weighers import NORMALISATIONS, normalised
from metaxl_evo.models.weight_net import SUBFOLDER, WeightNet
from metaxl_evo.training.watched import Watched
from metaxl_evo.training.weight_watch import LABELS, Watch
from vision_tasks.classification import ImageTask


class WeightedClassifier(Watched, ImageTask):
    """inner loss = mean of V(cost_i) cost_i, V on the detached costs.

    V sees the costs after the network, so that a derivative by its parameters needs no graph of the network: EvoGrad's
    copies, finite differences and `one_step` with engine `jvp` run the network for its values (and tangents) alone.

    Args:
        base: a classifier whose configuration names `image_mean` and `image_std`.
        meta: the weighting network.
        weighted: False trains on the plain mean (the baseline).
        normalisation: of `normalised`: `sum` (the paper) divides the weights of a micro-batch by their sum in place of
            their number; 8 x 1 images are 4 x 2 with `mean` alone.
        told_apart: whether batches say which labels are `wrong`, (B,), so that the log tells these from right ones.

    Source: Shu et al., Meta-Weight-Net, NeurIPS 2019, equations 2 and 4 to 9.
    """

    stop_gradients = True
    reads_loss = True

    def __init__(
        self,
        base: nn.Module,
        meta: WeightNet,
        *,
        weighted: bool = True,
        normalisation: str = "mean",
        told_apart: bool = False,
    ) -> None:
        super().__init__(base, meta)
        if normalisation not in NORMALISATIONS:
            raise ValueError(unknown("weight_normalisation", normalisation, NORMALISATIONS))
        self.meta: WeightNet = meta
        self.weighted, self.normalisation = weighted, normalisation
        self.watch = Watch(LABELS if told_apart else (), relative=normalisation != "mean")

    def inner_loss(self, batch: Batch) -> Tensor:
        costs = self.costs(batch["images"], batch["labels"])  # (B,)
        if not self.weighted:
            return costs
        weights = normalised(self.meta(stop_gradient(costs)), self.normalisation, batch["labels"])
        self.note(weights, costs, batch.get("wrong"))
        return weights * costs

    def save_meta(self, folder: str | Path) -> None:
        self.meta.save_pretrained(Path(folder) / SUBFOLDER)

    def load_meta(self, folder: str | Path) -> None:
        self.meta.load_state_dict(WeightNet.from_pretrained(Path(folder) / SUBFOLDER).state_dict())
