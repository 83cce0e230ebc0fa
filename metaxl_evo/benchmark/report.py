"""What a benchmark leaves behind: results.json, a Markdown table, plots."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metaxl_evo.benchmark.rows import Row, Spread
from metaxl_evo.training.environment import environment
from metaxl_evo.training.figures import figure

COLUMNS: dict[str, Callable[[Row], str]] = {
    "estimator": lambda row: row.estimator,
    "settings": lambda row: _pairs(row.settings),
    "case": lambda row: _pairs(row.case),
    "order": lambda row: row.order,
    "time, times the plain step": lambda row: _spread(row.time_ratio),
    "peak memory": lambda row: _number(row.memory_ratio),
    "MiB above resident": lambda row: _number(row.memory_increment_mib),
    "launches, times the plain step": lambda row: _number(row.launch_ratio),
    "host waits above": lambda row: "" if row.wait_increment is None else str(row.wait_increment),
    "cosine": lambda row: _number(row.cosine, 4),
    "relative error": lambda row: _error(row.relative_error),
    "relative error to the same in float32": lambda row: _error(row.precision_error),
    "noise / signal": lambda row: "" if row.noise_to_signal is None else f"{row.noise_to_signal:.3g}",
    "passes": lambda row: ", ".join(f"{count} {name}" for name, count in (row.counts or {}).items() if count),
    "remark": lambda row: row.error or row.untimed or "",
}
Points = dict[str, list[tuple[float, float]]]  # by label
COSINE = "cosine to the exact hypergradient"
TIME = "time, times the plain step"
PLAIN = "plain step"
TEXTS = ("estimator", "settings", "case", "order", "passes", "remark")


def write_report(folder: Path, settings: Any, rows: Sequence[Row]) -> str:
    """Write results.json, table.md and, with matplotlib, the plots that the rows allow; returns the table."""
    require_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "environment": environment(),
        "settings": asdict(settings),
        "rows": [_finite(asdict(row) | _by_name(row)) for row in rows],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    text = markdown(rows)
    (folder / "table.md").write_text(text, encoding="utf-8")
    if find_spec("matplotlib"):
        plot(rows, folder)
    return text


def require_own(folder: Path) -> None:
    """Refuse a folder with the results of something else than a benchmark.

    Raises:
        ValueError: naming the folder.
    """
    file = folder / "results.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise ValueError(f"{file} is no benchmark's, and would be replaced: choose another output_dir")


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, then the plain step of each case; columns that are empty everywhere are left out."""
    cells = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = [f"| {' | '.join(cells)} |", f"|{'|'.join('---' if name in TEXTS else '---:' for name in cells)}|"]
    lines += [f"| {' | '.join(line)} |" for line in zip(*cells.values(), strict=True)]
    return "\n".join([*lines, *_yardsticks(rows)]) + "\n"


def _yardsticks(rows: Sequence[Row]) -> list[str]:
    """A line for the plain step of each case, behind an empty one."""
    found = {
        f"- {PLAIN} {_pairs(row.case)}".rstrip() + f": {_spread(row.plain_seconds, '.3g')} s, "
        f"load of the machine at most {row.load:.1f} on {os.cpu_count()} processors"
        for row in rows
        if row.plain_seconds is not None
    }
    return ["", *sorted(found)] if found else []


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Cost against accuracy; memory, time or cosine against what was varied: those that have points.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    cost = _Panel(_cost_points(rows), TIME, COSINE, "")
    plots = {
        "cost.png": [cost],
        "copies.png": [
            _Panel(_against(rows, "copies", "memory_increment_mib"), "copies", "MiB above resident"),
            _Panel(_against(rows, "copies", "time"), "copies", TIME),
        ],
        "horizon.png": [_Panel(_against(rows, "horizon", "cosine"), "steps of the episode", COSINE)],
        "width.png": _sizes(rows, "width", "width of the backbone", scale="linear"),
        "meta_parameters.png": _sizes(rows, "meta_parameters", "meta parameters"),
    }
    return [_draw(folder / name, panels) for name, panels in plots.items() if panels[0].points]


