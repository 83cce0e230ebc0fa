"""A MetaTrainer that logs what its weigher does, and warns once of each kind of trouble."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import pandas as pd
import torch

from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.training.weight_watch import MEAN, PATIENCE, WEIGHT, advice
from metaxl_evo.weighting.sampling import MixtureRows
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

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """As MetaTrainer's; of `MixtureRows` those that the weights draw now, in place of those of the epoch."""
        rows: Any = self.train_dataset
        if isinstance(rows, MixtureRows):
            epoch_iterator = self._drawn(rows, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _drawn(self, rows: MixtureRows, batches: Iterable[Any]) -> Iterator[Any]:
        """A micro-batch for each of `batches`: this process's, of those of all processes in turn."""
        args, weights = self.args, cast(WeightTable, self.model.meta).weights()
        size, seed = args.per_device_train_batch_size, args.seed if args.data_seed is None else args.data_seed
        for number, _ in enumerate(batches):
            first = (number * args.world_size + args.process_index) * size
            yield self.collated(rows.drawn(weights, seed, self.state.global_step, range(first, first + size)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._facts()
        super().log(logs, start_time)

    def _facts(self) -> dict[str, float]:
        module = self.model
        found = module.watch.take(lambda sums: self.accelerator.reduce(sums, "sum"))
        if not module.weighted:
            return {name: value for name, value in found.items() if name.startswith("domain_")}
        if isinstance(self.train_dataset, MixtureRows):  # whose rows count alike
            now = cast(WeightTable, module.meta).weights().tolist()
            kept = {name: value for name, value in found.items() if name.startswith("domain_")}
            return kept | {f"{WEIGHT}{name}": weight for name, weight in zip(module.watch.domains, now, strict=True)}
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
