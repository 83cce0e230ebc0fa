"""What a training script does: its runs, one after the other in this process, or a check of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.folders import RESULTS, understood, write_results
from metaxl_evo.experiments.plan import Key, Run, plan_runs
from metaxl_evo.experiments.report import REPORT
from metaxl_evo.experiments.reporting import Question, report_runs
from metaxl_evo.experiments.run import keep_finished, make_run, try_out
from metaxl_evo.experiments.run_folder import refuse_above, refuse_held, refuse_inputs, refuse_run
from metaxl_evo.experiments.task import Data, Settings, Task
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.check import check_training
from metaxl_evo.training.check_report import CheckReport
from metaxl_evo.training.checkpoint import LATEST
from metaxl_evo.training.parser import parse_arguments


def run_command(task: Task[Any, Any], argv: Sequence[str] | None) -> dict[str, Any]:
    """Parse the settings, then make the runs, or check one with `--check`."""
    which, settings, args = parse_arguments((RunsArguments, task.settings, task.training), argv, task.configs)
    return (check_runs if which.check else run_here)(task, which, settings, args)


def run_here(
    task: Task[Settings, Data], which: RunsArguments, settings: Settings, args: MetaTrainingArguments
) -> dict[str, Any]:
    """Make every run; returns the results of a single one, or what stands above several.

    Raises:
        ValueError: before any training, for what cannot work or would overwrite another run.
    """
    runs = plan_runs(task, which, settings, args)
    root, resuming = Path(str(args.output_dir)), args.resume_from_checkpoint is not None
    if resuming and len(runs) > 1 and str(args.resume_from_checkpoint).lower() not in LATEST:
        raise ValueError("resume_from_checkpoint: one checkpoint cannot continue several runs: use latest, or one run")
    refuse_other_runs(task, root, runs, resuming)
    finished: dict[Key, dict[str, Any]] = {}
    for run in runs:  # all that complains does so before the first step
        kept = keep_finished(task, run) if resuming else None
        if kept is not None:
            finished[run.key] = kept
        elif len(runs) > 1:  # a single run complains in time by itself
            try_out(task, run)
    results: dict[Key, dict[str, Any]] = {}
    for number, run in enumerate(runs, start=1):
        known = finished.get(run.key)
        if args.should_log and len(runs) > 1:
            print(f"{run} ({number} of {len(runs)}){': finished, kept' if known else ''}")
        results[run.key] = known or make_run(task, run)
    return _results(task, which, runs, results, root)


def _results(
    task: Task[Any, Any],
    which: RunsArguments,
    runs: Sequence[Run[Any]],
    results: Mapping[Key, dict[str, Any]],
    root: Path,
) -> dict[str, Any]:
    """What the command returns and prints, and of several runs leaves above them."""
    args = runs[0].args
    summary: dict[str, Any] | None = None
    if len(runs) == 1:
        summary = results[runs[0].key]
    elif not which.runs and not which.seeds:
        summary = task.join_cases({run.case: results[run.key] for run in runs})
        if summary is not None and args.should_save:
            write_results(root, summary)
    if summary is None:
        return report_runs(task, runs, root, Question.of(task, runs), log=args.should_log) if args.should_save else {}
    if args.should_log:
        print(f"models, cards and {RESULTS}: {', '.join(str(run.folder) for run in runs)}")
        with understood(root / RESULTS):
            print(task.table(summary["test"]))
        for run in runs:
            if found := task.findings(results[run.key]["run"]):
                print(f"\n{run}\n\n{found}" if len(runs) > 1 else f"\n{found}")
    return summary


def check_runs(
    task: Task[Settings, Data], which: RunsArguments, settings: Settings, args: MetaTrainingArguments
) -> dict[str, Any]:
    """A few steps of the first run that learns, at the full learning rates; prints the findings and returns them.

    Nothing of the user's is touched. The returned `problems` is empty where the verdict is OK.

    Raises:
        ValueError: for what a run would refuse as well.
    """
    runs = plan_runs(task, which, settings, args)
    run = next((one for one in runs if task.learns(one.settings)), runs[0])
    report = check_run(task, run)
    try:
        refuse_other_runs(task, Path(str(args.output_dir)), runs, args.resume_from_checkpoint is not None)
    except ValueError as error:
        report.problems.append(str(error))
    if args.should_log:
        print(report)
    return report.as_dict()


def check_run(task: Task[Settings, Data], run: Run[Settings]) -> CheckReport:
    """A few steps of one run, in a scratch folder.

    Raises:
        ValueError: for what the run would refuse as well.
    """
    set_seed(run.args.seed)
    data = task.load(run.settings, run.args)
    fitted = task.fit_arguments(run.settings, run.args, data)
    report, trainer = check_training(lambda args: task.build_trainer(run.settings, args, data), fitted)
    facts, problems = task.describe_check(trainer, run.settings, data)
    report.findings = {"run": run.name, **({"case": run.case} if run.case else {}), **facts, **report.findings}
    report.problems += problems
    return report


def refuse_other_runs(task: Task[Any, Any], root: Path, runs: Sequence[Run[Any]], resuming: bool) -> None:
    """Nothing of the user's is overwritten, neither by the runs nor by the report above several.

    Raises:
        ValueError: for the first folder that holds files of their names, where these runs are not resumed, and for one
            that the runs read from.
    """
    places = dict.fromkeys(run.folder for run in runs)
    for run in runs:
        read = {name: getattr(run.settings, name, None) for name in task.inputs}
        for folder in (root, run.folder):
            refuse_inputs(folder, read)
    for folder in places:  # all of them, before another one's is called another run
        refuse_held(folder)
    for folder in places:
        refuse_run(folder, resuming, task.own_files)
    if root not in places:
        refuse_above(root, resuming, (*task.own_files, *REPORT))
