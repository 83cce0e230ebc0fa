"""The hypergradient estimators: one file a method, one line in `ESTIMATORS`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

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
        ValueError: for an unknown name or field (the valid ones are listed), or a value out of range.
    """
    if name not in ESTIMATORS:
        raise ValueError(unknown("estimator", name, ESTIMATORS))
    cls = ESTIMATORS[name]
    valid = [field.name for field in fields(cls)]
    for setting in settings:
        if setting not in valid:
            raise ValueError(
                unknown(f"field of {name}", setting, valid) if valid else f"{name} has no fields, not {setting!r}"
            )
    return cls(**settings)


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
]
