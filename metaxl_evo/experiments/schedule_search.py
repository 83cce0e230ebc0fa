"""Schedules to try without a hypergradient: drawn at random, or proposed by Optuna from those that were tried.

A proposal is a function of the seed, its number and the trainings before it alone, so that a search which was cut off
goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.models.schedule import Schedule

Bounds = Mapping[str, tuple[float, float]]
Propose = Callable[[Schedule, int], Tensor]  # the number of a training -> a row of `tried`


def at_random(bounds: Bounds, seed: int) -> Propose:
    """Each value by itself from its kind's bounds: evenly, in the logarithm where the lower bound is positive."""

    def propose(schedule: Schedule, number: int) -> Tensor:
        generator, drawn = np.random.default_rng([seed, number]), []
        for kind, count in schedule.windows().items():
            low, high = bounds[kind]
            if low > 0:
                drawn.append(np.exp(generator.uniform(np.log(low), np.log(high), count)))
            else:
                drawn.append(generator.uniform(low, high, count))
        return torch.as_tensor(np.concatenate(drawn), dtype=schedule.tried.dtype)

    return propose


def by_optuna(bounds: Bounds, seed: int) -> Propose:
    """By its tree-structured Parzen estimator, told of every training so far.

    Raises:
        ImportError: without optuna (`pip install metaxl_evo[optuna]`).
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def propose(schedule: Schedule, number: int) -> Tensor:
        ranges = _distributions(optuna, schedule, bounds)
        sampler = optuna.samplers.TPESampler(seed=mix_seed(seed, number) % 2**32)  # its state is in no checkpoint
        study = optuna.create_study(sampler=sampler)
        for row, loss in zip(schedule.tried[:number].tolist(), schedule.losses[:number].tolist(), strict=True):
            values = zip(ranges.items(), row, strict=True)
            held = {name: min(max(value, one.low), one.high) for (name, one), value in values}  # float32 rounds
            study.add_trial(optuna.trial.create_trial(params=held, distributions=ranges, value=loss))
        asked = study.ask(ranges)
        return torch.tensor([asked.params[name] for name in ranges], dtype=schedule.tried.dtype)

    return propose


def _distributions(optuna: Any, schedule: Schedule, bounds: Bounds) -> dict[str, Any]:
    made = dict[str, Any]()
    for kind, count in schedule.windows().items():
        low, high = bounds[kind]
        distribution = optuna.distributions.FloatDistribution(low, high, log=low > 0)
        made |= {f"{kind}_{window}": distribution for window in range(count)}
    return made


def as_it_is(schedule: Schedule, number: int) -> Tensor:
    """The schedule that it begins with."""
    return schedule.row()
