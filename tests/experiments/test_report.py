"""The report of a study, against numbers computed by hand: F1 in percent, a number a seed.

plain  de 50 52 54   sw 60 60 63       average 55 56 58.5
meta   de 55 56 60   sw 61 63 failed   average 58 59.5
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from metaxl_evo.experiments.comparison import Comparison
from metaxl_evo.experiments.records import Record
from metaxl_evo.experiments.report import comparison_text, write_report
from metaxl_evo.experiments.tables import cost_table, notes, run_table, score_tables, setting_tables

PERCENT = {
    ("plain", "de"): (50, 52, 54),
    ("plain", "sw"): (60, 60, 63),
    ("meta", "de"): (55, 56, 60),
    ("meta", "sw"): (61, 63),
}
FILES = ["report.md", "scores.csv", "differences.csv", "scores.png", "report.html"]


def study(**asked: Any) -> Comparison:
    records = [
        Record(
            run, case, seed, Path(run, case, str(seed)), scores={"f1": f1 / 100}, facts={"train_seconds": 10 + seed}
        )
        for (run, case), values in PERCENT.items()
        for seed, f1 in enumerate(values)
    ]
    lost = Record("meta", "sw", 2, Path("meta/sw/2"), error="CUDA | out of\nmemory")
    return Comparison([*records, lost], "f1", {"f1": "%"}, ["plain"], **asked)


def record(run: str = "plain", case: str = "", seed: int = 0, **held: Any) -> Record:
    return Record(run, case, seed, Path("runs", run), **({"scores": {"f1": 0.5, "loss": 0.25}} | held))


def compared(*records: Record) -> Comparison:
    return Comparison(records, "f1", {"f1": "%", "loss": ""}, [records[0].run])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(study(), folder)
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "| run | de | sw | average |",
        "| plain | 52.00 ± 2.00 | 61.00 ± 1.73 | 56.50 ± 1.80 |",
        "| meta | 57.00 ± 2.65 | 62.00 ± 1.41 (2 of 3 seeds) | 58.75 ± 1.06 (2 of 3 seeds) |",
        "| run | case | difference | 95 % interval | pairs | permutation p | reading |",
        "| meta | de | +5.00 | +2.52 to +7.48 | 3 | 0.25 | better |",  # 5 ± 4.303 / sqrt(3)
        "| meta | sw | +2.00 | -10.71 to +14.71 | 2 | 0.5 | undecided |",  # 2 ± 12.706
        "| meta | average | +3.25 | +0.07 to +6.43 | 2 | 0.5 | better |",  # 3.25 ± 12.706 / 4
        "- The smallest p that 3 pairs can give is 0.25: no significance is claimed below 6 pairs.",
        "- meta sw seed 2: CUDA \\| out of memory",
        "| plain | 11.00 ± 0.89 |",  # seconds of both cases
        "| meta | 10.80 ± 0.84 |",
    ],
)
def test_the_page_holds_what_one_computes_by_hand(line: str, written: Path) -> None:
    assert line in (written / "report.md").read_text(encoding="utf-8").splitlines()


def test_a_command_prints_the_tables_that_the_page_holds(written: Path) -> None:
    printed = comparison_text(study())
    assert printed in (written / "report.md").read_text(encoding="utf-8")
    assert printed.count("| meta |") == 4


def test_the_numbers_are_there_to_compute_with(written: Path) -> None:
    scores, differences = (pd.read_csv(written / name) for name in FILES[1:3])
    assert scores.groupby(["run", "case"], sort=False)["value"].agg(list).to_dict() == {
        key: pytest.approx(values) for key, values in PERCENT.items()
    }
    assert differences["mean"].tolist() == pytest.approx([5, 2, 3.25])
    assert differences["adjusted_p"].isna().all()


@pytest.mark.parametrize(
    ("asked", "with_outcomes", "note"),
    [
        ({}, 0, "A higher f1 is better."),
        ({"greater_is_better": False}, 0, "A lower f1 is better."),
        ({}, 0, "No margin is set, so no difference is read as a tie."),
        ({"margin": 0.5}, 0, "A tie is an interval inside ±0.5 points."),
        ({}, 0, "Intervals are over the seeds alone: they say nothing of another test set."),
        ({}, 1, "Intervals are over the seeds, and over test examples where both runs kept theirs (1 of 2 runs did)."),
        ({}, 2, "Intervals are over the seeds and the test examples; the cases are taken as given."),
        ({}, 0, "A single pair has no interval."),
        ({"baselines": ["lost"]}, 0, "No run has a pair with lost."),
    ],
)
def test_notes_say_what_the_tables_rest_on(asked: dict[str, Any], with_outcomes: int, note: str) -> None:
    outcomes = {"f1": np.array([[1.0, 1.0], [0.0, 1.0]])}
    records = [record(run, outcomes=outcomes if number < with_outcomes else {}) for number, run in enumerate("ab")]
    comparison = Comparison(
        [*records, Record("lost", "", 0, Path("lost"), error="stopped")],
        "f1",
        {"f1": "%"},
        **({"baselines": ["a"]} | asked),
    )
    assert note in notes(comparison)


@pytest.mark.parametrize(
    "records",
    [
        [record()],
        [record(error="stopped", scores={}), record("meta", error="stopped", scores={})],
        [record(error="stopped", scores={}), record("meta")],
        [record(scores={"f1": 0.0}), record("meta", scores={"f1": 0.0, "loss": math.nan})],
        [record(case="de"), record("meta", "de"), record(case="sw", error="stopped", scores={})],
        [record(facts={"a": 1, "b": None}), record("meta", facts={"a": math.inf, "b": 2}, settings={"a": [1]})],
        [record("$x_{$"), record("$"), record("%{x}"), record("_"), record("a | b\n<i>`*")],
    ],
    ids=["one", "none", "no baseline", "zeros", "a case lost", "odd facts", "odd names"],
)
def test_a_report_is_made_of_what_there_is(records: list[Record], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    assert [file.name for file in write_report(compared(*records), tmp_path)] == FILES
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|inf)\b", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_without_the_libraries_a_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("matplotlib", "plotly.express"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "metaxl_evo.experiments.html_report", raising=False)
    assert [file.name for file in write_report(study(), tmp_path)] == FILES[:3]
    assert [one.message.partition(": ")[2] for one in caplog.records] == [
        "pip install 'metaxl_evo[plot]' draws one",
        "pip install 'metaxl_evo[report]' makes one",
    ]


def test_cost_is_in_the_numbers_that_all_runs_have() -> None:
    held = {"steps": 200, "train_seconds": 1.5, "none": None, "large": math.inf, "flag": True, "nested": {"a": 1}}
    other = {**held, "train_seconds": 2.5, "none": 1, "large": 1.0, "own": 3}
    table = cost_table(
        compared(record(facts=held), record(seed=1, facts=held | {"train_seconds": 2.5}), record("b", facts=other))
    )
    assert table.columns == ["run", "train_seconds", "steps"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["plain", "2.000 ± 0.707", "200"],
        ["b", "2.500", "200"],
    ]


def test_panels_are_in_the_order_of_the_study_and_share_a_scale_for_curves_alone() -> None:
    html_report = pytest.importorskip("metaxl_evo.experiments.html_report", exc_type=ImportError)
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    made = [record(run, case, history=history) for run, case in (("plain", "sw"), ("meta", "de"), ("meta", "sw"))]
    figures = html_report.charts(compared(record(case="de", error="stopped"), *made))
    assert [one.text for one in figures["scores"]["f1, %"].layout.annotations] == ["de", "sw", "average"]
    assert [one.text for one in figures["learning curves"]["loss"].layout.annotations] == ["de", "sw"]
    scores, curves = figures["scores"]["f1, %"].layout, figures["learning curves"]["loss"].layout
    assert [scores.xaxis2.matches, curves.xaxis2.matches, curves.yaxis2.matches] == [None, "x", "y"]


@pytest.mark.parametrize(
    ("shares", "cells"), [((1.0, 0.9996), ["100.00", "99.96"]), ((0.0912, 0.05), ["9.120", "5.000"])]
)
def test_as_many_digits_are_shown_as_tell_scores_apart(shares: tuple[float, float], cells: list[str]) -> None:
    (table,) = score_tables(compared(*(record(str(one), scores={"f1": one}) for one in shares)))
    assert [row[1].text for row in table.rows] == cells


def test_settings_that_differ_stand_apart() -> None:
    def made(run: str, seed: int, **own: Any) -> Record:
        return record(run, seed=seed, settings={"rate": 0.1, "seed": seed, "output_dir": f"runs/{run}"} | own)

    plain = [made("plain", seed) for seed in range(5)]
    tables = setting_tables(compared(*plain, *(made("meta", seed, rate=0.2, kwargs={"n": 3}) for seed in range(5))))
    differing, common = ([[cell.text for cell in row] for row in table.rows] for table in tables)
    assert tables[0].columns == ["setting", "plain", "meta"]
    assert differing == [["rate", "0.1", "0.2"], ["kwargs", "", "{'n': 3}"]]
    assert common == [["seed", "0, 1, 2, and 2 more"], ["output_dir", "(its folder)"]]


def test_curves_are_lines_by_run_with_gaps_where_there_is_no_number() -> None:
    html_report = pytest.importorskip("metaxl_evo.experiments.html_report", exc_type=ImportError)
    loss = [3.0, math.nan, math.inf, 1.0]
    history = [
        {"step": 10 * (place + 1), "loss": one, "meta_param/a": -one, "note": "x"} for place, one in enumerate(loss)
    ]
    ended = {"step": 40, "train_runtime": 60.0}
    runs = [record(run, seed=seed, history=[*history, ended]) for run in ("<b>", "meta") for seed in (0, 1)]
    figures = html_report.charts(compared(*runs))
    assert {chart: list(views) for chart, views in figures.items()} == {
        "scores": ["f1, %", "loss"],
        "learning curves": ["loss"],
        "meta parameters": ["meta_param/a"],
    }
    lines = figures["learning curves"]["loss"].data
    assert [line.name for line in lines] == ["&lt;b&gt;", "&lt;b&gt;", "meta", "meta"]
    assert [len({line.line.color for line in lines}), len({line.hovertemplate for line in lines})] == [2, 4]
    np.testing.assert_array_equal(lines[0].x, [10, 20, 30, 40])
    np.testing.assert_array_equal(lines[0].y, loss)
    dots, other, mean, _ = figures["scores"]["f1, %"].data
    assert [list(dots.x), list(other.x), list(mean.x)] == [[50, 50], [50, 50], [50]]


@pytest.mark.parametrize(("rows", "drawn"), [(500, 500), (501, 251), (2000, 501)])
def test_long_curves_are_thinned_out_to_their_ends(rows: int, drawn: int) -> None:
    html_report = pytest.importorskip("metaxl_evo.experiments.html_report", exc_type=ImportError)
    history = [{"step": step, "loss": 1 / step} for step in range(1, rows + 1)]
    (line,) = html_report.charts(compared(record(history=history)))["learning curves"]["loss"].data
    assert [len(line.x), line.x[0], line.x[-1]] == [drawn, 1, rows]


def test_runs_are_linked_where_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "runs/100 %#?ä:1"
    folder.mkdir(parents=True)
    there, nowhere = run_table(
        compared(Record("a", "", 0, folder, scores={"f1": 0.5}), record("b", error="stopped")), tmp_path / "report"
    ).rows
    assert [there[-2].link, nowhere[-2].link] == ["../runs/100%20%25%23%3F%C3%A4%3A1/", ""]
    assert [there[-1].text, nowhere[-1].text] == ["finished", "failed"]
