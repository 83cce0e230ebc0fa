"""What is written: results.json, the table, the plots."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from metaxl_evo.benchmark import report
from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.report import markdown, plot, write_report
from metaxl_evo.benchmark.rows import Row, Spread
from metaxl_evo.benchmark.run import run_benchmark


def measured(estimator: str = "one_step", horizon: int = 1, **settings: int) -> Row:
    return Row(
        estimator, settings, "after_step", {"horizon": horizon}, time_ratio=Spread(1.5, 1.25, 2.0), memory_ratio=1.05,
        memory_increment_mib=12.5, peak_mib=21.0, cosine=0.98765, relative_error=1.234e-5,
        counts={"forwards": 2, "hvps": 0},
        plain_seconds=Spread(0.5, 0.4, 0.75), load=1.25, launch_ratio=8.8, wait_increment=3,
    )  # fmt: skip


FAILED = Row("first_order", {}, "lookahead", {"horizon": 1}, error="cannot: do that")


def test_results(tmp_path: Path) -> None:
    row = measured()
    row.noise_to_signal, row.relative_error = math.inf, math.nan
    table = write_report(tmp_path / "new", BenchmarkArguments("out", repeats=3), [row, FAILED])
    found = json.loads((tmp_path / "new/results.json").read_text(encoding="utf-8"))
    assert found.keys() == {"environment", "settings", "rows"}
    assert found["environment"].keys() >= {"torch", "transformers", "cpu", "threads", "date", "commit"}
    assert found["settings"]["repeats"] == 3
    assert found["rows"][0] == {
        "estimator": "one_step", "settings": {}, "order": "after_step", "case": {"horizon": 1},
        "time_ratio": {"median": 1.5, "q1": 1.25, "q3": 2.0}, "memory_ratio": 1.05, "memory_increment_mib": 12.5,
        "peak_mib": 21.0, "plain_seconds": {"median": 0.5, "q1": 0.4, "q3": 0.75}, "load": 1.25, "untimed": None,
        "launch_ratio": 8.8, "wait_increment": 3,
        "cosine": 0.98765, "relative_error": None, "precision_error": None, "noise_to_signal": None,
        "counts": {"forwards": 2, "hvps": 0},
        "error": None,
    }  # fmt: skip
    assert found["rows"][1]["error"] == "cannot: do that"
    assert found["rows"][1]["time_ratio"] is None
    assert (tmp_path / "new/table.md").read_text(encoding="utf-8") == table


@pytest.mark.parametrize("held", ['{"test": {}}', "[]", "text"])
def test_the_results_of_something_else_are_not_replaced(tmp_path: Path, held: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(held, encoding="utf-8")
    with pytest.raises(ValueError, match=r"results.json is no benchmark's, .*another output_dir"):
        run_benchmark(BenchmarkArguments(problem="regression", output_dir=str(tmp_path)))
    assert file.read_text(encoding="utf-8") == held


def test_the_table() -> None:
    late = Row("sama", {}, "lookahead", untimed="no time: why")
    lines = markdown([measured(radius=2), FAILED, late]).splitlines()
    assert lines[0] == (
        "| estimator | settings | case | order | time, times the plain step | peak memory | MiB above resident "
        "| launches, times the plain step | host waits above | cosine | relative error | passes | remark |"
    )
    assert lines[2] == (
        "| one_step | radius 2 | horizon 1 | after_step | 1.50 (1.25 to 2.00) | 1.05 | 12.50 | 8.80 | 3 | 0.9877 "
        "| 1.2e-05 | 2 forwards |  |"
    )
    assert lines[3] == "| first_order |  | horizon 1 | lookahead |  |  |  |  |  |  |  |  | cannot: do that |"
    assert lines[4].endswith("| no time: why |")
    assert lines[6].startswith("- plain step horizon 1: 0.5 (0.4 to 0.75) s, load of the machine at most 1.2 on ")


def test_plots_are_those_that_have_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    copies = [measured("evograd", copies=count) for count in (2, 8)]
    several = [measured(horizon=1), measured(horizon=4)]

    def names(rows: list[Row]) -> list[str]:
        return [file.name for file in plot(rows, tmp_path)]

    assert names([FAILED]) == []
    assert names([measured(), FAILED]) == ["cost.png"]
    assert names(copies) == ["cost.png", "copies.png"]
    assert names(several) == ["cost.png", "horizon.png"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("cost", "copies", "horizon"))


def test_sizes_are_drawn_against_memory_and_time_beside_the_plain_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(report, "_draw", lambda file, panels: drawn.setdefault(file.name, panels))

    def sized(width: int, parameters: int, copies: int, order: str = "after_step") -> Row:
        row = measured("evograd", copies=copies)
        row.case, row.order = {"width": width, "meta_parameters": parameters}, order
        row.time_ratio, row.peak_mib = Spread(2.0 * width, 1.0, 9.0), 21.0 * width
        return row

    plot([sized(3, 301, 2), sized(1, 301, 2), sized(1, 3001, 2), sized(2, 301, 9), FAILED], tmp_path)
    memory, time = drawn["width.png"]
    assert memory.points == {
        "evograd copies 2": [(1, 21.0), (3, 63.0)],
        "plain step": [(1, 20.0), (2, 40.0), (3, 60.0)],
    }
    assert time.points == {"evograd copies 2": [(1, 2.0), (3, 6.0)], "plain step": [(1, 1), (2, 1), (3, 1)]}
    memory, time = drawn["meta_parameters.png"]
    assert time.points == {
        "evograd copies 2": [(301, 2.0), (3001, 2.0)],
        "plain step": [(301, 1), (3001, 1)],
    }
    drawn.clear()
    plot([sized(width, 301, 2, order) for width in (1, 2) for order in ("after_step", "lookahead")], tmp_path)
    assert list(drawn["width.png"][0].points) == [
        "evograd copies 2 after_step",
        "evograd copies 2 lookahead",
        "plain step",
    ]


def test_two_panels_are_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [measured(), measured()]
    rows[0].case, rows[1].case = {"width": 1}, {"width": 2}
    assert [file.name for file in plot(rows, tmp_path)] == ["cost.png", "width.png"]
    assert (tmp_path / "width.png").stat().st_size > 5000
