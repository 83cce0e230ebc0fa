"""Runs compared over cases and seeds: scores, paired differences, and how they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from metaxl_evo.experiments.records import Record

AVERAGE = "average"  # in the place of a case: the mean over the cases of each seed


@dataclass(frozen=True)
class Difference:
    """How much a run's score is above a baseline's, paired over seeds.

    In the unit of the score; `low`, `high` and the p values are None where there are too few pairs for them.

    Attributes:
        case: a case, or `average`.
        low, high: a 95 % interval over seeds and test examples.
        pairs: seeds that both runs have.
        p: exact two-sided paired permutation test over the seeds.
        smallest_p: that this number of pairs can give.
        adjusted_p: p corrected for the comparisons of the same case and baseline (Holm); None below six pairs.
        reading: `better`, `worse`, `tie` (the interval lies inside the margin) or `undecided`.
    """

    run: str
    baseline: str
    case: str
    mean: float
    low: float | None
    high: float | None
    pairs: int
    p: float | None
    smallest_p: float | None
    adjusted_p: float | None
    reading: str


@dataclass(frozen=True)
class Comparison:
    """The runs of a study, and what is asked of them.

    Attributes:
        records: all runs in the order of the plan, those that failed among them.
        score: the score that is compared.
        units: of the scores that tables show, `score` first; a score of unit "%" is a fraction, shown times 100.
        baselines: runs that the others are compared with.
        margin: differences inside it are a tie, in the unit of the table; None: no tie is read.
        greater_is_better: of `score`.
        title: of the study.
    """

    records: Sequence[Record]
    score: str
    units: Mapping[str, str]
    baselines: Sequence[str]
    margin: float | None = None
    greater_is_better: bool = True
    title: str = "Study"

    @property
    def runs(self) -> list[str]: ...

    @property
    def cases(self) -> list[str]: ...

    @property
    def seeds(self) -> list[int]: ...

    def frame(self) -> pd.DataFrame:
        """The long table: run, case, seed, score, value (in the unit of the tables), a row a score of `units`."""

    def differences(self, baseline: str) -> list[Difference]:
        """Every other run against `baseline`: run by run, each case and, of several, `average` last."""
