"""The events of a MetaTrainer, for those who watch it and for itself."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.hypergradients import Hypergradient
from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.training.base_optimizer import BaseOptimizer
from metaxl_evo.training.meta_level import MetaLevel
from metaxl_evo.training.meta_rows import Window, tell_epoch
from metaxl_evo.training.meta_step import MetaStep
from metaxl_evo.training.synchrony import require_synchrony
from metaxl_evo.training.tuned import put_numbers


class HasMetaLevel(Protocol):
    """What the callbacks here need of a MetaTrainer, whose attributes these are."""

    model: BilevelModule
    optimizer: Any
    train_dataset: Any
    meta_level: MetaLevel | None
    meta_step: MetaStep | None
    learned_numbers: dict[str, float]


class MetaCallback(TrainerCallback):
    """A callback that also sees the meta steps of a MetaTrainer."""

    def on_meta_step(
        self, args: Any, state: Any, control: Any, hypergradient: Hypergradient, window: Window, **kwargs: Any
    ) -> None:
        """Between a finite hypergradient, estimated over the batches of `window`, and the step that lam makes by it.

        Args:
            kwargs: `model`, the task.
        """


class LevelEvents(TrainerCallback):
    """Calls the meta level around `optimizer.step()`, which no method of the Trainer surrounds."""

    def __init__(self, trainer: HasMetaLevel):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The number of whole epochs made, also within one: the last step of epoch k sets it to k + n/n. The Trainer
        # makes its iterator, and the workers their copies of the data set, after this.
        tell_epoch(self.trainer.train_dataset, int(state.epoch))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.model.tuned_optimizer:
            base = BaseOptimizer(trainer.optimizer, trainer.model, args)
            steps = base.steps_before(state.global_step)
            trainer.learned_numbers = put_numbers(base.torch_optimizer, trainer.model, steps)
        if trainer.meta_step is not None:
            trainer.meta_step.before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.meta_step is not None:
            trainer.meta_step.after_update()
            trainer.meta_step = None
        if trainer.meta_level is not None:
            trainer.meta_level.end_step()


class LastLog(TrainerCallback):
    """Logs what the last steps of a training have done, which may be fewer than logging_steps.

    The Trainer logs no step twice.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_the_rest(args, state, control)  # before a checkpoint of the last step is written

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_the_rest(args, state, control)  # an evaluation may have ended the training

    def _log_the_rest(self, args: Any, state: Any, control: Any) -> None:
        ends = control.should_training_stop or state.global_step >= state.max_steps
        control.should_log |= ends and args.logging_strategy != IntervalStrategy.NO


class Divergence(TrainerCallback):
    """Ends a training whose weights are not finite, before they are logged, evaluated or saved.

    Behind `LastLog`, whose steps it looks at. Raises FloatingPointError, as a meta level does that learns nothing.
    """

    def __init__(self, trainer: HasMetaLevel):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_evaluate or control.should_save:
            require_finite(self.trainer.model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_finite(self.trainer.model, state.global_step)


def require_finite(model: BilevelModule, step: int) -> None:
    """Check the base's weights after a step.

    Raises:
        FloatingPointError: with advice.
    """
    weights = model.base_parameters()
    if tree.all_finite(weights):
        return
    lost = sum(int((~one.isfinite()).sum()) for one in weights.values())
    raise FloatingPointError(
        f"step {step}: {lost} of {tree.size(weights)} weights are not finite, the training has "
        "diverged: lower learning_rate, warm it up, or set max_grad_norm"
    )


class Synchrony(TrainerCallback):
    """Requires the same weights on all processes, at the start and with every checkpoint."""

    def __init__(self, trainer: HasMetaLevel):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._require(args, "before the first step")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._require(args, f"after step {state.global_step}")

    def _require(self, args: Any, when: str) -> None:
        if args.world_size > 1:
            require_synchrony(self.trainer.model, when)
