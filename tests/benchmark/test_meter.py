"""Interleaving, ratios and distances against numbers worked out by hand."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.meter import Meter, judge
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.bilevel import Counts, Hypergradient

CPU = torch.device("cpu")
BUSY = "import time\nwhile True:\n    sum(range(3_000_000))\n    time.sleep(0.2)"


def settings(**fields: int) -> BenchmarkArguments:
    return BenchmarkArguments("unused", **{"repeats": 6, "warmup": 2} | fields)


def three() -> list[Row]:
    return [Row("one_step", {}, order) for order in ("a", "b", "c")]


def test_a_timed_run_stands_between_two_of_the_yardstick() -> None:
    rows = three()
    plan = list(Meter(settings(), rows, CPU).plan)
    assert plan[:4] == [(None, "nothing"), *((row, "nothing") for row in rows)]
    timed = [row for row, measure in plan if measure == "seconds"]
    assert timed[::2] == [None] * 19
    rounds = [tuple(map(rows.index, timed[i : i + 6 : 2])) for i in range(1, 36, 6)]  # type: ignore[arg-type]
    assert all(set(one) == {0, 1, 2} for one in rounds)
    assert len(set(rounds)) > 3, "each timed round has an order of its own"
    assert plan[-4:] == [(None, "peak"), *((row, "peak") for row in rows)]


def test_the_seed_fixes_the_order() -> None:
    rows = three()
    first, again, other = (list(Meter(settings(seed=seed), rows, CPU).plan) for seed in (1, 1, 2))
    assert first == again != other


def test_a_row_that_fails_is_passed_over() -> None:
    rows, clock = three(), [0.0]
    meter = Meter(settings(repeats=1, warmup=0), rows, CPU, clock=lambda: clock[0])
    seen = []
    while not meter.done:
        row, measure = meter.next()
        seen.append((row, measure))
        if row is rows[1]:
            rows[1].fail(RuntimeError("boom"))
        else:
            with meter.measuring(row, measure):
                clock[0] += 1.0 if row is None else 3.0
                torch.zeros(8)
    assert [row for row, _ in seen].count(rows[1]) == 1
    assert len(seen) == 10
    meter.fill(resident=0)
    assert (rows[1].time_ratio, rows[1].error) == (None, "RuntimeError: boom")
    assert rows[0].time_ratio is not None


def test_what_is_measured() -> None:
    rows, clock = three()[:1], [0.0]
    meter = Meter(settings(repeats=3, warmup=1), rows, CPU, clock=lambda: clock[0])
    while not meter.done:
        row, measure = meter.next()
        with meter.measuring(row, measure):
            clock[0] += 2.0 if row is None else 5.0
            held = torch.zeros(1 if row is None else 2**20)
            if row is not None:
                held.add_(1).sum().item()
            del held
    meter.fill(resident=2**21)
    assert (rows[0].launch_ratio, rows[0].wait_increment) == (3, 1)
    assert (rows[0].plain_seconds, rows[0].untimed) == ((2.0, 2.0, 2.0), None)
    assert rows[0].time_ratio == (2.5, 2.5, 2.5)
    assert meter.peak[rows[0]] - 2**22 == pytest.approx(meter.peak[None], abs=2**16)
    assert rows[0].peak_mib == meter.peak[rows[0]] / 2**20
    assert rows[0].memory_increment_mib == rows[0].peak_mib - 2
    assert rows[0].time == 2.5


def timed(repeats: int, seconds: Sequence[float]) -> tuple[Row, Meter]:
    """One row, whose timed runs and those of the yardstick, in turn, take so long (the last ones for ever)."""
    rows, clock, left = three()[:1], [0.0], [*seconds]
    meter = Meter(settings(repeats=repeats, warmup=0), rows, CPU, clock=lambda: clock[0])
    while not meter.done:
        row, measure = meter.next()
        with meter.measuring(row, measure):
            torch.zeros(1)
            if measure == "seconds":
                clock[0] += left.pop(0) if len(left) > 2 else left[row is not None]
    meter.fill(resident=0)
    return rows[0], meter


def test_pairs() -> None:
    """A slow while between is left out; a slope within 15 % is evened out."""
    row, meter = timed(3, [1.0, 2.0, 1.1, 9.0, 3.0, 9.0, 3.1, 6.0, 2.9, 6.3, 3.1, 9.0, 3.1, 9.0])
    assert row.time == pytest.approx(2.0)
    assert meter.ratios[row] == pytest.approx([2 / 1.05, 9 / 3.05, 6 / 3.0])
    assert row.untimed is None


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        ([1.0, 2.0, 3.0, 2.0] * 20, "of 9 runs 0 stood between plain steps within 15% of each other, 2 are needed"),
        ([1.0, 0.65] * 20, "0.65 plain steps were measured, and one is in every run"),
    ],
)
def test_what_is_not_quoted(seconds: list[float], why: str) -> None:
    row, _ = timed(2, seconds)
    assert row.time_ratio is None
    assert why in str(row.untimed)


def test_a_load_that_comes_and_goes() -> None:
    """For spells as long as a few runs all takes up to four times as long; thrice the yardstick stays thrice."""
    spells = random.Random(0)
    factors = [factor for _ in range(40) for factor in [spells.choice([1.0, 1.0, 2.5, 4.0])] * spells.randint(1, 6)]
    row, _ = timed(9, [(1.0, 3.0)[index % 2] * factor for index, factor in enumerate(factors)])
    assert row.time == pytest.approx(3.0)


@pytest.mark.slow
def test_beside_another_job() -> None:
    """Of what takes thrice the yardstick either about that is quoted, or nothing; the job comes and goes."""
    here, rows = torch.randn(600, 600), three()[:1]
    meter = Meter(settings(repeats=5, warmup=3), rows, CPU)
    other = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        while not meter.done:
            row, measure = meter.next()
            with meter.measuring(row, measure):
                for _ in range(5 if row is None else 15):
                    here @ here
    finally:
        other.kill()
        other.wait()
    meter.fill(resident=0)
    assert (rows[0].time is None) == (rows[0].untimed is not None)
    assert rows[0].time is None or 2 < rows[0].time < 4.5
    assert rows[0].load is not None
    assert rows[0].load > 0


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
