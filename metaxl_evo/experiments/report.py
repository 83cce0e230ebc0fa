"""The report of a study: a page to read, tables to compute with, a picture, and a page to explore."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd

from metaxl_evo.experiments.comparison import Comparison, Difference
from metaxl_evo.experiments.tables import (
    PANELS,
    Table,
    cost_table,
    describe,
    difference_tables,
    failures,
    label,
    notes,
    panel_cases,
    score_tables,
    scores,
)
from metaxl_evo.messages import one_line
from metaxl_evo.training.durable import whole
from metaxl_evo.training.figures import figure

logger = logging.getLogger(__name__)

REPORT = ("report.md", "scores.csv", "differences.csv", "scores.png", "report.html")


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write report.md, scores.csv, differences.csv and, with their libraries, scores.png and report.html.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    *files, picture, page = (folder / name for name in REPORT)
    rows = [asdict(one) for found in comparison.by_baseline.values() for one in found]
    differences = pd.DataFrame(rows, columns=[one.name for one in fields(Difference)])
    tables = (comparison.frame().to_csv(index=False), differences.to_csv(index=False))
    for file, text in zip(files, (_report_text(comparison), *tables), strict=True):
        with whole(file) as draft:
            draft.write_text(text, encoding="utf-8")
    try:
        files.append(plot_scores(comparison, picture))
    except ImportError:
        logger.warning("no scores.png: pip install 'metaxl_evo[plot]' draws one")
    try:
        from metaxl_evo.experiments.html_report import write_html

        files.append(write_html(comparison, page))
    except ImportError:
        logger.warning("no report.html: pip install 'metaxl_evo[report]' makes one")
    return files


def comparison_text(comparison: Comparison) -> str:
    """What a command prints at its end: the first table of scores, the differences and how to read them (Markdown)."""
    tables = [*score_tables(comparison)[:1], *difference_tables(comparison)]
    return "\n".join([*map(_markdown, filter(None, tables)), _items(notes(comparison))])


def _tables_text(comparison: Comparison) -> str:
    tables = [*score_tables(comparison), *difference_tables(comparison)]
    return "\n".join(map(_markdown, filter(None, tables)))


def _report_text(comparison: Comparison) -> str:
    parts = [f"# {_escaped(comparison.title)}\n", _tables_text(comparison)]
    parts.append(_items(map(_escaped, notes(comparison))))
    if lost := failures(comparison):
        parts.append(f"## Without results: {len(lost)} of {len(comparison.records)} runs\n")
        parts.append(_items([f"{_escaped(describe(one))}: {_escaped(one_line(one.error))}" for one in lost]))
    if cost := cost_table(comparison):
        parts.append(_markdown(cost))
    return "\n".join(parts)


def _markdown(table: Table) -> str:
    rules = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [[_escaped(column) for column in table.columns], rules]
    lines += [[_escaped(cell.text) for cell in row] for row in table.rows]
    return "\n".join([f"## {_escaped(table.title)}\n", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def plot_scores(comparison: Comparison, file: Path) -> Path:
    """Every seed a dot and the mean a line, a row a run, a panel a case and, of several, their average.

    Raises:
        ImportError: without matplotlib.
    """
    shown = scores(comparison).query("score == @comparison.score")
    cases = panel_cases(comparison, shown)
    names = [_plain(run) for run in comparison.runs]
    columns = min(PANELS, max(1, len(cases)))
    rows = max(1, math.ceil(len(cases) / columns))
    size = (2 + 2.6 * columns, rows * (1 + 0.3 * len(comparison.runs)))
    with figure(file, columns, size, rows=rows) as axes:
        for axis in axes[len(cases) :]:
            axis.set_axis_off()
        for index, (axis, case) in enumerate(zip(axes, cases, strict=False)):
            for row, run in enumerate(comparison.runs):
                values = shown["value"][(shown["case"] == case) & (shown["run"] == run)]
                axis.plot(values, [row] * len(values), "o", color=f"C{row}", alpha=0.5)
                axis.plot(values.mean(), row, "|", color=f"C{row}", markersize=18)
            axis.set(title=_plain(case), xlabel=_plain(label(comparison, comparison.score)))
            axis.set(ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=names)
            axis.tick_params(labelleft=index % columns == 0)
    return file


def _items(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _escaped(text: str) -> str:
    """As it is, in Markdown."""
    return re.sub(r"([\\|<*`])", r"\\\1", one_line(text))


def _plain(text: str) -> str:
    """As it is, in matplotlib, which reads formulas between dollars."""
    return text.replace("$", r"\$")
