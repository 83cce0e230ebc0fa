"""A row of results: an estimator with its settings and order in one case of a problem, and what was measured of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from metaxl_evo.estimators import Estimator, make_estimator
from metaxl_evo.messages import one_line


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    q1: float
    q3: float


@dataclass(eq=False)
class Row:
    """One estimator in one case; a number that could not be had is None, and `error` says why.

    Args:
        estimator, settings, order: what ran.
        case: where, such as {"rtn_layer": 12} or {"horizon": 8}.
        time_ratio: seconds against those of the yardstick before and after; where it is None `untimed` says why.
        plain_seconds, load: of the yardstick, and the highest load average of the machine (over a minute).
        memory_ratio, memory_increment_mib: peak against the yardstick's peak, and above the resident tensors.
        peak_mib: the peak itself.
        launch_ratio, wait_increment: operators against the yardstick's, and waits of the host beyond its own.
        cosine, relative_error: to the exact hypergradient of the same horizon; means over the draws of noise.
        precision_error: relative error to the same estimates by float32 meta passes, where they are of another
            precision.
        noise_to_signal: variance of a draw over the square of the draws' common component along the exact one.
        counts: passes of one hypergradient.
    """

    estimator: str
    settings: dict[str, Any]
    order: str
    case: dict[str, Any] = field(default_factory=dict)
    time_ratio: Spread | None = None
    plain_seconds: Spread | None = None
    load: float | None = None
    untimed: str | None = None
    memory_ratio: float | None = None
    memory_increment_mib: float | None = None
    peak_mib: float | None = None
    launch_ratio: float | None = None
    wait_increment: int | None = None
    cosine: float | None = None
    relative_error: float | None = None
    precision_error: float | None = None
    noise_to_signal: float | None = None
    counts: dict[str, int] | None = None
    error: str | None = None

    @property
    def time(self) -> float | None:
        """The median of `time_ratio`."""
        return None if self.time_ratio is None else self.time_ratio.median

    def make(self) -> Estimator:
        """The estimator.

        Raises:
            ValueError: for a name or settings that are none.
        """
        return make_estimator(self.estimator, **self.settings)

    def fail(self, error: Exception) -> None:
        """Note why there are no (further) numbers."""
        text = one_line(error)
        self.error = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Inside, an error is the row's own and goes no further."""
        try:
            yield
        except Exception as error:
            self.fail(error)


def standing(rows: Sequence[Row]) -> list[Row]:
    """The rows that have not failed."""
    return [row for row in rows if row.error is None]
