"""How far the outer loss falls for one step of the meta parameters, by the horizon of the hypergradient.

A run of a task is recorded over some base steps. The same steps are made again, from the same weights with the same
batches, with lam a little way along each estimate, and along a random direction: what the outer loss is at their end
then is what the step was worth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from scipy.stats import sem
from transformers import TrainerCallback

from metaxl_evo.benchmark.recorded import refuse_made, train_recorded, write_table
from metaxl_evo.benchmark.trajectories import train
from metaxl_evo.bilevel import BilevelProblem, PassContext, Tree, run_episode, tree
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState, map_trees
from metaxl_evo.estimators import OneStep, make_estimator
from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.plan import Run, plan_runs
from metaxl_evo.experiments.task import Task, find_task
from metaxl_evo.training.arguments import NO_ESTIMATOR
from metaxl_evo.training.base_optimizer import BaseOptimizer
from metaxl_evo.training.meta_rows import Window
from metaxl_evo.training.parser import given_text, parse_arguments
from metaxl_evo.training.trainer import MetaTrainer

TABLE = "horizons.csv"
RANDOM, NOWHERE, WHOLE = "random direction", "no step", "unroll"
Batches = list[Any]


@dataclass
class HorizonArguments:
    """Where a run is recorded, and which estimates are judged.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    task: str = field(default="ner", metadata={"help": "A task, as of `metaxl-evo study`."})
    starts: list[int] = field(
        default_factory=lambda: [0, 200], metadata={"help": "Base steps before which the recording begins."}
    )
    steps: int = field(default=20, metadata={"help": "Base steps that are recorded, and made again."})
    horizons: list[int] = field(
        default_factory=lambda: [1, 5, 20], metadata={"help": "Of `unroll`: how many of these steps, the last ones."}
    )
    others: dict[str, Any] = field(
        default_factory=lambda: {"hyperdistill": {"scale": "one"}},
        metadata={"help": "Further estimators -> their settings."},
    )
    moves: list[float] = field(
        default_factory=lambda: [0.01, 0.1], metadata={"help": "How far lam is moved, of its norm."}
    )

    def __post_init__(self) -> None:
        for name, fields in self.others.items():
            make_estimator(name, **(fields or {}))
        if not self.horizons or not all(1 <= one <= self.steps for one in self.horizons):
            raise ValueError(f"horizons must be from 1 to steps, {self.steps}, not {self.horizons}")
        if min(self.starts, default=-1) < 0 or min(self.moves, default=0) <= 0:
            raise ValueError("starts and moves must be given: at least 0, and above 0")


@dataclass(frozen=True)
class Recording:
    """Base steps of a run, from where they began.

    Args:
        problem: with the rule of these steps, their learning rates that of the first.
        w, lam, update_state: before the first of them.
        train, meta: the batches of each step.
    """

    problem: BilevelProblem
    w: Tree
    lam: Tree
    update_state: UpdateState
    train: Sequence[Batches]
    meta: Sequence[Batches]

    def replay(self, lam: Tree) -> Tree:
        """The base weights after the same steps with another lam."""
        return train(self.problem, self.w, lam, self.train, self.update_state)

    def judge(self, w: Tree, lam: Tree) -> tuple[float, float]:
        """The outer loss on the meta rows of the last step, and on those of the steps before it."""
        found = [self._outer(w, lam, batch) for batch in self.meta]
        return found[-1], fmean(found[:-1] or found)

    def _outer(self, w: Tree, lam: Tree, batch: Batches) -> float:
        return float(PassContext(self.problem).outer_grad(w, lam, batch, wrt_w=(), wrt_lam=())[0])


class Recorder(TrainerCallback):
    """Keeps what an `Recording` needs of a training, from base step `start` on."""

    def __init__(self, trainer: MetaTrainer, start: int):
        self.trainer, self.start = trainer, start
        self.windows: list[Window] = []
        self.before: tuple[UpdateRule, UpdateState, Tree, Tree] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.start:
            return
        model = self.trainer.model
        if self.before is None:
            base = BaseOptimizer(self.trainer.optimizer, model, args)
            rule, held = base.update_rule(OneStep(), state.global_step)
            weights = tree.clone(model.base_parameters()), tree.clone(model.meta_parameters())
            self.before = rule, map_trees(tree.clone, held), *weights
        self.windows.append(self.trainer.window)

    def recording(self) -> Recording:
        """What was recorded, once the training is over."""
        assert self.before is not None
        rule, state, w, lam = self.before
        batches = [one.train for one in self.windows], [one.meta for one in self.windows]
        return Recording(self.trainer.model.problem(rule), w, lam, state, *batches)


def record(task: Task[Any, Any], run: Run[Any], start: int, steps: int) -> Recording:
    """Train up to base step `start` without an estimator, and record the steps behind it.

    Raises:
        ValueError: for whatever the run would refuse, and for meta rows that there are not.
    """
    args = copy.copy(run.args)
    args.estimator, args.estimator_kwargs, args.max_steps = NO_ESTIMATOR, None, start + steps
    args.lr_scheduler_type, args.lr_milestones = "constant", None
    return train_recorded(task, run, args, lambda trainer: Recorder(trainer, start)).recording()


