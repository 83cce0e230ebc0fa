"""The runs of a study as they were left behind: what a comparison and a report read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOT_MADE = "not made yet"


@dataclass(frozen=True)
class Record:
    """One run: a method (`run`) on a case (a language, a noise rate; "" where there is but one) with a seed.

    Attributes:
        folder: where it is.
        error: why it has no results, `not made yet` among the reasons; None where it is finished.
        scores: test scores as plain numbers.
        outcomes: score -> (N, 2) numerators and denominators of the N test examples, in the order of the test set; the
            score is the ratio of their sums. Only for scores that are one.
        settings: what the run was made with.
        facts: what else is known of it (`train_seconds`, ...).
        history: the rows that its trainer logged, each with its `step`.
    """

    run: str
    case: str
    seed: int
    folder: Path
    error: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    outcomes: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
