"""Data sets whose rows are drawn anew in every epoch: in each, in a resumed run, in workers, in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from metaxl_evo.training.callbacks import LevelEvents
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import on_processes
from tests.training.test_episodes import Weighting, rows
from tests.training.test_resume import assert_same_run, resumed
from tests.training.tiny import different, final_state, meta_weights, same, stack, tiny_arguments

TRAIN_ROWS, META_ROWS, BATCH = 20, 10, 4  # five batches an epoch, three draws a pass


class Anew(Dataset[dict[str, Tensor]]):
    """Rows with noise of their index and epoch; they say which."""

    def __init__(self, count: int, seed: int):
        self.rows, self.epoch = rows(count, seed), -1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, generator = self.rows[index], torch.Generator().manual_seed(1000 * self.epoch + index)
        noise = torch.randn(3, generator=generator, dtype=torch.float64)
        return {"x": row["x"] + noise, "y": row["y"], "epoch": torch.tensor(self.epoch), "row": torch.tensor(index)}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Seen(TrainerCallback):
    """The epochs of the train and of the meta rows of each step, and which train rows they were."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.train: list[list[int]] = []
        self.meta: list[list[int]] = []
        self.rows: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for window, seen in zip(self.trainer.window, (self.train, self.meta), strict=True):
            seen.append(sorted({int(epoch) for batch in window for epoch in batch["epoch"]}))
        self.rows += [int(row) for batch in self.trainer.window[0] for row in batch["row"]]


def trainer_of(folder: Path, *, train: Any = None, meta: Any = None, **fields: Any) -> tuple[MetaTrainer, Seen]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "max_steps": 15,
        "save_strategy": "steps",
        "per_device_train_batch_size": BATCH,
        "per_device_meta_batch_size": BATCH,
        "meta_portion": 1.0,
        "meta_learning_rate": 0.05,
    }
    base = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Dropout(0.2)).double()
    seen = Seen()
    trainer = {name: fields.pop(name) for name in ("eval_dataset",) if name in fields}
    seen.trainer = MetaTrainer(
        Weighting(base, nn.Linear(3, 1).double()),
        tiny_arguments(folder, **settings | fields),
        train_dataset=Anew(TRAIN_ROWS, 1) if train is None else train,
        meta_dataset=Anew(META_ROWS, 2) if meta is None else meta,
        data_collator=stack,
        callbacks=[seen],
        **trainer,
    )
    return seen.trainer, seen


def run(folder: Path, resume: Path | None = None, **fields: Any) -> tuple[MetaTrainer, Seen]:
    trainer, seen = trainer_of(folder, **fields)
    return resumed(trainer, resume), seen


@pytest.mark.parametrize(("accumulation", "per_epoch", "workers"), [(1, 5, 1), (2, 3, 0)])
def test_rows_are_those_of_their_epoch(tmp_path: Path, accumulation: int, per_epoch: int, workers: int) -> None:
    _, seen = run(
        tmp_path,
        max_steps=3 * per_epoch,
        save_steps=100,
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=workers,
    )
    assert seen.train == [[step // per_epoch] for step in range(3 * per_epoch)]
    draws = -(-META_ROWS // (BATCH * accumulation))
    assert seen.meta == [[step // draws] for step in range(3 * per_epoch)]
    assert [sorted(seen.rows[start : start + TRAIN_ROWS]) for start in (0, 20, 40)] == [[*range(TRAIN_ROWS)]] * 3


@pytest.mark.parametrize(
    ("accumulation", "at", "workers"),
    [(1, 7, 0), (1, 10, 1), (2, 6, 0), (2, 8, 1)],
)
def test_resumed_within_an_epoch_and_at_its_end(tmp_path: Path, accumulation: int, at: int, workers: int) -> None:
    fields: dict[str, Any] = {
        "save_steps": at,
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": workers,
    }
    whole, seen = run(tmp_path / "whole", **fields)
    again, rest = run(tmp_path / "again", tmp_path / "whole" / f"checkpoint-{at}", **fields)
    assert (rest.train, rest.meta) == (seen.train[at:], seen.meta[at:])
    assert rest.rows == seen.rows[-len(rest.rows) :]
    assert_same_run(again, whole)
    assert different(meta_weights(whole), meta_weights(trainer_of(tmp_path)[0]))


@pytest.mark.parametrize("steps", [3, 7, 49, 490])
def test_the_epoch_is_counted_exactly(tmp_path: Path, steps: int) -> None:
    """`state.epoch` is a float: within epoch k it is below k + 1, and k + 1 after its last step, in a file too."""
    trainer, _ = trainer_of(tmp_path, max_steps=1)
    told: list[int] = []
    trainer.train_dataset.set_epoch = told.append  # type: ignore[method-assign, union-attr]
    begin = next(one for one in trainer.callback_handler.callbacks if isinstance(one, LevelEvents))
    expected = []
    for epoch in (0, 1, 39, 40, 999):
        for made in (0, 1, steps - 1, steps):
            trainer.state.epoch = epoch + made / steps
            trainer.state.save_to_json(str(tmp_path / "state.json"))
            begin.on_epoch_begin(None, type(trainer.state).load_from_json(str(tmp_path / "state.json")), None)
            expected.append(epoch + (made == steps))
    assert told == expected


def test_training_twice_begins_at_the_first_epoch(tmp_path: Path) -> None:
    trainer, seen = trainer_of(tmp_path, max_steps=7, save_strategy="no")
    for _ in range(2):
        trainer.train()
    assert seen.train == [[0]] * 5 + [[1]] * 2 + [[0]] * 5 + [[1]] * 2
    assert seen.meta[:7] == seen.meta[7:]


@pytest.mark.parametrize("shared", ["meta_dataset", "eval_dataset", "one of several"])
def test_one_data_set_for_two_is_refused(tmp_path: Path, shared: str) -> None:
    def make(one: Any) -> None:
        if shared == "meta_dataset":
            trainer_of(tmp_path, train=one, meta=one)
        else:
            trainer_of(tmp_path, train=one, eval_dataset=one if shared == "eval_dataset" else {"a": [], "b": one})

    name = shared if "_" in shared else "eval_dataset"
    with pytest.raises(ValueError, match=f"^train_dataset and {name} are one data set .*: make it twice$"):
        make(Anew(TRAIN_ROWS, 1))
    make(rows(TRAIN_ROWS, 1))


def test_workers_that_outlive_an_epoch_are_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    with pytest.raises(ValueError, match=r"dataloader_persistent_workers would keep .*: set it to false$"):
        trainer_of(tmp_path, **settings)
    trainer_of(tmp_path, train=rows(TRAIN_ROWS, 1), **settings)


def whole_and_resumed(folder: str) -> dict[str, Any]:
    """On one of two ranks: three steps an epoch, a draw and a half a pass of the meta rows."""
    fields: dict[str, Any] = {"max_steps": 8, "save_steps": 4}
    whole, seen = run(Path(folder), **fields)
    expected = final_state(whole)
    again, rest = run(Path(folder), Path(folder) / "checkpoint-4", **fields)
    found = final_state(again)
    return {
        "train": seen.train,
        "meta": seen.meta,
        "rest": (rest.train, rest.meta),
        "different": [key for key in expected if not same(found[key], expected[key])],
    }


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    for found in on_processes(2, whole_and_resumed, str(tmp_path)):
        assert found["train"] == [[step // 3] for step in range(8)]
        assert found["meta"] == [[step // 2] for step in range(8)]
        assert found["rest"] == (found["train"][4:], found["meta"][4:])
        assert found["different"] == []
