"""What the base is asked in evaluation: the columns that it takes, a loss where it gives one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from metaxl_evo.models.bilevel_module import Batch, BilevelModule, totals_of
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.tiny import random_rows, stack, tiny_arguments, tiny_trainer

COUNT = 10


class Plain(nn.Module):
    """Outputs alone, as modules of plain PyTorch give them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x).squeeze(1)


class WithLoss(Plain):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = super().forward(x)
        return {"logits": out} if y is None else {"loss": (out - y).square().mean(), "logits": out}


class AsTuple(Plain):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = super().forward(x)
        return (out,) if y is None else ((out - y).square().mean(), out)


class Silent(Plain):
    """It takes the labels and says nothing of a loss."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return {"logits": super().forward(x)}


class Anything(WithLoss):
    def forward(self, x: Tensor, y: Tensor | None = None, **others: Any) -> Any:
        assert "index" in others
        return super().forward(x, y)


class Regression(BilevelModule):
    def inner_loss(self, batch: Batch) -> Tensor:
        out = self.base.layer(batch["x"]).squeeze(1)
        return (self.meta(batch["x"]).squeeze(1).sigmoid() * (out - batch["y"]) ** 2).sum() / totals_of(self, batch)[
            "n"
        ]

    outer_loss = inner_loss

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"n": len(batch["y"])}


def rows(count: int) -> list[dict[str, Tensor]]:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    return [{"x": one, "y": one.sum(), "index": torch.tensor(i)} for i, one in enumerate(x)]


def error(found: Any) -> dict[str, float]:
    return {"mse": float(np.square(found.predictions - found.label_ids).mean())}


def trainer_of(folder: Path, base: nn.Module) -> MetaTrainer:
    return MetaTrainer(
        Regression(base, nn.Linear(3, 1)),
        tiny_arguments(
            folder,
            meta_portion=1,
            per_device_eval_batch_size=4,
            label_names=["y"],
            eval_strategy="steps",
            eval_steps=2,
        ),
        train_dataset=rows(8),
        meta_dataset=rows(6),
        eval_dataset=rows(COUNT),
        data_collator=stack,
        compute_metrics=error,
    )


@pytest.mark.parametrize("kind", [Plain, WithLoss, AsTuple, Silent, Anything])
def test_columns_that_the_base_does_not_take_are_left_out(tmp_path: Path, kind: type[nn.Module], caplog: Any) -> None:
    trainer = trainer_of(tmp_path, kind())
    trainer.train()
    found = trainer.evaluate()
    held = rows(COUNT)
    with torch.no_grad():
        out = trainer.model.base.layer(torch.stack([row["x"] for row in held])).squeeze(1)
    expected = float((out - torch.stack([row["y"] for row in held])).square().mean())
    assert found["eval_mse"] == pytest.approx(expected, rel=1e-6)
    said = [record.message for record in caplog.records if "evaluation leaves out" in record.message]
    assert len(said) == (kind is not Anything)
    assert all("leaves out" in line and "index" in line for line in said)
    silent = [record.message for record in caplog.records if "gives no loss in evaluation" in record.message]
    assert len(silent) == (kind in (Plain, Silent))
    if silent:
        assert "eval_loss" not in found
    else:
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert math.isfinite(found["eval_loss"])


def test_predictions_are_a_plain_trainers(tmp_path: Path) -> None:
    """Those of a transformers model, labels there or not."""
    trainer = tiny_trainer(tmp_path)
    labelled = random_rows(6, seed=9, language=None)
    plain = Trainer(trainer.model.base, trainer.args, data_collator=trainer.data_collator)
    for rows_ in (labelled, labelled.remove_columns("labels")):
        if "labels" not in rows_.column_names:
            trainer.data_collator = plain.data_collator = unlabelled
        found, expected = trainer.predict(rows_), plain.predict(rows_)
        np.testing.assert_array_equal(found.predictions, expected.predictions)
        if found.label_ids is not None:
            np.testing.assert_array_equal(found.label_ids, expected.label_ids)
        assert (found.label_ids is None) == (expected.label_ids is None)
        assert found.metrics.get("test_loss") == expected.metrics.get("test_loss")


def unlabelled(batch: Any) -> dict[str, Tensor]:
    length = min(len(row["input_ids"]) for row in batch)
    return {key: torch.tensor([row[key][:length] for row in batch]) for key in ("input_ids", "attention_mask")}
