"""What a run logs of its meta parameters, and the history that it leaves behind."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from metaxl_evo.training.history import HISTORY, PICTURE, logged_lam, read_history
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.test_tuned_optimizer import layered
from tests.training.tiny import SHALLOW, logged, meta_weights, tiny_tagger, tiny_trainer


def test_few_meta_parameters_are_logged_by_value() -> None:
    lam = {"scale": torch.tensor(2.0), "rates": torch.tensor([0.5, 0.25]), "matrix": torch.ones(1, 5)}
    found = logged_lam(lam, lam)
    assert len(found) == 8
    assert found["meta_param/scale"] == 2.0
    assert (found["meta_param/rates/0"], found["meta_param/rates/1"], found["meta_param/matrix/4"]) == (0.5, 0.25, 1)


def test_many_are_logged_by_how_far_they_moved() -> None:
    start, lam = {"w": torch.full((9,), 2.0)}, {"w": torch.full((9,), 3.0)}
    assert logged_lam(lam, start) == {"meta_moved": pytest.approx(0.5)}
    assert logged_lam(lam, {"w": torch.zeros(9)}) == {"meta_moved": pytest.approx(3 * 9**0.5)}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the picture, which takes half of a short run's time."""
    monkeypatch.setattr("metaxl_evo.training.history.plot_history", lambda *of: None)


def histories(folder: Path) -> list[dict[str, str]]:
    return read_history(folder / HISTORY)


def run(folder: Path, resume: Any = None, **fields: Any) -> MetaTrainer:
    trainer = tiny_trainer(
        folder,
        tagger=tiny_tagger(base=SHALLOW),
        **{"meta_history": True, "max_steps": 6, "logging_steps": 2, **fields},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_history_is_the_log(tmp_path: Path) -> None:
    trainer = run(tmp_path, meta_diagnostics_every=4)
    rows = histories(tmp_path)
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    for key in ("loss", "meta_loss", "meta_grad_norm", "learning_rate", "meta_learning_rate", "meta_moved"):
        assert [float(row[key]) for row in rows] == logged(trainer, key)
    assert [bool(row["meta_cosine_to_exact"]) for row in rows] == [False, True, False]
    assert (tmp_path / PICTURE).stat().st_size > 1000
    start = tiny_tagger(base=SHALLOW).meta_parameters()
    now = meta_weights(trainer)
    moved = sum(float((now[n] - p).square().sum()) for n, p in start.items()) ** 0.5
    assert float(rows[-1]["meta_moved"]) == pytest.approx(
        moved / sum(float(p.square().sum()) for p in start.values()) ** 0.5, rel=1e-5
    )


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("cut", ["", "7,1.5"])
def test_a_resumed_run_writes_the_history_of_one_that_was_not_cut_off(tmp_path: Path, cut: str) -> None:
    """A save every four steps, a row a step, the last one perhaps half written when the run was killed."""
    settings: dict[str, Any] = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 4}
    run(tmp_path / "whole", **settings)
    run(tmp_path / "parted", **settings)  # to be resumed at step 4
    file = tmp_path / "parted" / HISTORY
    file.write_text(file.read_text("utf-8") + cut, "utf-8")
    run(tmp_path / "parted", str(tmp_path / "parted/checkpoint-4"), **settings)
    whole = histories(tmp_path / "whole")
    assert [row["step"] for row in whole] == list("123456")
    assert histories(tmp_path / "parted") == whole
    assert not (tmp_path / "parted/meta_history.1.csv").exists()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("stops", [False, True])
def test_the_last_steps_are_logged(tmp_path: Path, stops: bool) -> None:
    """Also of a run with fewer steps than logging_steps, and of one that a callback ends."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= stops and state.global_step == 3

    steady = {"lr_scheduler_type": "constant", "meta_lr_scheduler_type": "constant"}
    each = run(tmp_path / "each", max_steps=3, logging_steps=1, **steady)
    given = {"callbacks": [Stop()]}
    short = run(tmp_path / "short", max_steps=8 if stops else 3, logging_steps=500, trainer=given, **steady)
    (row,) = histories(tmp_path / "short")
    assert row["step"] == "3"
    for key in ("loss", "meta_loss"):
        assert [float(row[key])] == logged(short, key) == pytest.approx([sum(logged(each, key)) / 3], rel=1e-5)
    assert float(row["meta_moved"]) == logged(each, "meta_moved")[-1]


@pytest.mark.usefixtures("undrawn")
def test_no_step_is_logged_twice(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    run(tmp_path, max_steps=5, **settings)
    resumed = run(tmp_path, "latest", max_steps=7, **settings)
    assert [row["step"] for row in histories(tmp_path)] == list("24567")
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [2, 4, 5, 6, 7]


@pytest.mark.usefixtures("undrawn")
def test_an_earlier_runs_history_is_put_aside(tmp_path: Path) -> None:
    kept = []
    for _ in range(3):
        run(tmp_path)
        kept.append((tmp_path / HISTORY).read_text("utf-8"))
    asides = [(tmp_path / f"meta_history.{number}.csv").read_text("utf-8") for number in (1, 2)]
    assert asides == kept[:2]


def test_learned_rates_are_in_it(tmp_path: Path) -> None:
    trainer = layered(tmp_path, max_steps=2, meta_history=True, estimator="none")
    trainer.train()
    assert not (tmp_path / HISTORY).exists()  # nothing is learned
    few = nn.ParameterDict({"first": torch.tensor(0.1), "last": torch.tensor(0.2), "momentum": torch.tensor(0.3)})
    assert logged_lam(dict(few.named_parameters()), {}) == {
        "meta_param/first": pytest.approx(0.1),
        "meta_param/last": pytest.approx(0.2),
        "meta_param/momentum": pytest.approx(0.3),
    }


@pytest.mark.parametrize("fields", [{"meta_history": False}, {"estimator": "none"}, {"logging_strategy": "no"}])
def test_none_where_there_is_nothing_to_tell(tmp_path: Path, fields: dict[str, Any]) -> None:
    run(tmp_path, **fields)
    assert list(tmp_path.glob("meta_history*")) == []


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    run(tmp_path)
    assert len(histories(tmp_path)) == 3
    assert not (tmp_path / PICTURE).exists()
