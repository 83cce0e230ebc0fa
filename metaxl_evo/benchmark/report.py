"""What a benchmark leaves behind: results.json, a Markdown table, plots."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from metaxl_evo.benchmark.rows import Row, Spread

COLUMNS: dict[str, Callable[[Row], str]] = {
    "estimator": lambda row: row.estimator,
    "settings": lambda row: _pairs(row.settings),
    "case": lambda row: _pairs(row.case),
    "order": lambda row: row.order,
    "time, times the plain step": lambda row: _spread(row.time_ratio),
    "peak memory": lambda row: _number(row.memory_ratio),
    "MiB above resident": lambda row: _number(row.memory_increment_mib),
    "cosine": lambda row: _number(row.cosine, 4),
    "relative error": lambda row: "" if row.relative_error is None else f"{row.relative_error:.1e}",
    "noise / signal": lambda row: "" if row.noise_to_signal is None else f"{row.noise_to_signal:.3g}",
    "passes": lambda row: ", ".join(f"{count} {name}" for name, count in (row.counts or {}).items() if count),
    "remark": lambda row: row.error or "",
}
Points = dict[str, list[tuple[float, float]]]  # by label
TEXTS = ("estimator", "settings", "case", "order", "passes", "remark")


def write_report(folder: Path, settings: Any, rows: Sequence[Row]) -> str:
    """Write results.json, table.md and, with matplotlib, the plots that the rows allow; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "environment": environment(),
        "settings": asdict(settings),
        "rows": [_finite(asdict(row) | {"time_ratio": row.time_ratio and row.time_ratio._asdict()}) for row in rows],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    text = markdown(rows)
    (folder / "table.md").write_text(text, encoding="utf-8")
    if find_spec("matplotlib"):
        plot(rows, folder)
    return text


def environment() -> dict[str, Any]:
    """Where the numbers were made."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; columns that are empty everywhere are left out."""
    cells = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = [f"| {' | '.join(cells)} |", f"|{'|'.join('---' if name in TEXTS else '---:' for name in cells)}|"]
    lines += [f"| {' | '.join(line)} |" for line in zip(*cells.values(), strict=True)]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Cost against accuracy, memory against number of copies, horizon against cosine: those that have points.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    plots = {
        "cost.png": (_cost_points(rows), "time, times the plain step", "cosine to the exact hypergradient", ""),
        "copies.png": (_copies_points(rows), "copies", "MiB above resident", "-"),
        "horizon.png": (_horizon_points(rows), "steps of the episode", "cosine to the exact hypergradient", "-"),
    }
    return [_draw(folder / name, *what) for name, what in plots.items() if what[0]]


def _cost_points(rows: Sequence[Row]) -> Points:
    points: Points = {}
    for row in rows:
        if row.time_ratio is not None and row.cosine is not None:
            points.setdefault(_label(row), []).append((row.time_ratio.median, row.cosine))
    return points


def _copies_points(rows: Sequence[Row]) -> Points:
    """A line for everything but the copies; lines of at least two points."""
    points: Points = {}
    for row in rows:
        copies = row.settings.get("copies")
        if copies is not None and row.memory_increment_mib is not None:
            rest = {name: value for name, value in row.settings.items() if name != "copies"}
            label = " ".join(filter(None, [row.estimator, _pairs(rest), _pairs(row.case), row.order]))
            points.setdefault(label, []).append((copies, row.memory_increment_mib))
    return _lines(points)


def _horizon_points(rows: Sequence[Row]) -> Points:
    points: Points = {}
    for row in rows:
        if "horizon" in row.case and row.cosine is not None:
            points.setdefault(_label(row), []).append((row.case["horizon"], row.cosine))
    return _lines(points)


def _lines(points: Points) -> Points:
    return {label: sorted(line) for label, line in points.items() if len({x for x, _ in line}) > 1}


def _label(row: Row) -> str:
    return " ".join(filter(None, [row.estimator, _pairs(row.settings)]))


def _draw(file: Path, points: Points, x: str, y: str, line: str) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, (label, values) in enumerate(points.items()):
        marker = "osD^v<>P*X"[index // 10 % 10]  # ten colours a marker
        axis.plot(*zip(*values, strict=True), marker + line, color=f"C{index % 10}", label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=x, ylabel=y)
    if "MiB" in y:
        axis.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def _pairs(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _spread(value: Spread | None) -> str:
    return "" if value is None else f"{value.median:.2f} ({value.q1:.2f} to {value.q3:.2f})"


def _finite(value: Any) -> Any:
    """The same with null in place of what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu() -> str:
    """The processor's name; Linux tells it in a file only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The commit of the working tree, with `-dirty` where it differs; None outside one."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
