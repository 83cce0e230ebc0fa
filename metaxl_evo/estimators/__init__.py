"""The hypergradient estimators: one file a method, one line in `ESTIMATORS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from metaxl_evo.estimators.base import Estimator
from metaxl_evo.estimators.conjugate_gradient import ConjugateGradient
from metaxl_evo.estimators.drmad import DrMAD
from metaxl_evo.estimators.evograd import EvoGrad
from metaxl_evo.estimators.first_order import FirstOrder
from metaxl_evo.estimators.forward_mode import ForwardMode
from metaxl_evo.estimators.greedy import Greedy
from metaxl_evo.estimators.hyperdistill import HyperDistill
from metaxl_evo.estimators.neumann import Neumann
from metaxl_evo.estimators.one_step import OneStep
from metaxl_evo.estimators.sama import Sama
from metaxl_evo.estimators.unroll import Unroll
from metaxl_evo.messages import unknown

ESTIMATORS: dict[str, type[Estimator]] = {
    "first_order": FirstOrder,
    "one_step": OneStep,
    "evograd": EvoGrad,
    "sama": Sama,
    "neumann": Neumann,
    "conjugate_gradient": ConjugateGradient,
    "unroll": Unroll,
    "drmad": DrMAD,
    "forward_mode": ForwardMode,
    "greedy": Greedy,
    "hyperdistill": HyperDistill,
}


def make_estimator(name: str, **settings: Any) -> Estimator:
    """The estimator of that name with the given fields.

    Raises:
        ValueError: for an unknown name or field (the valid ones are listed), a value of another type or out of range.
    """
    if name not in ESTIMATORS:
        raise ValueError(unknown("estimator", name, ESTIMATORS))
    cls = ESTIMATORS[name]
    valid = [field.name for field in fields(cls)]
    hints = get_type_hints(cls)
    for setting, value in settings.items():
        if setting not in valid:
            raise ValueError(
                unknown(f"field of {name}", setting, valid) if valid else f"{name} has no fields, not {setting!r}"
            )
        if not _fits(value, hints[setting]):
            raise ValueError(f"{name}: {setting} must be {_in_words(hints[setting])}, not {value!r}")
    return cls(**settings)


def takes_any_optimizer() -> list[str]:
    """The names of the estimators that do without the inner optimiser's own step, and so take any of them."""
    return [name for name in ESTIMATORS if not make_estimator(name).needs_update_rule]


_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    Mapping: "names with numbers",
    NoneType: "null",
}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of a file may stand for a field of that type."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, member) for member in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    kind = str if get_origin(hint) is Literal else get_origin(hint) or hint
    return isinstance(value, (int, float) if kind is float else kind)


def _in_words(hint: Any) -> str:
    members = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    return " or ".join(_WORDS.get(get_origin(member) or member, "a text") for member in members)


__all__ = [
    "ESTIMATORS",
    "ConjugateGradient",
    "DrMAD",
    "Estimator",
    "EvoGrad",
    "FirstOrder",
    "ForwardMode",
    "Greedy",
    "HyperDistill",
    "Neumann",
    "OneStep",
    "Sama",
    "Unroll",
    "make_estimator",
    "takes_any_optimizer",
]
