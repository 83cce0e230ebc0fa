"""Optimisers by the name of their class, with settings that are checked against what the class takes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from metaxl_evo.messages import unknown
from metaxl_evo.training.sign_halving import SignHalving

_UNFIT = (  # not driven by lr, weight_decay and eps alone
    *("Optimizer", "LBFGS", "SparseAdam", "Muon", "Adafactor", "Rprop"),
)
_NO_SETTINGS = ("params", "differentiable")  # a step that autograd may pass through cannot move a trainer's leaves
_HOUSE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"SignHalving": SignHalving}


def optimizer_named(name: str, field_name: str) -> type[torch.optim.Optimizer]:
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


def make_optimizer(
    cls: type[torch.optim.Optimizer],
    parameters: Iterable[torch.Tensor],
    held: Mapping[str, Any],
    further: Mapping[str, Any] | None,
) -> torch.optim.Optimizer:
    """Of the settings that fields hold (`held`) it gets those that it takes, and all of the further ones."""
    taken = {name: value for name, value in held.items() if name in inspect.signature(cls).parameters}
    return cls(list(parameters), **taken, **(further or {}))


def with_rates(parameters: Mapping[str, torch.Tensor], rates: Mapping[str, float] | None) -> list[Any]:
    """What an optimiser takes: the parameters; with rates of their own, a group for each.

    Raises:
        ValueError: for the rate of a parameter that there is not.
    """
    if not rates:
        return list(parameters.values())
    for name in rates:
        if name not in parameters:
            raise ValueError(unknown("meta parameter of meta_learning_rates", name, parameters))
    return [{"params": [p], **({"lr": rates[name]} if name in rates else {})} for name, p in parameters.items()]


def refuse_settings(
    name: str, further: Mapping[str, Any] | None, cls: type[torch.optim.Optimizer], fields: Mapping[str, str]
) -> None:
    """Refuse settings that an optimiser does not have, that `fields` hold, or of another type than its default's.

    Args:
        name: of the setting that holds the further ones.
        fields: setting of the optimiser -> the field that holds it.

    Raises:
        ValueError: one line for the first of them.
    """
    settings = {key: one.default for key, one in inspect.signature(cls).parameters.items() if key not in _NO_SETTINGS}
    valid = [key for key in settings if key not in fields]
    for key, value in (further or {}).items():
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
