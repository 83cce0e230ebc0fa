"""Interleaving, ratios and distances against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.meter import Meter, judge, ratio
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.bilevel import Counts, Hypergradient

CPU = torch.device("cpu")


def settings(**fields: int) -> BenchmarkArguments:
    return BenchmarkArguments("unused", **{"repeats": 6, "warmup": 2} | fields)


def three() -> list[Row]:
    return [Row("one_step", {}, order) for order in ("a", "b", "c")]


def test_every_round_has_the_yardstick_and_all_rows() -> None:
    rows = three()
    plan = list(Meter(settings(), rows, CPU).plan)
    rounds = [plan[i : i + 4] for i in range(0, len(plan), 4)]
    assert [{measure for _, measure in one} for one in rounds] == [{"nothing"}] * 2 + [{"seconds"}] * 6 + [{"bytes"}]
    assert all({row for row, _ in one} == {None, *rows} for one in rounds)
    assert plan[0][0] is None
    timed = [tuple(rows.index(row) if row else -1 for row, _ in one) for one in rounds[2:-1]]
    assert len(set(timed)) > 3, "each timed round has an order of its own"


def test_the_seed_fixes_the_order() -> None:
    rows = three()
    first, again, other = (list(Meter(settings(seed=seed), rows, CPU).plan) for seed in (1, 1, 2))
    assert first == again != other


def test_a_row_that_fails_is_passed_over() -> None:
    rows = three()
    meter = Meter(settings(repeats=1, warmup=0), rows, CPU)
    seen = []
    while not meter.done:
        row, measure = meter.next()
        seen.append((row, measure))
        if row is rows[1]:
            rows[1].fail(RuntimeError("boom"))
        else:
            with meter.measuring(row, measure):
                torch.zeros(8)
    assert [row for row, _ in seen].count(rows[1]) == 1
    assert len(seen) == 7
    meter.fill(resident=0)
    assert (rows[1].time_ratio, rows[1].error) == (None, "RuntimeError: boom")
    assert rows[0].time_ratio is not None


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(Meter, "_now", lambda self: clock[0])
    rows = three()[:1]
    meter = Meter(settings(repeats=3, warmup=1), rows, CPU)
    while not meter.done:
        row, measure = meter.next()
        with meter.measuring(row, measure):
            clock[0] += 2.0 if row is None else 5.0
            held = torch.zeros(1 if row is None else 2**20)
            del held
    meter.fill(resident=2**21)
    assert [len(seconds) for seconds in meter.seconds.values()] == [3, 3]
    assert rows[0].time_ratio == (2.5, 2.5, 2.5)
    assert meter.peak[rows[0]] - 2**22 == pytest.approx(meter.peak[None], abs=2**16)
    assert rows[0].peak_mib == meter.peak[rows[0]] / 2**20
    assert rows[0].memory_increment_mib == rows[0].peak_mib - 2
    assert rows[0].time == 2.5


def test_ratio_is_that_of_medians() -> None:
    assert ratio([10.0, 2.0, 6.0, 4.0, 8.0], [100.0, 1.0, 2.0]) == (3.0, 2.0, 4.0)
    assert ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


def draw(*numbers: float) -> Hypergradient:
    return Hypergradient({"lam": torch.tensor(numbers)}, torch.zeros(()), counts=Counts(forwards=3))


def test_distances_of_one_estimate() -> None:
    (row,) = three()[:1]
    judge(row, [draw(3.0, 4.0)], {"lam": torch.tensor([5.0, 0.0])})
    assert row.cosine == pytest.approx(0.6)
    assert row.relative_error == pytest.approx(math.hypot(-2, 4) / 5)
    assert row.noise_to_signal is None
    assert row.counts == Counts(forwards=3).as_dict()


def test_noise_to_signal_of_several() -> None:
    """Mean (2, 1): the signal along (1, 0) is 2; the variance over three draws is (1 + 9 + 1 + 1 + 0 + 4) / 2 = 8."""
    (row,) = three()[:1]
    judge(row, [draw(1.0, 4.0), draw(3.0, 0.0), draw(2.0, -1.0)], {"lam": torch.tensor([7.0, 0.0])})
    assert row.noise_to_signal == pytest.approx(8 / 4)
    assert row.cosine == pytest.approx((1 / math.sqrt(17) + 1 + 2 / math.sqrt(5)) / 3)


def test_zeros() -> None:
    (row,) = three()[:1]
    judge(row, [draw(0.0, 0.0)] * 2, {"lam": torch.tensor([1.0, 0.0])})
    assert (row.cosine, row.relative_error, row.noise_to_signal) == (0.0, 1.0, math.inf)
    with pytest.raises(ValueError, match="exact hypergradient is zero"):
        judge(row, [draw(1.0)], {"lam": torch.tensor([0.0])})
