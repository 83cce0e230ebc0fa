"""Differences of runs and how they read, from records written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.multitest import multipletests

from metaxl_evo.experiments.comparison import AVERAGE, Comparison, Difference
from metaxl_evo.experiments.records import Record

UP, MIXED = [0.02, 0.021, 0.019, 0.022, 0.018, 0.02], [0.02, -0.01, 0.03, -0.02, 0.01, 0.0]


def record(run: str, case: str, seed: int, score: float, **known: Any) -> Record:
    return Record(run, case, seed, Path(run, case, str(seed)), scores={"f1": score}, **known)


def records(run: str, case: str, scores: Sequence[float]) -> list[Record]:
    return [record(run, case, seed, score) for seed, score in enumerate(scores)]


def with_examples(run: str, case: str, seed: int, hits: ArrayLike) -> Record:
    """With the outcomes of its test examples, 0 or 1."""
    outcomes = np.stack([np.asarray(hits, float), np.ones(np.size(hits))], -1)
    return record(run, case, seed, float(np.mean(hits)), outcomes={"f1": outcomes})


def failed(run: str, case: str, seed: int) -> Record:
    return Record(run, case, seed, Path(run, case, str(seed)), error="killed")


def comparison(rows: Sequence[Record], **choices: Any) -> Comparison:
    return Comparison(rows, "f1", {"f1": "%", "seconds": "s"}, ["base"], **choices)


def found(rows: Sequence[Record], **choices: Any) -> dict[tuple[str, str], Difference]:
    return {(one.run, one.case): one for one in comparison(rows, **choices).differences("base")}


def above(run: str, differences: Sequence[float]) -> list[Record]:
    return records(run, "sw", [0.5 + one for one in differences])


BASE = above("base", [0.0] * 6)


def test_the_long_table() -> None:
    both = Record("a", "rw", 3, Path("a"), scores={"f1": 0.25, "seconds": 9.0, "hidden": 1.0})
    table = comparison([record("base", "sw", 1, 0.5), failed("base", "rw", 1), both]).frame()
    assert table.columns.tolist() == ["run", "case", "seed", "score", "value"]
    assert table.values.tolist() == [
        ["base", "sw", 1, "f1", 50.0],
        ["a", "rw", 3, "f1", 25.0],
        ["a", "rw", 3, "seconds", 9.0],
    ]


def test_the_average_is_taken_within_a_seed() -> None:
    """Two languages and three seeds are three pairs, not six."""
    ours, theirs = [[0.53, 0.62, 0.58], [0.31, 0.26, 0.35]], [[0.50, 0.60, 0.55], [0.30, 0.20, 0.30]]
    rows = [*records("a", "sw", ours[0]), *records("a", "rw", ours[1])]
    rows += [*records("base", "sw", theirs[0]), *records("base", "rw", theirs[1])]
    average = found(rows)["a", AVERAGE]
    expected = stats.ttest_rel(*(100 * np.mean(scores, 0) for scores in (ours, theirs)))
    assert (average.low, average.high) == pytest.approx(expected.confidence_interval())
    assert (average.pairs, average.mean, average.smallest_p) == (3, pytest.approx((2 + 4 + 4) / 3), 0.25)


def test_the_order_is_that_of_the_plan_and_pairs_go_by_seed() -> None:
    rows = [
        record(run, case, seed, seed / 10 + (run == "b") * 0.05)
        for run in ("b", "base", "a")
        for case in "yx"
        for seed in (4, 2, 3)
    ]
    one = comparison(rows)
    assert (one.runs, one.cases, one.seeds) == (["b", "base", "a"], ["y", "x"], [4, 2, 3])
    places = [(difference.run, difference.case) for difference in one.differences("base")]
    assert places == [(run, case) for run in ("b", "a") for case in ("y", "x", AVERAGE)]
    swapped = found([*rows[:6], *rows[6:12][::-1], *rows[12:]])
    assert swapped == found(rows)
    assert swapped["b", "y"].mean == pytest.approx(5)


def test_a_study_of_one_case_has_no_average() -> None:
    assert found([*BASE, *above("a", UP)]).keys() == {("a", "sw")}


@pytest.mark.parametrize(
    ("differences", "choices", "reading"),
    [
        (UP, {}, "better"),
        (UP, {"greater_is_better": False}, "worse"),
        (-np.array(UP), {}, "worse"),
        (-np.array(UP), {"greater_is_better": False}, "better"),
        (MIXED, {}, "undecided"),
        (MIXED, {"margin": 5}, "tie"),  # in points
        (MIXED, {"margin": 2}, "undecided"),  # the interval is wider
        (UP, {"margin": 5}, "tie"),  # above 0, and too little to matter
        (UP, {"margin": 2.1}, "better"),  # the interval ends at 2.15
        (-np.array(UP), {"margin": 2.1}, "worse"),
        ([0.0] * 6, {}, "undecided"),
        ([0.0] * 6, {"margin": 0.1}, "tie"),
        ([0.02] * 6, {}, "undecided"),  # nothing is known of the spread
        (UP[:2], {}, "better"),
        (UP[:1], {}, "undecided"),
    ],
)
def test_the_reading(differences: Sequence[float], choices: dict[str, Any], reading: str) -> None:
    assert found([*BASE, *above("a", differences)], **choices)["a", "sw"].reading == reading


def test_equal_runs_differ_by_nothing() -> None:
    one = found([*BASE, *above("a", [0.0] * 6)])["a", "sw"]
    assert (one.mean, one.low, one.high, one.p, one.adjusted_p) == (0, 0, 0, 1, 1)


def test_one_pair_says_nothing() -> None:
    one = found([*BASE, *above("a", UP[:1])])["a", "sw"]
    assert (one.pairs, one.mean) == (1, pytest.approx(2))
    assert {one.low, one.high, one.p, one.smallest_p, one.adjusted_p} == {None}


def test_p_values_are_corrected_among_the_runs_of_a_case() -> None:
    generator = np.random.default_rng(0)
    runs = {name: above(name, generator.normal(0.01, 0.008, 6)) for name in "abcd"}
    others = records("a", "rw", UP) + records("base", "rw", [0.0] * 6)
    together = found([*BASE, *(one for rows in runs.values() for one in rows), *others])
    for name, rows in runs.items():
        alone = found([*BASE, *rows])[name, "sw"]
        assert together[name, "sw"].p == alone.p == alone.adjusted_p
    corrected = multipletests([together[name, "sw"].p for name in runs], method="holm")[1]
    assert [together[name, "sw"].adjusted_p for name in runs] == pytest.approx(corrected.tolist())
    assert together["a", "rw"].adjusted_p == together["a", "rw"].p == 1 / 32


def test_a_reading_is_corrected_too() -> None:
    """p = 0.03 by the t test: better alone, not as one of two."""
    differences = 0.01 * (stats.zscore([1, 2, 3, 4, 5, 6], ddof=1) + stats.t.isf(0.015, 5) / np.sqrt(6))
    rows = [*BASE, *above("a", differences)]
    assert found(rows)["a", "sw"].reading == "better"
    assert found([*rows, *above("b", MIXED)])["a", "sw"].reading == "undecided"


def test_significance_is_not_claimed_below_six_pairs() -> None:
    five = found([*BASE, *above("a", UP[:5])])["a", "sw"]
    assert (five.p, five.smallest_p, five.adjusted_p) == (1 / 16, 1 / 16, None)


def test_what_failed_has_no_pair() -> None:
    """Of the average only seed 2 is left, for which both cases of both runs are there."""
    rows = [
        record(run, case, seed, 0.5 + (run == "a") * seed / 10)
        for run in ("base", "a")
        for case in ("sw", "rw")
        for seed in range(3)
    ]
    rows[0] = failed("base", "sw", 0)
    rows[10] = failed("a", "rw", 1)
    rows += [failed("never", case, 0) for case in ("sw", "rw")]
    assert {place: (one.pairs, round(one.mean, 9)) for place, one in found(rows).items()} == {
        ("a", "sw"): (2, 15),
        ("a", "rw"): (2, 10),
        ("a", AVERAGE): (1, 20),
    }


def test_examples_count_where_all_runs_have_them() -> None:
    generator = np.random.default_rng(1)
    plan = [(run, case, seed) for run in ("base", "a") for case in ("sw", "rw") for seed in range(3)]
    easy = {"sw": generator.uniform(size=50), "rw": generator.uniform(size=40)}
    rows = [
        with_examples(*key, generator.uniform(size=easy[key[1]].size) < easy[key[1]] + 0.1 * (key[0] == "a"))
        for key in plan
    ]
    whole = found(rows)
    rows[-1] = record(*plan[-1], rows[-1].scores["f1"])
    partly = found(rows)
    without = found([record(*key, row.scores["f1"]) for key, row in zip(plan, rows, strict=True)])
    assert partly["a", "sw"] == whole["a", "sw"] != without["a", "sw"]
    assert partly["a", "rw"] == without["a", "rw"] != whole["a", "rw"]
    assert partly["a", AVERAGE] == without["a", AVERAGE] != whole["a", AVERAGE]


def test_the_examples_are_in_the_unit_of_the_table() -> None:
    """Equal seeds: the interval is the t interval over the examples, in points."""
    hits = {"base": np.arange(20) % 2, "a": np.arange(20) % 3 > 0}
    one = found([with_examples(run, "sw", seed, hits[run]) for run in hits for seed in range(2)])["a", "sw"]
    expected = stats.ttest_rel(100 * hits["a"], 100 * hits["base"])
    assert (one.low, one.high) == pytest.approx(expected.confidence_interval())


@pytest.mark.parametrize(
    ("rows", "choices", "message"),
    [
        ([*BASE, record("base", "sw", 5, 0.1)], {}, "base/sw/5 and base/sw/5 are the same run, case and seed"),
        ([*BASE, record("a", "sw", 0, float("nan"))], {}, "a/sw/0: its f1 is nan"),
        ([*BASE, record("a", AVERAGE, 0, 0.1)], {}, "no case can be named 'average'"),
        (
            [with_examples("base", "sw", 0, [1, 0]), with_examples("a", "sw", 0, [1])],
            {},
            "a/sw/0 was tested on 1 .* base/sw/0 on 2",
        ),
        ([record("base", "sw", 0, 0.5, outcomes={"f1": np.array([[1.0, 3.0]])})], {}, "do not give its f1"),
        (BASE, {"margin": 0.0}, "margin 0.0 must be above 0"),
        (BASE, {"score": "seconds"}, "unknown score 'seconds': Valid: f1"),
        (BASE, {"score": "f2"}, "unknown score 'f2': Valid: f1, seconds"),
        (BASE, {"baseline": "bass"}, "unknown baseline 'bass': did you mean 'base'"),
    ],
)
def test_what_cannot_be_right_is_refused(rows: Sequence[Record], choices: dict[str, Any], message: str) -> None:
    score, baseline = choices.pop("score", "f1"), choices.pop("baseline", "base")
    with pytest.raises(ValueError, match=message) as error:
        Comparison(rows, score, {"f1": "%", "seconds": "s"}, ["base"], **choices).differences(baseline)
    assert "\n" not in str(error.value)
