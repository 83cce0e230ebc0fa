"""The trainer of a search for a schedule, made of what a task has of its own, and what is said of it afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.experiments.schedule_rows import JudgingRows, Splits, Training
from metaxl_evo.experiments.schedule_task import Budget, ScheduleArguments, describe_schedule
from metaxl_evo.experiments.schedule_trainer import ScheduleTrainer
from metaxl_evo.models.schedule import Schedule
from metaxl_evo.models.scheduled import Scheduled
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer


@dataclass(frozen=True)
class Parts:
    """What a task has of its own.

    Attributes:
        network: a network of the random state that there is.
        module: a network, a schedule and the steps of a training -> the task.
        rows: splits and the steps of a training -> the rows that train.
        collate: rows -> a batch.
        saved: the processor or tokenizer that is saved beside the network.
    """

    network: Callable[[], nn.Module]
    module: Callable[[nn.Module, Schedule, int], Scheduled]
    rows: Callable[[Splits, int], Training]
    collate: Callable[[Any], Any]
    saved: Any = None


def make_schedule_trainer(
    settings: ScheduleArguments, args: MetaTrainingArguments, parts: Parts, splits: Splits
) -> ScheduleTrainer:
    """The trainer of a search; the last training is on all rows, the schedule stretched.

    Raises:
        ValueError: for what the settings and the rows cannot make.
    """
    base, steps = parts.network(), settings.inner_steps
    rows, propose = parts.rows(splits, steps), settings.propose(args.seed)
    judges = JudgingRows(rows)

    def fresh(number: int) -> Mapping[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(mix_seed(args.seed, number))
            return parts.network().state_dict()

    def retrain(args: MetaTrainingArguments, schedule: Schedule) -> MetaTrainer:
        args.max_steps = settings.retrain_steps or steps
        network, found = copy.deepcopy(base), Schedule(schedule.windows())
        network.load_state_dict(fresh(len(schedule.losses)))
        found.put(schedule.row())
        every = parts.rows(Splits(splits.rows, 0, args.seed), args.max_steps)
        module = parts.module(network, found, args.max_steps)
        return MetaTrainer(module, args, train_dataset=cast(Any, every), data_collator=parts.collate)

    return ScheduleTrainer(
        parts.module(base, settings.make_schedule(args), steps),
        args,
        train_dataset=rows,
        meta_dataset=judges if propose is None else None,
        data_collator=judged_or(parts.collate),
        processing_class=parts.saved,
        fresh=fresh,
        retrain=retrain,
        judges=judges,
        propose=propose,
        bounds=settings.bounds() if settings.out_of_bounds == "refuse" else None,
    )


def judged_or(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Collates the numbers of rows that judge, and all else by `collate`."""

    def collated(rows: Any) -> Any:
        return {"judge": torch.tensor([row["judge"] for row in rows])} if "judge" in rows[0] else collate(rows)

    return collated


def schedule_of(trainer: MetaTrainer) -> Schedule:
    """The schedule of a search."""
    return cast(ScheduleTrainer, trainer).schedule


def best_loss(trainer: MetaTrainer, *, learned: bool) -> float:
    """The outer loss of the last training of hypergradients, or the least of those that were tried."""
    losses = schedule_of(trainer).losses
    return float(losses[-1] if learned else losses[losses == losses].min())


def rows_a_step(args: MetaTrainingArguments) -> int:
    """Of all micro-batches."""
    return args.train_batch_size * args.gradient_accumulation_steps


def describe_search(trainer: MetaTrainer, settings: ScheduleArguments, judging: int) -> dict[str, Any]:
    """The schedule, how each training ended, and their cost in gradients where it is known.

    Args:
        judging: how many rows judge.
    """
    args, facts = trainer.args, describe_schedule(settings, schedule_of(trainer))
    budget = Budget(settings, min(judging, args.per_device_meta_batch_size) / rows_a_step(args))
    estimator = args.estimator if settings.method == "learned" else None
    try:
        facts["gradient_steps"] = facts["trainings"] * budget.of_a_training(estimator, args.meta_every)
    except ValueError:  # of an estimator whose cost is not known
        facts["gradient_steps"] = None
    return facts
