"""Modules that weigh their training items, and the trainer that logs what the weights do and warns of trouble once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.training.weight_watch import DOMAIN, MEAN, PATIENCE, Watch, advice

logger = logging.getLogger(__name__)


class Watched(BilevelModule):
    """A module that notes the weights of the base step's items, and not those of meta passes.

    Attributes:
        watch: where they are noted, which a subclass makes.
        weighted: False where it trains without weights.
        reads_loss: whether the weigher reads the loss.
    """

    watch: Watch
    weighted: bool
    reads_loss: bool
    _training_step = False

    def note(self, weights: Tensor, losses: Tensor, domains: Tensor | None = None) -> None:
        """Of a base step's items, (N,) each; nothing in other passes."""
        if self._training_step:
            self.watch.note(weights, losses, domains)

    def forward(self, **batch: Any) -> Any:
        self._training_step = self.training  # passes of the meta level do not come this way
        try:
            return super().forward(**batch)
        finally:
            self._training_step = False


class WatchingTrainer(MetaTrainer):
    """Trains a `Watched` module: each log has the facts of its `Watch`, each kind of trouble is warned of once."""

    model: Watched

    def __init__(self, *given: Any, **further: Any) -> None:
        super().__init__(*given, **further)
        self._warned, self._seen = set[str](), Counter[str]()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.watched_facts(self.model.watch.take(lambda sums: self.accelerator.reduce(sums, "sum")))
        super().log(logs, start_time)

    def watched_facts(self, found: Mapping[str, float]) -> dict[str, float]:
        """Of what was found since the last log, the facts that are logged."""
        if not self.model.weighted:
            return {name: value for name, value in found.items() if name.startswith(DOMAIN)}
        if MEAN in found:
            self._warn(dict(advice(found, self.model.reads_loss)))
        return dict(found)

    def _warn(self, trouble: Mapping[str, str]) -> None:
        """Once of each kind, when it has been there in as many logs in a row as it takes."""
        self._seen = Counter({kind: self._seen[kind] + 1 for kind in trouble})
        for kind, text in trouble.items():
            if kind not in self._warned and self._seen[kind] >= PATIENCE.get(kind, 1):
                self._warned.add(kind)
                logger.warning("step %d: %s", self.state.global_step, text)
