"""Few-shot regression on sinusoids: features that tasks share, and a linear head of each task (ANIL).

Sources: Raghu et al., ICLR 2020 (ANIL); Lee et al., ICLR 2022, appendix G, whose sizes are the defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from metaxl_evo.bilevel.randomness import mix_seed
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
    """lam: the layers below, learned across tasks; w: a linear head of each task.

    Args:
        tasks: of a meta-batch.
        hidden: units of each of the three layers below.
    """

    direct_term = True

    def __init__(self, tasks: int, hidden: int = 100):
        sizes = [1, hidden, hidden, hidden]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(TaskBatch(nn.Linear(hidden, 1), tasks), nn.Sequential(*layers))

    def costs(self, batch: Batch) -> Tensor:
        found = self.base.each(lambda head, features: head(features), batch[SLOT], self.meta(batch["x"]))
        return (found - batch["y"]).square().squeeze(2)

    def measures(self, batch: Batch) -> dict[str, Tensor]:
        return {"mse": self.costs(batch).mean(1)}
