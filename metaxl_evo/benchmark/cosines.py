"""How near estimates come to the exact hypergradient of an episode, at episodes of a run that is under way.

A run of a task is trained by its own estimator up to the last of some episodes. Each of these is then made again, from
the weights and the meta parameters at its start, which stand still, by every estimator; `unroll` is the judge.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from torch import nn
from transformers import TrainerCallback

from metaxl_evo.benchmark.recorded import refuse_made, train_recorded, write_table
from metaxl_evo.bilevel import BilevelProblem, Hypergradient, Tree, run_episode, tree
from metaxl_evo.estimators import OneStep, make_estimator
from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.plan import Run, plan_runs
from metaxl_evo.experiments.task import Task, find_task
from metaxl_evo.training.base_optimizer import BaseOptimizer
from metaxl_evo.training.meta_rows import Window
from metaxl_evo.training.parser import given_text, parse_arguments
from metaxl_evo.training.trainer import MetaTrainer

TABLE = "cosines.csv"
EXACT, DIRECT = "unroll", "first_order"
JUDGED = {DIRECT: {}, "one_step": {}, "drmad": {}, "neumann": {"step": 0.01}, "hyperdistill": {}, EXACT: {}}


@dataclass
class CosineArguments:
    """Which episodes are made again, and by which estimators.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    task: str = field(default="sinusoid", metadata={"help": "A task, as of `metaxl-evo study`."})
    episodes: list[int] = field(
        default_factory=lambda: [0, 5, 10], metadata={"help": "Episodes of a run, from 0, that are made again."}
    )
    judged: dict[str, Any] = field(
        default_factory=lambda: dict(JUDGED),
        metadata={"help": "Estimators -> their settings; what follows a name's first word tells them apart."},
    )

    def __post_init__(self) -> None:
        for name, fields in self.judged.items():
            make_estimator(name.split()[0], **(fields or {}))
        if not self.episodes or min(self.episodes) < 0:
            raise ValueError(f"episodes must be given, each at least 0, not {self.episodes}")


@dataclass(frozen=True)
class Recorded:
    """An episode: the problem, both levels at its start, and the windows of its steps."""

    problem: BilevelProblem
    w: Tree
    lam: Tree
    windows: Sequence[Window]

    def by(self, name: str, settings: Mapping[str, Any]) -> tuple[Hypergradient, float]:
        """The hypergradient at its end by an estimator, and the seconds that the episode took with it."""
        batches, begun = [window.train for window in self.windows], time.perf_counter()
        estimator = make_estimator(name.split()[0], **settings)
        found = run_episode(self.problem, estimator, self.w, self.lam, batches, self.windows[-1].meta)
        return found, time.perf_counter() - begun

    def direct(self) -> tuple[Tree, float]:
        """The direct term, and the seconds of the episode; zero where the outer loss does not read lam."""
        if not self.problem.direct_term:
            return tree.zeros_like(self.lam), 0.0
        found, seconds = self.by(DIRECT, {})
        return found.grads, seconds


class Recorder(TrainerCallback):
    """Keeps some episodes of a training, from where the first forward of each finds the weights."""

    def __init__(self, trainer: MetaTrainer, episodes: Sequence[int]):
        self.trainer, self.episodes = trainer, episodes
        self.starts: dict[int, tuple[BilevelProblem, Tree, Tree]] = {}
        self.windows: dict[int, list[Window]] = {one: [] for one in episodes}
        trainer.model.register_forward_pre_hook(self._before)

    def _episode(self, step: int) -> int:
        assert self.trainer.args.episode_length is not None
        return step // self.trainer.args.episode_length

    def _before(self, module: nn.Module, inputs: Any) -> None:
        model, number = self.trainer.model, self._episode(self.trainer.state.global_step)
        if not module.training or number not in self.episodes or number in self.starts:
            return
        rule, _ = BaseOptimizer(self.trainer.optimizer, model, self.trainer.args).update_rule(OneStep(), 0)
        weights = tree.clone(model.base_parameters()), tree.clone(model.meta_parameters())
        self.starts[number] = model.problem(rule), *weights

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (number := self._episode(state.global_step - 1)) in self.episodes:
            self.windows[number].append(self.trainer.window)

    def recorded(self) -> Iterator[tuple[int, Recorded]]:
        """Each episode by its number."""
        for number, start in self.starts.items():
            yield number, Recorded(*start, self.windows[number])


def record(task: Task[Any, Any], run: Run[Any], episodes: Sequence[int]) -> list[tuple[int, Recorded]]:
    """Train to the end of the last of these episodes.

    Raises:
        ValueError: for whatever the run would refuse, and a run without episodes.
    """
    args = copy.copy(run.args)
    if args.episode_length is None:
        raise ValueError("estimates are compared over episodes: set episode_length, the number of base steps in one")
    args.max_steps = args.episode_length * (max(episodes) + 1)
    return list(train_recorded(task, run, args, lambda trainer: Recorder(trainer, episodes)).recorded())


def compare_cosines(argv: Sequence[str]) -> pd.DataFrame:
    """Measure each of a task's runs, the options being its own and those of `CosineArguments`.

    Returns a row a run, episode and estimator: `cosine` with the exact hypergradient, `beyond_direct` of what is left
    without the direct term, `length` by that of the exact one, and `seconds` of the episode with it.

    Raises:
        ValueError: for settings that cannot be, and files that are there already.
    """
    task = find_task(given_text("task", argv) or CosineArguments.task)
    which, settings, ours, args = parse_arguments(
        (RunsArguments, CosineArguments, task.settings, task.training), argv, task.configs
    )
    folder = Path(str(args.output_dir))
    refuse_made(folder, TABLE)
    rows = []
    with TemporaryDirectory() as scratch:
        args.output_dir = scratch
        for run in plan_runs(task, which, ours, args):
            for number, recorded in record(task, run, settings.episodes):
                for row in judged(recorded, settings.judged):
                    rows.append({"run": run.name, "seed": run.seed, "episode": number, **row})
    table = pd.DataFrame(rows)
    write_table(folder, TABLE, table, means(table))
    return table


def judged(recorded: Recorded, estimators: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row an estimator."""
    exact, (direct, of_direct) = recorded.by(EXACT, {})[0].grads, recorded.direct()
    beyond = tree.add(exact, direct, -1.0)
    for name, settings in estimators.items():
        if name == DIRECT:
            found, seconds = direct, of_direct
        else:
            made, seconds = recorded.by(name, settings or {})
            found = made.grads
        rest = tree.add(found, direct, -1.0)
        yield {
            "estimator": name,
            "cosine": tree.cosine(found, exact),
            "beyond_direct": tree.cosine(rest, beyond) if name != DIRECT else float("nan"),
            "length": tree.norm(found) / tree.norm(exact),
            "seconds": seconds,
        }


def means(table: pd.DataFrame) -> str:
    """Markdown: by estimator and episode the means over runs and seeds."""
    lines = ["| estimator | episode | cosine | without the direct term | length | seconds |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for (name, number), part in table.groupby(["estimator", "episode"], sort=False):
        cosine, beyond, length, seconds = part[["cosine", "beyond_direct", "length", "seconds"]].mean()
        lines.append(f"| {name} | {number} | {cosine:.3f} | {beyond:.3f} | {length:.2f} | {seconds:.2f} |")
    return "\n".join(lines)
