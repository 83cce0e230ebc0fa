"""Schedules over whole trainings: rows, hypergradients, the last training by hand, searches, budgets, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback, set_seed

from metaxl_evo.bilevel import SGD, run_episode
from metaxl_evo.estimators import make_estimator
from metaxl_evo.experiments.schedule_rows import JudgingRows, Splits
from metaxl_evo.experiments.schedule_search import at_random, by_optuna
from metaxl_evo.experiments.schedule_task import Budget, ScheduleTrainingArguments, plot_schedule, write_schedule
from metaxl_evo.experiments.schedule_trainer import ScheduleTrainer
from metaxl_evo.models.schedule import Schedule
from scripts.train_schedule import main
from tests.training.tiny import close
from tests.vision_tasks.small import random_images
from vision_tasks.images import ImageSet
from vision_tasks.schedule import TrainingRows
from vision_tasks.schedule_task import ImageScheduleArguments, ScheduleData, ScheduleTask

IMAGES, BATCH, STEPS = 40, 8, 6  # 36 images train a network, in epochs of four steps
SETTINGS: dict[str, Any] = {
    "backbone": "convnet", "n_lr": 3, "n_momentum": 2, "n_wd": 1, "initial_lr": 0.1, "initial_momentum": 0.5,
    "initial_wd": 0.01, "inner_steps": STEPS, "outer_steps": 2, "validation_share": 0.1, "retrain_steps": 7,
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 3, "use_cpu": True, "disable_tqdm": True,
    "report_to": "none", "save_strategy": "no", "logging_steps": 50, "meta_learning_rate": 0.03, "meta_history": False,
}  # fmt: skip


def images(count: int = IMAGES, seed: int = 0) -> ImageSet:
    return random_images(count, seed=seed)


def trainer_of(folder: Path, training: dict[str, Any] | None = None, **fields: Any) -> ScheduleTrainer:
    task, settings = ScheduleTask(), ImageScheduleArguments(**SETTINGS | fields)
    estimator = {} if task.learns(settings) else {"estimator": "none"}
    args = ScheduleTrainingArguments(str(folder), **TRAINING | estimator | (training or {}))
    task.refuse(settings, args)
    data = ScheduleData(images(), images(20, seed=1))
    set_seed(args.seed)
    trainer = task.build_trainer(settings, task.fit_arguments(settings, args, data), data)
    assert isinstance(trainer, ScheduleTrainer)
    return trainer


# Rows


def test_each_training_has_a_split_and_an_order_of_its_own() -> None:
    rows = TrainingRows(Splits(images(), 4, seed=3), steps=9, batch=BATCH)
    judging, seen = JudgingRows(rows), []
    assert len(rows) == 9 * BATCH
    for training in range(3):
        rows.set_epoch(training)
        judges = {judging[index]["judge"] for index in range(len(judging))}
        order = [int(rows.splits.shuffled(training, epoch)[place]) for epoch in range(2) for place in range(32)]
        assert len(judges) == 4
        assert not judges & set(order)
        assert len(set(order[:32])) == len(set(order[32:])) == 32  # whole batches: four images sit an epoch out
        for index in (0, 31, 32, 71):
            number = int(rows.splits.shuffled(training, index // 32)[index % 32])
            assert torch.equal(rows[index]["images"], torch.from_numpy(images().images[number, ..., 0])[None] / 255)
        seen.append((frozenset(judges), tuple(order)))
    assert len({one for one, _ in seen}) == len({one for _, one in seen}) == 3
    again = TrainingRows(Splits(images(), 4, seed=3), steps=9, batch=BATCH)
    again.set_epoch(2)
    assert all(torch.equal(again[index]["images"], rows[index]["images"]) for index in (5, 40))


def test_augmentation_is_drawn_anew_each_time_an_image_comes() -> None:
    def mark(image: Any, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(2, generator=generator)

    rows = TrainingRows(Splits(images(), 4, seed=3), steps=9, batch=BATCH, transform=mark)
    drawn = [tuple(rows[index]["images"].tolist()) for index in (0, 1, 32, 33)]
    rows.set_epoch(1)
    assert len({*drawn, *(tuple(rows[index]["images"].tolist()) for index in (0, 1, 32, 33))}) == 8


# Learned


class Windows(TrainerCallback):
    """The batches of each step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.seen = trainer, list[Any]()
        trainer.add_callback(self)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.trainer.window)


