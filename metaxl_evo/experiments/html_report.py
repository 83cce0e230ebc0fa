"""A study as one page to explore: it opens offline, with tables to sort and figures to point at."""

from __future__ import annotations

import html
import math
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.express as px
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.graph_objects import Figure
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from metaxl_evo.experiments.comparison import Comparison
from metaxl_evo.experiments.tables import (
    PANELS,
    cost_table,
    describe,
    difference_tables,
    failures,
    label,
    notes,
    panel_cases,
    run_table,
    score_tables,
    scores,
    setting_tables,
)
from metaxl_evo.training.durable import whole
from metaxl_evo.training.history import MOVED, VALUE

TEMPLATE = "report.html.jinja"
POINTS = 500  # of a curve; of longer ones evenly spaced rows are drawn
CURVE_HEIGHT, ROW, TOP, GAP = 240, 30, 40, 60  # heights in pixels: of curves, of a run's dots, above and below a panel
GRID, CLEAR = "rgba(128, 128, 128, 0.25)", "rgba(0, 0, 0, 0)"
CURVE = ["run", "case", "seed", "column"]


def write_html(comparison: Comparison, file: Path) -> Path:
    """Write the page, whose links lead from its folder into those of the runs; returns the file."""
    differing, common = setting_tables(comparison)
    figures = charts(comparison)
    page = _template().render(
        comparison=comparison,
        failures=[(describe(one), one.error) for one in failures(comparison)],
        scores=score_tables(comparison),
        differences=difference_tables(comparison),
        notes=notes(comparison),
        cost=cost_table(comparison),
        differing=differing,
        common=common,
        runs=run_table(comparison, file.parent),
        charts=figures,
        charts_json=to_json_plotly(figures),
        points=POINTS,
        plotly=get_plotlyjs(),
    )
    with whole(file) as draft:
        draft.write_text(page, encoding="utf-8")
    return file


def charts(comparison: Comparison) -> dict[str, dict[str, Figure]]:
    """Figures by chart and by what is chosen there: a score, or a column of the history."""
    by_score = scores(comparison).groupby("score", sort=False)
    by_column = _history(comparison).groupby("column", sort=False)
    curves = {str(column): _lines(comparison, str(column), rows) for column, rows in by_column}
    learned = [column for column in curves if column.startswith((VALUE, MOVED))]
    return {
        "scores": {(name := label(comparison, str(score))): _dots(comparison, name, rows) for score, rows in by_score},
        "learning curves": {column: curves[column] for column in curves if column not in learned},
        "meta parameters": {column: curves[column] for column in learned},
    }


def _history(comparison: Comparison) -> pd.DataFrame:
    """Every number that was logged, a row each: curves thinned out, without what is logged but once (run times)."""
    rows = [
        (one.run, one.case, one.seed, column, row["step"], value)
        for one in comparison.records
        for row in one.history
        for column, value in row.items()
        if column != "step" and isinstance(value, Real)
    ]
    frame = pd.DataFrame(rows, columns=[*CURVE, "step", "value"])
    steps = frame.groupby(CURVE)["step"]
    place, length = steps.cumcount(), steps.transform("size")
    drawn = (place % np.ceil(length / POINTS) == 0) | (place == length - 1)
    longest = length.groupby(frame["column"]).transform("max")
    return frame[drawn & (longest > 1)]


def _lines(comparison: Comparison, column: str, rows: pd.DataFrame) -> Figure:
    """A line a run, in the colour of its method."""
    panels = _panels(comparison, rows, column, CURVE_HEIGHT)
    return _laid_out(px.line(_escaped(rows), x="step", y="value", line_group="seed", render_mode="svg", **panels))


def _dots(comparison: Comparison, name: str, rows: pd.DataFrame) -> Figure:
    """A dot a seed, and their mean a line."""
    means = rows.groupby(["run", "case"], sort=False, as_index=False)["value"].mean()
    height = ROW * len(comparison.runs)
    lines = px.scatter(_escaped(means), x="value", y="run", **_panels(comparison, rows, f"mean {name}", height))
    lines.update_traces(marker={"symbol": "line-ns-open", "size": 20, "line_width": 2})
    panels = _panels(comparison, rows, name, height)
    figure = px.scatter(_escaped(rows), x="value", y="run", hover_data=["seed"], opacity=0.6, **panels)
    figure.update_traces(marker_size=9).add_traces(lines.data).update_layout(showlegend=False).update_yaxes(title="")
    return _laid_out(figure.update_xaxes(matches=None, showticklabels=True))


def _panels(comparison: Comparison, rows: pd.DataFrame, value: str, height: int) -> dict[str, Any]:
    """What all figures have in common: a colour a run, a panel of this height a case, and names as they are."""
    runs, cases = ([html.escape(one) for one in names] for names in (comparison.runs, panel_cases(comparison, rows)))
    down = max(1, math.ceil(len(cases) / PANELS))
    inside = down * height + (down - 1) * GAP
    return {
        "color": "run",
        "color_discrete_sequence": px.colors.qualitative.D3,
        "facet_col": "case" if len(cases) > 1 else None,
        "facet_col_wrap": PANELS,
        "facet_row_spacing": (down > 1) * GAP / inside,
        "height": inside + TOP + GAP,
        "category_orders": {"run": runs, "case": cases},
        "labels": {"value": html.escape(value)},
        "template": "none",
    }


def _laid_out(figure: Figure) -> Figure:
    """On light and dark grounds alike."""
    figure.for_each_annotation(lambda one: one.update(text=one.text.removeprefix("case=")))
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(gridcolor=GRID, zeroline=False, automargin=True)
    margins = {"t": TOP, "r": 10, "b": GAP, "l": 60}
    return figure.update_layout(
        margin=margins, paper_bgcolor=CLEAR, plot_bgcolor=CLEAR, legend_title="", modebar_bgcolor=CLEAR
    )


def _escaped(frame: pd.DataFrame) -> pd.DataFrame:
    """Plotly reads tags in the names that it shows."""
    return frame.assign(run=frame["run"].map(html.escape), case=frame["case"].map(html.escape))


def _template() -> Any:
    folder = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(
        TEMPLATE
    )
