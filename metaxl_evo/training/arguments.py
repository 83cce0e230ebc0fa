"""Arguments of the meta level, on top of transformers' TrainingArguments."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from metaxl_evo.bilevel.precision import PRECISIONS
from metaxl_evo.estimators import ESTIMATORS, Estimator, make_estimator
from metaxl_evo.messages import unknown
from metaxl_evo.training.distributed import refuse_engines, refuse_lost_processes
from metaxl_evo.training.optimizers import make_optimizer, optimizer_named, refuse_settings
from metaxl_evo.training.values import mapping_of, refuse_out_of_range

NO_ESTIMATOR = "none"
META_ORDERS = ("after_step", "lookahead")
EPISODE_RESETS = ("continue", "restart", "reptile", "fomaml")
LEARNED_START = "learned"  # the reset of a task that computes its first weights from the meta parameters
META_SCHEDULES = (  # those that need no settings of their own
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

_MAPPINGS = ("estimator_kwargs", "lr_scheduler_kwargs", "meta_learning_rates", "meta_optim_kwargs", "optimizer_kwargs")
_BASE_FIELDS = {  # the fields that hold an optimiser's settings
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "eps": "adam_epsilon",
    "betas": "adam_beta1 and adam_beta2",
}
_META_FIELDS = {"lr": "meta_learning_rate", "weight_decay": "meta_weight_decay", "eps": "meta_adam_epsilon"}


@dataclass
class MetaTrainingArguments(TrainingArguments):
    """TrainingArguments with a second level; the first level's fields mean what they always do.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    output_dir: str = field(
        default="trainer_output", metadata={"help": "Where the model, its checkpoints and results are written."}
    )
    estimator: str = field(
        default="one_step",
        metadata={
            "help": f"How the hypergradient is estimated: {', '.join(ESTIMATORS)}, or none for no meta learning."
        },
    )
    estimator_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Fields of the estimator, such as {"copies": 8}.'}
    )
    meta_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the meta optimiser."})
    meta_learning_rates: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": 'Name of a meta parameter -> its own rate, as in {"weight_decay": 3e-4}; the others keep '
            "meta_learning_rate."
        },
    )
    meta_optim: str = field(default="AdamW", metadata={"help": "Meta optimiser: the name of a torch.optim class."})
    meta_optim_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Further settings of the meta optimiser, such as {"momentum": 0.9, "nesterov": true}.'},
    )
    meta_weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the meta optimiser."})
    meta_adam_epsilon: float = field(
        default=1e-12,
        metadata={
            "help": "Epsilon of an adaptive meta optimiser; hypergradients are small, Adam's 1e-8 would swamp them."
        },
    )
    meta_lr_scheduler_type: SchedulerType | str = field(
        default="linear", metadata={"help": "Schedule of the meta learning rate, in base steps."}
    )
    meta_warmup_steps: float = field(
        default=0,
        metadata={"help": "Warm-up of the meta learning rate: base steps, or their ratio where it is below 1."},
    )
    meta_max_grad_norm: float | None = field(default=None, metadata={"help": "Clip hypergradients to this norm."})
    meta_every: int = field(
        default=1, metadata={"help": "Base steps per meta step, which comes with the last of them."}
    )
    meta_last: int | None = field(
        default=None,
        metadata={"help": "Only so many base steps at the end of each episode have meta steps (default: all)."},
    )
    meta_order: str = field(
        default="after_step",
        metadata={
            "help": "after_step: the hypergradient of the step just made; lookahead: of the step to come, which is "
            "then made with the new meta parameters (the papers' order for MetaXL and Meta-Weight-Net)."
        },
    )
    episode_length: int | None = field(
        default=None,
        metadata={
            "help": "Base steps per episode, for estimators that answer at its end (default: one long episode)."
        },
    )
    episode_reset: str = field(
        default="continue",
        metadata={
            "help": "Where the base goes after an episode: continue; restart from the start of the run; reptile: move "
            "the start by episode_reptile_rate towards the weights reached, and go on from there; fomaml: move it by "
            "minus episode_reptile_rate times the outer gradient at the weights reached; learned: to what the task "
            "computes of the meta parameters (MAML)."
        },
    )
    episode_reptile_rate: float = field(
        default=1.0,
        metadata={"help": "How far the start is moved: by reptile a share of the way, by fomaml a step of this rate."},
    )
    meta_portion: float = field(
        default=1.0,
        metadata={
            "help": "Share of each draw of meta rows that judges (outer loss); the rest joins the train rows, where "
            "the task can join them."
        },
    )
    per_device_meta_batch_size: int = field(
        default=12, metadata={"help": "Meta rows drawn per micro-batch and device."}
    )
    meta_dropout: bool = field(
        default=False,
        metadata={"help": "Keep dropout on in meta passes (shared masks, unless the estimator draws its own)."},
    )
    meta_precision: str = field(
        default="float32",
        metadata={
            "help": "Of meta passes: float32 (full, also where torch computes in TF32), tf32 (as torch is set), bf16 "
            "(autocast; parameters, losses and hypergradients stay float32)."
        },
    )
    meta_diagnostics_every: int = field(
        default=0,
        metadata={
            "help": "On base steps of a multiple of this number that have a meta step, also take the exact one-step "
            "hypergradient, log how near the estimate is to it, and warn once of what swamps it (0: off)."
        },
    )
    meta_history: bool = field(
        default=True,
        metadata={
            "help": "Leave meta_history.csv in output_dir, a row a log, and where matplotlib is a picture of it; "
            "up to 8 meta parameters are in it by value, more by how far they moved."
        },
    )
    meta_seed: int | None = field(
        default=None, metadata={"help": "Seed of the meta rows' order and of the estimator's noise (default: seed)."}
    )
    max_skipped_meta_steps: int = field(
        default=10, metadata={"help": "Stop after this many non-finite hypergradients in a row."}
    )
    max_grad_value: float | None = field(
        default=None,
        metadata={"help": "Bound on every entry of the base gradients, before max_grad_norm (default: none)."},
    )
    optimizer_class: str | None = field(
        default=None,
        metadata={
            "help": "Base optimiser by the name of a torch.optim class, with weight_decay on every parameter as the "
            "class itself applies it (Adam: coupled L2), in place of optim."
        },
    )
    optimizer_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Further settings of optimizer_class, such as {"momentum": 0.9, "nesterov": true}.'},
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the training, such as 0.5,0.75, after which the base learning rate drops to its "
            "lr_milestone_factor; needs lr_scheduler_type: constant. The meta learning rate has none."
        },
    )
    lr_milestone_factor: float = field(
        default=0.1, metadata={"help": "What each of lr_milestones multiplies the base learning rate by."}
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Drop columns that the model's forward does not name (off: losses read others)."},
    )

    def __new__(cls, *args: Any, **given: Any) -> Self:
        known = [one.name for one in fields(cls) if one.init]
        for name in given:
            if name not in known:
                raise ValueError(unknown(f"setting of {cls.__name__}", name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in _MAPPINGS:
            setattr(self, name, mapping_of(name, getattr(self, name)))
        refuse_out_of_range(self)
        refuse_engines(self)
        if str(self.fsdp).lower() in ("true", "false"):  # the command line has it as a text
            self.fsdp = str(self.fsdp).lower() == "true"  # type: ignore[assignment]
        super().__post_init__()
        if self.meta_seed is None:
            self.meta_seed = self.seed
        refuse_lost_processes(self)
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # the trainer averages running statistics, and no other buffer moves
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # losses read all base parameters; the search takes time and warns
        self.check_settings()

    def check_settings(self) -> None:
        """Check the values that TrainingArguments knows nothing of, also of arguments changed since (a trial's).

        What only other libraries can judge is left to `dry_run.refuse_unusable`.

        Raises:
            ValueError: one line for the first value that cannot be, with the valid choices.
        """
        refuse_out_of_range(self)
        if self.meta_order not in META_ORDERS:
            raise ValueError(unknown("meta_order", self.meta_order, META_ORDERS))
        if self.meta_precision not in PRECISIONS:
            raise ValueError(unknown("meta_precision", self.meta_precision, PRECISIONS))
        if self.episode_reset not in (*EPISODE_RESETS, LEARNED_START):
            raise ValueError(unknown("episode_reset", self.episode_reset, (*EPISODE_RESETS, LEARNED_START)))
        self._check_optimizers()
        self._check_schedules()
        self.make_estimator()

    def make_estimator(self) -> Estimator | None:
        """The configured estimator, None for `none`; the same one for as long as its settings stay."""
        name, further = self.estimator, mapping_of("estimator_kwargs", self.estimator_kwargs) or {}
        settings = ESTIMATORS.get(name), name, further  # the class too: another one may be registered meanwhile
        made_of, estimator = vars(self).get("_kept_estimator", (None, None))
        if made_of != settings:
            estimator = _estimator(name, further)
            self._kept_estimator = copy.deepcopy(settings), estimator
        return estimator

    def __getstate__(self) -> dict[str, Any]:
        """Without the estimator, whose class another process need not know, and the token: files may be uploaded."""
        kept = {key: value for key, value in vars(self).items() if key != "_kept_estimator"}
        return kept | {"hub_token": None}

    def __copy__(self) -> Self:
        """With the token, which a copy in this process needs."""
        copied = object.__new__(type(self))
        vars(copied).update(self.__getstate__(), hub_token=self.hub_token)
        return copied

    def make_optimizer(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        """The base optimiser that optimizer_class names."""
        assert self.optimizer_class is not None
        held = {
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": (self.adam_beta1, self.adam_beta2),
            "eps": self.adam_epsilon,
        }
        further = mapping_of("optimizer_kwargs", self.optimizer_kwargs)
        return make_optimizer(optimizer_named(self.optimizer_class, "optimizer_class"), parameters, held, further)

    def make_meta_optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """The meta optimiser, of parameters or groups of them."""
        held = {
            "lr": self.meta_learning_rate,
            "weight_decay": self.meta_weight_decay,
            "eps": self.meta_adam_epsilon,
        }
        further = mapping_of("meta_optim_kwargs", self.meta_optim_kwargs)
        return make_optimizer(optimizer_named(self.meta_optim, "meta_optim"), parameters, held, further)

    def _check_optimizers(self) -> None:
        meta, base = (mapping_of(name, getattr(self, name)) for name in ("meta_optim_kwargs", "optimizer_kwargs"))
        refuse_settings("meta_optim_kwargs", meta, optimizer_named(self.meta_optim, "meta_optim"), _META_FIELDS)
        if self.optimizer_class is not None:
            cls = optimizer_named(self.optimizer_class, "optimizer_class")
            refuse_settings("optimizer_kwargs", base, cls, _BASE_FIELDS)
        elif base:
            raise ValueError(
                "optimizer_kwargs are settings of optimizer_class, which is not set: set it, or use optim and "
                "optim_args instead"
            )

    def _check_schedules(self) -> None:
        if self.lr_milestones and self.lr_scheduler_type != SchedulerType.CONSTANT:
            kind = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
            raise ValueError(
                f"lr_milestones are drops of a constant rate, not of a {kind} one: set lr_scheduler_type: constant, "
                "or leave lr_milestones out"
            )
        schedule = getattr(self.meta_lr_scheduler_type, "value", self.meta_lr_scheduler_type)
        if schedule not in META_SCHEDULES:
            raise ValueError(unknown("meta_lr_scheduler_type", str(schedule), META_SCHEDULES))
        self.meta_lr_scheduler_type = SchedulerType(schedule)


def _estimator(name: str, settings: dict[str, Any]) -> Estimator | None:
    if name == NO_ESTIMATOR:
        return None
    if name not in ESTIMATORS:
        raise ValueError(unknown("estimator", name, [*ESTIMATORS, NO_ESTIMATOR]))
    try:
        return make_estimator(name, **settings)
    except ValueError as error:
        raise ValueError(f"{error} (estimator_kwargs '{{}}' drops those of a config)") from None
