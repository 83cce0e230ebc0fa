"""The trainer of weighted texts: what its weigher says, and rows that a mixture draws."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import pandas as pd
import torch
from datasets import Dataset

from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.training.watched import WatchingTrainer
from metaxl_evo.training.weight_watch import DOMAIN, WEIGHT
from metaxl_evo.weighting.sampling import MixtureRows
from metaxl_evo.weighting.weighted_text import WeightedText

logger = logging.getLogger(__name__)


class WeightingTrainer(WatchingTrainer):
    """Trains a `WeightedText`; of domains the logs have losses and shares, too.

    Attributes:
        said: what the trained weigher says of the training rows, once it was asked.
    """

    model: WeightedText

    def __init__(self, *given: Any, **further: Any) -> None:
        super().__init__(*given, **further)
        self.said: pd.DataFrame | None = None
        rows = self.args.per_device_meta_batch_size * self.args.world_size
        if isinstance(self.meta_dataset, Dataset) and len(self.meta_dataset) < rows:
            logger.warning("the clean set has %d rows, fewer than a meta batch of %d", len(self.meta_dataset), rows)

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

    def watched_facts(self, found: Mapping[str, float]) -> dict[str, float]:
        module = self.model
        if not module.weighted or not isinstance(self.train_dataset, MixtureRows):
            return super().watched_facts(found)
        now = cast(WeightTable, module.meta).weights().tolist()  # of the domains: the rows count alike
        kept = {name: value for name, value in found.items() if name.startswith(DOMAIN)}
        return kept | {f"{WEIGHT}{name}": weight for name, weight in zip(module.watch.domains, now, strict=True)}
