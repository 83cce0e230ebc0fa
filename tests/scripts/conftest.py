"""The data and the model of the scripts' tests, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts.runs import train, write_data, write_model


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
