"""A mixture by a bandit: its published bound, one round by hand, and that micro-batches and resume change nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.weighting.bandit import BanditText, BanditTrainer, exp3
from metaxl_evo.weighting.mix_task import MixTextArguments
from metaxl_evo.weighting.sampling import MixtureRows
from tests.weighting.small import WORDS, base_of
from tests.weighting.test_sampling import NAMES, collate, rows_of


def test_the_regret_is_below_the_published_bound() -> None:
    """Auer et al. 2002, theorem 3.1: at most (e - 1) gamma G + K ln K / gamma in the mean, G that of the best arm."""
    means, rounds, gamma, regrets = (0.2, 0.3, 0.8, 0.5), 500, 0.1, list[float]()
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        table, won = WeightTable(len(means), "softmax", floor=gamma), 0.0
        for _ in range(rounds):
            arm = int(torch.multinomial(table.mixture().detach(), 1, generator=generator))
            reward = float(torch.rand(1, generator=generator) < means[arm])
            shares = torch.nn.functional.one_hot(torch.tensor(arm), len(means)).double()
            exp3(table, shares, reward * shares)
            won += reward
        regrets.append(rounds * max(means) - won)
    bound = (math.e - 1) * gamma * rounds * max(means) + len(means) * math.log(len(means)) / gamma
    at_random = rounds * (max(means) - sum(means) / len(means))
    assert 0 < sum(regrets) / len(regrets) < min(bound, at_random / 2)


def trainer_of(folder: Path, accumulation: int = 1, **further: Any) -> BanditTrainer:
    module = BanditText(
        base_of("causal"), WeightTable(len(NAMES), "softmax", floor=0.2), tokens=True, reads="number", domains=NAMES
    ).double()
    args = MetaTrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        estimator="none",
        learning_rate=0.01,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **further,
    )
    return BanditTrainer(module, args, train_dataset=MixtureRows(rows_of(1)), data_collator=collate)


def weights(trainer: BanditTrainer) -> Tensor:
    return trainer.model.meta.weights().detach()  # type: ignore[union-attr]


def test_a_round_of_a_training_by_hand(tmp_path: Path) -> None:
    """Rows of one length: a domain's share of the tokens is that of the rows."""
    trainer = trainer_of(tmp_path, save_strategy="no")
    trainer.args.max_steps = 1
    rows = trainer.train_dataset.drawn(torch.ones(3), trainer.args.seed, 0, range(8))  # type: ignore[union-attr]
    batch = collate(rows)
    with torch.no_grad():
        losses = trainer.model.eval().losses(batch, tokens=True).view(8, -1).mean(1)
    own = [losses[batch["number"] == k] for k in range(3)]
    estimate = torch.stack([3 * len(one) / 8 * (one.mean() / math.log(WORDS)).clamp(max=1) for one in own])
    trainer.train()
    expected = 0.2 + 0.8 * 3 * (0.2 / 3 * estimate).softmax(0)
    torch.testing.assert_close(weights(trainer), expected, rtol=1e-6, atol=0.0)


def test_micro_batches_and_resume_change_nothing(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", save_steps=2)
    whole.train()
    parts = trainer_of(tmp_path / "parts", accumulation=2, save_strategy="no")
    parts.train()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-8, atol=0.0)
    again = trainer_of(tmp_path / "again", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for name, leaf in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], leaf), name


@pytest.mark.parametrize("fields", [{}, {"mixing": "sampling"}, {"floor": 0.1}])
def test_a_bandit_draws_and_explores(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"set mixing: sampling and floor, to 0\.1 for one"):
        MixTextArguments(method="bandit", **fields)
