"""Numbers of the base optimiser that are meta parameters, as the trainer's own optimiser has them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import SGD, UpdateRule, Windowed
from metaxl_evo.messages import unknown
from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments

LOGGED = {"lr": "learning_rate"}  # the Trainer's own name, whose number would mislead here
RANGES = {"momentum": (0.0, 1.0)}
NOT_NEGATIVE = (0.0, math.inf)
Entry = str | Windowed


def refuse_tuned(args: MetaTrainingArguments, model: BilevelModule) -> None:
    """Refuse learned numbers that the base optimiser cannot have.

    Raises:
        ValueError: for an unknown number, parameter or entry, a rate an element, a start outside its range, or a
            schedule over anything but an episode that starts afresh.
    """
    name, lam = type(model).__name__, model.meta_parameters()
    known = [one.name for one in fields(SGD) if one.name in ("lr", "weight_decay", "momentum")]
    for field, hyper in model.tuned_optimizer.items():
        if field not in known:
            raise ValueError(unknown(f"number of {name}.tuned_optimizer", field, known))
        if isinstance(hyper, Mapping):
            if field == "momentum":
                raise ValueError(f"{name} learns momentum by parameter: name one for all parameters")
            for parameter in hyper:
                if parameter not in model.base_parameters():
                    raise ValueError(
                        unknown(f"parameter of {name}.tuned_optimizer", str(parameter), model.base_parameters())
                    )
        for entry in _entries(hyper):
            where = f"{name} learns {field} as {_name(entry)!r}"
            if _name(entry) not in lam:
                raise ValueError(f"{where}, which is no meta parameter: name one of {sorted(lam)}")
            if isinstance(entry, Windowed):
                learned = args.estimator != NO_ESTIMATOR
                if learned and (args.episode_length != entry.steps or args.episode_reset == "continue"):
                    raise ValueError(
                        f"{name} learns a schedule of {field} over {entry.steps} steps: set episode_length: "
                        f"{entry.steps} and episode_reset: restart"
                    )
            elif lam[_name(entry)].numel() != 1:
                raise ValueError(
                    f"{where}, of shape {[*lam[_name(entry)].shape]}: torch's optimisers have one number a parameter, "
                    "so give each parameter an entry of its own, or take a rate an element in a loop of your own "
                    "(metaxl_evo.run_episode)"
                )
            (low, high), value = range_of(model, field), lam[_name(entry)].detach()
            if not bool(((value >= low) & (value <= high)).all()):
                raise ValueError(
                    f"{where}, which starts outside its range {low:g} to {high:g}: start inside, or state another in "
                    "tuned_ranges"
                )


def tuned_rule(rule: UpdateRule, model: BilevelModule) -> UpdateRule:
    """The rule with the numbers that the model learns; parameters that a mapping leaves out keep the rule's own."""
    numbers: dict[str, Any] = dict(model.tuned_optimizer)
    for field, hyper in numbers.items():
        if isinstance(hyper, Mapping):
            own: Any = getattr(rule, field, 0.0)
            numbers[field] = {
                name: hyper.get(name, own[name] if isinstance(own, Mapping) else own)
                for name in model.base_parameters()
            }
    return replace(rule, **numbers)


def fit_groups(optimizer: torch.optim.Optimizer, model: BilevelModule) -> None:
    """Give the parameters of each learned number a group of their own, before the optimiser's first step.

    Raises:
        ValueError: for a number that the optimiser does not have.
    """
    for field in model.tuned_optimizer:
        if any(field not in group for group in optimizer.param_groups):
            raise ValueError(
                f"{type(model).__name__} learns {field}, which {type(optimizer).__name__} does not have: use another "
                "optimiser (optim: sgd has lr, momentum and weight_decay)"
            )
    layered = [hyper for hyper in model.tuned_optimizer.values() if isinstance(hyper, Mapping)]
    if not layered:
        return
    names = {parameter: name for name, parameter in model.base_parameters().items()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[Any, list[Any]] = {}
        for parameter in group["params"]:
            name = names.get(parameter, "")
            parts.setdefault(tuple(hyper.get(name) for hyper in layered), []).append(parameter)
        groups += [{**group, "params": members} for members in parts.values()]
    optimizer.param_groups[:] = groups


def put_numbers(optimizer: torch.optim.Optimizer, model: BilevelModule, step: int) -> dict[str, float]:
    """Put the learned numbers of a step into the optimiser; returns them under the names of the log."""
    names = {parameter: name for name, parameter in model.base_parameters().items()}
    lam, acting = model.meta_parameters(), dict[str, float]()
    for group in optimizer.param_groups:
        name = next((names[parameter] for parameter in group["params"] if parameter in names), "")
        for field, hyper in model.tuned_optimizer.items():
            layered = isinstance(hyper, Mapping)
            entry = hyper.get(name) if isinstance(hyper, Mapping) else hyper
            logged = LOGGED.get(field, field)
            if entry is not None:
                value = _number(entry, lam, step)
                acting[f"{logged}/{_name(entry)}" if layered else logged] = value
                if field == "momentum" and value == 0:
                    value = sys.float_info.min  # at zero torch keeps no buffers, which its derivative reads
                group[field] = value
    return acting


def learns_all_rates(model: BilevelModule) -> bool:
    """Whether no base parameter is left to the learning rate of the schedule."""
    rates = model.tuned_optimizer.get("lr")
    return model.base_parameters().keys() <= rates.keys() if isinstance(rates, Mapping) else rates is not None


@torch.no_grad()
def keep_in_range(model: BilevelModule) -> None:
    """After a meta step: put learned numbers that left their range back to its nearer end."""
    lam = model.meta_parameters()
    for field, hyper in model.tuned_optimizer.items():
        for entry in _entries(hyper):
            lam[_name(entry)].clamp_(*range_of(model, field))


def range_of(model: BilevelModule, field: str) -> tuple[float, float]:
    """The least and the largest value of a learned number."""
    return model.tuned_ranges.get(field, RANGES.get(field, NOT_NEGATIVE))


def _entries(hyper: Entry | Mapping[str, Entry]) -> list[Entry]:
    return list(dict.fromkeys(hyper.values())) if isinstance(hyper, Mapping) else [hyper]


def _name(entry: Entry) -> str:
    return entry if isinstance(entry, str) else entry.name


def _number(entry: Entry, lam: Tree, step: int) -> float:
    value = lam[_name(entry)]
    return float(value[entry.window(lam, step)] if isinstance(entry, Windowed) else value)
