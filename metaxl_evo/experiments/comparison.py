"""Runs compared over cases and seeds: scores, paired differences, and how they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import numpy as np
import pandas as pd

from metaxl_evo.experiments.records import Record
from metaxl_evo.experiments.statistics import (
    Interval,
    PairedDifference,
    holm,
    paired_difference,
    permutation_p,
    smallest_p,
)
from metaxl_evo.messages import unknown

AVERAGE = "average"  # in the place of a case: the mean over the cases of each seed
CLAIMED_PAIRS = 6  # with fewer no permutation test can be below 5 %


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

    Raises:
        ValueError: for an unknown score, a margin not above 0, a case named `average`, a run that is there twice, a
            finished run whose compared score is not finite, test sets of a case that differ, and outcomes that do not
            give the score.
    """

    records: Sequence[Record]
    score: str
    units: Mapping[str, str]
    baselines: Sequence[str]
    margin: float | None = None
    greater_is_better: bool = True
    title: str = "Study"

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_records(self.records, self.score)

    @property
    def runs(self) -> list[str]:
        return list(dict.fromkeys(record.run for record in self.records))

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(record.case for record in self.records))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(record.seed for record in self.records))

    def frame(self) -> pd.DataFrame:
        """The long table: run, case, seed, score, value (in the unit of the tables), a row a score of `units`.

        Runs that failed have no rows.
        """
        rows = [
            (record.run, record.case, record.seed, score, self._factor(score) * record.scores[score])
            for record in self.records
            for score in self.units
            if record.error is None and score in record.scores
        ]
        return pd.DataFrame(rows, columns=["run", "case", "seed", "score", "value"])

    @cached_property
    def by_baseline(self) -> dict[str, list[Difference]]:
        """The differences from each of the baselines, made once: of many seeds they take a while."""
        return {baseline: self.differences(baseline) for baseline in self.baselines}

    def differences(self, baseline: str) -> list[Difference]:
        """Every other run against `baseline`: run by run, each case and, of several, `average` last.

        Pairs are the seeds of which both runs have the score, for `average` in every case; what has no pair is left
        out. The interval is over test examples too where all of these runs have their outcomes.

        Raises:
            ValueError: for an unknown baseline; where a score has its denominators all in one test example.
        """
        if baseline not in self.runs:
            raise ValueError(unknown("baseline", baseline, self.runs))
        places = {case: [case] for case in self.cases} | ({AVERAGE: self.cases} if len(self.cases) > 1 else {})
        found: dict[tuple[str, str], Difference] = {}
        for place, cases in places.items():
            paired = {run: self._paired(run, baseline, cases) for run in self.runs if run != baseline}
            family = {run: one for run, one in paired.items() if one is not None}
            found |= {(one.run, place): one for one in self._family(baseline, place, family)}
        return [found[run, place] for run in self.runs for place in places if (run, place) in found]

    def _paired(self, run: str, baseline: str, cases: Sequence[str]) -> PairedDifference | None:
        """Over the seeds that both runs have in all of the cases; None without one."""
        scored = {
            (record.run, record.case, record.seed): record
            for record in self.records
            if record.error is None and self.score in record.scores
        }
        both = (run, baseline)
        seeds = [seed for seed in self.seeds if all((one, case, seed) in scored for one in both for case in cases)]
        if not seeds:
            return None
        records = [[[scored[one, case, seed] for seed in seeds] for one in both] for case in cases]
        factor = self._factor(self.score)
        scores = factor * np.array([[[one.scores[self.score] for one in row] for row in case] for case in records])
        outcomes = []
        if all(self.score in one.outcomes for case in records for row in case for one in row):
            outcomes = [np.array([[one.outcomes[self.score] for one in row] for row in case]) for case in records]
        return paired_difference(scores[:, 0], scores[:, 1], [one * [factor, 1] for one in outcomes])

    def _family(self, baseline: str, place: str, family: Mapping[str, PairedDifference]) -> Iterator[Difference]:
        """The comparisons that their p values are corrected for."""
        by_t = _corrected({run: one.p for run, one in family.items()})
        flips = {run: permutation_p(one.by_seed) if one.pairs > 1 else None for run, one in family.items()}
        by_flips = _corrected(flips)
        for run, one in family.items():
            bounds = one.interval
            yield Difference(
                run=run,
                baseline=baseline,
                case=place,
                mean=one.mean,
                low=bounds.low if bounds else None,
                high=bounds.high if bounds else None,
                pairs=one.pairs,
                p=flips[run],
                smallest_p=smallest_p(one.pairs) if one.pairs > 1 else None,
                adjusted_p=by_flips[run] if one.pairs >= CLAIMED_PAIRS else None,
                reading=self._reading(bounds, by_t.get(run, 1.0)),
            )

    def _reading(self, bounds: Interval | None, p: float) -> str:
        if bounds is None:
            return "undecided"
        if self.margin is not None and -self.margin <= bounds.low and bounds.high <= self.margin:
            return "tie"
        if p >= 0.05:
            return "undecided"
        return "better" if (bounds.mean > 0) == self.greater_is_better else "worse"

    def _factor(self, score: str) -> float:
        return 100.0 if self.units[score] == "%" else 1.0


def _corrected(p: Mapping[str, float | None]) -> dict[str, float]:
    known = {run: one for run, one in p.items() if one is not None}
    return dict(zip(known, holm(list(known.values())), strict=True))


def _check_choices(comparison: Comparison) -> None:
    if comparison.score not in comparison.units:
        raise ValueError(unknown("score", comparison.score, comparison.units))
    if comparison.margin is not None and not comparison.margin > 0:
        raise ValueError(f"margin {comparison.margin} must be above 0, in the unit of the tables, or None")
    if AVERAGE in comparison.cases:
        raise ValueError(f"no case can be named {AVERAGE!r}: that is the mean over the cases")


def _check_records(records: Sequence[Record], score: str) -> None:
    places: dict[tuple[str, str, int], Record] = {}
    tested: dict[str, Record] = {}
    for record in records:
        other = places.setdefault((record.run, record.case, record.seed), record)
        if other is not record:
            raise ValueError(f"{other.folder} and {record.folder} are the same run, case and seed: keep one of them")
        if record.error is None and score in record.scores:
            _check_score(record, score)
            if score in record.outcomes:
                _check_outcomes(record, tested.setdefault(record.case, record), score)
    finished = [record for record in records if record.error is None]
    if finished and not any(score in record.scores for record in finished):
        raise ValueError(unknown("score", score, finished[0].scores))


def _check_score(record: Record, score: str) -> None:
    value = record.scores[score]
    if not isfinite(value):
        raise ValueError(f"{record.folder}: its {score} is {value}: run it again, or remove it")
    if score in record.outcomes:
        numerator, denominator = record.outcomes[score].sum(0)
        if not np.isclose(numerator, value * denominator, rtol=1e-5):
            raise ValueError(
                f"{record.folder}: the outcomes of its test examples do not give its {score}: run it again"
            )


def _check_outcomes(record: Record, first: Record, score: str) -> None:
    """That both have the same test set."""
    count, expected = len(record.outcomes[score]), len(first.outcomes[score])
    if count != expected:
        raise ValueError(
            f"{record.folder} was tested on {count} examples and {first.folder} on {expected}: "
            "run one of them again, on the test set of the other"
        )