def test_each_outer_step_differentiates_a_training_of_a_fresh_network(tmp_path: Path) -> None:
    """By reverse mode through the whole training, from the network and the schedule that it begins with."""
    trainer = trainer_of(tmp_path, {"max_grad_value": 0.05})
    module, windows = trainer.model, Windows(trainer)
    trainer.train()
    schedule = trainer.schedule
    networks = [trainer.fresh(number) for number in range(2)]
    assert not torch.equal(networks[0]["classifier.0.weight"], networks[1]["classifier.0.weight"])
    for number, network in enumerate(networks):
        w = {name: network[name] for name in module.base_parameters()}
        lam = {kind: values.clone() for kind, values in schedule.values(schedule.tried[number])}
        steps = windows.seen[number * STEPS : (number + 1) * STEPS]
        rule = SGD(max_grad_value=0.05, **schedule.over(STEPS))  # type: ignore[arg-type]
        found = run_episode(
            module.problem(rule), make_estimator("unroll"), w, lam, [one.train for one in steps], steps[-1].meta
        )
        close(dict(schedule.values(schedule.slopes[number])), found.grads, 1e-4)
        assert float(schedule.losses[number]) == pytest.approx(float(found.outer_loss), rel=1e-5)
    moved = schedule.tried[1] - schedule.tried[0]
    torch.testing.assert_close(moved[:5], -0.03 * schedule.slopes[0, :5].sign(), atol=1e-6, rtol=0)


