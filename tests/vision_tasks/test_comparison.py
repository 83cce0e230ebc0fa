"""The page of results: made of what the runs left, without running what is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import reproduce_vision_cpu as script
from vision_tasks.comparison import page, read_summary

CURVE = {"weights": {"curve": {"loss": [0.0, 1.0], "weight": [0.5, 0.1]}}}


def written(folder: Path, scores: dict[str, dict[str, list[float]]]) -> None:
    """A summary as `run_experiment` leaves it, as far as the page reads it."""
    folder.mkdir(parents=True)
    described = {
        run: {key: {"mean": sum(values) / len(values), "values": values} for key, values in found.items()}
        for run, found in scores.items()
    }
    runs: dict[str, Any] = {run: {"0": CURVE if run != "baseline" else {}} for run in scores}
    (folder / "results.json").write_text(json.dumps({"test": described, "run": runs}), encoding="utf-8")


def test_the_page_compares_with_each_baseline(tmp_path: Path) -> None:
    written(tmp_path / "few", {"none": {"a": [0.5, 0.6]}, "none_seen": {"a": [0.4, 0.5]}, "evo": {"a": [0.45, 0.56]}})
    (tmp_path / "cost").mkdir()
    (tmp_path / "cost/table.md").write_text("| a cost |\n", encoding="utf-8")
    found = page(tmp_path, {"few": ("a",)}, ["cost"])
    assert "| run | a | a over none | 95 % interval | reading |" in found
    assert "| run | a | a over none_seen | 95 % interval | reading |" in found
    assert "| -0.045 |" in found
    assert "| +0.055 |" in found
    assert found.endswith("### cost\n\n| a cost |\n")
    with pytest.raises(ValueError, match=r"results.json is missing: run the comparison again"):
        read_summary(tmp_path / "other")


def test_the_script_starts_what_may_have_changed_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    images, output = tmp_path / "data/images", tmp_path / "out"
    images.mkdir(parents=True)
    (images / script.MNIST).touch()
    started: list[list[Any]] = []
    monkeypatch.setattr(script, "run_scripts", lambda commands, jobs: started.append([jobs, commands]))
    for name in script.experiments(images):
        scores = {key: [0.5, 0.6] for key in script.SHOWN[name.partition("_")[0]]}
        written(output / name, {"baseline": scores, "evograd": scores})
    for name in script.COSTS:
        (output / name).mkdir()
        (output / name / "table.md").write_text(f"| {name} |", encoding="utf-8")
    found = script.main(["--data", str(tmp_path), "--output_dir", str(output), "--jobs", "3"])
    (jobs, trainings), (alone, costs) = started
    assert (jobs, len(trainings), alone, costs) == (3, 5, 1, {})
    for log, (path, options) in trainings.items():
        assert log.parent == output
        assert path.is_file()
        assert options[-2:] == ["--resume_from_checkpoint", "latest"]
        assert Path(options[options.index("--config") + 1]).is_file()
        assert options[options.index("--output_dir") + 1] == str(log.with_suffix(""))
        noise, _, rate = log.stem.partition("_")
        assert options[2:].count("--noise_rate") == (noise == "noise")
        assert not rate or options[options.index("--noise_rate") + 1] == rate
    assert found == (output / "tables.md").read_text(encoding="utf-8")
    assert all(f"### {name}" in found for name in (*script.experiments(images), *script.COSTS))
    assert all((output / name).stat().st_size > 5000 for name in ("noise.png", "weights.png"))
