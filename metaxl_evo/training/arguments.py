"""Arguments of the meta level, on top of transformers' TrainingArguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from metaxl_evo.estimators import ESTIMATORS, Estimator, make_estimator
from metaxl_evo.messages import unknown

NO_ESTIMATOR = "none"
META_ORDERS = ("after_step", "lookahead")


def optimizer_class(name: str, field_name: str) -> type[torch.optim.Optimizer]:
    """The class of that name in `torch.optim`.

    Raises:
        ValueError: listing the classes there are.
    """
    valid = [
        key
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    ]
    if name not in valid:
        raise ValueError(unknown(field_name, name, valid))
    return getattr(torch.optim, name)


@dataclass
class MetaTrainingArguments(TrainingArguments):
    """TrainingArguments with a second level; the first level's fields mean what they always do.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "estimator_kwargs"]

    estimator: str = field(
        default="one_step",
        metadata={"help": f"How the hypergradient is estimated: {', '.join(ESTIMATORS)}, or none for no meta learning."},
    )
    estimator_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of the estimator, such as {\"copies\": 8}."}
    )
    meta_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the meta optimiser."})
    meta_optim: str = field(default="AdamW", metadata={"help": "Meta optimiser: the name of a torch.optim class."})
    meta_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the meta optimiser."})
    meta_adam_epsilon: float = field(
        default=1e-12,
        metadata={"help": "Epsilon of an adaptive meta optimiser; hypergradients are small, Adam's 1e-8 would swamp them."},
    )
    meta_lr_scheduler_type: SchedulerType | str = field(
        default="linear", metadata={"help": "Schedule of the meta learning rate, in base steps."}
    )
    meta_warmup_steps: float = field(
        default=0, metadata={"help": "Warm-up of the meta learning rate: base steps, or their ratio where it is below 1."}
    )
    meta_max_grad_norm: float | None = field(default=None, metadata={"help": "Clip hypergradients to this norm."})
    meta_every: int = field(default=1, metadata={"help": "Base steps per meta step."})
    meta_order: str = field(
        default="after_step",
        metadata={
            "help": "after_step: the hypergradient of the step just made; lookahead: of the step to come, which is then "
            "made with the new meta parameters (the papers' order for MetaXL and Meta-Weight-Net)."
        },
    )
    meta_portion: float = field(
        default=0.5,
        metadata={"help": "Share of each draw of meta rows that judges (outer loss); the rest joins the train rows."},
    )
    per_device_meta_batch_size: int = field(default=12, metadata={"help": "Meta rows drawn per micro-batch and device."})
    meta_dropout: bool = field(
        default=False, metadata={"help": "Keep dropout on in meta passes (shared masks, unless the estimator draws its own)."}
    )
    meta_seed: int | None = field(
        default=None, metadata={"help": "Seed of the meta rows' order and of the estimator's noise (default: seed)."}
    )
    max_skipped_meta_steps: int = field(
        default=10, metadata={"help": "Stop after this many non-finite hypergradients in a row."}
    )
    optimizer_class: str | None = field(
        default=None,
        metadata={
            "help": "Base optimiser by the name of a torch.optim class, with weight_decay on every parameter as the class "
            "itself applies it (Adam: coupled L2), in place of optim."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop columns that the model's forward does not name (off: losses read others)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes()
        if self.meta_order not in META_ORDERS:
            raise ValueError(unknown("meta_order", self.meta_order, META_ORDERS))
        optimizer_class(self.meta_optim, "meta_optim")
        if self.optimizer_class is not None:
            optimizer_class(self.optimizer_class, "optimizer_class")
        try:
            self.meta_lr_scheduler_type = SchedulerType(self.meta_lr_scheduler_type)
        except ValueError:
            valid = [kind.value for kind in SchedulerType]
            raise ValueError(unknown("meta_lr_scheduler_type", str(self.meta_lr_scheduler_type), valid)) from None
        if self.meta_seed is None:
            self.meta_seed = self.seed
        self.make_estimator()

    def make_estimator(self) -> Estimator | None:
        """The configured estimator; None for `none`."""
        settings = self.estimator_kwargs or {}
        if not isinstance(settings, dict):
            raise ValueError(f"estimator_kwargs must be a mapping of the estimator's fields, not {settings!r}")
        if self.estimator == NO_ESTIMATOR:
            return None
        if self.estimator not in ESTIMATORS:
            raise ValueError(unknown("estimator", self.estimator, [*ESTIMATORS, NO_ESTIMATOR]))
        return make_estimator(self.estimator, **settings)

    def _check_sizes(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("learning_rate", _at_least(self.learning_rate, 0), "a number of at least 0"),
            ("weight_decay", _at_least(self.weight_decay, 0), "a number of at least 0"),
            ("max_grad_norm", _at_least(self.max_grad_norm, 0), "a number of at least 0 (0: no clipping)"),
            ("num_train_epochs", _at_least(self.num_train_epochs, 0), "a number of at least 0"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size >= 1, "at least 1"),
            ("meta_learning_rate", _at_least(self.meta_learning_rate, 0), "a number of at least 0"),
            ("meta_weight_decay", _at_least(self.meta_weight_decay, 0), "a number of at least 0"),
            ("meta_adam_epsilon", _at_least(self.meta_adam_epsilon, 0), "a number of at least 0"),
            ("meta_warmup_steps", _at_least(self.meta_warmup_steps, 0), "a number of at least 0"),
            ("meta_max_grad_norm", self.meta_max_grad_norm is None or 0 < self.meta_max_grad_norm < math.inf, "above 0"),
            ("meta_every", self.meta_every >= 1, "at least 1"),
            ("meta_portion", 0 <= self.meta_portion <= 1, "between 0 and 1"),
            ("per_device_meta_batch_size", self.per_device_meta_batch_size >= 1, "at least 1"),
            ("max_skipped_meta_steps", self.max_skipped_meta_steps >= 1, "at least 1"),
        ]
        for name, holds, what in checks:
            if not holds:
                raise ValueError(f"{name} must be {what}, not {getattr(self, name)}")


def _at_least(value: float, low: float) -> bool:
    return low <= value < math.inf
