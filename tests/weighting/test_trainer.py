"""Whole trainings: a weight of one is training without weights, and what is resumed ends with the same bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.weighting.trainer import WeightingTrainer
from metaxl_evo.weighting.weighted_text import WeightedText
from tests.weighting.small import base_of, batch_of

ROWS = 24


def rows_of(seed: int) -> Dataset:
    """Unpadded, so that a collator has nothing to do."""
    batches = [batch_of("rows", seed * 10 + one) for one in range(ROWS // 6)]
    ids = torch.cat([batch["input_ids"].clamp(min=1) for batch in batches])
    return Dataset.from_dict({
        "input_ids": ids.tolist(),
        "labels": [label for batch in batches for label in batch["labels"].tolist()],
        "number": list(range(ROWS)),
    })  # fmt: skip


def trained(folder: Path, logit: float = 0.0, *, weighted: bool = True, resume: bool = False, **fields: Any) -> Any:
    base = base_of("rows").float()
    module = WeightedText(base, WeightTable(ROWS, start=logit), reads="number", weighted=weighted)
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "meta_learning_rate": 0.3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "meta_history": False,
    }
    args = MetaTrainingArguments(str(folder), **settings | fields)
    judge = rows_of(2).remove_columns("number")
    trainer = WeightingTrainer(module, args, train_dataset=rows_of(1), meta_dataset=judge)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = trainer.model.state_dict()
    return state


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(leaf, state_of(other)[name]) for name, leaf in state_of(one).items())


def test_training_with_a_weight_of_one_is_training_without(tmp_path: Path) -> None:
    """With dropout, accumulation and a meta step in each: sigmoid(100) is 1, and flat."""
    one = trained(tmp_path / "one", 100.0)
    off = trained(tmp_path / "off", 100.0, weighted=False, estimator="none")
    other = trained(tmp_path / "other")
    assert same(one, off)
    assert not same(one, other)


def test_what_is_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = trained(tmp_path, save_strategy="steps", save_steps=2)
    resumed = trained(tmp_path, resume=True)
    assert same(whole, resumed)
    kept, again = (
        [{key: row[key] for key in row if key.startswith("weights/")} for row in one.state.log_history[:4]]
        for one in (whole, resumed)
    )
    assert kept == again
    assert all(len(row) >= 5 for row in kept)


def test_trouble_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="metaxl_evo.training.watched"):
        trained(tmp_path, -8.0, meta_learning_rate=1e-6)
    said = [record.getMessage() for record in caplog.records if record.name == "metaxl_evo.training.watched"]
    assert len(said) == 1
    assert said[0].startswith("step 1: the weights have collapsed (their mean is 3.4e-04)")


def test_a_slope_takes_three_logs_in_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What chance makes at the start says nothing; such weights were not warned of at all."""
    base = base_of("rows").float()
    net = WeightNet(1)
    with torch.no_grad():
        for leaf, value in zip(net.parameters(), (0.02, 0.1, 0.1, 0.0), strict=True):
            leaf.fill_(value)  # a little larger for a larger loss
    module = WeightedText(base, net, reads="loss")
    fields: dict[str, Any] = {"max_steps": 5, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    args = MetaTrainingArguments(str(tmp_path), use_cpu=True, meta_learning_rate=1e-9, **fields)
    judge, rows = (rows_of(seed).remove_columns("number") for seed in (2, 1))
    with caplog.at_level(logging.WARNING, logger="metaxl_evo.training.watched"):
        WeightingTrainer(module, args, train_dataset=rows, meta_dataset=judge).train()
    said = [record.getMessage() for record in caplog.records if record.name == "metaxl_evo.training.watched"]
    assert len(said) == 1
    assert said[0].startswith("step 3: the weights are nearly alike")
