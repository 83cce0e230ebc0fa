"""Many-shot meta-learning of image classifiers: what tasks share, beside the convolutional net of each.

| learner | lam | w, of each task |
|---|---|---|
| `anil` | all convolutional blocks but the last | the last block and the head |
| `warpgrad` | two warp layers behind every convolution | all convolutions and the head |
| `alternating` | every second convolution of twice as many | the others and the head |
| `weight_net` | a network that weighs each image by its loss | the whole net |

Sources: Lee et al., ICLR 2022, section 5 (HyperDistill); Raghu et al., ICLR 2020 (ANIL); Flennerhag et al., ICLR 2020
(WarpGrad); Generalized Greedy Gradient-Based Hyperparameter Optimization, ICLR 2025 submission 6297 (alternating);
Shu et al., NeurIPS 2019 (Meta-Weight-Net).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from metaxl_evo.bilevel import stop_gradient
from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.task_batch import SLOT, MetaLearner, TaskBatch
from metaxl_evo.models.weight_net import WeightNet

LEARNERS = ("anil", "warpgrad", "alternating", "weight_net")
WARP_LAYERS = 2


class Block(nn.Module):
    """Convolution, batch norm, ReLU, max pooling by 2; what warps stands behind the convolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs, track_running_stats=False)  # of the batch, also in tests

    def forward(self, x: Tensor, warp: nn.Module | None = None) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H / 2, W / 2)."""
        x = self.convolution(x)
        return F.max_pool2d(self.norm(x if warp is None else warp(x)).relu(), 2)


class Head(nn.Module):
    """Some blocks, and logits behind them."""

    def __init__(self, channels: list[int], side: int, way: int):
        super().__init__()
        self.blocks = make_blocks(channels)
        self.out = nn.Linear(channels[-1] * side * side, way)

    def forward(self, x: Tensor, warps: nn.ModuleList | None = None) -> Tensor:
        """(B, C, H, W) -> (B, way)."""
        for number, block in enumerate(self.blocks):
            x = block(x, None if warps is None else warps[number])
        logits: Tensor = self.out(x.flatten(1))
        return logits


def make_blocks(channels: list[int]) -> nn.Sequential:
    """Blocks from each number of channels to the next."""
    return nn.Sequential(*(Block(a, b) for a, b in pairwise(channels)))


class Warp(nn.Sequential):
    """Convolutions that begin as the identity."""

    def __init__(self, channels: int):
        layers = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(WARP_LAYERS)]
        super().__init__(*layers)
        for layer in layers:
            nn.init.dirac_(layer.weight)
            nn.init.constant_(layer.get_parameter("bias"), 0.0)


class Alternate(nn.Sequential):
    """A convolution behind that of a block, and behind a norm and a ReLU of its own."""

    def __init__(self, channels: int):
        norm = nn.BatchNorm2d(channels, track_running_stats=False)
        super().__init__(norm, nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))


class ManyShotLearner(MetaLearner):
    """Classifiers of tasks (n, rows, C, H, W) -> logits (n, rows, way), normalised by the statistics of the batch."""

    def logits(self, batch: Batch) -> Tensor:
        return self.base.each(lambda net, x: net(x), batch[SLOT], batch["x"])

    def costs(self, batch: Batch) -> Tensor:
        logits = self.logits(batch)
        return F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), reduction="none").view_as(batch["y"])

    def measures(self, batch: Batch) -> dict[str, Tensor]:
        hits = self.logits(batch).argmax(2) == batch["y"]
        return {"accuracy": hits.float().mean(1), **super().measures(batch)}


class Anil(ManyShotLearner):
    """lam: the blocks below; w: the last block and the head of each task."""

    direct_term = True

    def logits(self, batch: Batch) -> Tensor:
        return self.base.each(lambda net, x: net(self.meta(x)), batch[SLOT], batch["x"])


class WarpGrad(ManyShotLearner):
    """lam: what stands behind each convolution, through which all of a task's gradients go."""

    direct_term = True
    meta: nn.ModuleList

    def logits(self, batch: Batch) -> Tensor:
        return self.base.each(lambda net, x: net(x, self.meta), batch[SLOT], batch["x"])


class WeightedShots(ManyShotLearner):
    """lam: V of inner loss = mean of V(cost) cost, V at least `floor` and read off the detached costs."""

    stop_gradients = True

    def __init__(self, base: TaskBatch, meta: WeightNet, floor: float = 0.1):
        super().__init__(base, meta)
        self.floor = floor

    def train_costs(self, batch: Batch) -> Tensor:
        costs = self.costs(batch)
        weights = self.meta(stop_gradient(costs).flatten()).view_as(costs)
        return (self.floor + (1 - self.floor) * weights) * costs


def make_learner(
    kind: str, *, tasks: int, way: int, image: tuple[int, int], layers: int, channels: int, hidden: int, in_turn: bool
) -> ManyShotLearner:
    """A learner of LEARNERS with a net of so many blocks.

    Args:
        image: channels and pixels of a side.
        hidden: of the weighting network.
        in_turn: as of `TaskBatch`.
    """
    side, widths = image[1] >> layers, [image[0], *layers * [channels]]
    if kind == "anil":
        shared = make_blocks(widths[:-1])
        return Anil(TaskBatch(Head(widths[-2:], side, way), tasks, in_turn=in_turn), shared)
    base = TaskBatch(Head(widths, side, way), tasks, in_turn=in_turn)
    warps = {"warpgrad": Warp, "alternating": Alternate}
    if kind in warps:
        return WarpGrad(base, nn.ModuleList(warps[kind](channels) for _ in range(layers)))
    return WeightedShots(base, WeightNet(hidden))
