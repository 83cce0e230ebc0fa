"""What a report tells of a study: tables of scores, differences, cost, settings and runs, and how to read them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple
from urllib.parse import quote

import pandas as pd

from metaxl_evo.experiments.comparison import AVERAGE, CLAIMED_PAIRS, Comparison, Difference
from metaxl_evo.experiments.records import NOT_MADE, Record
from metaxl_evo.experiments.statistics import spread

PANELS = 4  # side by side, in every figure
LISTED = 3  # values of a setting that changes within a run


class Cell(NamedTuple):
    """A text, what it is sorted by (None: last), and where it leads."""

    text: str
    value: float | str | None
    link: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, one a column."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __bool__(self) -> bool:
        """Whether it holds anything beside the names of its rows."""
        return bool(self.rows) and len(self.columns) > 1

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers."""
        return [any(isinstance(cell.value, float | int) for cell in column) for column in zip(*self.rows, strict=True)]


def label(comparison: Comparison, score: str) -> str:
    """A score with its unit: `f1, %`."""
    return ", ".join(filter(None, [score, comparison.units[score]]))


def describe(record: Record) -> str:
    """Run, case and seed in words."""
    return " ".join(filter(None, [record.run, record.case, f"seed {record.seed}"]))


def failures(comparison: Comparison) -> list[Record]:
    """The runs without results."""
    return [record for record in comparison.records if record.error is not None]


def scores(comparison: Comparison) -> pd.DataFrame:
    """The finite scores of `Comparison.frame` and, of several cases, their average for each seed that has them all."""
    frame = _finite(comparison.frame()).dropna(subset="value")
    if len(comparison.cases) < 2:
        return frame
    wide = frame.pivot(index=["run", "seed", "score"], columns="case", values="value")
    average = wide.reindex(columns=comparison.cases).mean(axis=1, skipna=False).dropna()
    return pd.concat([frame, average.rename("value").reset_index().assign(case=AVERAGE)], ignore_index=True)


def panel_cases(comparison: Comparison, rows: pd.DataFrame) -> list[str]:
    """The cases that rows of a long table are of, in the order of the study, `average` last."""
    return [case for case in (*comparison.cases, AVERAGE) if case in set(rows["case"])]


def score_tables(comparison: Comparison) -> list[Table]:
    """Mean ± standard deviation over the seeds, a row a run: of one case all scores, of several a table a score."""
    frame = scores(comparison)
    found = frame.groupby(["score", "case", "run"])["value"].agg(list).to_dict()

    def column(score: str, case: str) -> list[Cell]:
        decimals = _decimals(frame["value"][frame["score"] == score])
        values = [found.get((score, case, run), []) for run in comparison.runs]
        return [_spread(one, decimals, len(comparison.seeds)) for one in values]

    if len(comparison.cases) == 1:
        columns = {label(comparison, score): column(score, comparison.cases[0]) for score in comparison.units}
        return [_by_run("Scores", comparison, columns)]
    cases = [*comparison.cases, AVERAGE]
    return [
        _by_run(label(comparison, score), comparison, {case: column(score, case) for case in cases})
        for score in comparison.units
    ]


def difference_tables(comparison: Comparison) -> list[Table]:
    """A table a baseline: how much the others score above it, and how sure that is."""
    frame = comparison.frame()
    decimals = _decimals(frame["value"][frame["score"] == comparison.score])
    columns = ["run", "case", "difference", "95 % interval", "pairs", "permutation p", "adjusted p", "reading"]
    return [
        _without_empty(
            f"{label(comparison, comparison.score)}: difference from {baseline}",
            columns,
            [_difference_row(one, decimals) for one in found],
        )
        for baseline, found in comparison.by_baseline.items()
    ]


def cost_table(comparison: Comparison) -> Table:
    """The numbers among the facts that all runs have: mean ± standard deviation over the cases and seeds."""
    finished = [record for record in comparison.records if record.error is None]
    facts = pd.DataFrame([dict(record.facts) for record in finished]).select_dtypes("number")
    facts = _finite(facts).dropna(axis=1)
    found = facts.groupby([record.run for record in finished]).agg(list).to_dict()  # fact -> run -> values

    def cell(fact: str, run: str) -> Cell:
        values = found[fact].get(run, [])
        if len(set(values)) == 1:
            return _number(values[0], "d" if isinstance(values[0], int) else f".{_decimals(values)}f")
        return _spread(values, _decimals(facts[fact]))

    ordered = sorted(facts, key=lambda fact: fact != "train_seconds")
    return _by_run("Cost", comparison, {fact: [cell(fact, run) for run in comparison.runs] for fact in ordered})


def setting_tables(comparison: Comparison) -> tuple[Table, Table]:
    """The settings that differ between runs, a column a run, and those that are the same for all."""
    made = [record for record in comparison.records if record.settings]
    texts = pd.DataFrame([_setting_texts(record) for record in made], index=[record.run for record in made])
    runs = list(dict.fromkeys(texts.index))
    differing, common = [], []
    for key, column in texts.fillna("").items():
        values = [tuple(column[[run]].unique()) for run in runs]
        if len(set(values)) > 1:
            differing.append([_text(str(key)), *map(_listed, values)])
        else:
            common.append([_text(str(key)), _listed(values[0])])
    return Table("Settings that differ", ["setting", *runs], differing), Table("", ["setting", "value"], common)


