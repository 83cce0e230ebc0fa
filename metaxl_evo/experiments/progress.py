"""How far the runs of a study are: each tells it in its folder, and one bar shows them all."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

PROGRESS = "_progress"  # which an upload leaves out
PAUSE = 1.0  # seconds between two notes


class Progress(TrainerCallback):
    """Notes the part of the steps that is made in the run's folder, about once a second."""

    def __init__(self, folder: Path):
        self._file, self._noted = folder / PROGRESS, -PAUSE

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or time.monotonic() - self._noted < PAUSE:
            return
        self._noted = time.monotonic()
        with suppress(OSError):  # a full disk; what cannot be done without will say so
            self._file.write_text(str(state.global_step / state.max_steps), encoding="utf-8")


def part_made(folders: Iterable[Path]) -> float:
    """The runs that are under way, each counted by the part of it that is made."""
    made = 0.0
    for folder in folders:
        with suppress(OSError, ValueError):  # not begun, or just being written
            made += float((folder / PROGRESS).read_text(encoding="utf-8"))
    return made
