"""The data and the model of the scripts' tests, made once, and what a refused run leaves undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaxl_evo.training.trainer import MetaTrainer
from scripts.train_ner import main
from tests.scripts.refusals import assert_refused
from tests.scripts.runs import TINY, argv, keep_checkpoints, train, write_data, write_model


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "family")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path, model: Path) -> Path:
    """The output folder of a run with one target; tests only read it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(model, data, folder)
    return folder


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory: pytest.TempPathFactory, data: Path, model: Path) -> Path:
    """An output folder with one checkpoint, of a run that did not come to its end."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    train(model, data, folder, save_strategy="steps", save_steps=2, max_steps=2)
    return keep_checkpoints(folder)


DRAWN = (
    *("metaxl_evo.training.history.plot_history", "metaxl_evo.experiments.curves.plot_history"),
    *("metaxl_evo.experiments.report.plot_scores", "metaxl_evo.experiments.html_report.write_html"),
    *("vision_tasks.fewshot_task.plot_sizes", "vision_tasks.noisy_labels_task.plot_weights"),
    *("vision_tasks.noisy_labels_task.plot_noise", "vision_tasks.noisy_labels_task.plot_weight_curves"),
)


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes half a second; those of the runs that a module shares are drawn."""
    for draw in DRAWN:
        monkeypatch.setattr(draw, lambda *of: None)


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes a training step fails."""

    def training_step(self: MetaTrainer, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a training step was made")

    monkeypatch.setattr(MetaTrainer, "training_step", training_step)


@pytest.fixture
def refused(no_step: None) -> Callable[..., None]:
    """Asserts that a tiny run is refused by one line that matches, without a step or a change to its folder."""

    def check(message: str, model: Path, data: Path, output: Path, *options: str, **settings: Any) -> None:
        places = {"model_name_or_path": model, "dataset": data, "output_dir": output}
        assert_refused(main, [*argv(places | TINY | settings), *options], message, output)

    return check
