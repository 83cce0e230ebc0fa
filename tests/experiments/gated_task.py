"""A linear model with two learned weights, whose runs can be held up, broken or killed at a step of one's choice."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaxl_evo.experiments.task import Task
from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.callbacks import MetaCallback
from metaxl_evo.training.trainer import MetaTrainer

EVENT = 3  # the step after which something happens
Rows = list[dict[str, Tensor]]


@dataclass
class Settings:
    gate: str | None = None
    event: str | None = None


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, group: Tensor) -> Tensor:
        return self.logits.exp()[group]


class Regression(BilevelModule):
    def squares(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.base(batch["x"]).squeeze(-1) - batch["y"]).square()

    def inner_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.meta(batch["group"]) * self.squares(batch)

    outer_loss = squares


class Event(MetaCallback):
    """Says where a run begins; after a step, waits for a file, or ends badly."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"from step {state.global_step}, GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != EVENT:
            return
        print(f"process {os.getpid()} is held up", flush=True)
        while self.settings.gate and not Path(self.settings.gate).exists():
            time.sleep(0.05)
        if self.settings.event == "raise":
            raise ValueError("not this one")
        if self.settings.event == "kill":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)


class GatedTask(Task[Settings, Rows]):
    settings = Settings
    units = {"error": ""}  # noqa: RUF012
    greater_is_better = False

    def load(self, settings: Settings, args: MetaTrainingArguments) -> Rows:
        draw = torch.Generator().manual_seed(args.seed)
        x, group = torch.randn(32, 3, generator=draw), torch.arange(32) % 2
        return [{"x": one, "y": one.sum() * (1 - 2 * of), "group": of} for one, of in zip(x, group, strict=True)]

    def build_trainer(self, settings: Settings, args: MetaTrainingArguments, data: Rows) -> MetaTrainer:
        clean = [row for row in data if row["group"] == 0]
        module = Regression(nn.Linear(3, 1), Weights())
        return MetaTrainer(module, args, train_dataset=data, meta_dataset=clean, callbacks=[Event(settings)])

    def score(self, trainer: MetaTrainer, settings: Settings, data: Rows) -> dict[str, float]:
        return {"error": float(trainer.model.base.weight.detach().sub(1).abs().sum())}
