"""A MetaTrainer that logs what its weigher does, and warns once of each kind of trouble."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.weighting.watch import MEAN, PATIENCE, advice
from metaxl_evo.weighting.weighted_text import WeightedText

logger = logging.getLogger(__name__)


class WeightingTrainer(MetaTrainer):
    """Trains a `WeightedText`; the logs have the facts of `Watch`, and of domains their losses and shares.

    Attributes:
        said: what the trained weigher says of the training rows, once it was asked.
    """

    model: WeightedText

    def __init__(self, *given: Any, **further: Any) -> None:
        super().__init__(*given, **further)
        self.said: pd.DataFrame | None = None
        self._warned, self._seen = set[str](), Counter[str]()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._facts()
        super().log(logs, start_time)

    def _facts(self) -> dict[str, float]:
        module = self.model
        found = module.watch.take(lambda sums: self.accelerator.reduce(sums, "sum"))
        if not module.weighted:
            return {name: value for name, value in found.items() if name.startswith("domain_")}
        if MEAN in found:
            self._warn(dict(advice(found, module.reads == "loss")))
        return found

    def _warn(self, trouble: Mapping[str, str]) -> None:
        """Once of each kind, when it has been there in as many logs in a row as it takes."""
        self._seen = Counter({kind: self._seen[kind] + 1 for kind in trouble})
        for kind, text in trouble.items():
            if kind not in self._warned and self._seen[kind] >= PATIENCE.get(kind, 1):
                self._warned.add(kind)
                logger.warning("step %d: %s", self.state.global_step, text)
