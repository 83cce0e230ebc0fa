"""Live diagnostics of learned weights: how far they spread, on how many examples they rest, and which way they go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

NEAR = 0.01  # of a bound
LEAST = 0.02  # a mean weight below it hardly trains
FEW = 0.1  # a share of examples
MOST = 0.95
UPHILL, SPREAD = 0.3, 0.05  # a correlation with the loss, of weights that spread so far
LABELS = ("right", "wrong")  # as the log tells them apart, where it is known which are
COLOURS = {"right": "C0", "wrong": "C3", "all": "C0"}
PATIENCE = {"drift": 3}  # logs in a row, of what chance makes at the start; of other trouble one
MEAN, STD, EFFECTIVE, CORRELATION = (f"weights/{one}" for one in ("mean", "std", "effective", "loss_correlation"))
DOMAIN, WEIGHT, LOSS, SHARE = "domain_", "domain_weight/", "domain_loss/", "domain_share/"
LOW, HIGH = "weights/at_floor", "weights/at_one"


class Watch:
    """Sums over the training items since the last log; those of several processes add up.

    Args:
        domains: the names of the domains whose losses are told apart.
        floor: the least weight that there can be.
        relative: weights are 1 on average by construction: that they are near 1 says nothing, and it is not told.
    """

    def __init__(self, domains: Sequence[str] = (), floor: float = 0.0, *, relative: bool = False) -> None:
        self.domains, self.floor, self.relative = list(domains), 0.0 if relative else floor, relative
        self.sums: Tensor | None = None

    def note(self, weights: Tensor, losses: Tensor, domains: Tensor | None = None) -> None:
        """Add items: weights, losses and domain numbers, each (N,)."""
        w, x = weights.detach().double(), losses.detach().double()
        low, high = w < self.floor + NEAR, (w > 1 - NEAR) & (w <= 1)
        moments = [torch.ones_like(w), w, w * w, x, x * x, w * x, low.double(), high.double()]
        sums = torch.stack([one.sum() for one in moments])
        if domains is not None and self.domains:
            per = torch.zeros(3, len(self.domains), dtype=w.dtype, device=w.device)
            per.index_add_(1, domains, torch.stack([x, w, torch.ones_like(w)]))
            sums = torch.cat([sums, per.flatten()])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, over_processes: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """What was seen since the last call, for the log; a domain of which nothing was seen is left out.

        Args:
            over_processes: the sum over them.
        """
        if self.sums is None:
            return {}
        sums, self.sums = over_processes(self.sums).tolist(), None
        if not sums[0]:  # no item was labelled
            return {}
        facts = _facts(*sums[:8])
        if self.relative:
            del facts[HIGH]
        return facts | self._of_domains(sums[8:])

    def _of_domains(self, sums: Sequence[float]) -> dict[str, float]:
        """Mean loss and weight of a domain's items, and the share of all weight that these had."""
        size, found, whole = len(self.domains), dict[str, float](), sum(sums[len(self.domains) : -len(self.domains)])
        for name, loss, weight, count in zip(self.domains, sums, sums[size:], sums[2 * size :], strict=False):
            if count:
                found |= {f"{LOSS}{name}": loss / count, f"{WEIGHT}{name}": weight / count}
                found |= {f"{SHARE}{name}": weight / whole} if whole else {}
        return found


def _facts(n: float, w: float, ww: float, x: float, xx: float, wx: float, low: float, high: float) -> dict[str, float]:
    mean, spread = w / n, max(ww / n - (w / n) ** 2, 0.0) ** 0.5
    deviation = max(xx / n - (x / n) ** 2, 0.0) ** 0.5
    found = {MEAN: mean, STD: spread, EFFECTIVE: w * w / (n * ww) if ww else 0.0, LOW: low / n, HIGH: high / n}
    if spread > 1e-6 and deviation > 1e-6:  # else there is nothing to correlate
        found[CORRELATION] = (wx / n - mean * x / n) / (spread * deviation)
    return found


def advice(facts: Mapping[str, float], of_loss: bool = False) -> Iterator[tuple[str, str]]:
    """Kinds of trouble that these facts show, each with a line of advice.

    Args:
        of_loss: the weigher reads the loss, so that a slope is its own doing, however small.
    """
    slower = "lower meta_learning_rate, or set a floor"
    mean, effective, correlation = facts[MEAN], facts[EFFECTIVE], facts.get(CORRELATION, 0.0)
    at_one = facts.get(HIGH, 0.0)
    if facts[LOW] > MOST or mean < LEAST:
        yield "collapsed", f"the weights have collapsed (their mean is {mean:.1e}), the base hardly trains: {slower}"
    elif effective < FEW:
        yield "few", f"the weights rest on {effective:.1%} of the examples: {slower}, or give more clean examples"
    if at_one > MOST:
        yield "saturated", f"{at_one:.0%} of the weights are at 1, as without a weigher: lower meta_learning_rate"
    if correlation > UPHILL and facts[STD] > SPREAD:
        yield (
            "uphill",
            (
                f"the weights grow with the loss (correlation {correlation:.2f}), and wrong labels have large losses: "
                "lower meta_learning_rate, or give more clean examples (for rare classes it may be right)"
            ),
        )
    elif correlation > UPHILL and of_loss and at_one <= MOST:
        yield (
            "drift",
            (
                f"the weights are nearly alike (deviation {facts[STD]:.1e}), and grow with the loss (correlation "
                f"{correlation:.2f}): they do not leave wrong labels out: compare with method plain and union"
            ),
        )


def over_time(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[list[float]]]:
    """Step and mean weight in each log, of all items or of those that are told apart by `names`."""
    keys = {name: f"{WEIGHT}{name}" for name in names} or {"all": MEAN}
    return {name: [[row["step"], row[key]] for row in history if key in row] for name, key in keys.items()}


def draw_over_time(axis: Any, path: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """What `over_time` found, a line a name, onto axes of matplotlib."""
    for number, (name, points) in enumerate(path.items()):
        axis.plot(*zip(*points, strict=True), color=COLOURS.get(name, f"C{number}"), label=name)
    axis.set(xlabel="step", ylabel="mean weight")
    axis.legend()
