"""Intervals, tests and corrections: against scipy, statsmodels, full enumerations and the share of covered truths."""

from __future__ import annotations

from itertools import product
from math import inf, sqrt

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.multitest import multipletests

from metaxl_evo.experiments.statistics import (
    Array,
    holm,
    interval,
    paired_difference,
    permutation_p,
    pseudovalues,
    smallest_p,
    spread,
)

T_TABLE = {2: 12.706205, 3: 4.302653, 5: 2.776445, 10: 2.262157}  # two-sided, 95 %, by the number of values


@pytest.mark.parametrize("count", T_TABLE)
def test_the_interval_is_the_textbooks(count: int) -> None:
    values = np.random.default_rng(count).normal(3, 2, count)
    mean = values.sum() / count
    half = T_TABLE[count] * sqrt(((values - mean) ** 2).sum() / (count - 1) / count)
    assert interval(values.tolist()) == pytest.approx((mean, mean - half, mean + half), rel=1e-6)


def test_values_without_a_spread() -> None:
    assert interval([0.3]) == (0.3, -inf, inf)
    assert interval([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)


def test_the_spread_is_the_sample_deviation() -> None:
    assert spread([1.0, 2.0, 6.0]) == "3.0 ± 2.6"  # sqrt(14 / 2) = 2.646
    assert spread([0.91234, 0.91234], 4) == "0.9123 ± 0.0000"
    assert spread([7.0]) == "7.0 ± 0.0"


def of_values(values: Array) -> Array:
    """Outcomes whose score is the mean of the values (..., N)."""
    return np.stack([values, np.ones_like(values)], -1)


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_without_examples_it_is_the_paired_t_test(seeds: int) -> None:
    scores, baseline = np.random.default_rng(seeds).normal(size=(2, seeds))
    found, expected = paired_difference([scores], [baseline]), stats.ttest_rel(scores, baseline)
    assert found.interval is not None
    assert found.interval[1:] == pytest.approx(expected.confidence_interval())
    assert found.p == pytest.approx(expected.pvalue)


def test_of_equal_seeds_it_is_the_t_test_over_examples() -> None:
    one, other = np.random.default_rng(0).normal(size=(2, 30))
    outcomes = of_values(np.stack([[one] * 4, [other] * 4]))
    found = paired_difference([[one.mean()] * 4], [[other.mean()] * 4], [outcomes])
    expected = stats.ttest_rel(one, other)
    assert found.interval is not None
    assert found.interval[1:] == pytest.approx(expected.confidence_interval())
    assert found.p == pytest.approx(expected.pvalue)


def crossed(
    generator: np.random.Generator, seeds: int, examples: int, mix: tuple[float, float, float], binary: bool
) -> Array:
    """Values (2, seeds, examples) of two equal methods; `mix`: deviations of seeds, of examples, and of the rest."""
    seed, example, rest = mix
    values = seed * generator.normal(size=(2, seeds, 1)) + example * generator.normal(size=(2, 1, examples))
    values = values + rest * generator.normal(size=(2, seeds, examples))
    return (values > generator.normal(size=examples)).astype(float) if binary else values


def test_the_standard_error_is_that_of_crossed_random_effects() -> None:
    """Restricted maximum likelihood and analysis of variance agree on a balanced table."""
    values = crossed(np.random.default_rng(1), 5, 25, (0.3, 0.7, 1.0), binary=False)
    found = paired_difference(*values.mean(-1)[:, None], [of_values(values)])
    seed, example = np.indices(values.shape[1:])
    table = pd.DataFrame({"y": (values[0] - values[1]).ravel(), "seed": seed.ravel(), "example": example.ravel()})
    parts = {"seed": "0 + C(seed)", "example": "0 + C(example)"}
    fit = MixedLM.from_formula("y ~ 1", table, groups=np.ones(len(table)), vc_formula=parts).fit()
    assert found.mean == pytest.approx(fit.fe_params.iloc[0])
    assert found.standard_error == pytest.approx(fit.bse_fe.iloc[0], rel=1e-4)


NOTHING_ELSE = {"seeds": (1.0, 0.0, 0.0), "examples": (0.0, 1.0, 0.0), "the rest": (0.0, 0.0, 1.0)}


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("mix", [*NOTHING_ELSE.values(), (0.15, 1.0, 1.0)], ids=[*NOTHING_ELSE, "all"])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_95_percent_are_covered(seeds: int, mix: tuple[float, float, float], binary: bool) -> None:
    """The true difference is 0; of 1000 intervals 930 to 980 hold it."""
    generator, covered = np.random.default_rng(2026), 0
    for _ in range(1000):
        values = crossed(generator, seeds, 40, mix, binary)
        found = paired_difference(*values.mean(-1)[:, None], [of_values(values)]).interval
        covered += found is not None and found.low <= 0 <= found.high
    assert 930 <= covered <= 980, covered


def test_the_p_value_is_the_level_whose_interval_ends_at_zero() -> None:
    values = crossed(np.random.default_rng(2), 4, 20, (0.3, 1.0, 1.0), binary=False)
    scores, baseline = values.mean(-1)[:, None]
    bounds = paired_difference(scores, baseline, [of_values(values)]).interval
    assert bounds is not None
    for end in (bounds.low, bounds.high):
        assert paired_difference(scores - end, baseline, [of_values(values)]).p == pytest.approx(0.05)


def test_cases_share_their_seeds_and_not_their_examples() -> None:
    """A case counted four times: as many seeds as before, and four times as many examples."""
    values = crossed(np.random.default_rng(3), 4, 20, (0.3, 1.0, 1.0), binary=False)
    scores, baseline = values.mean(-1)[:, None]
    one = paired_difference(scores, baseline, [of_values(values)])
    four = paired_difference(np.repeat(scores, 4, 0), np.repeat(baseline, 4, 0), [of_values(values)] * 4)
    assert (four.pairs, four.mean, four.seed_variance) == pytest.approx((4, one.mean, one.seed_variance))
    assert four.example_variance == pytest.approx(one.example_variance / 4)
    assert four.example_freedom == 4 * 19


def test_examples_never_make_an_interval_narrower() -> None:
    """What one seed gains on an example the other loses there: less than chance is left of the examples."""
    gains = np.random.default_rng(6).normal(size=20)
    values = np.stack([[gains, 1 - gains], np.zeros((2, 20))])
    found = paired_difference(*values.mean(-1)[:, None], [of_values(values)])
    assert found.interval == paired_difference(*values.mean(-1)[:, None]).interval


@pytest.mark.parametrize(
    ("scores", "baseline", "bounds"),
    [
        ([0.7, 0.8], [0.7, 0.8], (0, 0, 0)),
        ([0.7, 0.8], [0.65, 0.75], None),  # in floating point these differences are not equal
        ([0.1 + 0.2, 0.5], [0.3, 0.5], (0, 0, 0)),  # nor are these 0
        ([0.7], [0.6], None),
    ],
)
def test_without_a_spread_there_is_no_test(
    scores: list[float], baseline: list[float], bounds: tuple[float, ...] | None
) -> None:
    found = paired_difference([scores], [baseline])
    assert (found.interval, found.p) == (bounds, None)


def test_a_p_value_of_almost_nothing() -> None:
    """Of equal seeds and two thousand examples: beyond what the t distribution can invert."""
    values = np.stack([np.tile(np.arange(2000) % 2 + 9.0, (3, 1)), np.zeros((3, 2000))])
    assert paired_difference(*values.mean(-1)[:, None], [of_values(values)]).p == 1e-12


def test_pseudovalues_are_those_of_leaving_one_out() -> None:
    outcomes = np.random.default_rng(4).uniform(0.1, 1, (2, 6, 2))

    def ratio(rows: Array) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum())

    expected = [[6 * ratio(one) - 5 * ratio(np.delete(one, row, 0)) for row in range(6)] for one in outcomes]
    assert pseudovalues(outcomes) == pytest.approx(np.array(expected))


