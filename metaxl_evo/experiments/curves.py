"""The learning curves of a run: all that its trainer logged, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from metaxl_evo.training.history import plot_history, read_history

CURVES, PICTURE = "history.csv", "history.png"
OF_THE_CLOCK = ("train_", "total_", "eval_runtime", "eval_samples_per", "eval_steps_per")


def write_curves(folder: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """`history.csv`, a row a step that was logged.

    Args:
        log: a Trainer's `state.log_history`.
    """
    table = pd.DataFrame(log)
    if "step" not in table:
        return
    table = table.loc[:, [name for name in table if not name.startswith(OF_THE_CLOCK)]]
    table = table.groupby("step", as_index=False).first().dropna(axis=1, how="all")
    names = sorted(table.columns.drop("step"))  # a checkpoint sorts what was logged
    table[["step", *names]].to_csv(folder / CURVES, index=False)


def draw_curves(folder: Path) -> None:
    """`history.png`, of what `write_curves` left.

    Raises:
        ImportError: without matplotlib.
    """
    rows = read_history(folder / CURVES) if (folder / CURVES).is_file() else []
    if len(rows) > 1:  # a line has two ends
        plot_history(rows, folder / PICTURE)


def read_curves(folder: Path) -> list[dict[str, float]]:
    """The rows that `write_curves` left, each with the numbers that it has."""
    if not (folder / CURVES).is_file():
        return []
    table = pd.read_csv(folder / CURVES)
    return [{name: value for name, value in row.items() if value == value} for row in table.to_dict("records")]
