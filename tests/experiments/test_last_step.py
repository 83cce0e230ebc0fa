"""Told to stop behind the last step of a run: the training is not made again, or a line says what is."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.command import run_here
from metaxl_evo.experiments.task import Task
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.checkpoint import MANIFEST
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.preemption import Interrupted
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import on_processes
from tests.training.test_preemption import Told
from tests.training.tiny import collate, random_rows, tiny_arguments, tiny_tagger

STEPS = 4
SAVED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}


@dataclass
class Settings:
    pass


class ToldTask(Task[Settings, Dataset]):
    """A tagger whose run is told to stop in its test, or in an event at the end of its training."""

    settings = Settings
    units = {"weights": ""}  # noqa: RUF012

    def __init__(self, told: str | None = None):
        self._told = told

    def load(self, settings: Settings, args: MetaTrainingArguments) -> Dataset:
        return random_rows(24, seed=1, language=0)

    def build_trainer(self, settings: Settings, args: MetaTrainingArguments, data: Dataset) -> MetaTrainer:
        told = [Told(STEPS, event=self._told)] if self._told == "on_train_end" else []
        rows = {"meta_dataset": random_rows(12, seed=2), "eval_dataset": random_rows(6, seed=9, language=None)}
        return MetaTrainer(tiny_tagger(), args, train_dataset=data, data_collator=collate, callbacks=told, **rows)

    def score(self, trainer: MetaTrainer, settings: Settings, data: Dataset) -> dict[str, float]:
        if self._told == "score":
            os.kill(os.getpid(), signal.SIGTERM)
        return {"weights": sum(float(one.double().sum()) for one in trainer.model.base.state_dict().values())}


def made(folder: Path, told: str | None = None, **fields: Any) -> dict[str, Any]:
    args = tiny_arguments(folder, max_steps=STEPS, **fields)
    main = ends_with_one_line(lambda argv: run_here(ToldTask(told), RunsArguments(), Settings(), args))
    return main([])  # type: ignore[no-any-return]


def stopped(folder: Path, told: str, **fields: Any) -> None:
    with pytest.raises(Interrupted) as caught:
        made(folder, told, **fields)
    assert caught.value.code == 75
    assert not (folder / "results.json").exists()


def finished_without_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        patch.setattr(MetaTrainer, "training_step", lambda *of, **named: pytest.fail("a training step was made"))
        return made(folder, resume_from_checkpoint="latest", **fields)


@pytest.mark.parametrize("told", ["score", "on_train_end"])
def test_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    stopped(tmp_path / "run", told)
    assert (tmp_path / f"run/checkpoint-{STEPS}" / MANIFEST).is_file()
    again = finished_without_a_step(tmp_path / "run", monkeypatch)
    assert again["test"] == made(tmp_path / "whole")["test"]


def test_of_one_checkpoint_the_last_stays_until_there_are_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the best; what is only called like one is not touched."""
    fields = SAVED | BEST | {"save_total_limit": 1}
    stopped(tmp_path / "run", "score", **fields)
    (tmp_path / "run/checkpoint-2-of-mine").mkdir()
    again = finished_without_a_step(tmp_path / "run", monkeypatch, **fields)
    assert again["run"]["best_checkpoint"] == str(tmp_path / "run/checkpoint-2")
    assert again["test"] == made(tmp_path / "whole", **fields)["test"]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-2-of-mine",
    ]


def test_where_the_best_weights_have_taken_its_place_a_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = SAVED | BEST | {"save_strategy": "best"}
    stopped(tmp_path / "run", "score", **fields)
    assert "no checkpoint keeps the last step: what is resumed goes on from checkpoint-2" in caplog.messages
    assert made(tmp_path / "run", resume_from_checkpoint="latest", **fields)["run"]["steps"] == STEPS


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def told_on_all(folder: str) -> list[str]:
    heard = Heard()
    logging.getLogger("metaxl_evo").addHandler(heard)
    stopped(Path(folder), "score")
    return heard.texts


@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_say_what_is_lost(tmp_path: Path) -> None:
    """They are told at different places, and cannot wait for each other."""
    first, second = on_processes(2, told_on_all, str(tmp_path))
    assert "no checkpoint keeps the last step: what is resumed goes on from the start" in first
    assert not [text for text in second if "keeps the last step" in text]
