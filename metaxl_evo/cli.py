"""The command `metaxl-evo`: every door of the package, each with settings of its own (`metaxl-evo COMMAND --help`)."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from metaxl_evo.messages import unknown
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.shipped_configs import described, launch_profile

HELP = ("-h", "--help")
LAUNCH = "--accelerate_config"
PLAN_FILE = "OUT/plan.json"  # here and below, what takes seconds to import is imported where it is called


@dataclass
class RunArguments:
    """Which run of a plan."""

    index: int = field(metadata={"help": "Its number, from 0."})
    with_parent: bool = field(default=False, metadata={"help": "End with the process that started this one."})


@dataclass(frozen=True)
class Command:
    """One word behind `metaxl-evo`.

    Attributes:
        does: in a line.
        run: takes the options, returns the exit code.
        launched: whether `--accelerate_config` starts it by `accelerate launch`.
        shows_help: whether it answers `--help` itself.
    """

    does: str
    run: Callable[[Sequence[str]], int]
    launched: bool = False
    shows_help: bool = True


def task(name: str) -> Callable[[Sequence[str]], int]:
    """The command of a task: train and test; 1 where a check found problems."""

    def run(argv: Sequence[str]) -> int:
        from metaxl_evo.experiments.command import run_command
        from metaxl_evo.experiments.task import find_task

        return int(bool(run_command(find_task(name), argv).get("problems")))

    return run


def plain(module: str, settings: str, function: str, room: str | None = None) -> Callable[[Sequence[str]], int]:
    """The command of a function of settings, imported when it is called."""

    def run(argv: Sequence[str]) -> int:
        from metaxl_evo.training.parser import parse_arguments

        here: Any = import_module(module)
        getattr(here, function)(*parse_arguments((getattr(here, settings),), argv, room))
        return 0

    return run


def check(argv: Sequence[str]) -> int:
    """`--check` of another command."""
    from metaxl_evo.experiments.task import TASKS

    able = [*(name.replace("_", "-") for name in TASKS), "study"]
    if not argv or argv[0] not in able:
        raise ValueError(unknown("command to check", argv[0] if argv else "", able))
    return COMMANDS[argv[0]].run([*argv[1:], "--check=true"])


def study(argv: Sequence[str]) -> int:
    """Make, check or plan a study; 1 where runs failed or a check found problems."""
    from metaxl_evo.experiments.study import PLAN, Study

    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    if not {"--config", *HELP, "--help_all"} & {one.partition("=")[0] for one in argv}:
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
    from metaxl_evo.experiments.study import Study
    from metaxl_evo.training.parser import parse_arguments

    if not argv:
        raise ValueError(f"run: name the plan, as in metaxl-evo run {PLAN_FILE} --index 0")
    (settings,) = parse_arguments((RunArguments,), argv[1:])
    if settings.with_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    planned = Study.read(Path(argv[0]))
    if not 0 <= settings.index < len(planned.runs):
        raise ValueError(f"index: {argv[0]} has the runs 0 to {len(planned.runs) - 1}, not {settings.index}")
    planned.make(settings.index)
    print(f"{planned.runs[settings.index]}: {planned.runs[settings.index].folder}")
    return 0


def report(argv: Sequence[str]) -> int:
    """Compare and report the runs of a study that are finished."""
    from metaxl_evo.experiments.study import PLAN, Study

    if len(argv) != 1:
        raise ValueError("report: name the folder of a study, as in metaxl-evo report OUT")
    if not (plan := Path(argv[0]) / PLAN).exists():
        raise ValueError(f"{argv[0]} holds no {PLAN}: give the folder of a study, OUT of metaxl-evo study")
    Study.read(plan).report()
    return 0


def estimate_memory(argv: Sequence[str]) -> int:
    """The memory of the run of a settings file, or of a model that the options describe."""
    from metaxl_evo.experiments.memory_command import estimate

    estimate(argv)
    return 0


def export_mixture(argv: Sequence[str]) -> int:
    """Print a learned mixture as the settings of another library."""
    from metaxl_evo.weighting.export import export

    return export(argv)


def demo(argv: Sequence[str]) -> int:
    """Tag sentences in the browser by one run or two."""
    from metaxl_evo.demo import serve

    return serve(argv)


def configs(argv: Sequence[str]) -> int:
    """List the settings files that `--config` knows by name."""
    print("\n".join(described()))
    return 0


def env(argv: Sequence[str]) -> int:
    """What a bug report needs."""
    from metaxl_evo.training.environment import environment

    print("\n".join(f"{name}: {value}" for name, value in environment().items()))
    return 0


COMMANDS = {
    "ner": Command("train a cross-lingual NER tagger, and test it", task("ner"), launched=True),
    "pos": Command("train a cross-lingual tagger of parts of speech, and test it", task("pos"), launched=True),
    "sentiment": Command("train a cross-lingual classifier of texts, and test it", task("sentiment"), launched=True),
    "noisy-labels": Command("train an image classifier on noisy labels", task("noisy_labels"), launched=True),
    "fewshot": Command("few-shot classification on an unseen image domain", task("fewshot"), launched=True),
    "rotation": Command("learn the angle of a test set", task("rotation"), launched=True),
    "hyper-cleaning": Command("learn a weight for each training image", task("hyper_cleaning"), launched=True),
    "many-shot": Command("layers, warps or weights for many-shot image tasks", task("many_shot"), launched=True),
    "sinusoid": Command("features from which a head fits a new sinusoid", task("sinusoid"), launched=True),
    "weight-text": Command("learn which texts a classifier should train on", task("weight_text"), launched=True),
    "weight-tags": Command("learn which sentences or words a tagger trains on", task("weight_tags"), launched=True),
    "schedule": Command("learn a schedule of an optimiser's numbers over a long training", task("schedule")),
    "schedule-text": Command("learn a schedule of fine-tuning a text classifier", task("schedule_text")),
    "mix-text": Command("learn how much of each domain a language model should see", task("mix_text"), launched=True),
    "export-mixture": Command(
        "RUN --to trl, axolotl or llamafactory: print the mixture of mix-text as their YAML",
        export_mixture,
        shows_help=False,
    ),
    "study": Command("CONFIG --output_dir OUT: make runs x cases x seeds, compare, report", study),
    "run": Command(f"{PLAN_FILE} --index N: make one run of a study's plan", run, shows_help=False),
    "report": Command("OUT: compare and report what a study has made so far", report, shows_help=False),
    "check": Command("COMMAND ...: a few steps of it and a verdict; writes nothing", check, shows_help=False),
    "evaluate": Command(
        "entity scores of a trained tagger, and where it errs",
        plain("metaxl_evo.ner.evaluate_command", "EvaluationArguments", "evaluate_model"),
        launched=True,
    ),
    "predict": Command(
        "labels and confidences for text without any",
        plain("metaxl_evo.ner.predict_command", "PredictionArguments", "predict"),
        launched=True,
    ),
    "rank-sources": Command(
        "candidate source languages by how near they are to a few sentences of a target; reads no labels",
        plain("metaxl_evo.ner.rank_command", "RankArguments", "rank_sources"),
    ),
    "benchmark": Command(
        "estimators side by side: time, memory, distance from the exact hypergradient",
        plain("metaxl_evo.benchmark.run", "BenchmarkArguments", "run_benchmark", "benchmark"),
    ),
    "estimate-memory": Command(
        "[CONFIG] ...: what a process needs to train with a base in parts, term by term; loads no weights",
        estimate_memory,
    ),
    "illustrate": Command(
        "what estimators make of a hypergradient that is known exactly",
        plain("vision_tasks.illustration_report", "IllustrationArguments", "run_illustration", "vision"),
    ),
    "demo": Command("FOLDER [FOLDER2]: tag sentences in the browser by one run or two", demo),
    "configs": Command("list the settings files that --config knows by name", configs, shows_help=False),
    "env": Command("what a bug report needs", env, shows_help=False),
}


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    name, *options = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in HELP:
        print(_help())
        return 0
    if name not in COMMANDS:
        raise ValueError(unknown("command", name, COMMANDS))
    command = COMMANDS[name]
    if set(HELP) & set(options) and not command.shows_help:
        print(f"metaxl-evo {name} {command.does}")
        return 0
    profile, options = _taken(LAUNCH, options)
    if profile is not None:
        if not command.launched:
            raise ValueError(f"{LAUNCH}: {name} starts its processes itself, or needs none: leave it out")
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(launch_profile(profile))]
        os.execv(sys.executable, [sys.executable, *launcher, "-m", "metaxl_evo", name, *options])
    return command.run(options)


def script() -> None:
    """The console entry."""
    sys.exit(main())


def _help() -> str:
    lines = [f"  {name:<15} {command.does}" for name, command in COMMANDS.items()]
    launched = ", ".join(name for name, command in COMMANDS.items() if command.launched)
    return "\n".join([
        "metaxl-evo COMMAND [--config FILE or NAME] [--any_setting value]",
        "",
        *lines,
        "",
        f"{LAUNCH} NAME or FILE starts {launched} by `accelerate launch`.",
    ])  # fmt: skip


def _taken(option: str, options: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of an option, and all the others."""
    rest, value = list[str](), None
    tokens = iter(options)
    for token in tokens:
        name, equals, text = token.partition("=")
        if name != option:
            rest.append(token)
        elif not (value := text if equals else next(tokens, "")):
            raise ValueError(f"{option}: expected a profile or a file")
    return value, rest


def _end_with_parent() -> None:
    """The parent holds the other end of the input, and nobody writes to it."""
    os.read(0, 1)  # not of sys.stdin, whose lock would be held when this process ends
    os._exit(1)