def run_table(comparison: Comparison, folder: Path) -> Table:
    """Every run with its scores and the way to it from `folder`."""
    frame = comparison.frame()
    found = frame.set_index(["run", "case", "seed", "score"])["value"].to_dict()
    formats = {score: f".{_decimals(frame['value'][frame['score'] == score])}f" for score in comparison.units}

    def row(one: Record) -> list[Cell]:
        values = [_number(found.get((one.run, one.case, one.seed, score)), form) for score, form in formats.items()]
        status = "finished" if one.error is None else NOT_MADE if one.error == NOT_MADE else "failed"
        return [_text(one.run), _text(one.case), _number(one.seed, "d"), *values, _way(one, folder), _text(status)]

    shown = [label(comparison, score) for score in comparison.units]
    return _without_empty("Runs", ["run", "case", "seed", *shown, "folder", "status"], [*map(row, comparison.records)])


def notes(comparison: Comparison) -> list[str]:
    """How the tables are to be read."""
    zero = sum(record.scores.get(comparison.score) == 0 for record in comparison.records)
    differences = comparison.by_baseline
    few = {one.pairs: one.smallest_p for found in differences.values() for one in found if one.adjusted_p is None}
    return [
        f"A {'higher' if comparison.greater_is_better else 'lower'} {comparison.score} is better.",
        "Scores are mean ± standard deviation over the seeds. Runs of the same case and seed are compared in pairs.",
        _interval_note(comparison),
        "Better or worse is what the t test of the interval finds at 5 %, corrected for all comparisons of the same "
        "case and baseline (Holm). The permutation test over the seeds assumes no distribution.",
        _margin_note(comparison),
        *(
            f"The smallest p that {pairs} pairs can give is {smallest:g}: "
            f"no significance is claimed below {CLAIMED_PAIRS} pairs."
            for pairs, smallest in sorted(few.items())
            if smallest is not None
        ),
        *(["A single pair has no interval."] if 1 in few else []),
        *(
            [f"{zero} runs have a {comparison.score} of 0: a tie of runs that find nothing tells nothing."]
            if zero
            else []
        ),
        *(f"No run has a pair with {baseline}." for baseline, found in differences.items() if not found),
    ]


def _margin_note(comparison: Comparison) -> str:
    if comparison.margin is None:
        return "No margin is set, so no difference is read as a tie."
    unit = comparison.units[comparison.score].replace("%", "points")
    return f"A tie is an interval inside ±{comparison.margin:g} {unit}".rstrip() + "."


def _interval_note(comparison: Comparison) -> str:
    finished = [record for record in comparison.records if record.error is None]
    with_outcomes = sum(comparison.score in record.outcomes for record in finished)
    if not with_outcomes:
        return "Intervals are over the seeds alone: they say nothing of another test set."
    if with_outcomes < len(finished):
        have = f"{with_outcomes} of {len(finished)} runs"
        return f"Intervals are over the seeds, and over test examples where both runs kept theirs ({have} did)."
    return "Intervals are over the seeds and the test examples; the cases are taken as given."


def _difference_row(one: Difference, decimals: int) -> list[Cell]:
    signed = f"+.{decimals}f"
    bounds = "" if one.low is None or one.high is None else f"{one.low:{signed}} to {one.high:{signed}}"
    p_values = [_number(one.p, ".3g"), _number(one.adjusted_p, ".3g")]
    interval, pairs = Cell(bounds, one.low), _number(one.pairs, "d")
    return [_text(one.run), _text(one.case), _number(one.mean, signed), interval, pairs, *p_values, _text(one.reading)]


def _by_run(title: str, comparison: Comparison, columns: Mapping[str, Sequence[Cell]]) -> Table:
    rows = zip(map(_text, comparison.runs), *columns.values(), strict=True)
    return Table(title, ["run", *columns], list(rows))


def _without_empty(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """Without the columns in which no row has anything, such as that of the only case, which has no name."""
    kept = [index for index in range(len(columns)) if any(row[index].text for row in rows)]
    return Table(title, [columns[index] for index in kept], [[row[index] for index in kept] for row in rows])


def _setting_texts(record: Record) -> dict[str, str]:
    """As texts, in which the folder of the run is no difference."""
    own = str(record.folder)
    return {key: "(its folder)" if str(value) == own else str(value) for key, value in record.settings.items()}


def _finite(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.replace([math.inf, -math.inf], math.nan)


def _decimals(values: Iterable[float]) -> int:
    """So many that what is below the largest value shows four digits: 99.96 beside 100."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return max(0, 4 - math.ceil(math.log10(largest))) if largest else 0


def _text(text: str) -> Cell:
    return Cell(text, text)


def _number(value: float | None, form: str) -> Cell:
    return Cell("", None) if value is None or not math.isfinite(value) else Cell(format(value, form), value)


def _spread(values: Sequence[float], decimals: int, planned: int = 0) -> Cell:
    """Of fewer values than were planned, how many they are."""
    if not values:
        return Cell("", None)
    text = spread(values, decimals) if len(values) > 1 else f"{values[0]:.{decimals}f}"
    return Cell(text + (f" ({len(values)} of {planned} seeds)" if len(values) < planned else ""), fmean(values))


def _listed(values: Sequence[str]) -> Cell:
    rest = f", and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return _text(", ".join(values[:LISTED]) + rest)


def _way(record: Record, folder: Path) -> Cell:
    """Percent-encoded; no link to a folder that was never made."""
    path = Path(os.path.relpath(record.folder, folder)).as_posix()
    return Cell(path, path, f"{quote(path)}/" if record.folder.is_dir() else "")
