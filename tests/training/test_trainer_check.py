"""`trainer.check()`: any task, without a script; what it notices of batches; nothing is changed."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.training.check import check_training
from metaxl_evo.training.check_report import CheckReport
from metaxl_evo.training.isolation import Snapshot
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.test_seams import Counting
from tests.training.tiny import (
    ESTIMATES,
    collate,
    final_state,
    random_rows,
    same,
    stack,
    tiny_arguments,
    tiny_tagger,
    tiny_trainer,
)

NOTED = ("same pass twice", "than its halves")


class Weigh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze(1).sigmoid()


class Reweight(BilevelModule):
    """A loss per row."""

    def losses_of(self, batch: Batch) -> Tensor:
        return (self.base(batch["x"]).squeeze(1) - batch["y"]) ** 2

    def inner_loss(self, batch: Batch) -> Any:
        return self.meta(batch["x"]) * self.losses_of(batch)

    def outer_loss(self, batch: Batch) -> Any:
        return self.losses_of(batch)


class ByTheSum(Reweight):
    """Meta-Weight-Net's weights, of the batch that they are in."""

    def inner_loss(self, batch: Batch) -> Any:
        weights = self.meta(batch["x"])
        return weights / weights.mean() * self.losses_of(batch)


class Noisy(Reweight):
    """Noise of a generator of its own."""

    def __init__(self, base: nn.Module, meta: nn.Module):
        super().__init__(base, meta)
        self.generator = torch.Generator().manual_seed(0)

    def inner_loss(self, batch: Batch) -> Any:
        return super().inner_loss(batch) * torch.rand(len(batch["y"]), generator=self.generator)


class Contrastive(Reweight):
    def outer_loss(self, batch: Batch) -> Any:
        return (self.base(batch["x"]) @ self.base(batch["x"]).T).log_softmax(1).diagonal()


class Failing(Reweight):
    def outer_loss(self, batch: Batch) -> Any:
        return batch["label"]


def rows(count: int) -> list[dict[str, Tensor]]:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    return [{"x": one, "y": one.sum()} for one in x]


def trainer_of(folder: Path, task: type[Reweight] = Reweight, *layers: nn.Module, **fields: Any) -> MetaTrainer:
    torch.manual_seed(0)
    settings = {"meta_portion": 1, "learning_rate": 0.01, "meta_learning_rate": 0.05, "max_steps": 100, **fields}
    return MetaTrainer(
        task(nn.Sequential(nn.Linear(3, 4), *layers, nn.Tanh(), nn.Linear(4, 1)), Weigh()),
        tiny_arguments(folder, **settings),
        train_dataset=rows(16),
        meta_dataset=rows(12),
        data_collator=stack,
    )


def test_a_report_prints_itself(tmp_path: Path) -> None:
    report = trainer_of(tmp_path).check()
    assert report.ok
    assert (report.problems, report.warnings) == ([], [])
    lines = str(report).splitlines()
    assert lines[-1] == "OK"
    assert f"base_parameters: {report.findings['base_parameters']}" in lines
    assert report.findings["meta_cosine_to_exact"] == pytest.approx(1, abs=1e-5)
    assert not CheckReport(problems=["bad"]).ok
    assert str(CheckReport(problems=["bad"])) == "PROBLEM: bad"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "layers", "noted"),
    [
        (ByTheSum, (), ["inner_loss: a batch of 8 has another loss .* than its halves .*8 x 1 will not equal 4 x 2"]),
        (Contrastive, (), ["outer_loss: a batch of 8 has another loss"]),
        (Noisy, (), ["inner_loss: the same pass twice gives two numbers"]),
        (Reweight, (nn.BatchNorm1d(4),), ["inner_loss: a batch of 8", "outer_loss: a batch of 8"]),
        (Reweight, (nn.Dropout(0.5),), []),
        (Reweight, (nn.LayerNorm(4),), []),
    ],
)
def test_batches_whose_items_depend_on_each_other(
    tmp_path: Path, task: type[Reweight], layers: Any, noted: list[str]
) -> None:
    report = trainer_of(tmp_path, task, *layers).check()
    found = [line for line in report.warnings if any(one in line for one in NOTED)]
    assert len(found) == len(noted)
    for line, pattern in zip(found, noted, strict=True):
        assert re.match(pattern, line)
    assert report.ok == (task is not Noisy)  # whose hypergradients are of other noise


PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.01}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "diverges": (
        {**PLAIN, "learning_rate": 10.0},
        r"PROBLEM: the inner loss went from 2\.\d+ to \S+e\+\d+ in 9 steps, it diverges: lower learning_rate$",
    ),
    "flies": ({"meta_learning_rate": 10.0}, r"WARNING: a meta step moves entries .* by up to .*: lower meta_learning"),
    "saturates": ({"meta_learning_rate": 1e6}, r"WARNING: the exact .* is zero at .* reached, and was not before"),
    "series": (
        {"estimator": "neumann", "estimator_kwargs": {"step": 100.0}},
        r"WARNING: the solve .* does not converge \(it leaves \d[^ ]*\): raise damping, lower step",
    ),
    "negative curvature": (
        {"estimator": "conjugate_gradient"},
        r"WARNING: the solve .* does not converge \(it .*, and the Hessian has negative curvature\): raise damping",
    ),
    "few copies": (
        {**PLAIN, "estimator": "evograd"},
        r"WARNING: evograd has a cosine of -?0\.\d\d to the exact hypergradient: raise copies",
    ),
    "another size": (
        {**PLAIN, "estimator": "evograd", "estimator_kwargs": {"copies": 256}, "meta_optim": "SGD"},
        r"WARNING: the estimate is 0\.00\d+ times as long .*SGD steps as far as it is long: divide meta_learning_rate",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_run_that_is_plainly_broken_is_not_just_ok(tmp_path: Path, what: str) -> None:
    fields, pattern = BROKEN[what]
    lines = str(trainer_of(tmp_path, **fields).check()).splitlines()
    assert sum(re.match(pattern, line) is not None for line in lines) == 1
    assert lines[-1] != "OK"
    assert not any("reads the meta parameters" in line for line in lines)


def test_evograd_with_many_copies_under_adamw_is_ok(tmp_path: Path) -> None:
    fields = {**PLAIN, "estimator": "evograd", "estimator_kwargs": {"copies": 256}}
    report = trainer_of(tmp_path, **fields).check()
    assert (report.problems, report.warnings) == ([], [])
    assert report.findings["meta_cosine_to_exact"] > 0.99


def test_a_base_that_goes_far_and_learns_is_no_warning(tmp_path: Path) -> None:
    """Small first weights: they move by more than their size, and the loss falls."""
    trainer = trainer_of(tmp_path, learning_rate=0.1)
    with torch.no_grad():
        for parameter in trainer.model.base.parameters():
            parameter.mul_(0.1)
    report = trainer.check()
    assert report.findings["base_moved"] > 1
    assert (report.problems, report.warnings) == ([], [])


def test_what_fails_in_a_step_is_a_problem(tmp_path: Path) -> None:
    report = trainer_of(tmp_path, Failing).check()
    assert not report.ok
    assert report.problems == ["a step fails: KeyError: 'label'"]


@pytest.mark.parametrize("task", [Reweight, Noisy])
def test_training_after_a_check_is_training_without_one(tmp_path: Path, task: type[Reweight]) -> None:
    """Batch norm has buffers, dropout draws, the task's generator goes on; before, and in the middle."""

    def run(check: bool) -> tuple[Any, Any]:
        trainer = trainer_of(tmp_path, task, nn.BatchNorm1d(4), nn.Dropout(0.5), max_steps=4)
        trainer.model.base[0].register_forward_hook(lambda *_: None)
        if check:
            trainer.check()
        trainer.train()
        first = final_state(trainer)
        if check:
            random_state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
            trainer.check()
            assert same(
                list(random_state),
                [torch.random.get_rng_state(), random.getstate(), np.random.get_state()],  # noqa: NPY002
            )
            assert same(final_state(trainer), first)
        trainer.train()
        return first, final_state(trainer)

    assert same(run(True), run(False))


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Noisy, nn.BatchNorm1d(4))
    model = trainer.model.eval()
    weight = model.base[0].weight
    weight.grad = torch.ones_like(weight)
    before = {module: dict(vars(module)) for module in model.modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = model.generator.get_state()
    trainer.check()
    assert same(dict(model.state_dict()), state)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(model.generator.get_state(), generator)
    assert not model.training
    assert model.base[0].weight is weight
    for module, attributes in before.items():
        assert vars(module).keys() == attributes.keys()
    assert trainer.optimizer is None
    assert trainer.state.global_step == 0


def test_a_snapshot_restores_what_was_exchanged() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weight = model[0].weight
    value, snapshot = weight.detach().clone(), Snapshot(model)
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    model[0].forward = None  # type: ignore[assignment]
    model.register_buffer("more", torch.zeros(1))
    weight.data.zero_()
    snapshot.restore()
    assert model[0].weight is weight
    assert torch.equal(weight, value)
    assert "forward" not in vars(model[0])
    assert "more" not in model._buffers


def test_it_finds_what_the_check_of_a_script_finds(tmp_path: Path) -> None:
    def build(args: Any) -> MetaTrainer:
        return MetaTrainer(
            tiny_tagger(dropout=False),
            args,
            train_dataset=random_rows(24, seed=1, language=0),
            meta_dataset=random_rows(12, seed=2),
            data_collator=collate,
        )

    args = tiny_arguments(tmp_path, meta_learning_rate=0.05, max_steps=300)
    found, expected = build(args).check(), check_training(build, args)[0]
    times = {"seconds_per_step", "times_the_plain_step"}
    assert found.findings.keys() == expected.findings.keys()
    for key in found.findings.keys() - times:
        assert found.findings[key] == expected.findings[key], key
    assert (found.problems, found.warnings) == (expected.problems, expected.warnings)


def test_an_optimiser_that_was_handed_over_is_left_alone(tmp_path: Path) -> None:
    tagger = tiny_tagger(dropout=False)
    optimizer = Counting(tagger.base.parameters())
    trainer = tiny_trainer(
        tmp_path, tagger=tagger, trainer={"optimizers": (optimizer, None)}, **ESTIMATES["evograd_head"]
    )
    report = trainer.check()
    assert report.ok
    assert report.findings["base_moved"] > 0
    assert [group["k"] for group in optimizer.param_groups] == [0]


def test_a_subclass_is_checked_as_one(tmp_path: Path) -> None:
    """With what its own `__init__` has set."""
    seen: list[str] = []

    class Named(MetaTrainer):
        def __init__(self, name: str, **kwargs: Any):
            super().__init__(**kwargs)
            self.name = name

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.name)
            return super().training_step(*args, **kwargs)

    trainer = Named(
        "mine",
        model=Reweight(nn.Linear(3, 1), Weigh()),
        args=tiny_arguments(tmp_path, meta_portion=1),
        train_dataset=rows(8),
        meta_dataset=rows(8),
        data_collator=stack,
    )
    trainer.check()
    assert set(seen) == {"mine"}
