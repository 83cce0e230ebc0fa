"""A search for a schedule over trainings that each begin afresh, and one more training by what was found."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.hypergradients import Hypergradient
from metaxl_evo.experiments.schedule_search import Bounds, Propose
from metaxl_evo.models.schedule import Schedule
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.base_optimizer import unwrapped
from metaxl_evo.training.callbacks import MetaCallback
from metaxl_evo.training.meta_rows import Window
from metaxl_evo.training.trainer import MetaTrainer

RETRAINING = "retraining"  # the folder of the last training
Fresh = Callable[[int], Mapping[str, Tensor]]  # number of a training -> the state with which its network begins
Retrain = Callable[[MetaTrainingArguments, Schedule], MetaTrainer]


class ScheduleTrainer(MetaTrainer):
    """A MetaTrainer of episodes that each train a fresh network; then a last one trains by the schedule found.

    Its model then holds the network of the last training.

    Args:
        fresh: the networks.
        judges: the rows that judge, where there are no hypergradients (`meta_dataset` is None).
        propose: the schedule of each training then.
        bounds: kind -> where a hypergradient may not lead it; None lets it go anywhere.
        retrain: makes the last training.
    """

    def __init__(
        self,
        *args: Any,
        fresh: Fresh,
        retrain: Retrain,
        judges: Any = None,
        propose: Propose | None = None,
        bounds: Bounds | None = None,
        **kwargs: Any,
    ):
        self.fresh, self.retrain, self.judges, self.propose, self.bounds = fresh, retrain, judges, propose, bounds
        super().__init__(*args, callbacks=[Trainings(self)], **kwargs)

    @property
    def schedule(self) -> Schedule:
        """Of the search."""
        return cast(Schedule, self.model.meta)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As a MetaTrainer's, and the last training behind it; a check, which keeps nothing, goes without.

        Raises:
            ValueError: where every training diverged.
        """
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.stoppable:
            if self.propose is not None:
                self._choose()
            self._retrain(resuming=resume_from_checkpoint is not None)
        return output

    def judge(self) -> float:
        """The mean outer loss of the rows that judge, in evaluation mode."""
        size, rows, total = self.args.per_device_eval_batch_size, len(self.judges), 0.0
        self.model.eval()
        with torch.no_grad():
            for start in range(0, rows, size):
                taken = [self.judges[index] for index in range(start, min(start + size, rows))]
                total += float(cast(Tensor, self.model.outer_loss(self.collated(taken))).sum())
        self.model.train()
        return total / rows

    def _choose(self) -> None:
        losses = self.schedule.losses.nan_to_num(math.inf)
        if not losses.isfinite().any():
            raise ValueError(
                f"all {len(losses)} trainings diverged: lower the upper ends of lr_bounds, momentum_bounds"
            )
        self.schedule.put(self.schedule.tried[int(losses.argmin())])

    def _retrain(self, *, resuming: bool) -> None:
        args = copy.copy(self.args)
        args.output_dir = str(Path(str(self.args.output_dir)) / RETRAINING)
        args.estimator, args.estimator_kwargs = NO_ESTIMATOR, None
        args.episode_length, args.episode_reset, args.meta_every = None, "continue", 1
        args.push_to_hub, args.meta_history = False, False
        last = self.retrain(args, self.schedule)
        last.train(resume_from_checkpoint="latest" if resuming else None)
        self.model.base.load_state_dict(last.model.base.state_dict())
        shutil.rmtree(args.output_dir, ignore_errors=True)  # checkpoints of a training that is made


class Trainings(MetaCallback):
    """Begins each training of a ScheduleTrainer with a network and a schedule, and notes how it ended."""

    def __init__(self, trainer: ScheduleTrainer):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number, place = divmod(state.global_step, args.episode_length)
        if place == 0:
            schedule = self.trainer.schedule
            if self.trainer.propose is not None:
                schedule.put(self.trainer.propose(schedule, number))
            if number < len(schedule.tried):  # a check may make more
                schedule.tried[number] = schedule.row()
            self._begin(number)

    def on_meta_step(
        self, args: Any, state: Any, control: Any, hypergradient: Hypergradient, window: Window, **kwargs: Any
    ) -> None:
        number, schedule = state.global_step // args.episode_length, self.trainer.schedule
        if number < len(schedule.losses):
            schedule.losses[number] = hypergradient.outer_loss
            schedule.slopes[number] = schedule.row(hypergradient.grads)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        number, place = divmod(state.global_step - 1, args.episode_length)
        if self.trainer.bounds is not None:
            self._refuse_outside(self.trainer.bounds)
        if self.trainer.propose is not None and number < len(self.trainer.schedule.losses):
            self._judge(number, ends=place == args.episode_length - 1)

    def _begin(self, number: int) -> None:
        trainer = self.trainer
        trainer.model.base.load_state_dict(trainer.fresh(number))
        unwrapped(trainer.optimizer).state.clear()
        if trainer.meta_level is not None:
            trainer.meta_level.episodes.restart_from(trainer.model.base_parameters())

    def _judge(self, number: int, *, ends: bool) -> None:
        """A training that diverges has an infinite loss and goes on from its start, so that the search goes on."""
        losses = self.trainer.schedule.losses
        if not tree.all_finite(self.trainer.model.base_parameters()):
            losses[number] = math.inf
            self._begin(number)
        elif ends and not losses[number].isinf():
            losses[number] = self.trainer.judge()

    def _refuse_outside(self, bounds: Bounds) -> None:
        for kind, values in self.trainer.schedule.named_parameters():
            low, high = bounds[kind]
            outside = values[(values < low) | (values > high)]
            if outside.numel():
                raise ValueError(
                    f"the learned {kind} {float(outside[0]):.4g} left its bounds {low:g} to {high:g}: set "
                    f"out_of_bounds: clamp or allow, widen {kind}_bounds, or lower meta_learning_rate"
                )
