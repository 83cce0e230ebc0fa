"""Zero hypergradients, rows that judge by a NaN, parameters frozen on the way, sparse gradients, in a MetaTrainer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.test_sitting_out import Heads, Task, Weights, rows
from tests.training.tiny import logged, meta_weights, same, stack


class Deaf(Task):
    """The inner loss reads lam from the given call on."""

    hears_from: float = float("inf")
    calls: int = 0

    def inner_loss(self, batch: Batch) -> Tensor:
        hears = bool(batch["x"][0, 0] > self.hears_from)
        return super().inner_loss(batch) if hears else self.outer_loss(batch)


class Broken(Task):
    """A row that judges has a loss of NaN."""

    def outer_loss(self, batch: Batch) -> Tensor:
        return super().outer_loss(batch) * (float("nan") if bool((batch["y"] > 90).any()) else 1.0)


def trainer_of(folder: Path, kind: type[Task], base: nn.Module | None = None, **fields: Any) -> MetaTrainer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "max_steps": 12, "per_device_train_batch_size": 2, "per_device_meta_batch_size": 2, "meta_portion": 1.0,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "lr_scheduler_type": "constant", "meta_history": False,
    }  # fmt: skip
    judges = rows(12, 2, 0)
    judges[3]["y"] = torch.tensor(99.0, dtype=torch.float64)
    return MetaTrainer(
        kind((base or Heads()).double(), Weights()),
        MetaTrainingArguments(str(folder), **settings | fields),
        train_dataset=rows(24, 1, 0),
        meta_dataset=judges,
        data_collator=stack,
    )


def test_a_meta_network_that_is_never_reached_ends_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, Deaf)
    with pytest.raises(
        ValueError, match=r"all of the first 10 meta steps.*inner_loss does not depend on the meta parameters$"
    ):
        trainer.train()
    warned = [message for message in caplog.messages if "exactly zero" in message]
    assert len(warned) == 1
    assert warned[0].startswith(
        "step 0: the hypergradient is exactly zero: the inner_loss does not depend on the meta parameters"
    )
    assert trainer.state.global_step == 9


def test_batches_that_do_not_read_lam_are_no_mistake(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, Deaf, max_steps=30)
    trainer.model.hears_from = 1.0
    trainer.train()
    norms = logged(trainer, "meta_grad_norm")
    assert 3 < norms.count(0.0) < len(norms)
    assert sum("exactly zero" in message for message in caplog.messages) <= 1


@pytest.mark.parametrize("fields", [{}, {"episode_length": 6}, {"meta_every": 2}], ids=str)
def test_greedy_goes_on_after_a_row_that_is_nan(
    tmp_path: Path, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It skips what one_step skips, and its lam moves on after each skip."""
    skipped = []
    with caplog.at_level(logging.WARNING):
        for estimator in ("one_step", "greedy"):
            trainer = trainer_of(tmp_path / estimator, Broken, estimator=estimator, max_steps=24, **fields)
            start = meta_weights(trainer)
            trainer.train()
            skipped.append(trainer.skipped_meta_steps)
            assert not same(meta_weights(trainer), start)
            assert all(bool(leaf.isfinite().all()) for leaf in meta_weights(trainer).values())
    assert skipped[0] == skipped[1] > 0


def test_a_refused_optimizer_names_the_estimators_that_take_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Task, optim="adafactor")
    with pytest.raises(ValueError, match=r"Adafactor has no rule.*takes any optimizer: first_order, evograd, neumann"):
        trainer.train()


class Unfreezing(TrainerCallback):
    """The trunk is set free at the third step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base.trunk.requires_grad_(state.global_step >= 2)


@pytest.mark.parametrize(
    ("name", "kwargs", "length"),
    [
        ("one_step", {}, None),
        ("greedy", {}, 4),
        ("unroll", {}, 2),
        ("unroll", {}, 4),
        ("forward_mode", {}, 4),
        ("hyperdistill", {"scale": "one"}, 4),
    ],
)
def test_gradual_unfreezing(tmp_path: Path, name: str, kwargs: dict[str, Any], length: int | None) -> None:
    """Between episodes, and where weights are not remembered; else it is refused."""
    trainer = trainer_of(tmp_path, Task, estimator=name, estimator_kwargs=kwargs, episode_length=length, max_steps=4)
    trainer.add_callback(Unfreezing())
    start = meta_weights(trainer)
    if length == 4 and name != "greedy":
        with pytest.raises(ValueError, match=f"'trunk.bias' was frozen, or set free.*{name}.*one_step or greedy"):
            trainer.train()
    else:
        trainer.train()
        assert not same(meta_weights(trainer), start)


class Lookup(nn.Module):
    """The signs of a row looked up, and a linear layer."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.out = nn.Embedding(4, 3, sparse=sparse), nn.Linear(3, 1)

    def forward(self, x: Tensor, head: Tensor) -> Tensor:
        return self.out(self.rows((x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long())).squeeze(1)


@pytest.mark.parametrize(
    ("name", "engine", "max_grad_norm"),
    [("one_step", "jvp", 0.1), ("one_step", "finite_difference", 0.0), ("evograd", None, 0.1)],
)
def test_sparse_gradients_are_those_of_dense_ones(
    tmp_path: Path, name: str, engine: str | None, max_grad_norm: float
) -> None:
    found = []
    for sparse in (False, True):
        trainer = trainer_of(
            tmp_path / str(sparse), Task, Lookup(sparse), estimator=name, max_grad_norm=max_grad_norm, max_steps=4,
            estimator_kwargs={"engine": engine} if engine else {}, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train()
        found.append(meta_weights(trainer))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)
    assert not same(found[0], {"v": Weights().v.detach()})
