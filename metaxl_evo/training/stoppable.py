"""A trainer that a signal ends behind its step: all that was learned is in a checkpoint, whatever the strategy."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from metaxl_evo.training.callbacks import require_finite
from metaxl_evo.training.preemption import GO_ON, Interrupted, Preemption, shield_workers
from metaxl_evo.training.task_trainer import TaskTrainer


class StoppableTrainer(TaskTrainer):
    """A TaskTrainer that looks, behind every step, for a signal that told some process to stop.

    Attributes:
        stoppable: whether it does; else signals are left to others.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.stoppable, self._preemption = True, Preemption()
        self._looked_at, self._kept = -1, False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's.

        Raises:
            Interrupted: told to stop; a checkpoint holds the last step.
        """
        self._looked_at, self._preemption = -1, Preemption()
        with self._preemption.heeded() if self.stoppable else nullcontext():
            return super().train(*args, **kwargs)

    def keep_step(self) -> None:
        """Write a checkpoint to resume from, whatever the strategy, and upload nothing."""
        require_finite(self.model, self.state.global_step)
        args, self.args = self.args, copy.copy(self.args)
        self.args.save_only_model, self.args.push_to_hub = False, False
        try:
            self._save_checkpoint(self.model, self._trial)
        finally:
            self.args = args
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _run_epoch(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the Trainer's, which would make one step more from a checkpoint of the last one within an epoch."""
        if self.state.global_step >= self.state.max_steps:
            self._load_rng_state(kwargs["resume_from_checkpoint"])
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(**kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        shield_workers(loader)
        return loader

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._kept = True

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, behind every step and every epoch; then is the time to stop."""
        self._kept = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        step = self.state.global_step
        last_of_epoch = self.control.should_training_stop or float(self.state.epoch or 0).is_integer()
        if last_of_epoch and self._looked_at != step:
            self._looked_at = step  # the end of the epoch comes next, and may evaluate
        elif self._told_to_stop():
            self._stop()

    def _told_to_stop(self) -> bool:
        """Whether any process was: all agree on the step."""
        told = self._preemption.told is not None
        if self.accelerator.num_processes == 1:
            return told
        return bool(self.accelerator.reduce(torch.tensor(int(told), device=self.args.device), reduction="sum"))

    def _stop(self) -> None:
        if not self._kept or self.args.save_only_model:
            self.keep_step()
        told, step = self._preemption.told, self.state.global_step
        by = "a signal to another process" if told is None else told.name
        folder = Path(self._get_output_dir(self._trial)) / f"checkpoint-{step}"
        text = f"stopped by {by} after step {step} of {self.state.max_steps}, which {folder} keeps: {GO_ON}"
        raise Interrupted(text).say(self.args.should_log)
