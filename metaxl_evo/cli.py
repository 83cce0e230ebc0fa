"""The command `metaxl-evo`.

metaxl-evo study CONFIG --output_dir OUT [--jobs N] [--any_field value]   make runs x cases x seeds, compare, report
metaxl-evo study CONFIG --check                                           a few steps of each run, a verdict, no files
metaxl-evo run OUT/plan.json --index N                                    make one run of a study's plan
metaxl-evo report OUT                                                     compare and report what is there
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from metaxl_evo.experiments.study import PLAN, Study
from metaxl_evo.messages import unknown
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments


@dataclass
class RunArguments:
    """Which run of a plan."""

    index: int = field(metadata={"help": "Its number, from 0."})
    with_parent: bool = field(default=False, metadata={"help": "End with the process that started this one."})


def study(argv: Sequence[str]) -> int:
    """Make, check or plan a study; 1 where runs failed or a check found problems."""
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    if not any(one.partition("=")[0] == "--config" for one in argv):
        raise ValueError("study: name its settings file first, as in metaxl-evo study CONFIG --output_dir OUT")
    made = Study(argv)
    if made.arguments.check:
        return int(any(made.check().values()))
    if made.arguments.plan:
        made.try_runs()
        made.write_plan()
        print(f"{len(made.runs)} runs: metaxl-evo run {made.folder / PLAN} --index 0 to {len(made.runs) - 1}")
        return 0
    return int(bool(made.run()))


def run(argv: Sequence[str]) -> int:
    """Make one run of a plan, unless it is finished."""
    if not argv:
        raise ValueError(f"run: name the plan, as in metaxl-evo run OUT/{PLAN} --index 0")
    (settings,) = parse_arguments((RunArguments,), argv[1:])
    if settings.with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    planned = Study.read(Path(argv[0]), [] if sys.stdout.isatty() else ["--disable_tqdm=true"])
    if not 0 <= settings.index < len(planned.runs):
        raise ValueError(f"index: {argv[0]} has the runs 0 to {len(planned.runs) - 1}, not {settings.index}")
    planned.make(settings.index)
    print(f"{planned.runs[settings.index]}: {planned.runs[settings.index].folder}")
    return 0


def report(argv: Sequence[str]) -> int:
    """Compare and report the runs of a study that are finished."""
    if len(argv) != 1:
        raise ValueError("report: name the folder of a study, as in metaxl-evo report OUT")
    if not (plan := Path(argv[0]) / PLAN).exists():
        raise ValueError(f"{argv[0]} holds no {PLAN}: give the folder of a study, OUT of metaxl-evo study")
    Study.read(plan).report()
    return 0


HELP = ("-h", "--help")
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"study": study, "run": run, "report": report}


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in HELP or (given[0] in ("run", "report") and set(HELP) & set(given)):
        print(__doc__)
        return 0
    if given[0] not in COMMANDS:
        raise ValueError(unknown("command", given[0], COMMANDS))
    return COMMANDS[given[0]](given[1:])


def script() -> None:
    """The console entry."""
    sys.exit(main())


def _end_with_parent() -> None:
    """The parent holds the other end of the input, and nobody writes to it."""
    os.read(0, 1)  # not of sys.stdin, whose lock would be held when this process ends
    os._exit(1)
