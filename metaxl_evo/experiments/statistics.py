"""Spreads and intervals beside every number that is reported over seeds, languages or episodes."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from statistics import fmean, stdev
from typing import NamedTuple

from scipy import stats


class Interval(NamedTuple):
    """A mean with its 95 % t-interval, infinite for a single value."""

    mean: float
    low: float
    high: float

    @property
    def reading(self) -> str:
        """Of a difference: `better`, `worse`, a `tie` (the interval holds zero), or `one value`, which says none."""
        if not isfinite(self.low):
            return "one value"
        if self.low <= 0 <= self.high:
            return "tie"
        return "better" if self.low > 0 else "worse"


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and its 95 % t-interval."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, -inf, inf)
    if stdev(values) == 0:  # scipy would divide by it
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    return Interval(mean, float(low), float(high))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean difference between two methods run on the same seeds, in the same order."""
    return interval([value - other for value, other in zip(values, baseline, strict=True)])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`mean ± standard deviation`."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.{digits}f} ± {deviation:.{digits}f}"
