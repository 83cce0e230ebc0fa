"""Few-shot regression on sinusoids: features that tasks share below a head of each (ANIL), or a start (MAML).

Sources: Raghu et al., ICLR 2020 (ANIL); Lee et al., ICLR 2022, appendix G, whose sizes are the defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.task_batch import SLOT, MetaLearner, TaskBatch
from metaxl_evo.training.task_rows import Rows


@dataclass(frozen=True)
class Sinusoids:
    """Task j is y = amplitude sin(x - phase), amplitude U(0.1, 5), phase U(0, pi), at x from U(-5, 5).

    Args:
        seed: all of task j follows from (seed, j).
        shots: points that train, the same in every step; as many others judge.
        test_points: points that test an adapted task.
    """

    seed: int
    shots: int = 10
    test_points: int = 100

    def train(self, task: int, step: int) -> Rows:
        return self._rows(task, 0, self.shots)

    def judge(self, task: int, step: int) -> Rows:
        return self._rows(task, self.shots, self.shots)

    def test(self, task: int) -> Rows:
        return self._rows(task, 2 * self.shots, self.test_points)

    def _rows(self, task: int, first: int, count: int) -> Rows:
        """Points `first` and following: x and y of shape (count, 1)."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, task))
        height, shift = torch.rand(2, generator=generator)
        x = 10 * torch.rand(2 * self.shots + self.test_points, 1, generator=generator)[first : first + count] - 5
        return {"x": x, "y": (0.1 + 4.9 * height) * torch.sin(x - math.pi * shift)}


class SinusoidLearner(MetaLearner):
    """What tasks have in common: squared errors."""

    def predicted(self, batch: Batch) -> Tensor:
        """Curves (n, rows, 1) of the tasks at their x."""
        raise NotImplementedError

    def costs(self, batch: Batch) -> Tensor:
        return (self.predicted(batch) - batch["y"]).square().squeeze(2)

    def measures(self, batch: Batch) -> dict[str, Tensor]:
        return {"mse": self.costs(batch).mean(1)}


class Anil(SinusoidLearner):
    """lam: the layers below, learned across tasks; w: a linear head of each task.

    Args:
        tasks: of a meta-batch.
        hidden: units of each of the three layers below.
    """

    direct_term = True

    def __init__(self, tasks: int, hidden: int = 100):
        super().__init__(TaskBatch(nn.Linear(hidden, 1), tasks), layers_below(hidden))

    def predicted(self, batch: Batch) -> Tensor:
        return self.base.each(lambda head, features: head(features), batch[SLOT], self.meta(batch["x"]))


class Maml(SinusoidLearner):
    """lam: the weights from which the whole network of each task begins (Finn et al., ICML 2017)."""

    def __init__(self, tasks: int, hidden: int = 100):
        network = nn.Sequential(*layers_below(hidden), nn.Linear(hidden, 1))
        super().__init__(TaskBatch(network, tasks), network)

    def predicted(self, batch: Batch) -> Tensor:
        return self.base.each(lambda network, x: network(x), batch[SLOT], batch["x"])

    def first_weights(self) -> Tree:
        return self.base.spread(self.meta_parameters())


LEARNERS = {"anil": Anil, "maml": Maml}


def layers_below(hidden: int) -> nn.Sequential:
    """1-hidden-hidden-hidden with ReLU."""
    sizes = [1, hidden, hidden, hidden]
    return nn.Sequential(*(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())))
