"""One command, several runs: every method on every seed, each in a folder of its own, and their comparison.

A task says what differs: how data, trainer and scores are made. Everything here is the same for all.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Generic, TypeVar, cast

from transformers import set_seed

from metaxl_evo.bilevel import tree
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.check import check_training
from metaxl_evo.training.checkpoint import LATEST
from metaxl_evo.training.dry_run import refuse_unusable
from metaxl_evo.training.parser import make_settings, parse_arguments, typed
from metaxl_evo.training.runs import (
    RESULTS,
    checkpoint_settings,
    finished_run,
    hub_id,
    refuse_another_run,
    training_settings,
    write_results,
)
from metaxl_evo.training.statistics import paired_difference, spread
from metaxl_evo.training.trainer import MetaTrainer
from vision_tasks.arguments import VisionArguments, VisionTrainingArguments
from vision_tasks.images import SYNTHETIC

SINGLE = ("model.safetensors", "config.json")  # what a folder of several runs has not
Settings = TypeVar("Settings", bound=VisionArguments)
Data = TypeVar("Data")


class VisionTask(ABC, Generic[Settings, Data]):
    """What an experiment is about.

    Attributes:
        title: of the model card.
        sources: what the card cites.
        usage: how what is left behind is loaded, in Python; `FOLDER` is its place.
        own_files: names that a run writes beyond those of any run.
        shown: of the test scores, those that the table shows; the first is compared.
        training: the training arguments, where the task has defaults of its own.
        chooses: whether evaluations are of other data than the tests, so that they may choose a checkpoint.
    """

    title: str
    sources: Sequence[str]
    usage: str
    own_files: Sequence[str] = ()
    shown: Sequence[str] = ("accuracy",)
    training: type[MetaTrainingArguments] = VisionTrainingArguments
    chooses: bool = False

    @abstractmethod
    def learns(self, settings: Settings) -> bool:
        """Whether the method learns on the meta level."""

    @abstractmethod
    def load(self, settings: Settings, seed: int) -> Data:
        """The data of one repetition.

        Raises:
            ValueError: for data that cannot serve.
        """

    @abstractmethod
    def build_trainer(self, settings: Settings, args: MetaTrainingArguments, data: Data) -> MetaTrainer:
        """The trainer of one run."""

    @abstractmethod
    def score(self, trainer: MetaTrainer, settings: Settings, data: Data) -> dict[str, float]:
        """The test scores of the trained model."""

    def describe(self, trainer: MetaTrainer, settings: Settings, data: Data) -> dict[str, Any]:
        """What else is to be known of a trained run (plain values)."""
        return {}

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        """Pictures of one run, where matplotlib is installed."""


@dataclass(frozen=True, eq=False)
class Run(Generic[Settings]):
    """One training: a method on one seed."""

    name: str
    seed: int
    folder: Path
    settings: Settings
    args: MetaTrainingArguments

    def all_settings(self) -> dict[str, Any]:
        """What it is made with, plain values."""
        own = {key: value for key, value in asdict(self.settings).items() if key not in ("runs", "seeds", "check")}
        return {**own, **training_settings(self.args)}


def plan(task: VisionTask[Settings, Any], settings: Settings, args: MetaTrainingArguments) -> list[Run[Settings]]:
    """The runs of one command, seed by seed; a single one has the output folder for itself.

    Raises:
        ValueError: for settings of a run that cannot be.
    """
    if args.load_best_model_at_end and not task.chooses:
        raise ValueError("load_best_model_at_end would choose on the test images: leave it out, the last step counts")
    if args.meta_portion != 1:  # clean images and episodes of other domains judge, and nothing else
        raise ValueError("these tasks cannot join meta rows to train rows: set meta_portion to 1")
    named, seeds = settings.runs or {"": {}}, settings.seeds or [args.seed]
    alone, root = len(named) * len(seeds) == 1, Path(args.output_dir)
    changes = {name: _typed_run(settings, args, name, overrides) for name, overrides in named.items()}
    runs = []
    for seed in seeds:
        for name, overrides in changes.items():
            folder = root if alone else root / (name or "run") / str(seed)
            mine = {one.name for one in fields(type(settings))}
            held = {key: getattr(settings, key) for key in mine} | {"runs": {}, "seeds": None}
            own = make_settings(type(settings), held | {key: v for key, v in overrides.items() if key in mine})
            theirs = {key: value for key, value in overrides.items() if key not in mine}
            if not task.learns(own):
                theirs |= {"estimator": NO_ESTIMATOR}
            if "estimator" in theirs:  # which then starts from its own defaults
                theirs = {"estimator_kwargs": None} | theirs
            theirs |= {"output_dir": str(folder), "seed": seed}
            if not alone:  # a repository a run
                theirs["hub_model_id"] = f"{args.hub_model_id or root.name}-{name or 'run'}-{seed}"
            runs.append(Run(name or "run", seed, folder, own, _with(args, theirs)))
    return runs


def _typed_run(
    settings: VisionArguments, args: MetaTrainingArguments, name: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        return typed((type(settings), type(args)), overrides)
    except ValueError as error:
        raise ValueError(f"run {name}: {error}") from None


def _with(args: MetaTrainingArguments, changes: Mapping[str, Any]) -> MetaTrainingArguments:
    """Arguments made anew, so that what they check is checked of the changed ones too."""
    values = {one.name: getattr(args, one.name) for one in fields(args) if one.init}
    launch = {"use_configured_state": True}  # which stays as it is
    values["accelerator_config"] = cast(Any, args.accelerator_config).to_dict() | launch
    if args.meta_seed == args.seed:
        values["meta_seed"] = None  # follows the seed
    made = make_settings(type(args), values | dict(changes))
    refuse_unusable(made)
    return made


def run_experiment(task: VisionTask[Settings, Any], settings: Settings, args: MetaTrainingArguments) -> dict[str, Any]:
    """Train and test every run; returns and saves the results, those of several runs with their comparison.

    Raises:
        ValueError: before any training, for what cannot work or would overwrite another run.
    """
    runs = plan(task, settings, args)
    resuming = args.resume_from_checkpoint is not None
    if resuming and len(runs) > 1 and str(args.resume_from_checkpoint).lower() not in LATEST:
        raise ValueError("resume_from_checkpoint: one checkpoint cannot continue several runs: use latest, or one run")
    for folder in dict.fromkeys([Path(args.output_dir), *(run.folder for run in runs)]):
        refuse_another_run(folder, resuming, task.own_files)
    if len(runs) > 1 and any((Path(args.output_dir) / name).exists() for name in SINGLE):
        raise ValueError(f"{args.output_dir} holds a single run: choose another output_dir for several")
    finished: dict[Path, dict[str, Any]] = {}
    for run in runs:  # all that complains does so before the first step
        saved = run.folder / RESULTS
        if resuming and saved.exists():
            finished[run.folder] = finished_run(saved, run.all_settings())
        else:
            set_seed(run.args.seed)  # several processes compare their weights
            task.build_trainer(run.settings, run.args, task.load(run.settings, run.seed))
    results = {}
    for number, run in enumerate(runs, start=1):
        known = finished.get(run.folder)
        if args.should_log and len(runs) > 1:
            print(f"run {run.name}, seed {run.seed} ({number} of {len(runs)}){': finished, kept' if known else ''}")
        results[run.name, run.seed] = known or train_run(task, run)
    summary = summarise(task, results, settings, args)
    if len(runs) > 1 and args.should_save:
        write_results(Path(args.output_dir), summary)
    if args.should_log:
        print(table(task.shown, summary))
        print(f"models, cards and {RESULTS}: {args.output_dir}")
    return summary if len(runs) > 1 else results[runs[0].name, runs[0].seed]


def train_run(task: VisionTask[Settings, Any], run: Run[Settings]) -> dict[str, Any]:
    """Train, test and save one run."""
    set_seed(run.args.seed)
    data = task.load(run.settings, run.seed)
    trainer = task.build_trainer(run.settings, run.args, data)
    settings = run.all_settings()
    trainer.run_settings = checkpoint_settings(settings)
    begun = time.perf_counter()
    trainer.train(resume_from_checkpoint=run.args.resume_from_checkpoint)
    seconds = time.perf_counter() - begun
    results: dict[str, Any] = {
        "test": task.score(trainer, run.settings, data),
        "settings": settings,
        "run": {
            "steps": trainer.state.global_step,
            "train_seconds": seconds,
            "skipped_meta_steps": trainer.skipped_meta_steps,
            "base_parameters": tree.size(trainer.model.base_parameters()),
            "meta_parameters": tree.size(trainer.model.meta_parameters()),
            **task.describe(trainer, run.settings, data),
        },
    }
    trainer.save_model()
    if run.args.should_save:
        write_results(run.folder, results)
        task.plot(run.folder, results)
    trainer.card_sections = _card(task, results, trainer)
    finish = trainer.push_to_hub if run.args.push_to_hub else trainer.create_model_card
    title = (run.args.hub_model_id or run.folder.name).rpartition("/")[2]  # a folder of several runs is a seed's
    finish(dataset_tags=hub_id(run.settings.data, SYNTHETIC), model_name=title)
    return results


def _card(task: VisionTask[Any, Any], results: Mapping[str, Any], trainer: MetaTrainer) -> list[str]:
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in results["test"].items())
    held = {key: value for key, value in results["settings"].items() if value is not None}
    held["data"] = data = Path(held["data"]).name if Path(held["data"]).exists() else held["data"]  # no local paths
    settings = "\n".join(f"| `{key}` | `{value}` |" for key, value in held.items())
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    weights = "the weights of its last step" if best is None else f"the weights of its {Path(best).name}"
    cited = [*task.sources, *([] if trainer.estimator is None else [trainer.estimator.citation])]
    return [
        f"## {task.title}\n\nData `{data}`, one training run, {weights}.",
        f"## Use\n\n```python\n{task.usage}\n```\n\nPixels are in [0, 1], (B, C, H, W).",
        f"## Test scores\n\n| score | value |\n|---|---:|\n{scores}",
        f"## Settings\n\n| field | value |\n|---|---|\n{settings}",
        "## Citation\n\n" + "\n".join(f"- {line}" for line in cited),
    ]


def summarise(
    task: VisionTask[Any, Any],
    results: Mapping[tuple[str, int], Mapping[str, Any]],
    settings: VisionArguments,
    args: MetaTrainingArguments,
) -> dict[str, Any]:
    """Scores of every run over the seeds, and their paired differences from the first run."""
    names, seeds = (list(dict.fromkeys(keys)) for keys in zip(*results, strict=True))

    def values(name: str, key: str) -> list[float]:
        return [float(results[name, seed]["test"][key]) for seed in seeds]

    compared = task.shown[0]
    test, differences = {}, {}
    for name in names:
        test[name] = {key: _described(values(name, key)) for key in results[name, seeds[0]]["test"]}
        if name != names[0]:
            found = paired_difference(values(name, compared), values(names[0], compared))
            bounds = {key: value if math.isfinite(value) else None for key, value in found._asdict().items()}
            differences[name] = {**bounds, "reading": found.reading}  # of one seed there are none, nor is inf JSON
    return {
        "test": test,
        "differences": differences,
        "seeds": seeds,
        "settings": {**asdict(settings), **training_settings(args)},
        "run": {name: {str(seed): results[name, seed]["run"] for seed in seeds} for name in names},
    }


def _described(values: list[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "values": values}


def table(shown: Sequence[str], summary: Mapping[str, Any], first: str | None = None) -> str:
    """A summary in Markdown: test scores, mean ± deviation over the seeds, and paired differences from one run.

    Args:
        shown: the scores to show; the first is the one compared.
        summary: of `summarise`.
        first: the run that the others are compared with (default: the first one).
    """
    scores = {name: {key: found[key]["values"] for key in shown} for name, found in summary["test"].items()}
    first = next(iter(scores)) if first is None else first
    columns = ["run", *shown, *([f"{shown[0]} over {first}", "95 % interval", "reading"] if len(scores) > 1 else [])]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for name, values in scores.items():
        cells = [name, *(spread(values[key], 3) for key in shown)]
        if len(scores) > 1:
            found = paired_difference(values[shown[0]], scores[first][shown[0]])
            between = f"{found.low:+.3f} to {found.high:+.3f}" if math.isfinite(found.low) else ""
            cells += ["", "", ""] if name == first else [f"{found.mean:+.3f}", between, found.reading]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check_experiment(
    task: VisionTask[Settings, Any], settings: Settings, args: MetaTrainingArguments
) -> dict[str, Any]:
    """A few steps of the first run that learns, at the full learning rates; prints the findings and returns them.

    Nothing of the user's is touched. The returned `problems` is empty where the verdict is OK.

    Raises:
        ValueError: for what a run would refuse as well.
    """
    runs = plan(task, settings, args)
    run = next((one for one in runs if task.learns(one.settings)), runs[0])
    data = task.load(run.settings, run.seed)
    report, _ = check_training(lambda args: task.build_trainer(run.settings, args, data), run.args)
    report.findings = {"run": run.name, **report.findings}
    for folder in dict.fromkeys([Path(args.output_dir), *(one.folder for one in runs)]):
        try:
            refuse_another_run(folder, args.resume_from_checkpoint is not None, task.own_files)
        except ValueError as error:
            report.problems.append(str(error))
    if args.should_log:
        print(report)
    return report.as_dict()


def run_command(
    task: VisionTask[Settings, Any], arguments: type[Settings], argv: Sequence[str] | None
) -> dict[str, Any]:
    """What a script does: parse the settings, then make the runs, or check one with `--check`."""
    settings, args = parse_arguments((arguments, task.training), argv)
    return check_experiment(task, settings, args) if settings.check else run_experiment(task, settings, args)
