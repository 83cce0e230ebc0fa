"""A study: plan, check every run, make them, compare, report. What is finished is kept, what was cut off goes on."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from metaxl_evo.experiments.arguments import StudyArguments
from metaxl_evo.experiments.command import check_run, refuse_other_runs
from metaxl_evo.experiments.engines import Ended, Engine, LocalEngine, at_work
from metaxl_evo.experiments.folders import RESULTS, write_json
from metaxl_evo.experiments.plan import Run, plan_runs, selected
from metaxl_evo.experiments.progress import part_made
from metaxl_evo.experiments.reporting import Question, report_runs
from metaxl_evo.experiments.run import keep_finished, make_run, try_out
from metaxl_evo.experiments.run_folder import alone
from metaxl_evo.experiments.task import Task, find_task
from metaxl_evo.messages import one_line
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.logs import is_watched
from metaxl_evo.training.parser import given_text, parse_arguments, resolve_config

PLAN, CONFIGS = "plan.json", "study"


class Study:
    """A task, the settings of its runs, and their plan.

    Args:
        argv: the options of `metaxl-evo study`, `--config FILE` among them.

    Raises:
        ValueError: for settings that cannot be, of the study or of any run.
    """

    def __init__(self, argv: Sequence[str]):
        self.name = given_text("task", argv, CONFIGS) or "ner"
        self.task: Task[Any, Any] = find_task(self.name)
        types = (StudyArguments, self.task.settings, self.task.training)
        self.options = [*resolve_config(types, argv, CONFIGS), "--resume_from_checkpoint=latest"]
        parsed: tuple[StudyArguments, Any, MetaTrainingArguments] = parse_arguments(types, self.options)
        self.arguments, self.settings, self.args = parsed
        if given_text("output_dir", self.options) is None and not self.arguments.check:
            raise ValueError("output_dir: name the folder of the study, as in --output_dir runs/study")
        self.folder = Path(str(self.args.output_dir))
        self.runs: list[Run[Any]] = plan_runs(self.task, self.arguments, self.settings, self.args, nested=True)
        if any(args.hub_token is not None for args in (self.args, *(run.args for run in self.runs))):
            raise ValueError(f"hub_token would stand in {PLAN}: leave it out, and log in by `hf auth login`")
        self.chosen = list(selected(self.runs, self.arguments.only))
        asked = self.arguments.score, self.arguments.baselines, self.arguments.margin
        self.question = Question.of(self.task, self.runs, *asked)

    @classmethod
    def read(cls, plan: Path, further: Sequence[str] = ()) -> Study:
        """The study whose plan stands in a file, wherever its folder is by now; `further` options change no results.

        Raises:
            ValueError: for a file that is none.
        """
        return cls([*_read(plan)["options"], f"--output_dir={plan.parent}", *further])

    def run(self) -> dict[int, str]:
        """Make what is not finished yet, compare and report; returns why runs failed, by their number."""
        engine = self._engine()  # what is not installed is told first
        with self._alone():
            unfinished = self.try_runs()
            self.write_plan()
            errors = self._make(engine, unfinished)
            self.report(errors)
        return errors

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two studies do not write into one folder, which is not made where all is refused."""
        made = not self.folder.exists()
        try:
            with alone(self.folder) if self.args.should_save else nullcontext():
                yield
        finally:
            if made:
                with suppress(OSError):  # filled
                    self.folder.rmdir()

    def try_runs(self) -> list[int]:
        """Try every chosen run up to its first step; returns those that are not finished.

        Raises:
            ValueError: for the first that cannot work or would overwrite something, and for any of the plan, chosen or
                not, that was made with other settings: the report would mix them.
        """
        plan, unfinished = self.folder / PLAN, []
        ours = plan.exists()
        if ours and (other := _read(plan)["task"]) != self.name:
            raise ValueError(f"{self.folder} holds a study of the task {other}: choose another output_dir")
        refuse_other_runs(self.task, self.folder, self.runs, ours)
        for number, run in enumerate(self._bar(self.runs, desc="checks")):
            if not keep_finished(self.task, run) and number in self.chosen:
                try_out(self.task, run)
                unfinished.append(number)
        return unfinished

    def write_plan(self) -> None:
        """`plan.json`: all that a process needs to make one of the runs by its number, and the runs to read."""
        if not self.args.should_save:
            return
        planned = [
            {"run": run.name, "case": run.case, "seed": run.seed, "folder": str(run.folder.relative_to(self.folder))}
            for run in self.runs
        ]
        write_json(self.folder / PLAN, {"task": self.name, "options": self.options, "runs": planned})

    def _make(self, engine: Engine, unfinished: Sequence[int]) -> dict[int, str]:
        """Why runs failed, by their number; all the others are made."""
        folders = {number: self.runs[number].folder for number in unfinished}
        errors: dict[int, str] = {}
        begun, waiting = len(self.chosen) - len(unfinished), dict(folders)
        with (
            self._bar(total=len(self.chosen), initial=begun, desc="runs", unit="run") as bar,
            at_work(engine(self.folder / PLAN, folders)) as events,
        ):
            for ended in events:
                if ended is not None:
                    folder = waiting.pop(ended.number)
                    if ended.error is not None:
                        bar.write(f"{self.runs[ended.number]}: {ended.error}")
                        if not (folder / RESULTS).exists():
                            errors[ended.number] = ended.error
                made = len(self.chosen) - len(waiting) + part_made(waiting.values())
                bar.update(max(0.0, round(made, 2) - bar.n))
        return errors

    def _bar(self, *args: Any, **kwargs: Any) -> tqdm:
        """One that a log file sees twice a minute."""
        return tqdm(*args, disable=self.args.disable_tqdm, mininterval=0.5 if is_watched() else 30.0, **kwargs)

    def _engine(self) -> Engine:
        named = self.arguments.engine
        if named == "inline":
            return self._inline
        if self.args.world_size > 1:
            raise ValueError(f"engine {named} starts processes itself: leave the launcher out, or use engine inline")
        if named == "ray":
            from metaxl_evo.experiments.ray_engine import RayEngine

            return RayEngine(self.arguments.jobs, self.arguments.threads)
        return LocalEngine(self.arguments.jobs, self.arguments.threads)

    def make(self, number: int) -> None:
        """Make one run, unless it is finished.

        Raises:
            ValueError: for whatever cannot work.
        """
        make_run(self.task, self.runs[number])

    def _inline(self, plan: Path, folders: Mapping[int, Path]) -> Generator[Ended]:
        for number in folders:
            try:
                self.make(number)
                yield Ended(number)
            except Exception as error:  # the others go on
                yield Ended(number, one_line(error))

    def report(self, errors: Mapping[int, str] | None = None) -> dict[str, Any]:
        """Compare all runs of the plan as they stand; write and print what comes of it."""
        if not self.args.should_save:
            return {}
        return report_runs(self.task, self.runs, self.folder, self.question, errors, log=self.args.should_log)

    def check(self) -> dict[str, list[str]]:
        """A few steps of each method, on the first case with the first seed; prints findings, returns problems.

        Raises:
            ValueError: for what a run would refuse as well.
        """
        problems: dict[str, list[str]] = {}
        for run in self.runs:
            if run.name not in problems:
                report = check_run(self.task, run)
                print(f"\n## {run}\n{report}")
                problems[run.name] = report.problems
        return problems


def _read(plan: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(plan.read_text(encoding="utf-8"))
        if not isinstance(found["task"], str) or not all(isinstance(one, str) for one in found["options"]):
            raise TypeError("its task and options are no texts")
        return {key: found[key] for key in ("task", "options")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{plan} is no plan of a study ({one_line(error)}): give OUT/{PLAN}") from error
