"""The report of a GPU, part by part in small on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metaxl_evo.benchmark.gpu import GpuReportArguments, agreement, every_engine, kernels, precisions
from metaxl_evo.estimators import ESTIMATORS
from metaxl_evo.training.cli import SettingsError
from scripts.gpu_report import main


@pytest.mark.slow
def test_each_estimator_and_engine_is_near_its_float64(tmp_path: Path) -> None:
    assert {name for name, _ in every_engine()} == ESTIMATORS.keys() - {"first_order"}
    _, (_, *rows) = agreement(GpuReportArguments(str(tmp_path), small=True))
    for name, settings, error in rows:
        assert 0 < float(error) < 0.1, (name, settings, error)


def test_precisions_and_kernels(tmp_path: Path) -> None:
    settings = GpuReportArguments(str(tmp_path), small=True)
    errors = {(engine, precision): float(error) for engine, precision, error in precisions(settings)[1][1:]}
    assert len(errors) == 6
    assert all(1e-4 < error < 0.1 for (_, precision), error in errors.items() if precision == "bf16")
    assert all(float(error) < 1e-2 for _, error in kernels(settings)[1][1:])


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_report(tmp_path: Path) -> None:
    text = main(["--output_dir", str(tmp_path / "out"), "--small", "true"])
    assert (tmp_path / "out/gpu.md").read_text("utf-8") == text
    parts = text.split("\n## ")[1:]
    assert len(parts) == 6
    assert all(len(part.splitlines()) >= 5 for part in parts), "a title, a head and a row"
    assert "Error" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="torch sees none here: set small: true"):
        main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
