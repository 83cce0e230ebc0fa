"""From the folders of runs to what stands above them: `results.json`, the comparison and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from metaxl_evo.experiments.comparison import Comparison
from metaxl_evo.experiments.curves import drawing, read_curves
from metaxl_evo.experiments.folders import OUTSIDE, RESULTS, read_results, understood, write_results
from metaxl_evo.experiments.plan import Run
from metaxl_evo.experiments.records import NOT_MADE, Record
from metaxl_evo.experiments.report import comparison_text, write_report
from metaxl_evo.experiments.scores import read_outcomes
from metaxl_evo.experiments.task import Task
from metaxl_evo.messages import unknown


@dataclass(frozen=True)
class Question:
    """What is asked of runs: the score that is compared, with which runs, and what is small enough for a tie."""

    score: str
    baselines: Sequence[str]
    margin: float | None = None

    @classmethod
    def of(
        cls,
        task: Task[Any, Any],
        runs: Sequence[Run[Any]],
        score: str | None = None,
        baselines: Sequence[str] | None = None,
        margin: float | None = None,
    ) -> Question:
        """By default the task's first score is compared, with the first run.

        Raises:
            ValueError: for a score or a run that there is not.
        """
        names = list(dict.fromkeys(run.name for run in runs))
        for one in baselines or ():
            if one not in names:
                raise ValueError(unknown("baseline", one, names))
        compared = [one for one in task.units if one not in task.shown_only]
        if score is not None and score not in compared:
            raise ValueError(unknown("score", score, compared))
        return cls(score or compared[0], baselines or names[:1], margin)


def report_runs(
    task: Task[Any, Any],
    runs: Sequence[Run[Any]],
    folder: Path,
    question: Question,
    errors: Mapping[int, str] | None = None,
    *,
    log: bool = True,
) -> dict[str, Any]:
    """Write `results.json` and the report of these runs into their folder; returns what stands in the former.

    Args:
        errors: number of a run -> why it failed.

    Raises:
        ValueError: for runs that cannot be compared.
    """
    records = [read_record(task, run, (errors or {}).get(number)) for number, run in enumerate(runs)]
    comparison = compare(task, records, question)
    summary = summarise(comparison)
    write_results(folder, summary)
    written = write_report(comparison, folder)
    if find_spec("matplotlib"):
        with drawing():
            task.plot_study(folder, [record for record in records if record.error is None])
    if log:
        print(f"report: {', '.join(map(str, written))}")
        print(comparison_text(comparison))
    return summary


def read_record(task: Task[Any, Any], run: Run[Any], error: str | None = None) -> Record:
    """A run as its folder shows it; `error` is why it failed, where that is known."""
    where, file = (run.name, run.case, run.seed, run.folder), run.folder / RESULTS
    history: list[dict[str, float]] = []
    try:
        history = read_curves(run.folder)
        if error is not None or not file.is_file():
            return Record(*where, error or NOT_MADE, history=history)
        results, outcomes = read_results(file), read_outcomes(run.folder)
        with understood(file):
            held = task.flat_scores(results["test"]).items()
            scores = {name: float(value) for name, value in held if isinstance(value, int | float)}
    except ValueError as damaged:
        return Record(*where, error or str(damaged), history=history)
    settings = {name: value for name, value in results["settings"].items() if name not in OUTSIDE}
    return Record(*where, None, scores, outcomes, settings, results["run"], history)


def compare(task: Task[Any, Any], records: Sequence[Record], question: Question) -> Comparison:
    """The comparison that answers the question.

    Raises:
        ValueError: for runs that cannot be compared, such as those of different test sets.
    """
    units = {question.score: task.units[question.score], **task.units}
    judged = [_judged(record, question.score) for record in records]
    ask = question.score, units, question.baselines, question.margin
    return Comparison(judged, *ask, task.greater_is_better, task.title)


def _judged(record: Record, score: str) -> Record:
    """A run without the score, or whose score is no number, has failed, whatever it left behind."""
    value = record.scores.get(score)
    if record.error is not None or (value is not None and isfinite(value)):
        return record
    return replace(record, error=f"its {score} is {'missing' if value is None else value}")


def summarise(comparison: Comparison) -> dict[str, Any]:
    """Scores over the seeds, differences and facts, nested as the folders are; plain values."""
    finished = [record for record in comparison.records if record.error is None]
    return {
        "test": _nested(finished, _described),
        "differences": [asdict(one) for found in comparison.by_baseline.values() for one in found],
        "failed": {str(record.folder): record.error for record in comparison.records if record.error is not None},
        "seeds": comparison.seeds,
        "settings": shared([record.settings for record in finished]),
        "run": _nested(finished, lambda records: {str(one.seed): dict(one.facts) for one in records}),
    }


def _nested(records: Iterable[Record], leaf: Callable[[list[Record]], Any]) -> dict[str, Any]:
    """run -> case -> leaf, without the level of the cases where there is one without a name."""
    grouped: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        grouped.setdefault(record.run, {}).setdefault(record.case, []).append(record)
    return {
        run: leaf(cases[""]) if list(cases) == [""] else {case: leaf(own) for case, own in cases.items()}
        for run, cases in grouped.items()
    }


def _described(records: Sequence[Record]) -> dict[str, Any]:
    names = [name for name in records[0].scores if all(name in one.scores for one in records)]
    found = {name: [one.scores[name] for one in records] for name in names}
    return {
        name: {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "values": values}
        for name, values in found.items()
    }


def shared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all of these have alike."""
    first, *others = settings or [{}]
    return {key: value for key, value in first.items() if all(one.get(key, ...) == value for one in others)}