def test_the_jackknife_agrees_with_the_bootstrap() -> None:
    """Of an F1: twice the hits over what was found and what was to be found."""
    generator = np.random.default_rng(5)
    gold, found = generator.poisson(2, (2, 400))
    outcomes = np.stack([2.0 * generator.binomial(np.minimum(gold, found), 0.8), gold + found], -1)
    resampled = stats.bootstrap(
        (outcomes[:, 0], outcomes[:, 1]),
        lambda top, bottom, axis: top.sum(axis) / bottom.sum(axis),
        paired=True,
        method="basic",
        random_state=5,
    )
    assert stats.sem(pseudovalues(outcomes)) == pytest.approx(resampled.standard_error, rel=0.03)


@pytest.mark.parametrize("outcomes", [[[1.0, 1.0]], [[1.0, 2.0], [0.0, 0.0]]])
def test_a_score_of_one_example_is_refused(outcomes: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="all in one test example"):
        pseudovalues(np.array(outcomes))


@pytest.mark.parametrize(
    "tenths",
    [
        [1, 2],
        [1, 2, -3],
        [3, 3, 3],
        [0, 0, 0],
        [1, 2, 3, -6, 2],
        [4, -1, 5, 2, 7, 3],
        [-2, -6, 9, -3, 4, -2],
        [1, 1, 1, 1, 1, -1, 9, 2],
    ],
)
def test_the_permutation_test_counts_every_sign_flip(tenths: list[int]) -> None:
    """Here in whole numbers: tenths are not exact in floating point, and ties must be seen."""
    observed = abs(sum(tenths))
    flips = [abs(np.dot(tenths, signs)) for signs in product((1, -1), repeat=len(tenths))]
    expected = sum(flip >= observed for flip in flips) / len(flips)
    assert permutation_p(np.array(tenths) / 10) == pytest.approx(expected)


@pytest.mark.parametrize("pairs", [2, 6, 10, 16, 40])
def test_the_smallest_p_is_that_of_one_sign(pairs: int) -> None:
    assert permutation_p(np.linspace(1, 2, pairs)) == smallest_p(pairs)
    assert smallest_p(pairs) == pytest.approx(max(2.0 ** (1 - pairs), 2 / 65537))


@pytest.mark.parametrize("p", [[], [0.2], [0.01, 0.04, 0.03], [0.5, 0.5, 0.9, 0.001], [0.02, 0.02, 0.03, 0.04]])
def test_holm_is_that_of_statsmodels(p: list[float]) -> None:
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist() if p else [])
