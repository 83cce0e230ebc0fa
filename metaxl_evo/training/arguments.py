"""Arguments of the meta level, on top of transformers' TrainingArguments."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Self

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType

from metaxl_evo.estimators import ESTIMATORS, Estimator, make_estimator
from metaxl_evo.messages import one_line, unknown
from metaxl_evo.training.launch import refuse_engines, refuse_lost_processes
from metaxl_evo.training.sign_halving import SignHalving

NO_ESTIMATOR = "none"
META_ORDERS = ("after_step", "lookahead")
EPISODE_RESETS = ("continue", "restart", "reptile")
META_SCHEDULES = (  # those that need no settings of their own
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

_NUMBERS = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "adam_epsilon",
    "meta_learning_rate",
    "meta_weight_decay",
    "meta_adam_epsilon",
    "meta_warmup_steps",
)
_BETAS = ("adam_beta1", "adam_beta2")
_INTERVALS = ("logging_steps", "eval_steps", "save_steps")  # zero is judged, or replaced, by TrainingArguments
_SEEDS = ("seed", "data_seed", "meta_seed")
_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "per_device_meta_batch_size",
    "gradient_accumulation_steps",
    "meta_every",
    "max_skipped_meta_steps",
)
_UNFIT = (
    "Optimizer",
    "LBFGS",
    "SparseAdam",
    "Muon",
    "Adafactor",
    "Rprop",
)  # not driven by lr, weight_decay and eps alone
_BASE_FIELDS = {  # the fields that hold an optimiser's settings
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "eps": "adam_epsilon",
    "betas": "adam_beta1 and adam_beta2",
}
_META_FIELDS = {"lr": "meta_learning_rate", "weight_decay": "meta_weight_decay", "eps": "meta_adam_epsilon"}
_NO_SETTINGS = ("params", "differentiable")  # a step that autograd may pass through cannot move a trainer's leaves
_HOUSE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"SignHalving": SignHalving}


def optimizer_class(name: str, field_name: str) -> type[torch.optim.Optimizer]:
    """The class of that name: the house's own, or one of `torch.optim` for dense tensors of any shape, no closure.

    Raises:
        ValueError: listing the classes there are.
    """
    valid = _HOUSE_OPTIMIZERS | {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and key not in _UNFIT
    }
    if name not in valid:
        raise ValueError(unknown(field_name, name, valid))
    return valid[name]


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
            "the start by episode_reptile_rate towards the weights reached, and go on from there."
        },
    )
    episode_reptile_rate: float = field(
        default=1.0, metadata={"help": "Share of the way that episode_reset: reptile moves the start."}
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
        self.estimator_kwargs = _mapping("estimator_kwargs", self.estimator_kwargs)
        self.lr_scheduler_kwargs = _mapping("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
        self.meta_optim_kwargs = _mapping("meta_optim_kwargs", self.meta_optim_kwargs)
        self.optimizer_kwargs = _mapping("optimizer_kwargs", self.optimizer_kwargs)
        self._check_sizes()
        refuse_engines(self)
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

        Raises:
            ValueError: one line for the first value that cannot be, with the valid choices.
        """
        self._check_sizes()
        if self.meta_order not in META_ORDERS:
            raise ValueError(unknown("meta_order", self.meta_order, META_ORDERS))
        if self.episode_reset not in EPISODE_RESETS:
            raise ValueError(unknown("episode_reset", self.episode_reset, EPISODE_RESETS))
        if self.lr_milestones and self.lr_scheduler_type != SchedulerType.CONSTANT:
            raise ValueError(
                f"lr_milestones are drops of a constant rate, not of a {_plain(self.lr_scheduler_type)} one: "
                "set lr_scheduler_type: constant, or leave lr_milestones out"
            )
        self._check_optimizers()
        schedule = getattr(self.meta_lr_scheduler_type, "value", self.meta_lr_scheduler_type)
        if schedule not in META_SCHEDULES:
            raise ValueError(unknown("meta_lr_scheduler_type", str(schedule), META_SCHEDULES))
        self.meta_lr_scheduler_type = SchedulerType(schedule)
        self.make_estimator()
        self._try_out()

    def make_estimator(self) -> Estimator | None:
        """The configured estimator; None for `none`."""
        settings = _mapping("estimator_kwargs", self.estimator_kwargs)
        if self.estimator == NO_ESTIMATOR:
            return None
        if self.estimator not in ESTIMATORS:
            raise ValueError(unknown("estimator", self.estimator, [*ESTIMATORS, NO_ESTIMATOR]))
        try:
            return make_estimator(self.estimator, **(settings or {}))
        except ValueError as error:
            raise ValueError(f"{error} (estimator_kwargs '{{}}' drops those of a config)") from None

    def make_optimizer(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        """The base optimiser that optimizer_class names."""
        assert self.optimizer_class is not None
        held = {
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": (self.adam_beta1, self.adam_beta2),
            "eps": self.adam_epsilon,
        }
        further = _mapping("optimizer_kwargs", self.optimizer_kwargs)
        return _optimizer(optimizer_class(self.optimizer_class, "optimizer_class"), parameters, held, further)

    def make_meta_optimizer(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        """The meta optimiser."""
        held = {
            "lr": self.meta_learning_rate,
            "weight_decay": self.meta_weight_decay,
            "eps": self.meta_adam_epsilon,
        }
        further = _mapping("meta_optim_kwargs", self.meta_optim_kwargs)
        return _optimizer(optimizer_class(self.meta_optim, "meta_optim"), parameters, held, further)

    def _check_optimizers(self) -> None:
        cls = optimizer_class(self.meta_optim, "meta_optim")
        _check_further("meta_optim_kwargs", self.meta_optim_kwargs, cls, _META_FIELDS)
        if self.optimizer_class is not None:
            cls = optimizer_class(self.optimizer_class, "optimizer_class")
            _check_further("optimizer_kwargs", self.optimizer_kwargs, cls, _BASE_FIELDS)
        elif self.optimizer_kwargs:
            raise ValueError(
                "optimizer_kwargs are settings of optimizer_class, which is not set: set it, or use optim and "
                "optim_args instead"
            )

    def _try_out(self) -> None:
        """Make what a library makes of the settings, for one number, so that it complains before data are read."""
        weight = torch.nn.Parameter(torch.zeros(1))
        with _telling(self, "meta_optim", "meta_optim_kwargs"):
            self.make_meta_optimizer([weight])
        if self.optimizer_class is not None:
            with _telling(self, "optimizer_class", "optimizer_kwargs"):
                self.make_optimizer([weight])
        elif self.optim_target_modules is None:
            with _telling(self, "optim", "optim_args"):
                cls, settings = Trainer.get_optimizer_cls_and_kwargs(self)
                cls([weight], **settings)
        with _telling(self, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"):
            optimizer = torch.optim.SGD([weight], lr=1.0)
            own = _mapping("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
            schedule = get_scheduler(self.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=own)
            if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
                optimizer.step()
                schedule.step()
        with _telling(self, "report_to"):
            for callback in get_reporting_integration_callbacks(self.report_to):
                callback()
        if self.torch_compile:
            with _telling(self, "torch_compile_backend", "torch_compile_mode"):
                torch.compile(
                    torch.nn.Identity(), backend=self.torch_compile_backend or "inductor", mode=self.torch_compile_mode
                )

    def _check_sizes(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("output_dir", self.output_dir != "", "the name of a folder"),
            *((name, _is_number(getattr(self, name)), "a number of at least 0") for name in _NUMBERS),
            *((name, _is_count(getattr(self, name)), "a whole number of at least 1, below 2**31") for name in _COUNTS),
            *((name, _is_seed(getattr(self, name)), "a whole number of at least 0, below 2**32") for name in _SEEDS),
            (
                "episode_length",
                self.episode_length is None or _is_count(self.episode_length),
                "a whole number of at least 1, or left out",
            ),
            ("lr_milestones", _are_milestones(self.lr_milestones), "increasing numbers above 0 and below 1"),
            ("lr_milestone_factor", _is_share(self.lr_milestone_factor), "a number above 0 and at most 1"),
            ("episode_reptile_rate", _is_share(self.episode_reptile_rate), "a number above 0 and at most 1"),
            (
                "meta_diagnostics_every",
                _is_count(self.meta_diagnostics_every, least=0),
                "a whole number of at least 0 (0: off)",
            ),
            ("meta_portion", _is_number(self.meta_portion) and self.meta_portion <= 1, "a number between 0 and 1"),
            ("num_train_epochs", _is_number(self.num_train_epochs) and self.num_train_epochs > 0, "a number above 0"),
            ("max_steps", self.max_steps == -1 or _is_count(self.max_steps), "at least 1, or -1 to count epochs"),
            ("label_smoothing_factor", self.label_smoothing_factor == 0, "0: the losses are the task's own"),
            *((name, _is_beta(getattr(self, name)), "a number of at least 0 and below 1") for name in _BETAS),
            *((name, _is_number(getattr(self, name) or 1), "a number above 0") for name in _INTERVALS),
        ]
        if self.meta_max_grad_norm is not None:
            positive = _is_number(self.meta_max_grad_norm) and self.meta_max_grad_norm > 0
            checks.append(("meta_max_grad_norm", positive, "a number above 0 (leave it out for no clipping)"))
        for name, holds, what in checks:
            if not holds:
                raise ValueError(f"{name} must be {what}, not {getattr(self, name)!r}")


@contextmanager
def _telling(args: TrainingArguments, *names: str) -> Iterator[None]:
    """Turns whatever a library raises into one line with the settings that it was given."""
    try:
        yield
    except Exception as error:
        given = ", ".join(f"{name} {_plain(getattr(args, name))}" for name in names if getattr(args, name))
        raise ValueError(f"{given}: cannot be used ({one_line(error)})") from error


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _are_milestones(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, (list, tuple)) or not all(_is_share(share) and share < 1 for share in value):
        return False
    return all(first < second for first, second in pairwise(value))


def _is_beta(value: Any) -> bool:
    return _is_number(value) and value < 1


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_seed(value: Any) -> bool:
    return value is None or (isinstance(value, int) and 0 <= value < 2**32)


def _optimizer(
    cls: type[torch.optim.Optimizer],
    parameters: Iterable[torch.Tensor],
    held: Mapping[str, Any],
    further: Mapping[str, Any] | None,
) -> torch.optim.Optimizer:
    """Of the settings that fields hold it gets those that it takes; the further ones are checked."""
    taken = {name: value for name, value in held.items() if name in inspect.signature(cls).parameters}
    return cls(list(parameters), **taken, **(further or {}))


def _check_further(
    name: str, given: dict[str, Any] | str | None, cls: type[torch.optim.Optimizer], fields: Mapping[str, str]
) -> None:
    """Refuse settings that an optimiser does not have, that `fields` hold, or of another type than its default's."""
    settings = {key: one.default for key, one in inspect.signature(cls).parameters.items() if key not in _NO_SETTINGS}
    valid = [key for key in settings if key not in fields]
    for key, value in (_mapping(name, given) or {}).items():
        if key in settings and key in fields:
            raise ValueError(f"{name}: {key} has a field of its own: set {fields[key]} instead")
        if key not in settings:
            what = unknown(f"setting of {cls.__name__}", key, valid)
            raise ValueError(f"{what} ({name} '{{}}' drops those of a config)")
        if not _is_like(value, settings[key]):
            raise ValueError(f"{name}: {key} must be {_in_words(settings[key])}, not {value!r}")


def _is_like(value: Any, default: Any) -> bool:
    if default is None or isinstance(default, bool):  # torch's switches that choose for themselves have no default
        return isinstance(value, bool) or (value is None and default is None)
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and len(value) == len(default) and all(map(_is_like, value, default))
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _in_words(default: Any) -> str:
    if isinstance(default, tuple):
        return f"a list of {len(default)} numbers"
    return "true or false" if default is None or isinstance(default, bool) else "a number"


def _mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping that may be given as JSON."""
    example = '{"momentum": 0.9}' if "optim" in name else '{"copies": 8}'
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name} must be a mapping, as in {example}, and {value!r} is not JSON: {error}"
            ) from None
    if value is None or isinstance(value, dict):
        return value
    raise ValueError(f"{name} must be a mapping, as in {example}, not {value!r}")
