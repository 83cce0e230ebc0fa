"""Learning rate schedules that transformers does not have."""

from __future__ import annotations

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
