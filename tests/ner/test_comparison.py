"""Means, spreads and paired differences of a comparison, from result files written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from metaxl_evo.ner.comparison import Comparison, read_comparison, run_folder
from scripts import reproduce_ner_cpu as script

F1 = {"a": {"sw": [0.50, 0.60], "rw": [0.30, 0.20]}, "b": {"sw": [0.53, 0.62], "rw": [0.31, 0.26]}}


def written(folder: Path) -> Path:
    for method, languages in F1.items():
        for language, values in languages.items():
            for seed, value in enumerate(values):
                run = {"train_seconds": 10.0 + seed, "rtn_relative_change": 0.1, "skipped_meta_steps": 1}
                place = run_folder(folder, method, language, seed)
                place.mkdir(parents=True)
                (place / "results.json").write_text(json.dumps({"test": {language: {"f1": value}}, "run": run}))
    return folder


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return read_comparison(written(tmp_path), ["a", "b"], ["sw", "rw"], [0, 1])


def test_average_is_taken_within_a_seed(comparison: Comparison) -> None:
    assert comparison.f1("a", "sw") == pytest.approx([50, 60])
    assert comparison.f1("a", "average") == pytest.approx([40, 40])


def test_difference_is_paired(comparison: Comparison) -> None:
    mean, low, high = comparison.difference("b", "a")
    differences = [3.0, 2.0, 1.0, 6.0]  # points, over (language, seed)
    spread = math.sqrt(sum((d - 3) ** 2 for d in differences) / 3)
    half = 3.182446305284263 * spread / 2  # Student's t, 3 degrees of freedom, 97.5 %
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))


def test_table_reports_a_tie_as_a_tie(comparison: Comparison) -> None:
    table = comparison.markdown("a")
    assert "| a | 55.0 ± 7.1 | 25.0 ± 7.1 | 40.0 ± 0.0 |" in table
    assert "| b | +3.00 | -0.44 to +6.44 | tie |" in table
    assert "| b | 10 ± 1 | 10.0 ± 0.0 | 4 |" in table


def test_one_pair_has_no_interval(tmp_path: Path) -> None:
    single = read_comparison(written(tmp_path), ["a", "b"], ["sw"], [0])
    assert single.difference("b", "a") == (pytest.approx(3.0), -math.inf, math.inf)
    assert "| b | +3.00 | -inf to +inf | one value |" in single.markdown("a")


def test_missing_run_is_named(tmp_path: Path) -> None:
    (run_folder(written(tmp_path), "b", "rw", 1) / "results.json").unlink()
    with pytest.raises(ValueError, match=r"b/rw/1/results.json is missing: run the comparison again"):
        read_comparison(tmp_path, ["a", "b"], ["sw", "rw"], [0, 1])


def test_script_keeps_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "METHODS", {"joint_training_equal": [], "a": []})
    monkeypatch.setitem(F1, "joint_training_equal", F1["b"])
    monkeypatch.setattr(script, "options_of", lambda *key: [])
    monkeypatch.setattr(
        script, "run_scripts", lambda runs, jobs: pytest.fail(f"started again: {runs}") if runs else None
    )
    options = ["--data", str(tmp_path), "--output_dir", str(written(tmp_path / "runs"))]
    table = script.main([*options, "--languages", "sw,rw", "--seeds", "0,1"])
    assert "| a | -3.00 |" in table
    assert (tmp_path / "runs/table.md").read_text() == table
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has no models/xlmr-mini or xlmr-mini: give --data"):
        script.find(tmp_path, "models/xlmr-mini", "xlmr-mini")


def test_the_script_gives_each_run_its_own_settings(tmp_path: Path) -> None:
    for name in ("xlmr-mini", "wikiann"):
        (tmp_path / name).mkdir()
    options = script.options_of(tmp_path, tmp_path / "run", "metaxl_evograd", "ig", 2)
    found = dict(zip(options[::2], options[1::2], strict=True))
    assert (found["--target_languages"], found["--seed"], found["--output_dir"]) == ("ig", "2", str(tmp_path / "run"))
    assert found["--estimator"] == "evograd"
    assert found["--resume_from_checkpoint"] == "latest"