@dataclass(frozen=True)
class _Panel:
    """Lines, or loose points, on axes of their own."""

    points: Points
    x: str
    y: str
    line: str = "-"
    scale: str = "log"


def _sizes(rows: Sequence[Row], size: str, x: str, scale: str = "log") -> list[_Panel]:
    """Peak memory and time against a size of the problem, the plain step among the estimators."""
    rows = [*rows, *_plain_steps(rows)]
    measures = {"peak_mib": "peak memory, MiB", "time": TIME}
    return [_Panel(_against(rows, size, y), x, label, scale=scale) for y, label in measures.items()]


def _plain_steps(rows: Sequence[Row]) -> list[Row]:
    """The yardstick as a row of each case; every row was measured against it."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.memory_ratio and row.peak_mib:
            plain = Row(PLAIN, {}, "", row.case, time_ratio=Spread(1, 1, 1), peak_mib=row.peak_mib / row.memory_ratio)
            found.setdefault(_pairs(row.case), plain)
    return list(found.values())


def _cost_points(rows: Sequence[Row]) -> Points:
    points: Points = {}
    for row in rows:
        if row.time is not None and row.cosine is not None:
            points.setdefault(_label(row.estimator, row.settings), []).append((row.time, row.cosine))
    return points


def _against(rows: Sequence[Row], x: str, y: str) -> Points:
    """Lines of at least two points, one for all that is alike but `x`, a setting or a part of the case."""
    lines: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        found, value = {**row.case, **row.settings}.get(x), getattr(row, y)
        if found is not None and value is not None:
            settings, case = ({key: v for key, v in one.items() if key != x} for one in (row.settings, row.case))
            lines.setdefault((_label(row.estimator, settings), _pairs(case), row.order), []).append((found, value))
    lines = {key: sorted(line) for key, line in lines.items() if len({at for at, _ in line}) > 1}
    cases, orders = ({key[place] for key in lines if key[place]} for place in (1, 2))
    return {  # what all lines have in common is left out
        " ".join(filter(None, [label, case if len(cases) > 1 else "", order if len(orders) > 1 else ""])): line
        for (label, case, order), line in lines.items()
    }


def _label(estimator: str, settings: dict[str, Any]) -> str:
    return " ".join(filter(None, [estimator, _pairs(settings)]))


def _draw(file: Path, panels: Sequence[_Panel]) -> Path:
    """The panels side by side, with one legend; a label has its colour in all."""
    with figure(file, len(panels), (8 + 3 * (len(panels) - 1), 4.5)) as axes:
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel)
        legend = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(*legend, loc="outside right upper", fontsize="small")
    return file


def _draw_panel(axis: Any, panel: _Panel) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator

    for index, (label, values) in enumerate(panel.points.items()):
        marker = "osD^v<>P*X"[index // 10 % 10]  # ten colours a marker
        style, colour = ("--", "0.4") if label.startswith(PLAIN) else (marker + panel.line, f"C{index % 10}")
        size = max(10 - index, 4) if panel.line else 6  # of lines that coincide the ones below stay visible
        axis.plot(*zip(*values, strict=True), style, color=colour, label=label, markersize=size)
    if panel.scale == "log":
        axis.set_xscale("log", base=2)
    if panel.line:
        axis.xaxis.set_major_locator(FixedLocator(sorted({x for line in panel.points.values() for x, _ in line})))
    else:
        axis.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=panel.x, ylabel=panel.y)
    axis.grid(alpha=0.25)
    if panel.y != COSINE:
        axis.set_ylim(bottom=0)


def _pairs(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _spread(value: Spread | None, form: str = ".2f") -> str:
    return "" if value is None else f"{value.median:{form}} ({value.q1:{form}} to {value.q3:{form}})"


def _by_name(row: Row) -> dict[str, Any]:
    """Its spreads with the names of their parts, which JSON has no tuples for."""
    return {name: value._asdict() for name, value in vars(row).items() if isinstance(value, Spread)}


def _finite(value: Any) -> Any:
    """The same with null in place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
