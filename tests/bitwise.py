"""The weights after 20 steps, to be compared bit by bit with those of another commit, before and after a redesign.

python -m tests.bitwise make FILE           in either tree: every estimator, both orders, with and without
                                            accumulation, resumed, and on two processes
python -m tests.bitwise compare FILE FILE   names every run that is not the same; exit status 1 if there is one
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.estimators import ESTIMATORS, make_estimator
from tests.processes import on_processes
from tests.training.test_episodes import INSTANCES, OPTIMIZERS, trainer_of
from tests.training.tiny import ESTIMATES, ORDERS, base_weights, meta_weights, same, tiny_trainer

STEPS = 20
Weights = dict[str, dict[str, Tensor]]


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """A name and the settings of each run: the small regression of all estimators, and a tagger."""
    for accumulation in (1, 2):
        fields = {"gradient_accumulation_steps": accumulation, "max_steps": STEPS}
        for name, settings in INSTANCES:
            estimator = make_estimator(name, **settings)
            optimizer = OPTIMIZERS["momentum" if estimator.needs_sgd else "adamw"][0]
            for order in ORDERS[: 2 if estimator.online else 1]:
                chosen = {"estimator": name, "estimator_kwargs": settings, "meta_order": order, "episode_length": 5}
                yield f"regression {name} {settings} {order} x{accumulation}", optimizer | fields | chosen
        for name, chosen in ESTIMATES.items():
            for order in ORDERS:
                yield f"tagger {name} {order} x{accumulation}", {**fields, **chosen, "meta_order": order}


def run(name: str, fields: dict[str, Any], folder: str, resume: str | None = None) -> Weights:
    build: Any = trainer_of if name.startswith("regression") else tiny_trainer
    trainer = build(Path(folder), **fields)
    trainer.train(resume_from_checkpoint=resume)
    return {"base": base_weights(trainer), "meta": meta_weights(trainer)}


def runs() -> dict[str, Weights]:
    found = {}
    for name, fields in cases():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(name, fields, folder)
    return found


def resumed_runs() -> dict[str, Weights]:
    """From a checkpoint in the middle."""
    found = {}
    for name, fields in cases():
        with tempfile.TemporaryDirectory() as folder:
            saved = fields | {"save_strategy": "steps", "save_steps": STEPS // 2}
            run(name, saved, folder)
            found[f"{name} resumed"] = run(name, saved, folder, f"{folder}/checkpoint-{STEPS // 2}")
    return found


def make(file: str) -> None:
    assert {name for name, _ in INSTANCES} == ESTIMATORS.keys()
    first, second = on_processes(2, runs, timeout=1200)
    assert same(first, second)
    found = runs() | resumed_runs() | {f"{name} on two processes": held for name, held in first.items()}
    torch.save(found, file)
    print(len(found), "runs")


def compare(one: str, other: str) -> int:
    """The number of runs that differ."""
    before, after = torch.load(one), torch.load(other)
    differing = [name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name))]
    print("\n".join(sorted(differing)))
    print(f"{len(before)} runs before, {len(after)} after, {len(differing)} not the same")
    return len(differing)


if __name__ == "__main__":
    command, *files = sys.argv[1:]
    sys.exit(make(*files) if command == "make" else compare(*files) > 0)
