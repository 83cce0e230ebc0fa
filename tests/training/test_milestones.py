"""Drops of the base learning rate: at which step, by how much, of which level, in a run that goes on for longer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.test_episodes import trainer_of, watched
from tests.training.test_resume import run_regression
from tests.training.tiny import logged

CONSTANT = {"lr_scheduler_type": "constant", "learning_rate": 0.1}


@pytest.mark.parametrize("first", [0.6666666666666666, 0.666666, 0.66667])
def test_the_epochs_of_meta_weight_net(tmp_path: Path, first: float) -> None:
    """60 epochs of 490 steps, x0.1 at the beginnings of the 41st and the 51st."""
    trainer = trainer_of(tmp_path, lr_milestones=[first, 0.8333333333333334], **CONSTANT)
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(60 * 490)
    rates = []
    for _ in range(60 * 490):
        rates.append(scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        scheduler.step()
    changes = [step for step in range(1, len(rates)) if rates[step] != rates[step - 1]]
    assert changes == [40 * 490, 50 * 490]
    assert [rates[0], *(rates[step] for step in changes)] == pytest.approx([0.1, 0.01, 0.001], rel=1e-12)


RUNS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "steps": ({"lr_milestones": [0.4, 0.7]}, [0.1] * 4 + [0.01] * 3 + [0.001] * 3),
    "epochs": (
        {"max_steps": -1, "num_train_epochs": 4, "train_rows": 12, "lr_milestones": [0.5, 0.75]},
        [0.1] * 6 + [0.01] * 3 + [0.001] * 3,
    ),
    "factor": ({"lr_milestones": [0.5], "lr_milestone_factor": 0.5}, [0.1] * 5 + [0.05] * 5),
    "one step for two": ({"max_steps": 2, "lr_milestones": [0.5, 0.6]}, [0.1, 0.001]),
    "none": ({"lr_milestones": []}, [0.1] * 10),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_rate_that_steps_are_made_at(tmp_path: Path, name: str) -> None:
    fields, expected = RUNS[name]
    settings = {"max_steps": 10, "meta_learning_rate": 1.0, "meta_lr_scheduler_type": "constant"}
    watch = watched(tmp_path, **{**settings, **CONSTANT, **fields})
    assert [step["lr"] for step in watch.steps] == pytest.approx(expected, rel=1e-12)
    assert logged(watch.trainer, "learning_rate") == pytest.approx(expected, rel=1e-12)
    assert logged(watch.trainer, "meta_learning_rate") == [1.0] * len(expected)  # which has no drops


def test_a_longer_run_has_its_own_milestones(tmp_path: Path) -> None:
    """As with every other schedule, and not those that the checkpoint was made with."""
    fields: dict[str, Any] = {"save_steps": 1, "lr_milestones": [0.5], **CONSTANT}
    short = run_regression(tmp_path / "short", max_steps=4, **fields)
    assert logged(short, "learning_rate") == pytest.approx([0.1] * 2 + [0.01] * 2, rel=1e-12)
    longer = run_regression(tmp_path / "longer", tmp_path / "short" / "checkpoint-1", max_steps=12, **fields)
    assert logged(longer, "learning_rate") == pytest.approx([0.1] * 6 + [0.01] * 6, rel=1e-12)


def test_training_twice_drops_anew(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=4, lr_milestones=[0.5], **CONSTANT)
    for _ in range(2):
        trainer.train()
        assert logged(trainer, "learning_rate") == pytest.approx([0.1, 0.1, 0.01, 0.01], rel=1e-12)
