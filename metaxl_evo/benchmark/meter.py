"""Paired measurements of rows against a yardstick, and their distance from the exact hypergradient."""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Literal

import torch

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.launches import Launches
from metaxl_evo.benchmark.memory import CudaPeakMemory, PeakMemory, live_tensors
from metaxl_evo.benchmark.rows import Row, Spread, standing
from metaxl_evo.bilevel import Hypergradient, Tree, tree

MIB = 2**20
Measure = Literal["nothing", "seconds", "peak"]
APART = 0.15  # by how much the plain steps before and after a run may differ
PATIENCE = 4  # times the repeats: how often a row is run before it is given up


class Meter:
    """A plan of runs, and what they took; None in a row's place is the yardstick.

    First rounds that are not timed, then `repeats` timed ones, each in an order of its own. A timed run stands between
    two of the yardstick, and its ratio is to their mean: what slows the machine down for a while slows all three.
    Where these two are too far apart the run is repeated. Memory and launches last, in a round of their own, for
    counting is slow.

    Args:
        clock: seconds.
    """

    def __init__(
        self,
        settings: BenchmarkArguments,
        rows: Sequence[Row],
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.rows, self.device, self.repeats, self._clock = rows, device, settings.repeats, clock
        self.ratios: dict[Row, list[float]] = defaultdict(list)
        self.plain: list[float] = []
        self.peak: dict[Row | None, int] = {}
        self.launches: dict[Row | None, Launches] = {}
        self.plan: deque[tuple[Row | None, Measure]] = deque()
        self._tried, self._loads = Counter[Row](), [0.0]
        self._between: tuple[Row, float] | None = None  # the run since the last one of the yardstick
        everyone: list[Row | None] = [None, *rows]  # the yardstick first: it makes what is made once
        self.plan.extend((row, "nothing") for _ in range(settings.warmup) for row in everyone)
        self.plan.append((None, "seconds"))
        shuffler = random.Random(settings.seed)
        for _ in range(settings.repeats):
            for row in shuffler.sample(rows, len(rows)):
                self.plan.extend([(row, "seconds"), (None, "seconds")])
        self.plan.extend((row, "peak") for row in everyone)

    @property
    def done(self) -> bool:
        """Whether no run is left but those of rows that have failed."""
        return all(row is not None and row.error is not None for row, _ in self.plan)

    def next(self) -> tuple[Row | None, Measure]:
        """The next run of the plan, over those of rows that have failed."""
        row, measure = self.plan.popleft()
        return (row, measure) if row is None or row.error is None else self.next()

    @contextmanager
    def measuring(self, row: Row | None, measure: Measure) -> Iterator[None]:
        """One run of `row`."""
        if measure == "peak":
            counted = CudaPeakMemory(self.device) if self.device.type == "cuda" else PeakMemory(live_tensors())
            with counted as memory, Launches() as launches:
                yield
            self.peak[row], self.launches[row] = memory.peak, launches
            return
        start = self._now()
        yield
        if measure == "seconds":
            self._note(row, self._now() - start)

    def fill(self, resident: int) -> None:
        """Write what was measured into the rows that have not failed; `resident` bytes are there at any time."""
        plain = self.launches[None]
        for row in standing(self.rows):
            self._quote(row)
            row.memory_ratio = self.peak[row] / self.peak[None]
            row.memory_increment_mib = (self.peak[row] - resident) / MIB
            row.peak_mib = self.peak[row] / MIB
            row.launch_ratio = self.launches[row].launched.total() / plain.launched.total()
            row.wait_increment = self.launches[row].waited.total() - plain.waited.total()

    def _quote(self, row: Row) -> None:
        """The row's time, or why there is none; a row's run has a plain one in it, and takes no less."""
        row.plain_seconds, row.load = spread(self.plain), max(self._loads)
        found = self.ratios[row]
        if len(found) < self.repeats:
            row.untimed = (
                f"no time: of {self._tried[row]} runs {len(found)} stood between plain steps within {APART:.0%} of "
                f"each other, {self.repeats} are needed: run nothing else beside the benchmark"
            )
        elif statistics.median(found) < 1:
            row.untimed = (
                f"no time: {statistics.median(found):.2f} plain steps were measured, and one is in every run: "
                "run nothing else beside the benchmark, or raise repeats"
            )
        else:
            row.time_ratio = spread(found)

    def _note(self, row: Row | None, seconds: float) -> None:
        """A timed run; one of the yardstick closes the pair around the run before it."""
        if hasattr(os, "getloadavg"):
            self._loads.append(os.getloadavg()[0])
        if row is not None:
            self._between = (row, seconds)
            return
        self.plain.append(seconds)
        if self._between is not None:
            self._pair(*self._between, *self.plain[-2:])
            self._between = None

    def _pair(self, row: Row, seconds: float, before: float, after: float) -> None:
        self._tried[row] += 1
        if abs(before - after) <= APART * min(before, after):
            self.ratios[row].append(2 * seconds / (before + after))
        elif self._tried[row] < PATIENCE * self.repeats:
            self.plan.extendleft([(None, "seconds"), (row, "seconds")])

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return Spread(median, q1, q3)


def judge(row: Row, draws: Sequence[Hypergradient], exact: Tree) -> None:
    """Write into `row` how near its estimates are to the exact hypergradient, and how much they scatter around it.

    The signal is the draws' common component along the exact hypergradient: their mean's own norm would be mostly
    noise, whose variance is hundreds of times the signal. The cosine of an estimate that is zero is 0.

    Raises:
        ValueError: where the exact hypergradient is zero.
    """
    length = tree.norm(exact)
    if length == 0:
        raise ValueError("the exact hypergradient is zero here: there is nothing to compare with")
    along = [float(tree.dot(draw.grads, exact)) / length for draw in draws]
    row.cosine = statistics.fmean(a / (tree.norm(draw.grads) or 1.0) for a, draw in zip(along, draws, strict=True))
    row.relative_error = statistics.fmean(relative_error(draw.grads, exact) for draw in draws)
    if row.counts is None:
        row.counts = draws[0].counts.as_dict()
    if len(draws) > 1:
        mean = tree.scale(reduce(tree.add, [draw.grads for draw in draws]), 1 / len(draws))
        variance = sum(tree.norm(tree.add(draw.grads, mean, -1.0)) ** 2 for draw in draws) / (len(draws) - 1)
        signal = statistics.fmean(along)
        row.noise_to_signal = variance / signal**2 if signal else math.inf


def relative_error(found: Tree, expected: Tree) -> float:
    """|found - expected| / |expected|."""
    return tree.norm(tree.add(found, expected, -1.0)) / tree.norm(expected)
