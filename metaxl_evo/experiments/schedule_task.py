"""What tasks share whose meta parameters are a schedule: settings, budgets of gradient steps, files, pictures."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metaxl_evo.estimators import ForwardMode
from metaxl_evo.experiments.folders import write_json
from metaxl_evo.experiments.schedule_search import Bounds, Propose, as_it_is, at_random, by_optuna
from metaxl_evo.messages import one_line, unknown
from metaxl_evo.models.schedule import ANYWHERE, KINDS, SUBFOLDER, Schedule
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.figures import figure
from metaxl_evo.training.values import refuse_count

METHODS = ("learned", "random_search", "optuna", "fixed")
OUTSIDE = ("clamp", "refuse", "allow")
FILE, TABLE, PICTURE = "schedule.json", "schedules.csv", "schedule.png"
AT_THE_END = ("forward_mode", "greedy")  # these answer once a training
FORWARD = 1 / 3  # of a gradient


@dataclass
class ScheduleTrainingArguments(MetaTrainingArguments):
    """MetaTrainingArguments with the defaults of FDS."""

    estimator: str = field(
        default="forward_mode", metadata={"help": "forward_mode (FDS), or greedily: one_step, hyperdistill, greedy."}
    )
    meta_optim: str = field(default="SignHalving", metadata={"help": "Meta optimiser: SignHalving or of torch.optim."})
    meta_learning_rate: float = field(default=0.1, metadata={"help": "The first step of SignHalving."})
    meta_lr_scheduler_type: Any = field(default="constant", metadata={"help": "Schedule of the meta learning rate."})
    lr_scheduler_type: Any = field(default="constant", metadata={"help": "Of a rate that is not learned."})
    optimizer_class: str | None = field(default="SGD", metadata={"help": "The optimiser whose numbers are learned."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip base gradients to this norm (0: off)."})
    per_device_meta_batch_size: int = field(
        default=2500, metadata={"help": "Rows that judge at a meta step, at most (default: all of a usual split)."}
    )
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "The rows of a training come in an order of their own: sequential."}
    )


@dataclass
class ScheduleArguments:
    """Which numbers are learned, from where, and over how many steps.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    method: str = field(
        default="learned",
        metadata={
            "help": "learned: by hypergradients; random_search, optuna: the best of several trainings by their "
            "validation loss; fixed: the first schedule."
        },
    )
    n_lr: int = field(default=5, metadata={"help": "Windows of the learning rate (0: it is not learned)."})
    n_momentum: int = field(default=1, metadata={"help": "Windows of momentum."})
    n_wd: int = field(default=1, metadata={"help": "Windows of weight decay."})
    initial_lr: float = field(default=0.0, metadata={"help": "Where each window of it begins."})
    initial_momentum: float = field(default=0.0, metadata={"help": "Where each window of it begins."})
    initial_wd: float = field(default=0.0, metadata={"help": "Where each window of it begins."})
    initial_schedule: str | None = field(
        default=None, metadata={"help": f"A {FILE} of another run to begin with, in place of these three."}
    )
    lr_bounds: list[float] = field(default_factory=lambda: [0.0, 1.0], metadata={"help": "Least and largest value."})
    momentum_bounds: list[float] = field(
        default_factory=lambda: [0.0, 0.99], metadata={"help": "Least and largest value."}
    )
    wd_bounds: list[float] = field(default_factory=lambda: [0.0, 0.01], metadata={"help": "Least and largest value."})
    out_of_bounds: str = field(
        default="clamp",
        metadata={
            "help": "Where a hypergradient leads out of bounds: clamp, refuse (the run ends), allow (as published)."
        },
    )
    inner_steps: int = field(default=1000, metadata={"help": "Steps of one training, T."})
    outer_steps: int = field(default=10, metadata={"help": "Trainings of forward_mode, one an outer step."})
    trainings: int | None = field(
        default=None,
        metadata={
            "help": "Trainings of this run (default: as many as the gradients of forward_mode's outer_steps allow)."
        },
    )
    product_cost: float = field(
        default=2.0, metadata={"help": "Gradients that a Hessian product counts for, in such a budget."}
    )
    retrain_steps: int | None = field(
        default=None,
        metadata={"help": "Steps of the last training, on all rows, the schedule stretched (default: inner_steps)."},
    )

    def check_schedule(self) -> None:
        """Refuse values that cannot be, or do not fit each other."""
        for name, given, valid in (("method", self.method, METHODS), ("out_of_bounds", self.out_of_bounds, OUTSIDE)):
            if given not in valid:
                raise ValueError(unknown(name, given, valid))
        for name, least in (("n_lr", 0), ("n_momentum", 0), ("n_wd", 0), ("inner_steps", 1), ("outer_steps", 1)):
            refuse_count(name, getattr(self, name), least)
        for name in ("trainings", "retrain_steps"):
            refuse_count(name, getattr(self, name))
        if not self.product_cost >= 0:
            raise ValueError(f"product_cost must be a number of at least 0, not {self.product_cost}")
        self._check_bounds()
        self._check_windows()

    def _check_bounds(self) -> None:
        for name in ("lr_bounds", "momentum_bounds", "wd_bounds"):
            held = getattr(self, name)
            if len(held) != 2 or not held[0] < held[1] < float("inf"):
                raise ValueError(f"{name} must be the least and the largest value, as in [0, 1], not {held}")
        if not self.momentum_bounds[1] < 1 or min(self.lr_bounds[0], self.momentum_bounds[0]) < 0:
            raise ValueError(
                "lr_bounds must not be below 0, nor momentum_bounds, which must end below 1: "
                f"here are {self.lr_bounds} and {self.momentum_bounds}; out_of_bounds: allow takes any"
            )

    def _check_windows(self) -> None:
        windows = self.windows()
        if not windows:
            raise ValueError("n_lr, n_momentum and n_wd are all 0: give one of them windows to learn")
        for kind, count in windows.items():
            if self.inner_steps % count:
                near = self.inner_steps // count * count
                fitting = " or ".join(str(steps) for steps in (near, near + count) if steps)
                raise ValueError(
                    f"{count} windows of {kind} do not divide the {self.inner_steps} inner_steps: set inner_steps to "
                    f"{fitting}"
                )

    def windows(self) -> dict[str, int]:
        """Of each kind that is learned."""
        return {
            kind: count for kind, count in zip(KINDS, (self.n_lr, self.n_momentum, self.n_wd), strict=True) if count
        }

    def bounds(self) -> Bounds:
        """Of each kind."""
        given = (self.lr_bounds, self.momentum_bounds, self.wd_bounds)
        return {kind: (low, high) for kind, (low, high) in zip(KINDS, given, strict=True)}

    def ranges(self) -> Bounds:
        """What meta steps are kept in, the `tuned_ranges` of a task; a search does not leave its bounds."""
        held, kept = self.bounds(), self.out_of_bounds == "clamp" and self.method in ("learned", "fixed")
        return {kind: held[kind] if kept else ANYWHERE for kind in self.windows()}

    def propose(self, seed: int) -> Propose | None:
        """What is tried without hypergradients; None for `learned`."""
        if self.method == "optuna" and not find_spec("optuna"):
            raise ValueError("method optuna needs optuna: pip install metaxl_evo[optuna], or use random_search")
        if self.method in ("random_search", "optuna"):
            return (at_random if self.method == "random_search" else by_optuna)(self.bounds(), seed)
        return as_it_is if self.method == "fixed" else None

    def make_schedule(self, args: MetaTrainingArguments) -> Schedule:
        """The first numbers, with room for all trainings of the run."""
        schedule, kinds = Schedule(self.windows(), args.max_steps // self.inner_steps), self.windows()
        first = dict(zip(KINDS, (self.initial_lr, self.initial_momentum, self.initial_wd), strict=True))
        values: dict[str, Any] = {kind: [first[kind]] * count for kind, count in kinds.items()}
        if self.initial_schedule is not None:
            values = _read(Path(self.initial_schedule), kinds)
        schedule.put(schedule.tried.new_tensor([value for kind in kinds for value in values[kind]]))
        return schedule


@dataclass(frozen=True)
class Budget:
    """What trainings cost, in gradients of one training batch.

    Args:
        settings: of the run.
        judged: rows that judge at a meta step, over the rows of a training batch.
    """

    settings: ScheduleArguments
    judged: float

    def of_a_training(self, estimator: str | None, every: int) -> float:
        """Of `inner_steps` steps with this estimator, which answers `every` so many; None: judged at its end alone.

        Raises:
            ValueError: for an estimator whose cost is not known.
        """
        steps, product = self.settings.inner_steps, self.settings.product_cost
        if estimator is None:
            return steps + FORWARD * self.judged
        answers = {
            "forward_mode": self.judged + steps * self.products * product,
            "greedy": steps * (self.judged + product),
            "one_step": steps // every * (self.judged + product),
            "hyperdistill": steps // every * (self.judged + 1 + product),
        }
        if estimator not in answers:
            raise ValueError(
                f"trainings: what {estimator} costs is not known here: set it, or use {', '.join(answers)}"
            )
        return steps + answers[estimator]

    @property
    def products(self) -> float:
        """Hessian products of forward mode, a step on average: those of the windows that have begun."""
        return sum((count + 1) / 2 for count in self.settings.windows().values())

    @property
    def whole(self) -> float:
        """Of all outer steps of forward mode."""
        return self.settings.outer_steps * self.of_a_training("forward_mode", self.settings.inner_steps)

    def trainings(self, estimator: str | None, every: int) -> int:
        """As many as the whole allows."""
        if estimator == "forward_mode":
            return self.settings.outer_steps
        return max(1, int(self.whole / self.of_a_training(estimator, every)))


def fit_schedule(settings: ScheduleArguments, args: MetaTrainingArguments, judging: int) -> MetaTrainingArguments:
    """The arguments of the search: its episodes, its steps, the windows of forward mode.

    Args:
        judging: how many rows judge.
    """
    made, steps = copy.copy(args), settings.inner_steps
    learned = args.estimator if settings.method == "learned" else None
    made.episode_length, made.episode_reset = steps, "restart"
    if learned in AT_THE_END:
        made.meta_every = steps
    if learned == "forward_mode":
        made.estimator_kwargs = {"windows": settings.windows(), **(args.estimator_kwargs or {})}  # type: ignore[dict-item]
    rows = args.train_batch_size * args.gradient_accumulation_steps
    budget = Budget(settings, min(judging, args.per_device_meta_batch_size) / rows)
    trainings = 1 if settings.method == "fixed" else settings.trainings
    made.max_steps = steps * (trainings or budget.trainings(learned, made.meta_every))
    return made


def refuse_schedule(settings: ScheduleArguments, args: MetaTrainingArguments) -> None:
    """Refuse what a search cannot use.

    Raises:
        ValueError: one line with the setting and the way out.
    """
    size, largest = sum(settings.windows().values()), ForwardMode.max_meta_size
    if settings.method == "learned" and args.estimator == "forward_mode" and size > largest:
        raise ValueError(
            f"the schedule has {size} numbers, and forward_mode is meant for at most {largest}: lower n_lr, "
            "n_momentum or n_wd, or set estimator: one_step"
        )
    if settings.method == "learned":
        _refuse_answers(settings.inner_steps, args)
    follows = {"max_steps": -1, "episode_length": None, "episode_reset": "continue"}
    for name, default in follows.items():
        if getattr(args, name) != default:
            raise ValueError(f"{name} follows from inner_steps and trainings: leave it out")
    if args.train_sampling_strategy != "sequential":
        raise ValueError("train_sampling_strategy must be sequential: the rows of each training come shuffled")
    if args.world_size > 1:
        raise ValueError("a schedule is searched by one process: start one, and several runs side by side as a study")


def _refuse_answers(steps: int, args: MetaTrainingArguments) -> None:
    """Of meta steps that would not be where `meta_every` says, or nowhere."""
    every, at_the_end = args.meta_every, args.estimator in AT_THE_END
    if at_the_end and every not in (1, steps):
        raise ValueError(f"{args.estimator} answers at the end of a training: leave meta_every out")
    if not at_the_end and every > steps:
        raise ValueError(
            f"meta_every {every} is more than the {steps} inner_steps, nothing would be learned: lower it"
        )


def describe_schedule(settings: ScheduleArguments, schedule: Schedule) -> dict[str, Any]:
    """The schedule, and how each training ended; plain values."""
    losses = [None if loss != loss or loss == float("inf") else loss for loss in schedule.losses.tolist()]
    return {
        "schedule": schedule.plain(),
        "losses": losses,
        "trainings": len(losses),
        "inner_steps": settings.inner_steps,
    }


def write_schedule(folder: Path, schedule: Schedule) -> None:
    """`schedule.json`, the numbers by kind, and `schedules.csv`, a row a training."""
    write_json(folder / FILE, schedule.plain())
    names = [f"{kind}_{window}" for kind, count in schedule.windows().items() for window in range(count)]
    columns = [*names, *(f"slope_of_{name}" for name in names)]
    numbers = np.concatenate([schedule.tried.cpu().numpy(), schedule.slopes.cpu().numpy()], axis=1)
    table = pd.DataFrame(numbers, columns=columns)
    table.insert(0, "loss", schedule.losses.cpu().numpy())
    table.to_csv(folder / TABLE, index_label="training")


def plot_schedule(folder: Path, facts: Mapping[str, Any]) -> None:
    """The schedule that was found over the steps of a training, a picture a kind; faintly what was tried.

    Raises:
        ImportError: without matplotlib.
    """
    found, steps = facts["schedule"], facts["inner_steps"]
    tried = pd.read_csv(folder / TABLE) if (folder / TABLE).is_file() else pd.DataFrame()
    with figure(folder / PICTURE, len(found), (4.2 * len(found), 3.2)) as axes:
        for axis, (kind, values) in zip(axes, found.items(), strict=True):
            edges = np.linspace(0, steps, len(values) + 1)
            for _, row in tried.iterrows():
                axis.stairs([row[f"{kind}_{window}"] for window in range(len(values))], edges, color="C7", alpha=0.3)
            axis.stairs(values, edges, color="C0", linewidth=2, baseline=None)
            axis.set(xlabel="step of a training", title=kind.replace("_", " "))


def own_files() -> Sequence[str]:
    """What a run writes beyond the files of any."""
    return (SUBFOLDER, FILE, TABLE, PICTURE)


def _read(file: Path, windows: Mapping[str, int]) -> dict[str, list[float]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        held = {kind: [float(value) for value in found[kind]] for kind in windows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"initial_schedule: {file} is no {FILE} with {', '.join(windows)} ({one_line(error)})"
        ) from error
    if (sizes := {kind: len(values) for kind, values in held.items()}) != windows:
        raise ValueError(
            f"initial_schedule: {file} has {sizes} values, here are {dict(windows)}: set the same windows"
        )
    return held
