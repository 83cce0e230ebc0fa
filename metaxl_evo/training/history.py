"""The history of a run beside its model: a row a log in `meta_history.csv`, and a picture at the end."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.messages import first_line
from metaxl_evo.training.arguments import NO_ESTIMATOR
from metaxl_evo.training.durable import whole
from metaxl_evo.training.figures import figure

logger = logging.getLogger(__name__)

HISTORY, PICTURE = "meta_history.csv", "meta_history.png"
BY_VALUE = 8  # so many meta parameters are logged by value, more by how far they moved
MOVED, VALUE = "meta_moved", "meta_param/"
ALWAYS = ("step", "loss", "meta_loss", "meta_grad_norm", "meta_cosine_to_exact")
FROM_FIRST = (VALUE, MOVED, "learning_rate", "meta_learning_rate", "momentum", "weight_decay")


def logged_lam(lam: Tree, start: Tree) -> dict[str, float]:
    """The meta parameters for the log: by value up to 8 numbers, more by |lam - start| / |start| (|lam| from zero)."""
    if tree.size(lam) > BY_VALUE:
        return {MOVED: tree.norm(tree.add(lam, start, -1.0)) / (tree.norm(start) or 1.0)}
    found = {}
    for name, leaf in lam.items():
        values = leaf.detach().flatten().tolist()
        if leaf.dim() == 0:
            found[VALUE + name] = values[0]
        else:
            found |= {f"{VALUE}{name}/{index}": value for index, value in enumerate(values)}
    return found


class History(TrainerCallback):
    """Writes what is logged with a training loss, as the run goes; a resumed run goes on after its checkpoint's rows.

    The history that an earlier run left in the folder is put aside as `meta_history.1.csv` (2, ...).
    """

    def __init__(self, folder: Callable[[], Path]):
        self._folder = folder  # of the run; of each trial of a search another one
        self._file: Path | None = None
        self._columns: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._file = None
        wanted = args.meta_history and args.estimator != NO_ESTIMATOR
        if not wanted or not args.should_save or not state.is_world_process_zero:
            return
        self._file = self._folder() / HISTORY
        self._columns = []
        if not self._file.exists():
            return
        rows = read_history(self._file)
        if state.global_step == 0:
            put_aside(self._file)
        else:
            self._columns = list(rows[0]) if rows else []
            self._write([row for row in rows if int(row["step"]) <= state.global_step])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._file is None or logs is None or "loss" not in logs:
            return
        row = {"step": state.global_step, **logs}
        try:
            if not self._columns:
                self._columns = [*ALWAYS, *(key for key in row if key.startswith(FROM_FIRST))]
                self._write([])
            with self._file.open("a", encoding="utf-8", newline="") as out:
                csv.DictWriter(out, self._columns, extrasaction="ignore").writerow(row)
        except OSError as error:  # a full disk; what cannot be done without will say so
            logger.warning("%s is not written any more: %s", self._file, first_line(error))
            self._file = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._file is None or not self._file.exists():
            return
        try:
            rows = read_history(self._file)
            if len(rows) > 1:  # a line has two ends
                plot_history(rows, self._file.with_name(PICTURE))
        except ImportError:
            logger.info("no %s: pip install metaxl_evo[plot] draws one", PICTURE)
        except Exception as error:  # a picture is not worth a run
            logger.warning("%s could not be drawn: %s", PICTURE, first_line(error))

    def _write(self, rows: list[dict[str, str]]) -> None:
        """The file with these rows alone, whole or as it was."""
        assert self._file is not None
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with whole(self._file) as draft, draft.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, self._columns)
            writer.writeheader()
            writer.writerows(rows)


def read_history(file: Path) -> list[dict[str, str]]:
    """The rows, but for one that was cut off."""
    with file.open(encoding="utf-8-sig", newline="") as opened:  # as Excel saves it
        rows = list(csv.DictReader(opened))
    return [row for row in rows if None not in row and None not in row.values() and row.get("step", "").isdecimal()]


def put_aside(file: Path) -> None:
    """Rename a file to the first free number before its ending."""
    number = 1
    while (aside := file.with_suffix(f".{number}{file.suffix}")).exists():
        number += 1
    file.replace(aside)


def plot_history(rows: Sequence[Mapping[str, str]], file: Path) -> None:
    """Losses, scores, meta parameters and learning rates over the steps.

    Raises:
        ImportError: without matplotlib.
    """
    columns = list(rows[0])
    parts = {
        "loss": ["loss", "meta_loss", "eval_loss"],
        "evaluation": [key for key in columns if key.startswith("eval_") and key != "eval_loss"],
        "meta parameters": [key for key in columns if key.startswith((VALUE, MOVED))],
        "learning rate": [key for key in columns if key.startswith(("learning_rate", "meta_learning_rate"))],
        "cosine to exact": ["meta_cosine_to_exact"],
    }
    drawn = {title: [key for key in keys if any(row.get(key) for row in rows)] for title, keys in parts.items()}
    drawn = {title: keys for title, keys in drawn.items() if keys}
    with figure(file, len(drawn), (4.2 * len(drawn), 3.4)) as axes:
        for axis, (title, keys) in zip(axes, drawn.items(), strict=True):
            for key in keys:
                points = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
                axis.plot(*zip(*points, strict=True), label=key.removeprefix(VALUE), marker="." * (len(points) < 30))
            if title.startswith("cosine"):
                axis.set_ylim(-1.05, 1.05)
            axis.set_title(title)
            axis.set_xlabel("step")
            if len(keys) <= 8:
                axis.legend(fontsize="small")