def directions(settings: HorizonArguments, recording: Recording, seed: int) -> Iterator[tuple[str, Tree]]:
    """Where lam is moved: against each estimate, and anywhere."""
    named = {f"{WHOLE} {one}": make_estimator(WHOLE, horizon=one) for one in sorted(settings.horizons)}
    named |= {name: make_estimator(name, **(fields or {})) for name, fields in settings.others.items()}
    for name, estimator in named.items():
        where = (recording.w, recording.lam, recording.train, recording.meta[-1])
        found = run_episode(recording.problem, estimator, *where, update_state=recording.update_state)
        yield name, tree.scale(found.grads, -1.0)
    generator = torch.Generator().manual_seed(seed)
    yield RANDOM, {name: torch.randn(leaf.shape, generator=generator) for name, leaf in recording.lam.items()}


def compare_horizons(argv: Sequence[str]) -> pd.DataFrame:
    """Measure a task's run with each of `--seeds`, the options being its own and those of `HorizonArguments`.

    Raises:
        ValueError: for settings that cannot be, and files that are there already.
    """
    task = find_task(given_text("task", argv) or HorizonArguments.task)
    which, settings, ours, args = parse_arguments(
        (RunsArguments, HorizonArguments, task.settings, task.training), argv, task.configs
    )
    folder = Path(str(args.output_dir))
    refuse_made(folder, TABLE)
    with TemporaryDirectory() as scratch:
        args.output_dir = scratch
        runs = [run for run in plan_runs(task, which, ours, args) if task.learns(run.settings)]
        if len({run.name for run in runs}) != 1:
            named = ", ".join(dict.fromkeys(run.name for run in runs)) or "none"
            raise ValueError(f"runs: one that learns is measured, there are {named}: leave the others out (null)")
        table = measure(settings, task, runs)
    write_table(folder, TABLE, table, falls(table))
    return table


def measure(settings: HorizonArguments, task: Task[Any, Any], runs: Sequence[Run[Any]]) -> pd.DataFrame:
    """A row a run, start, direction and move: what the outer loss was at the end of the steps.

    Columns: `cosine` of the direction with that of the longest horizon; `own` and `other`, the outer loss on the meta
    rows that the estimate has seen, and on those of the other steps; `own_at_start` before the steps; `predicted`, the
    fall of `own` to first order in the move.
    """
    rows = []
    for run in runs:
        for start in settings.starts:
            recording = record(task, run, start, settings.steps)
            for row in _rows(settings, recording, run.seed):
                rows.append({"case": run.case, "seed": run.seed, "start": start, **row})
                print(
                    {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in rows[-1].items()}
                )
    return pd.DataFrame(rows)


def _rows(settings: HorizonArguments, recording: Recording, seed: int) -> Iterator[dict[str, Any]]:
    at_start, _ = recording.judge(recording.w, recording.lam)
    own, other = recording.judge(recording.replay(recording.lam), recording.lam)
    yield {"direction": NOWHERE, "move": 0.0, "own_at_start": at_start, "own": own, "other": other}
    if tree.norm(recording.lam) == 0:
        raise ValueError("moves are parts of the norm of the meta parameters, which begin at zero here")
    found = dict(directions(settings, recording, seed))
    longest = found[f"{WHOLE} {max(settings.horizons)}"]
    for name, direction in found.items():
        for move in settings.moves:
            length = move * tree.norm(recording.lam)
            lam = tree.add(recording.lam, direction, length / (tree.norm(direction) or 1.0))
            own, other = recording.judge(recording.replay(lam), lam)
            cosine = tree.cosine(direction, longest)
            slope = cosine * tree.norm(longest)
            yield {"direction": name, "move": move, "own": own, "other": other, "cosine": cosine} | {
                "predicted": length * slope
            }


def falls(table: pd.DataFrame) -> str:
    """Markdown: by start, direction and move the mean fall of the outer loss against no step, ± its standard error."""
    key = ["case", "seed", "start"]
    still = table[table["direction"] == NOWHERE]
    moved = table[table["direction"] != NOWHERE].merge(still[[*key, "own", "other"]], on=key, suffixes=("", "_still"))
    lines = ["| start | direction | moved by | cosine | falls, rows seen | falls, other rows | predicted |"]
    lines += ["|---:|---|---:|---:|---:|---:|---:|"]
    for (start, name, move), part in moved.groupby(["start", "direction", "move"], sort=False):
        fallen = [_spread(part[f"{which}_still"] - part[which]) for which in ("own", "other")]
        cells = [f"{part['cosine'].mean():.2f}", *fallen, f"{part['predicted'].mean():.5f}"]
        lines.append(f"| {start} | {name} | {100 * float(move):g} % | {' | '.join(cells)} |")
    for start, part in still.groupby("start"):
        lines.append(f"\nWithout a step, from base step {start}: {part['own_at_start'].mean():.3f} falls to "
                     f"{part['own'].mean():.3f} ({len(part)} recordings).")  # fmt: skip
    return "\n".join(lines)


def _spread(values: pd.Series) -> str:
    error = "" if len(values) < 2 else f" ± {sem(values):.5f}"
    return f"{values.mean():.5f}{error}"
