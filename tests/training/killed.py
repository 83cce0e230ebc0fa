"""A run that says where it is, to be killed there: the child's side of test_kill."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import torch

from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import join
from tests.training.tiny import random_rows, tiny_trainer

PHASES = ("start", "step", "save", "evaluation", "between")


class Telling(MetaTrainer):
    """Tells each phase that it enters; a step lasts until the next phase."""

    told: Any = None

    def tell(self, phase: str) -> None:
        if self.told is not None:
            self.told(phase)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.tell("step")
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.tell("evaluation")
        found = super().evaluate(*args, **kwargs)
        self.tell("between")
        return found

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.tell("save")
        super()._save_checkpoint(*args, **kwargs)
        self.tell("between")


def trainer_of(folder: str) -> Telling:
    """Twelve steps, six saves of which two are kept, four evaluations; an epoch is six steps."""
    trainer = tiny_trainer(
        folder,
        trainer_class=Telling,
        max_steps=12,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=3,
        trainer={"eval_dataset": random_rows(48, seed=9, language=None)},
    )
    assert isinstance(trainer, Telling)
    return trainer


def train(folder: str, phase: Any, connection: Connection, rank: int, count: int, port: int) -> None:
    """Train from the newest complete checkpoint; where rank 0 is stands in `phase` and comes through `connection`."""
    torch.set_num_threads(1)
    if count > 1:
        join(rank, count, port)
    trainer = trainer_of(folder)

    def told(name: str) -> None:
        phase.value = PHASES.index(name)
        connection.send(name)

    trainer.told = None if rank else told
    trainer.train("latest")
    connection.send("end")
