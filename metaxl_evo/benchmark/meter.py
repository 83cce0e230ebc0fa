"""Interleaved measurements of rows against a yardstick, and their distance from the exact hypergradient."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Literal

import torch

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.memory import CudaPeakMemory, PeakMemory, live_tensors
from metaxl_evo.benchmark.rows import Row, Spread, standing
from metaxl_evo.bilevel import Hypergradient, Tree, tree

MIB = 2**20
Measure = Literal["nothing", "seconds", "bytes"]


class Meter:
    """A plan of runs, and what they took; None in a row's place is the yardstick, which takes part in every round.

    First rounds that are not timed, then `repeats` timed ones, each in an order of its own, so that what slows the
    machine down for a while slows all alike; memory last, in a round of its own, for counting it is slow.
    """

    def __init__(self, settings: BenchmarkArguments, rows: Sequence[Row], device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.seconds: dict[Row | None, list[float]] = defaultdict(list)
        self.peak: dict[Row | None, int] = {}
        self.plan: deque[tuple[Row | None, Measure]] = deque()
        shuffler = random.Random(settings.seed)
        rounds: dict[Measure, int] = {"nothing": settings.warmup, "seconds": settings.repeats, "bytes": 1}
        for measure in [measure for measure, count in rounds.items() for _ in range(count)]:
            order: list[Row | None] = [None, *rows]  # the yardstick first: it makes what is made once
            if measure == "seconds":
                shuffler.shuffle(order)
            self.plan.extend((row, measure) for row in order)

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
        if measure == "bytes":
            with CudaPeakMemory(self.device) if self.device.type == "cuda" else PeakMemory(live_tensors()) as memory:
                yield
            self.peak[row] = memory.peak
            return
        start = self._now()
        yield
        if measure == "seconds":
            self.seconds[row].append(self._now() - start)

    def fill(self, resident: int) -> None:
        """Write what was measured into the rows that have not failed; `resident` bytes are there at any time."""
        for row in standing(self.rows):
            row.time_ratio = ratio(self.seconds[row], self.seconds[None])
            row.memory_ratio = self.peak[row] / self.peak[None]
            row.memory_increment_mib = (self.peak[row] - resident) / MIB
            row.peak_mib = self.peak[row] / MIB

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def ratio(seconds: Sequence[float], yardstick: Sequence[float]) -> Spread:
    """Median and quartiles of `seconds`, over the yardstick's median."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * [seconds[0]]
    unit = statistics.median(yardstick)
    return Spread(median / unit, q1 / unit, q3 / unit)


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
    row.relative_error = statistics.fmean(tree.norm(tree.add(draw.grads, exact, -1.0)) / length for draw in draws)
    if row.counts is None:
        row.counts = draws[0].counts.as_dict()
    if len(draws) > 1:
        mean = tree.scale(reduce(tree.add, [draw.grads for draw in draws]), 1 / len(draws))
        variance = sum(tree.norm(tree.add(draw.grads, mean, -1.0)) ** 2 for draw in draws) / (len(draws) - 1)
        signal = statistics.fmean(along)
        row.noise_to_signal = variance / signal**2 if signal else math.inf
