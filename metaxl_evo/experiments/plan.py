"""The runs of a command: every method on every case with every seed, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from metaxl_evo.experiments.arguments import NAME, RunsArguments
from metaxl_evo.experiments.comparison import AVERAGE
from metaxl_evo.experiments.folders import training_settings
from metaxl_evo.experiments.task import Settings, Task
from metaxl_evo.messages import unknown
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.dry_run import refuse_unusable
from metaxl_evo.training.parser import make_settings, typed

ALONE = "run"  # the name of the only run
OF_THE_STUDY = ("seed", "output_dir", "resume_from_checkpoint")  # not for a run to say
Key = tuple[str, str, int]  # run, case, seed
Own = TypeVar("Own")


@dataclass(frozen=True, eq=False)
class Run(Generic[Settings]):
    """One training: a method on a case with a seed, as it is planned."""

    name: str
    case: str
    seed: int
    folder: Path
    settings: Settings
    args: MetaTrainingArguments

    @property
    def key(self) -> Key:
        return self.name, self.case, self.seed

    def __str__(self) -> str:
        return ", ".join([self.name, *([self.case] if self.case else []), f"seed {self.seed}"])

    def all_settings(self, args: MetaTrainingArguments) -> dict[str, Any]:
        """What it is made with, plain values; `args` as the task fitted them to the data."""
        return {**asdict(cast(Any, self.settings)), **training_settings(args)}


def plan_runs(
    task: Task[Settings, Any],
    which: RunsArguments,
    settings: Settings,
    args: MetaTrainingArguments,
    *,
    nested: bool = False,
) -> list[Run[Settings]]:
    """The runs of one command, seed by seed and case by case.

    Args:
        nested: every run in OUT/RUN/CASE/SEED (without CASE where there is but one without a name), as in a study.
            Else a single run has the output folder for itself, and cases of one run and seed OUT/CASE each.

    Raises:
        ValueError: for settings of a run that cannot be.
    """
    runs = {name: _typed(task, f"run {name}", changes) for name, changes in which.runs.items()} or {ALONE: {}}
    cases = {name: _typed(task, f"case {name}", changes) for name, changes in which.cases.items()}
    cases = cases or cases_of(task, settings)
    if AVERAGE in cases:
        raise ValueError(f"no case can be named {AVERAGE!r}, that is the mean over the cases: rename it")
    seeds = which.seeds or [args.seed]
    for (run, mine), (case, its) in product(runs.items(), cases.items()):
        double = sorted(mine.keys() & its.keys())
        if double:
            raise ValueError(f"run {run} and case {case} both set {double[0]}: leave it to one of them")
    several = nested or bool(which.runs) or which.seeds is not None
    alone = len(runs) * len(cases) * len(seeds) == 1 and not nested
    planned = []
    for seed, case, run in product(seeds, cases, runs):
        parts = [run, case, str(seed)] if several else [case]
        folder = Path(str(args.output_dir)).joinpath(*([] if alone else parts))
        planned.append(_run(task, (run, case, seed), folder, settings, args, {**runs[run], **cases[case]}))
    return planned


def cases_of(task: Task[Any, Any], settings: Any) -> dict[str, dict[str, Any]]:
    """The cases that the task's own settings list: name -> settings; a single one without a name where it has none.

    Raises:
        ValueError: for an item that cannot be the name of a folder, or is there twice.
    """
    if task.case is None:
        return {"": {}}
    items = getattr(settings, task.case)
    for item in items:
        if items.count(item) > 1:
            raise ValueError(f"{task.case}: {item} is named twice: name it once")
        if not NAME.fullmatch(str(item)):
            raise ValueError(f"{task.case}: {item!r} names a folder: use letters, digits, dots, - and _")
    return {str(item): {task.case: [item]} for item in items}


def _typed(task: Task[Any, Any], what: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run or a case has of its own, converted as those of a file are."""
    types = (task.settings, task.training)
    known = {one.name for cls in types for one in fields(cast(Any, cls)) if one.init} - set(OF_THE_STUDY)
    for key in changes:
        if key not in known:
            raise ValueError(unknown(f"setting of {what}", key, sorted(known)))
    try:
        return typed(types, changes)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _run(
    task: Task[Settings, Any],
    key: Key,
    folder: Path,
    settings: Settings,
    args: MetaTrainingArguments,
    changes: Mapping[str, Any],
) -> Run[Settings]:
    root = Path(str(args.output_dir))
    own = _changed(task.settings, _values(settings), changes)
    theirs = {name: value for name, value in changes.items() if name not in _values(settings)}
    if not task.learns(own):
        theirs["estimator"] = NO_ESTIMATOR
    if "estimator" in theirs:  # which then starts from its own defaults
        theirs = {"estimator_kwargs": None} | theirs
    theirs |= {"output_dir": str(folder), "seed": key[2]}
    if folder != root:  # a repository a run
        theirs["hub_model_id"] = "-".join([args.hub_model_id or root.name, *folder.relative_to(root).parts])
    made = _changed_arguments(args, theirs)
    items = [] if task.case is None else getattr(own, task.case)
    if len(items) > 1:
        raise ValueError(f"case {key[1]}: {task.case} must be one, in a case of its own, not {', '.join(items)}")
    task.refuse(own, made)
    return Run(*key, folder, own, made)


def _changed_arguments(args: MetaTrainingArguments, changes: Mapping[str, Any]) -> MetaTrainingArguments:
    """Arguments made anew, so that what they check is checked of the changed ones too."""
    values = _values(args)
    launch = {"use_configured_state": True}  # which stays as it is
    values["accelerator_config"] = cast(Any, args.accelerator_config).to_dict() | launch
    if args.meta_seed == args.seed:
        values["meta_seed"] = None  # follows the seed
    made = _changed(type(args), values, changes)
    refuse_unusable(made)
    return made


def _changed(cls: type[Own], values: Mapping[str, Any], changes: Mapping[str, Any]) -> Own:
    return make_settings(cls, {**values, **{name: value for name, value in changes.items() if name in values}})


def _values(settings: Any) -> dict[str, Any]:
    return {one.name: getattr(settings, one.name) for one in fields(settings) if one.init}


def selected(runs: list[Run[Any]], only: list[str] | None) -> Iterator[int]:
    """The numbers of the runs that `only` names; of all where it names none.

    Raises:
        ValueError: for a run, case or seed that is not in the plan.
    """
    wanted: dict[str, set[str]] = {}
    for one in only or ():
        key, _, name = one.partition("=")
        wanted.setdefault(key, set()).add(name)
    found = [dict(zip(("run", "case", "seed"), map(str, run.key), strict=True)) for run in runs]
    for key, names in wanted.items():
        present = list(dict.fromkeys(names_of[key] for names_of in found))
        for name in sorted(names - set(present)):
            raise ValueError(unknown(f"{key} of only", name, present))
    return (number for number, one in enumerate(found) if all(one[key] in names for key, names in wanted.items()))
