"""The learning curves of a run: all that its trainer logged, as a table and as a picture."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from metaxl_evo.experiments.folders import understood
from metaxl_evo.messages import first_line
from metaxl_evo.training.history import MOVED, VALUE, plot_history, read_history

logger = logging.getLogger(__name__)

CURVES, PICTURE = "history.csv", "history.png"
ROWS, OUTLINED = 6, ("step", "loss", "meta_loss")  # of an outline
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


@contextmanager
def drawing() -> Iterator[None]:
    """Around pictures: one that fails is not worth a run, but for a full disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of any library, or of a task's own code
        logger.warning("a picture could not be drawn: %s", first_line(error))


def outline(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """What the meta level did in a few rows, the first and the last that were logged among them.

    Returns:
        step, loss, meta loss, and the meta parameters: up to 8 numbers by value, more by |lam - lam_0| / |lam_0|.
    """
    rows = [row for row in log if "meta_loss" in row]
    chosen = sorted({round(part * (len(rows) - 1) / (ROWS - 1)) for part in range(ROWS)}) if rows else []
    names = [*OUTLINED, *(name for name in (rows or [{}])[0] if name.startswith((MOVED, VALUE)))]
    return [{name: rows[at][name] for name in names} for at in chosen]


def outline_table(rows: Sequence[Mapping[str, float]]) -> str:
    """The rows of `outline` in Markdown."""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---:|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(f'{row[name]:.4g}' for name in columns)} |" for row in rows)])


def read_curves(folder: Path) -> list[dict[str, float]]:
    """The rows that `write_curves` left, each with the numbers that it has."""
    if not (folder / CURVES).is_file():
        return []
    with understood(folder / CURVES):
        table = pd.read_csv(folder / CURVES)
        if "step" not in table:
            raise KeyError("step")
    return [{name: value for name, value in row.items() if value == value} for row in table.to_dict("records")]
