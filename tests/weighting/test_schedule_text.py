"""`schedule-text`: hypergradients against AdamW written out, rows of trainings, refusals, what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import set_seed

from metaxl_evo.cli import main
from metaxl_evo.experiments.schedule_rows import Splits
from metaxl_evo.experiments.schedule_trainer import ScheduleTrainer
from metaxl_evo.training.cli import SettingsError
from metaxl_evo.weighting.drawn import draw_classifier
from metaxl_evo.weighting.schedule_text_task import (
    ScheduleTextArguments,
    ScheduleTextTask,
    ScheduleTextTrainingArguments,
)

STEPS = 4
BETAS, EPSILON = (0.9, 0.999), 1e-8
SETTINGS: dict[str, Any] = {
    "n_lr": 2, "n_wd": 1, "initial_lr": 0.01, "initial_wd": 0.005, "inner_steps": STEPS, "outer_steps": 1,
    "train_size": 40, "eval_size": 20, "validation_share": 0.2, "retrain_steps": 3,
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, "use_cpu": True, "disable_tqdm": True,
    "report_to": "none", "save_strategy": "no", "logging_steps": 50, "meta_history": False, "max_grad_norm": 0.0,
}  # fmt: skip


def trainer_of(folder: Path, training: dict[str, Any] | None = None, **fields: Any) -> ScheduleTrainer:
    task, settings = ScheduleTextTask(), ScheduleTextArguments(**SETTINGS | fields)
    args = ScheduleTextTrainingArguments(str(folder), **TRAINING | (training or {}))
    task.refuse(settings, args)
    data = task.load(settings, args)
    set_seed(args.seed)
    trainer = task.build_trainer(settings, task.fit_arguments(settings, args, data), data)
    assert isinstance(trainer, ScheduleTrainer)
    return trainer


def written_out(trainer: ScheduleTrainer, lr: Tensor, decay: Tensor) -> Tensor:
    """The judging loss at the end of the first training: AdamW as its paper has it, in float64."""
    network, rows = trainer.model.base.double().eval(), trainer.train_dataset
    network.set_attn_implementation("eager")  # others have no second derivative
    w = {name: leaf.double() for name, leaf in trainer.fresh(0).items()}
    w = {name: w[name].requires_grad_() for name, _ in network.named_parameters()}
    mean, square = ({name: torch.zeros_like(leaf) for name, leaf in w.items()} for _ in range(2))

    def loss(w: dict[str, Tensor], taken: list[Any]) -> Tensor:
        batch = trainer.model.collate(taken)
        found: Tensor = functional_call(network, w, kwargs=dict(batch)).loss
        return found

    for step in range(STEPS):
        taken = [rows[index] for index in range(8 * step, 8 * step + 8)]
        grads = torch.autograd.grad(loss(w, taken), list(w.values()), create_graph=True, materialize_grads=True)
        rate = lr[step * len(lr) // STEPS]
        for (name, leaf), grad in zip(w.items(), grads, strict=True):
            mean[name] = BETAS[0] * mean[name] + (1 - BETAS[0]) * grad
            square[name] = BETAS[1] * square[name] + (1 - BETAS[1]) * grad**2
            unbiased = square[name] / (1 - BETAS[1] ** (step + 1))
            root = unbiased.where(unbiased > 0, 1).sqrt()  # a word that has not come moves by its decay alone
            moved = mean[name] / (1 - BETAS[0] ** (step + 1)) / (root + EPSILON)
            w[name] = (1 - rate * decay) * leaf - rate * moved.where(unbiased > 0, 0)
    _, judges = rows.splits.of(0)
    return loss(w, [rows.rows[int(number)] for number in judges])


def test_hypergradients_are_those_of_adamw_written_out(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.stoppable = False  # without the last training
    trainer.train()
    lr = torch.full((2,), 0.01, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor(0.005, dtype=torch.float64, requires_grad=True)
    expected = written_out(trainer, lr, decay)
    slopes = torch.autograd.grad(expected, [lr, decay])
    assert float(trainer.schedule.losses[0]) == pytest.approx(float(expected), rel=1e-4)
    torch.testing.assert_close(
        trainer.schedule.slopes[0].double(), torch.cat([slopes[0], slopes[1][None]]), rtol=0.01, atol=1e-4
    )


def test_nothing_is_dropped_out(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    module = trainer.model.train()
    assert module.training
    assert module.base.config.hidden_dropout_prob > 0
    batch = trainer.model.collate([trainer.train_dataset[index] for index in range(4)])
    assert torch.equal(module.inner_loss(batch), module.inner_loss(batch))


def test_a_row_is_a_function_of_the_training_and_its_place(tmp_path: Path) -> None:
    rows: Any = trainer_of(tmp_path).train_dataset
    assert isinstance(rows.splits, Splits)
    assert len(rows) == 8 * STEPS
    seen = []
    for training in (0, 1, 0):
        rows.set_epoch(training)
        train, judges = rows.splits.of(training)
        assert len(judges) == 8
        assert not {*train} & {*judges}
        seen.append([rows[index]["input_ids"] for index in range(len(rows))])
    assert seen[0] == seen[2]
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("fields", "training", "line"),
    [
        ({"n_momentum": 1}, {}, "AdamW has betas, whose derivative forward mode does not carry.*n_momentum: 0"),
        ({}, {"warmup_steps": 0.1}, "learned in 2 windows.*warmup_steps 0.1 would do nothing: leave them out"),
        ({}, {"lr_scheduler_type": "linear"}, "lr_scheduler_type linear .*would do nothing"),
        ({"validation_share": 1.0}, {}, "validation_share must be above 0 and below 1"),
        ({"validation_share": 0.9}, {}, "4 rows train, fewer than the 8 of a batch"),
        ({"n_lr": 3}, {}, "3 windows of lr do not divide the 4 inner_steps"),
        ({}, {"meta_portion": 0.5}, "set meta_portion to 1"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    tmp_path: Path, fields: dict[str, Any], training: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError, match=line) as error:
        trainer_of(tmp_path, training, **fields)
    assert "\n" not in str(error.value)


def test_files_may_be_sorted_by_label(tmp_path: Path) -> None:
    for split in ("train", "test"):
        lines = [f"w{number},{'ab'[number >= 10]}\n" for number in range(20)]
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "".join(lines), "utf-8")
    model = str(tmp_path / "model")
    for part in draw_classifier(["a", "b"]):
        part.save_pretrained(model)
    fields = SETTINGS | {"data": str(tmp_path), "model_name_or_path": model}
    task, args = ScheduleTextTask(), ScheduleTextTrainingArguments(str(tmp_path / "out"), **TRAINING)
    data = task.load(ScheduleTextArguments(**fields | {"train_size": 4, "eval_size": 6}), args)
    assert data.train["label"][:] == [0, 0, 1, 1]
    assert data.test["label"][:] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="none of the 1 training texts is of class b: raise train_size"):
        task.load(ScheduleTextArguments(**fields | {"train_size": 1}), args)


def test_a_run_leaves_a_classifier_and_its_schedule(tmp_path: Path) -> None:
    sizes = {"inner_steps": 2, "n_lr": 2, "retrain_steps": 2, "trainings": 2, "method": "random_search"}
    options = {**TRAINING, "train_size": 40, "eval_size": 20, **sizes}
    argv = [token for key, value in options.items() for token in (f"--{key}", str(value))]
    assert main(["schedule-text", "--output_dir", str(tmp_path / "run"), *argv]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text("utf-8"))
    assert results["run"]["schedule"] == json.loads((tmp_path / "run/schedule.json").read_text("utf-8"))
    assert results["test"]["validation_loss"] == pytest.approx(min(results["run"]["losses"]))
    assert (tmp_path / "run/tokenizer.json").is_file()
    (tmp_path / "train.csv").write_text("text,label\na b,x\nc d,y\n", "utf-8")
    data = ("--data", str(tmp_path / "train.csv"), "--model_name_or_path", str(tmp_path / "run"))
    with pytest.raises(SettingsError, match="has no part test"):
        main(["schedule-text", "--output_dir", str(tmp_path / "other"), *argv, *data])
