"""What the illustration leaves behind: results.json, a table, and a figure of each study."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.estimators import Estimator
from metaxl_evo.messages import one_line
from metaxl_evo.training.checkpoint import require_writable
from metaxl_evo.training.figures import figure
from vision_tasks.illustration import (
    FILES,
    IllustrationArguments,
    Panel,
    Paths,
    exact_hypergradient,
    exact_trajectories,
    examine,
    grid_of,
    one_dimensional,
)


def run_illustration(settings: IllustrationArguments) -> dict[str, Any]:
    """Run both studies, write `FILES` and print a table; returns what results.json holds.

    Without matplotlib the figures are left out, which a line says.

    Raises:
        ValueError: where the folder cannot be written or holds another illustration, or no estimator can be drawn.
    """
    folder = Path(settings.output_dir)
    contenders = settings.contenders()
    refused = refusals(contenders)
    if len(refused) == len(contenders):
        raise ValueError(f"nothing to draw: {next(iter(refused.values()))}")
    for name in FILES:
        if (folder / name).exists():
            raise ValueError(f"{folder} holds another illustration ({name}): choose another output_dir")
    require_writable(folder)
    panels = [examine(settings, label, one) for label, one in contenders.items() if label not in refused]
    lams = grid_of(settings)
    results = {
        "settings": asdict(settings),
        "torch": torch.__version__,
        "exact": {
            "lam": lams.tolist(),
            "hypergradient": exact_hypergradient(lams).tolist(),
            "trajectories": exact_trajectories(settings),
        },
        "panels": [asdict(panel) for panel in panels],
        "refused": refused,
    }
    (folder / FILES[0]).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if find_spec("matplotlib"):
        draw_hypergradients(folder / FILES[1], lams, panels, refused)
        draw_trajectories(folder / FILES[2], exact_trajectories(settings), panels, refused)
    else:
        print("no figures without matplotlib: pip install 'metaxl_evo[plot]'")
    print(markdown(panels, refused))
    return results


def refusals(contenders: dict[str, Estimator]) -> dict[str, str]:
    """Of those that cannot serve the problem the reason, by label."""
    point = torch.ones((), dtype=torch.float64)
    refused = {}
    for label, estimator in contenders.items():
        try:
            estimator.check(one_dimensional(0.1), {"x": point}, {"l2": point})
        except ValueError as reason:
            refused[label] = one_line(reason)
    return refused


def markdown(panels: Sequence[Panel], refused: dict[str, str]) -> str:
    """A row for each panel, and a line for each estimator that refused."""
    lines = [
        "| estimator | correlation | sign agreement | spread | distance of the final lam |",
        "|---|---:|---:|---:|---:|",
    ]
    for panel in panels:
        alike = "-" if panel.correlation is None else f"{panel.correlation:.2f}"
        numbers = f"{panel.sign_agreement:.0f} % | {panel.spread:.2g} | {_mean(panel.distance):.2g}"
        lines.append(f"| {panel.label} | {alike} | {numbers} |")
    return "\n".join([*lines, *_notes(refused)])


def draw_hypergradients(file: Path, lams: Tensor, panels: Sequence[Panel], refused: dict[str, str]) -> None:
    """Study A: mean and standard deviation of the estimates at each lam beside the exact hypergradient."""
    exact = exact_hypergradient(lams)
    with _figure(file, panels, refused, "meta parameter λ", "hypergradient") as axes:
        for axis, panel in zip(axes, panels, strict=True):
            mean, std = torch.tensor(panel.mean), torch.tensor(panel.std)
            axis.fill_between(lams, mean - std, mean + std, color="C0", alpha=0.2, linewidth=0, label="± std")
            axis.plot(lams, mean, color="C0", label="mean of the estimates")
            axis.plot(lams, exact, color="black", linestyle="--", label="exact")
            # A scale of its own, which the band may leave where it is widest: it would flatten both curves.
            limit = max(1.1 * exact.abs().max().item(), (mean.abs() + std).quantile(0.9).item())
            axis.set_ylim(-limit, limit)
            alike = "" if panel.correlation is None else f"correlation {panel.correlation:.2f}, "
            agreement = f"sign {panel.sign_agreement:.0f} %, spread {panel.spread:.2g}"
            axis.set_title(f"{panel.label}\n{alike}{agreement}", fontsize="small")


def draw_trajectories(file: Path, exact: Paths, panels: Sequence[Panel], refused: dict[str, str]) -> None:
    """Study B: (x, lam) from each start, by the estimates and by the exact hypergradients."""
    optima = torch.linspace(0, 2, 100)
    with _figure(file, panels, refused, "base parameter x", "meta parameter λ") as axes:
        for axis, panel in zip(axes, panels, strict=True):
            axis.plot(1 / (1 + optima), optima, color="0.75", linewidth=1, label="inner optimum x*(λ)")
            axis.plot(0.5, 1, "*", color="gold", markeredgecolor="black", markersize=12, label="best")
            for number, (path, exact_path) in enumerate(zip(panel.trajectories, exact, strict=True)):
                told = number == 0
                axis.plot(*zip(*exact_path, strict=True), "--", color="black", label="exact" if told else None)
                axis.plot(*zip(*path, strict=True), ".-", color="C0", label="estimated" if told else None)
                axis.plot(*path[0], "o", color="C1", label="start" if told else None)
            axis.set_title(f"{panel.label}\nλ off by {_mean(panel.distance):.2g}", fontsize="small")


@contextmanager
def _figure(file: Path, panels: Sequence[Panel], refused: dict[str, str], x: str, y: str) -> Iterator[list[Any]]:
    """Axes for the panels, three in a row; saved at the end, with a legend above and the refusals below."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 1 + 3 * max(2, columns)  # inches; the legend needs two columns' worth
    notes = "\n".join(textwrap.fill(note, 13 * width) for note in _notes(refused))
    size = (width, 0.9 + 2.6 * rows + 0.2 * notes.count("\n"))
    with figure(file, columns, size, rows=rows, dpi=96) as axes:
        yield axes[: len(panels)]
        for axis in axes[len(panels) :]:
            axis.remove()
        whole = axes[0].figure
        whole.supxlabel(f"{x}\n{notes}".strip(), fontsize="medium")
        whole.supylabel(y, fontsize="medium")
        whole.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize="small")


def _notes(refused: dict[str, str]) -> list[str]:
    return [f"not drawn: {label}: {reason}" for label, reason in refused.items()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