def stretched(found: dict[str, list[float]], kind: str, step: int, steps: int) -> float:
    return found[kind][step * len(found[kind]) // steps]


def test_the_last_training_is_on_all_images_by_the_schedule_stretched(tmp_path: Path) -> None:
    """By hand: SGD with momentum and decay over seven steps, from a network of its own."""
    trainer = trainer_of(tmp_path)
    trainer.train()
    found, steps = trainer.schedule.plain(), 7
    rows = TrainingRows(Splits(images(), 0, trainer.args.seed), steps, BATCH)
    network = type(trainer.model.base)(trainer.model.base.config)
    network.load_state_dict(trainer.fresh(2))
    velocity = [torch.zeros_like(one) for one in network.parameters()]
    for step in range(steps):
        lr, momentum, decay = (stretched(found, kind, step, steps) for kind in ("lr", "momentum", "weight_decay"))
        taken = [rows[index] for index in range(step * BATCH, (step + 1) * BATCH)]
        pixels = trainer.model.normalised(torch.stack([row["images"] for row in taken]))
        loss = F.cross_entropy(network(pixels).logits, torch.stack([row["labels"] for row in taken]))
        slopes = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for one, slope, held in zip(network.parameters(), slopes, velocity, strict=True):
                held.mul_(momentum).add_(slope + decay * one)
                one.sub_(lr * held)
    expected = {name: one.detach() for name, one in network.named_parameters()}
    close({name: one.detach() for name, one in trainer.model.base.named_parameters()}, expected, 1e-5)


@pytest.mark.parametrize("method", ["learned", "random_search"])
def test_a_search_goes_on_bit_by_bit(tmp_path: Path, method: str) -> None:
    """From the middle of its second training."""
    whole = trainer_of(tmp_path / "whole", {"save_strategy": "steps", "save_steps": 8}, method=method, trainings=2)
    whole.train()
    assert json.loads((tmp_path / "whole/checkpoint-8/schedule/config.json").read_text())["trainings"] == 2
    again = trainer_of(tmp_path / "again", method=method, trainings=2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-8"))
    for one, other in zip(whole.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


# Searches


BOUNDS = {"lr": (1e-3, 1.0), "momentum": (0.0, 0.99), "weight_decay": (0.0, 0.1)}


def test_random_schedules_fill_their_bounds() -> None:
    schedule, propose = Schedule({"lr": 2, "momentum": 1}, 400), at_random(BOUNDS, seed=1)
    drawn = torch.stack([propose(schedule, number) for number in range(400)])
    assert torch.equal(propose(schedule, 7), drawn[7])
    for column, (low, high) in (
        (drawn[:, 0].log10(), (-3, 0)),
        (drawn[:, 1].log10(), (-3, 0)),
        (drawn[:, 2], (0, 0.99)),
    ):
        found = np.quantile(column, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(found, np.linspace(low, high, 5), atol=0.15 * (high - low))


def test_optuna_is_told_of_every_training() -> None:
    """The last proposals are near the best; one depends on the trainings before it alone."""
    pytest.importorskip("optuna")
    schedule = Schedule({"lr": 1, "weight_decay": 1}, 40)
    for number in range(40):
        schedule.tried[number] = by_optuna(BOUNDS, seed=2)(schedule, number)
        lr, decay = schedule.tried[number].tolist()
        schedule.losses[number] = np.inf if lr > 0.7 else (np.log10(lr) + 2) ** 2 + decay
    first, last = schedule.losses[:10].nanmedian(), schedule.losses[-10:].nanmedian()
    assert float(last) < 0.5 * float(first)


def test_the_best_training_counts_and_one_that_diverges_ends_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, method="random_search", trainings=4)
    rates = [1e30, 0.001, 0.1, 1e30]
    trainer.propose = lambda schedule, number: torch.tensor([rates[number]] * 3 + [0.5, 0.6, 0.0])
    trainer.train()
    schedule = trainer.schedule
    assert schedule.losses.isfinite().tolist() == [False, True, True, False]
    assert not schedule.losses.isnan().any()
    best = int(schedule.losses.argmin())
    assert torch.equal(schedule.row(), schedule.tried[best])
    assert torch.equal(schedule.tried[:, 0], torch.tensor(rates))
    write_schedule(tmp_path, schedule)
    plot_schedule(tmp_path, {"schedule": schedule.plain(), "inner_steps": STEPS})
    assert json.loads((tmp_path / "schedule.json").read_text())["lr"] == pytest.approx(
        schedule.tried[best, :3].tolist()
    )
    assert (tmp_path / "schedule.png").stat().st_size > 1000
    again = trainer_of(tmp_path / "b", method="fixed", initial_schedule=str(tmp_path / "schedule.json"))
    assert torch.equal(again.schedule.row(), schedule.row())


def test_the_budget_in_gradients_of_a_batch() -> None:
    """Of 1,000 steps: (1 + 2 + 3 + 4 + 5) / 5 + 1 + 1 products each, of two gradients; twice a batch judges."""
    settings = ImageScheduleArguments(n_lr=5, n_momentum=1, n_wd=1, inner_steps=1000, outer_steps=4)
    budget = Budget(settings, judged=2.0)
    assert budget.of_a_training("forward_mode", 1000) == 1000 + 2 + 1000 * 5 * 2
    assert budget.of_a_training("one_step", 10) == 1000 + 100 * (2 + 2)
    assert budget.of_a_training("greedy", 1000) == 1000 + 1000 * (2 + 2)
    assert budget.of_a_training(None, 1) == pytest.approx(1000 + 2 / 3)
    found = {one: budget.trainings(one, 10) for one in ("forward_mode", "one_step", None)}
    assert found == {"forward_mode": 4, "one_step": 31, None: 43}
    with pytest.raises(ValueError, match="what drmad costs is not known"):
        budget.trainings("drmad", 1)


# Refusals


def refusals() -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    yield {"n_lr": 4}, {}, "4 windows of lr do not divide the 6 inner_steps: set inner_steps to 4 or 8"
    yield {"n_lr": 70, "inner_steps": 140}, {}, "the schedule has 73 numbers.*at most 64: lower n_lr"
    yield dict.fromkeys(("n_lr", "n_momentum", "n_wd"), 0), {}, "are all 0"
    yield {"method": "grid"}, {}, "unknown method 'grid'"
    yield {"out_of_bounds": "clip"}, {}, r"unknown out_of_bounds 'clip'.* Valid: clamp, refuse, allow"
    yield {"momentum_bounds": [0, 1]}, {}, "must end below 1"
    yield {"lr_bounds": [-1, 1]}, {}, "must not be below 0"
    yield {"lr_bounds": [1, 0]}, {}, "lr_bounds must be the least and the largest value"
    yield {"trainings": 0}, {}, "trainings must be a whole number of at least 1"
    yield {"validation_share": 1.0}, {}, "validation_share must be above 0 and below 1"
    yield {"validation_share": 0.9}, {}, "4 rows train, fewer than the 8 of a batch"
    yield {"initial_momentum": 1.5}, {}, "learns momentum as 'momentum', which starts outside its range 0 to 0.99"
    yield {"initial_schedule": "nowhere.json"}, {}, "initial_schedule: nowhere.json is no schedule.json"
    yield {}, {"max_steps": 5}, "max_steps follows from inner_steps and trainings: leave it out"
    yield {}, {"meta_every": 3}, "forward_mode answers at the end of a training: leave meta_every out"
    yield {}, {"estimator": "one_step", "meta_every": 7}, "meta_every 7 is more than the 6 inner_steps"
    yield {}, {"train_sampling_strategy": "random"}, "must be sequential"
    yield {}, {"estimator": "drmad"}, "what drmad costs is not known"
    yield {}, {"optimizer_class": "AdamW"}, "learns momentum, which AdamW does not have"


@pytest.mark.parametrize(("fields", "training", "line"), [*refusals()])
def test_what_cannot_be_is_refused_before_training(
    tmp_path: Path, fields: dict[str, Any], training: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError, match=line) as error:
        trainer_of(tmp_path, training, **fields).create_optimizer()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("outside", "expected"), [("clamp", 0.99), ("allow", 5.5), ("refuse", None)])
def test_a_momentum_that_passes_one(tmp_path: Path, outside: str, expected: float | None) -> None:
    trainer = trainer_of(tmp_path, out_of_bounds=outside, outer_steps=1, n_lr=1)
    before = trainer.create_optimizer

    def at_any_rate(*args: Any) -> Any:
        made = before(*args)
        assert trainer.meta_optimizer is not None
        momentum = trainer.schedule.get_parameter("momentum")
        trainer.meta_optimizer.register_step_post_hook(lambda *hooked: momentum.data.fill_(5.5))
        return made

    trainer.create_optimizer = at_any_rate  # type: ignore[method-assign]
    trainer.stoppable = False  # without the last training
    if expected is None:
        with pytest.raises(ValueError, match=r"the learned momentum 5\.5 left its bounds 0 to 0\.99: set out_of"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.schedule.get_parameter("momentum").tolist() == pytest.approx([expected] * 2)


def test_optuna_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaxl_evo.experiments.schedule_task.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install metaxl_evo\[optuna\], or use random_search"):
        trainer_of(tmp_path, method="optuna")


def test_a_run_leaves_the_schedule_and_its_cost(tmp_path: Path) -> None:
    size = {"inner_steps": 2, "n_lr": 2, "retrain_steps": 2, "train_size": 40, "backbone": "convnet"}
    results = main([
        *("--output_dir", str(tmp_path / "run"), "--method", "random_search", "--trainings", "2"),
        *(token for key, value in {**TRAINING, **size}.items() for token in (f"--{key}", str(value))),
    ])  # fmt: skip
    assert results["run"]["schedule"] == json.loads((tmp_path / "run/schedule.json").read_text())
    assert results["run"]["gradient_steps"] == pytest.approx(2 * (2 + 2 / BATCH / 3))
    assert results["test"]["validation_loss"] == pytest.approx(min(results["run"]["losses"]))
    assert len((tmp_path / "run/schedules.csv").read_text().splitlines()) == 3
