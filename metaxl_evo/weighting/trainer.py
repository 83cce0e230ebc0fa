"""A MetaTrainer that logs what its weigher does, and warns once of each kind of trouble."""

from __future__ import annotations

import logging
from typing import Any

import pandas as pd

from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.weighting.watch import MEAN, advice
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
        self._warned = set[str]()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._facts()
        super().log(logs, start_time)

    def _facts(self) -> dict[str, float]:
        module = self.model
        found = module.watch.take(lambda sums: self.accelerator.reduce(sums, "sum"))
        if not module.weighted:
            return {name: value for name, value in found.items() if name.startswith("domain_")}
        for kind, text in advice(found) if MEAN in found else ():
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("step %d: %s", self.state.global_step, text)
        return found
