"""A task whose meta parameters are a schedule of its optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.models.schedule import Schedule


class Scheduled(BilevelModule):
    """Learns numbers of the optimiser alone: neither loss reads them; a subclass says the losses."""

    meta: Schedule

    def follow(self, steps: int, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Let the optimiser have the schedule's numbers.

        Args:
            steps: of a training.
            ranges: kind -> the least and the largest value.
        """
        self.tuned_optimizer, self.tuned_ranges = self.meta.over(steps), ranges

    def save_meta(self, folder: str | Path) -> None:
        self.meta.save(folder)

    def load_meta(self, folder: str | Path) -> None:
        self.meta.load(folder)
