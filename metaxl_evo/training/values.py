"""What the values of settings may be: the range of each number, and mappings that may be given as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from transformers import TrainingArguments


def mapping_of(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping that may be given as JSON.

    Raises:
        ValueError: naming the setting, with an example.
    """
    example = '{"momentum": 0.9}' if "optim" in name else '{"lr": 0.1}' if "rates" in name else '{"copies": 8}'
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


def refuse_out_of_range(args: TrainingArguments) -> None:
    """Refuse the first value that is out of its range, or of another type.

    Raises:
        ValueError: one line with the setting, its range and the value.
    """
    for name, (holds, what) in RANGES.items():
        value = getattr(args, name)
        if not holds(value):
            raise ValueError(f"{name} must be {what}, not {value!r}")


def refuse_count(name: str, value: int | None, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`, and below 2**31; None is left out.

    Raises:
        ValueError: one line with the setting, its range and the value.
    """
    if value is not None and not _is_count(value, least):
        raise ValueError(f"{name} must be a whole number of at least {least} and below 2**31, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _are_rates(value: Any) -> bool:
    return value is None or all(map(_is_number, value.values()))


def _is_share(value: Any) -> bool:
    return _is_positive(value) and value <= 1


def _are_milestones(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, (list, tuple)) or not all(_is_share(share) and share < 1 for share in value):
        return False
    return all(first < second for first, second in pairwise(value))


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_seed(value: Any) -> bool:
    return value is None or (isinstance(value, int) and 0 <= value < 2**32)


_NUMBERS = (
    *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon"),
    *("meta_learning_rate", "meta_weight_decay", "meta_adam_epsilon", "meta_warmup_steps"),
)
_COUNTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "per_device_meta_batch_size"),
    *("gradient_accumulation_steps", "meta_every", "max_skipped_meta_steps"),
)
_NUMBER = (_is_number, "a number of at least 0")
_COUNT = (_is_count, "a whole number of at least 1, below 2**31")
_SEED = (_is_seed, "a whole number of at least 0, below 2**32")
_SHARE = (_is_share, "a number above 0 and at most 1")
_BETA = (lambda value: _is_number(value) and value < 1, "a number of at least 0 and below 1")
_INTERVAL = (
    lambda value: _is_number(value or 1),
    "a number above 0",
)  # zero is TrainingArguments' to judge or replace

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {  # setting -> whether a value holds, and the range in words
    "output_dir": (lambda value: value != "", "the name of a folder"),
    **dict.fromkeys(_NUMBERS, _NUMBER),
    **dict.fromkeys(_COUNTS, _COUNT),
    **dict.fromkeys(("seed", "data_seed", "meta_seed"), _SEED),
    "episode_length": (
        lambda value: value is None or _is_count(value),
        "a whole number of at least 1, or left out",
    ),
    "meta_last": (lambda value: value is None or _is_count(value), "a whole number of at least 1, or left out"),
    "lr_milestones": (_are_milestones, "increasing numbers above 0 and below 1"),
    "lr_milestone_factor": _SHARE,
    "episode_reptile_rate": _SHARE,
    "meta_diagnostics_every": (lambda value: _is_count(value, least=0), "a whole number of at least 0 (0: off)"),
    "meta_portion": (lambda value: _is_number(value) and value <= 1, "a number between 0 and 1"),
    "num_train_epochs": (_is_positive, "a number above 0"),
    "max_steps": (lambda value: value == -1 or _is_count(value), "at least 1, or -1 to count epochs"),
    "label_smoothing_factor": (lambda value: value == 0, "0: the losses are the task's own"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BETA),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _INTERVAL),
    "meta_learning_rates": (_are_rates, "names with numbers of at least 0"),
    **dict.fromkeys(
        ("meta_max_grad_norm", "max_grad_value"),
        (lambda value: value is None or _is_positive(value), "a number above 0 (leave it out for no clipping)"),
    ),
}


def evenly(rows: int, size: int | None) -> list[int]:
    """`size` numbers of `rows`, evenly spread, since files may be sorted; all for None, or where there are fewer."""
    size = rows if size is None else min(size, rows)
    return [row * rows // size for row in range(size)]
