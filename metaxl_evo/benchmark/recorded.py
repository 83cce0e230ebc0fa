"""Trainings of a task that are recorded, and the tables that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from transformers import TrainerCallback

from metaxl_evo.experiments.plan import Run
from metaxl_evo.experiments.run import prepare
from metaxl_evo.experiments.task import Task
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer

Recorder = TypeVar("Recorder", bound=TrainerCallback)


def train_recorded(
    task: Task[Any, Any], run: Run[Any], args: MetaTrainingArguments, make: Callable[[MetaTrainer], Recorder]
) -> Recorder:
    """Train by a copy of the run's arguments, which is made to write, log and choose nothing.

    Args:
        make: the recorder, of the trainer.

    Raises:
        ValueError: for whatever the run would refuse.
    """
    args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
    args.load_best_model_at_end, args.report_to = False, []
    *_, trainer = prepare(task, replace(run, args=args))
    recorder = make(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


def refuse_made(folder: Path, table: str) -> None:
    """Refuse a folder that holds such a table.

    Raises:
        ValueError: naming it.
    """
    if (folder / table).exists():
        raise ValueError(f"{folder / table} exists: choose another output_dir")


def write_table(folder: Path, name: str, table: pd.DataFrame, text: str) -> None:
    """The rows beside what is made of them in Markdown, which is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / name, index=False)
    (folder / name).with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
