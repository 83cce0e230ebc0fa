"""Learning rate schedules that transformers does not have, and the length of a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def with_drops(optimizer: Any, milestones: Sequence[float], factor: float, steps: int) -> LambdaLR:
    """A constant rate with drops: the step nearest to a milestone's share of them all is the first at the lower rate.

    No MultiStepLR: resume would bring back its milestones of before, where the other schedules follow the arguments.

    Args:
        milestones: shares of the run, rising.
        factor: of the rate, at each of them.
        steps: of the run.
    """
    drops = [round(share * steps) for share in milestones]
    return LambdaLR(optimizer, lambda step: factor ** bisect_right(drops, step))


def steps_of(epochs: float, rows: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps of a run over so many rows: the schedule that all methods of a comparison share."""
    batches = math.ceil(rows / batch_size)
    return math.ceil(epochs * math.ceil(batches / accumulation))
