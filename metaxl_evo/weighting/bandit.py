"""A mixture that a bandit learns from the domains' losses alone, without hypergradient or target: a baseline."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback

from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.training.weight_watch import LOSS, SHARE, Watch
from metaxl_evo.weighting.trainer import WeightingTrainer
from metaxl_evo.weighting.weighted_text import WeightedText


@torch.no_grad()
def exp3(table: WeightTable, shares: Tensor, rewards: Tensor) -> None:
    """One round of a softmax table, whose `floor` is how much it explores.

    Args:
        shares: of the domains among what was drawn by the table's mixture, (K,), summing to 1.
        rewards: of the domains that were drawn, (K,), from 0 to 1.

    Source: Auer et al., The Nonstochastic Multiarmed Bandit Problem, SIAM J. Comput. 2002, figure 1 (EXP3), with the
    mean over the draws of a round.
    """
    estimates = shares * rewards / table.mixture()  # unbiased: E shares = the mixture
    table.logits.add_(estimates.to(table.logits), alpha=table.floor / len(table.logits))


class BanditText(WeightedText):
    """A `WeightedText` of a mixture that is sampled, which keeps the losses of the domains in a step.

    Attributes:
        step: what was seen since the last update of the mixture.
    """

    def __init__(self, *given: Any, **further: Any) -> None:
        super().__init__(*given, **further)
        self.step = Watch(self.watch.domains)

    def inner_loss(self, batch: Batch) -> Tensor:
        found = super().inner_loss(batch)  # its weights are 1
        if self._training_step:  # rows are drawn, so that rows count alike, however long
            losses = self._row_means(batch, found.detach())
            self.step.note(torch.ones_like(losses), losses, batch["number"])
        return found


class BanditTrainer(WeightingTrainer):
    """Trains a `BanditText`: after each step EXP3 moves the mixture, the reward of a domain is its loss over log V.

    Source of the reward: Albalak et al., Efficient Online Data Mixing For Language Model Pre-Training, 2023, whose
    bandit has a rate that falls and a moving mean in place of EXP3's sum.
    """

    model: BanditText

    def __init__(self, *given: Any, **further: Any) -> None:
        super().__init__(*given, **further)
        self.add_callback(_Pull(self))

    def pull(self) -> None:
        """Update the mixture by the losses of the last step, of all processes."""
        module, config = self.model, cast(Any, self.model.plain_base).config
        found = module.step.take(lambda sums: self.accelerator.reduce(sums, "sum"))
        names, most = module.step.domains, math.log(config.vocab_size)
        shares, losses = (
            torch.tensor([found.get(f"{key}{name}", 0.0) for name in names], dtype=torch.float64)
            for key in (SHARE, LOSS)
        )
        table = cast(WeightTable, module.meta)
        exp3(table, shares.to(table.logits.device), (losses / most).clamp(max=1.0).to(table.logits.device))


class _Pull(TrainerCallback):
    def __init__(self, trainer: BanditTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *given: Any, **further: Any) -> None:
        self.trainer.pull()
