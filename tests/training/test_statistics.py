"""Means with their intervals: against the t table and the textbook formula."""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
import pytest

from metaxl_evo.training.statistics import Interval, interval, paired_difference, spread

T_TABLE = {2: 12.706205, 3: 4.302653, 5: 2.776445, 10: 2.262157}  # two-sided, 95 %, by the number of values


@pytest.mark.parametrize("count", T_TABLE)
def test_the_interval_is_the_textbooks(count: int) -> None:
    values = np.random.default_rng(count).normal(3, 2, count)
    found = interval(values.tolist())
    mean = values.sum() / count
    half = T_TABLE[count] * sqrt(((values - mean) ** 2).sum() / (count - 1) / count)
    assert found == pytest.approx((mean, mean - half, mean + half), rel=1e-6)


def test_one_value_says_nothing_of_its_spread() -> None:
    assert interval([0.3]) == (0.3, -inf, inf)
    assert interval([0.3]).reading == "one value"


def test_equal_values_have_no_spread() -> None:
    assert interval([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)
    assert interval([0.0, 0.0]).reading == "tie"


@pytest.mark.parametrize(
    ("low", "high", "reading"),
    [(0.1, 0.3, "better"), (-0.3, -0.1, "worse"), (-0.1, 0.3, "tie"), (0.0, 0.3, "tie"), (-0.3, 0.0, "tie")],
)
def test_the_reading(low: float, high: float, reading: str) -> None:
    assert Interval((low + high) / 2, low, high).reading == reading


def test_differences_are_paired() -> None:
    """The spread between seeds is no spread of the difference."""
    baseline, values = [10.0, 50.0, 90.0], [11.0, 51.5, 91.1]
    found = paired_difference(values, baseline)
    assert found.mean == pytest.approx(1.2)
    half = T_TABLE[3] * sqrt((0.2**2 + 0.3**2 + 0.1**2) / 2 / 3)
    assert (found.low, found.high) == pytest.approx((1.2 - half, 1.2 + half), rel=1e-6)
    assert found.reading == "better"
    assert paired_difference(baseline, values).reading == "worse"
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])


def test_the_spread_is_the_sample_deviation() -> None:
    assert spread([1.0, 2.0, 6.0]) == "3.0 ± 2.6"  # sqrt(14 / 2) = 2.646
    assert spread([0.91234, 0.91234], 4) == "0.9123 ± 0.0000"
    assert spread([7.0]) == "7.0 ± 0.0"
