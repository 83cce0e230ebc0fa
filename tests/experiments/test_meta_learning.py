"""Meta-learning over tasks, on sinusoids: whose rows a step has, where tasks begin, resuming, held-out tasks."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import TrainerCallback

from metaxl_evo.cli import main
from metaxl_evo.experiments.meta_learning import TaskSplits
from metaxl_evo.long_horizon.sinusoid import Anil
from metaxl_evo.long_horizon.sinusoid_task import SinusoidArguments, SinusoidTask
from metaxl_evo.models.network_files import load_state
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import on_processes
from tests.scripts.refusals import assert_refused
from tests.scripts.runs import argv
from tests.training.test_resume import assert_same_run, resumed
from tests.training.tiny import base_weights, close, meta_weights, tiny_arguments

TASK = SinusoidTask()
TASKS, STEPS = 4, 3
SMALL: dict[str, Any] = {
    "meta_batch": TASKS, "shots": 3, "test_points": 4, "hidden": 5, "test_tasks": 6, "validation_tasks": 5,
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "optimizer_class": "SGD", "optimizer_kwargs": {"momentum": 0.5}, "learning_rate": 0.05, "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant", "episode_length": STEPS, "episode_reset": "reptile", "meta_portion": 1.0,
    "max_steps": 3 * STEPS, "meta_optim": "Adam", "meta_learning_rate": 0.01,
}  # fmt: skip
ESTIMATORS: dict[str, dict[str, Any]] = {
    "first_order": {"estimator": "first_order", "episode_reset": "fomaml", "episode_reptile_rate": 0.3},
    "one_step": {"estimator": "one_step", "meta_every": 2, "optimizer_class": "Adam", "optimizer_kwargs": None},
    "neumann": {"estimator": "neumann", "estimator_kwargs": {"step": 0.05}, "meta_last": 2},
    "unroll": {"estimator": "unroll"},
    "hyperdistill": {"estimator": "hyperdistill", "estimator_kwargs": {"decay": 0.9, "fit_every": 2}},
}


def made(folder: Path, learner: str = "anil", **fields: Any) -> tuple[MetaTrainer, TaskSplits]:
    settings = SinusoidArguments(**SMALL, learner=learner)
    args = tiny_arguments(folder, **TRAINING | fields)
    data = TASK.load(settings, args)
    torch.manual_seed(0)
    return TASK.build_trainer(settings, TASK.fit_arguments(settings, args, data), data), data


class Watch(TrainerCallback):
    """The window of each step and the heads behind it."""

    def __init__(self, trainer: MetaTrainer):
        self.trainer, self.windows, self.heads = trainer, list[Any](), list[Any]()
        trainer.add_callback(self)

    def on_step_end(self, *of: Any, **named: Any) -> None:
        self.windows.append(self.trainer.window)
        self.heads.append(base_weights(self.trainer))


def test_an_episode_has_tasks_of_its_own_and_begins_at_the_mean_of_those_before(tmp_path: Path) -> None:
    """Reptile, a third of the way; the rows of slot j are those of one sinusoid, and so are those that judge it."""
    trainer, data = made(tmp_path, estimator="first_order", episode_reptile_rate=1 / 3)
    watch, start = Watch(trainer), base_weights(trainer)
    trainer.train()
    for step, (train, judge) in enumerate(watch.windows):
        for (batch,), rows in ((train, data.train.train), (judge, data.train.judge)):
            assert batch["slot"].tolist() == list(range(TASKS))
            expected = [rows(step // STEPS * TASKS + slot, step % STEPS) for slot in range(TASKS)]
            assert torch.equal(batch["y"], torch.stack([one["y"] for one in expected]))
            assert torch.equal(batch["x"], torch.stack([one["x"] for one in expected]))
        if step % STEPS == STEPS - 1:
            reached = watch.heads[step]
            begun = {name: start[f"start.{name}"] for name in ("weight", "bias")}
            moved = {name: leaf.lerp(reached[f"copies.{name}"].mean(0), 1 / 3) for name, leaf in begun.items()}
            close({name: reached[f"start.{name}"] for name in moved}, moved, 1e-6)
            start = reached
    ((train, _),) = watch.windows[:1]
    assert len({float(one["x"].sum()) for one in (train[0], watch.windows[STEPS].train[0])}) == 2


def test_held_out_tasks_are_adapted_from_the_start(tmp_path: Path) -> None:
    """By torch's own optimiser on a head of one's own, after a training that moved both levels."""
    trainer, data = made(tmp_path, estimator="one_step")
    trainer.train()
    found, features = trainer.evaluate(), trainer.model.meta
    errors = []
    for task in range(SMALL["validation_tasks"]):
        head = nn.Linear(5, 1)
        head.load_state_dict(trainer.model.base.start.state_dict())
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.5)
        for step in range(STEPS):
            rows = data.validation.train(task, step)
            optimizer.zero_grad()
            (head(features(rows["x"])) - rows["y"]).square().mean().backward()
            optimizer.step()
        rows = data.validation.test(task)
        errors.append(float((head(features(rows["x"])) - rows["y"]).square().mean()))
    assert found["eval_mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(found["eval_mse"], rel=1e-5)
    deviation = torch.tensor(errors).std() / len(errors) ** 0.5
    assert found["eval_mse_interval"] == pytest.approx(1.96 * float(deviation), rel=1e-4)


def test_a_learned_start_is_differentiated_through_all_steps_of_all_tasks(tmp_path: Path) -> None:
    """MAML: the meta optimiser is SGD at rate 1, so lam moves by the mean gradient, here by plain autograd."""
    fields = {"episode_reset": "learned", "optimizer_kwargs": None, "meta_optim": "SGD", "meta_learning_rate": 1.0}
    trainer, data = made(
        tmp_path, "maml", estimator="unroll", meta_lr_scheduler_type="constant", **fields | {"max_steps": 2 * STEPS}
    )
    network = trainer.model.meta
    for episode in range(2):
        start = {name: leaf.detach().requires_grad_() for name, leaf in network.named_parameters()}
        judged = 0
        for task in range(episode * TASKS, (episode + 1) * TASKS):
            w = start
            for step in range(STEPS):
                loss = mean_error(network, w, data.train.train(task, step))
                slopes = torch.autograd.grad(loss, list(w.values()), create_graph=True)
                w = {name: leaf - 0.05 * slope for (name, leaf), slope in zip(w.items(), slopes, strict=True)}
            judged = judged + mean_error(network, w, data.train.judge(task, STEPS - 1)) / TASKS
        found = dict(zip(start, torch.autograd.grad(judged, list(start.values())), strict=True))
        expected = {name: (leaf - found[name]).detach() for name, leaf in start.items()}
        if episode == 0:
            network = copy.deepcopy(network)
            network.load_state_dict(expected)
    trainer.train()
    close(meta_weights(trainer), expected, 1e-4)
    close(dict(trainer.model.base.start.named_parameters()), meta_weights(trainer), 0)


def mean_error(network: nn.Module, w: dict[str, Tensor], rows: dict[str, Tensor]) -> Tensor:
    return (functional_call(network, w, (rows["x"],)) - rows["y"]).square().mean()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_resuming_in_the_middle_of_an_episode_is_bit_exact(tmp_path: Path, name: str) -> None:
    """A trajectory is saved at the end of an episode only."""
    cut = STEPS if name in ("unroll", "hyperdistill") else STEPS + 1
    fields = {**ESTIMATORS[name], "save_strategy": "steps", "save_steps": cut}
    whole, again = (made(tmp_path / folder, **fields)[0] for folder in ("whole", "again"))
    resumed(whole, None)
    resumed(again, tmp_path / f"whole/checkpoint-{cut}")
    assert_same_run(again, whole)
    assert again.evaluate()["eval_mse"] == whole.evaluate()["eval_mse"]


def trained(shares: int, accumulation: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("first_order", "hyperdistill"):
        with tempfile.TemporaryDirectory() as folder:
            trainer, _ = made(Path(folder), gradient_accumulation_steps=accumulation, **ESTIMATORS[name])
            assert trainer.args.per_device_train_batch_size * shares * accumulation == TASKS
            trainer.train()
            found[name] = base_weights(trainer), meta_weights(trainer), trainer.evaluate()["eval_mse"]
    return found


@pytest.mark.distributed
def test_a_meta_batch_may_be_cut_up() -> None:
    """Into micro-batches, and over processes: every task is one of those of one process."""
    whole = trained(1, 1)
    for found in (trained(1, 2), *on_processes(2, trained, 2, 1)):
        for name, (heads, features, error) in whole.items():
            close(found[name][0], heads, 2e-5)
            close(found[name][1], features, 2e-5)
            assert found[name][2] == pytest.approx(error, rel=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({"episode_length": None}, "episode_length base steps: set it"),
    "on and on": ({"episode_reset": "continue"}, "episode_reset: continue would train on from task to task"),
    "no level": ({"estimator": "none"}, "estimator: none has no episodes"),
    "clipping": ({"max_grad_norm": 1.0}, "clip the gradients of all tasks of a meta-batch together: set it to 0"),
    "decay": ({"lr_scheduler_type": "linear"}, "lr_scheduler_type: constant"),
    "optimiser": ({"optimizer_class": None, "optimizer_kwargs": None}, "name it in optimizer_class"),
    "half": ({"max_steps": 4}, r"max_steps 4 is not a multiple of episode_length \(3\)"),
    "last": ({"meta_last": 4}, "meta_last: 4 are the last base steps of an episode, and episode_length is 3"),
    "shares": ({"gradient_accumulation_steps": 3}, "meta_batch 4 is not a multiple of 3, the processes times"),
    "none": ({"meta_batch": 0}, "meta_batch must be a whole number of at least 1"),
    "other start": ({"episode_reset": "learned"}, "and Anil has no first_weights: set reptile, fomaml or restart"),
    "own start": ({"learner": "maml"}, "Maml computes its first weights from .*: set episode_reset: learned"),
    "no end": ({"learner": "maml", "episode_reset": "learned"}, "OneStep takes the first weights for constants"),
    "learner": ({"learner": "mam"}, "unknown learner 'mam': did you mean 'maml'"),
    "points": ({"shots": 0}, "shots must be a whole number of at least 1"),
}


def options(folder: Path, **fields: Any) -> list[str]:
    settings = {**SMALL, **TRAINING, "use_cpu": "true", "report_to": "none", "save_strategy": "no", **fields}
    settings["optimizer_kwargs"] = settings["optimizer_kwargs"] and json.dumps(settings["optimizer_kwargs"])
    given = {name: one for name, one in settings.items() if one is not None}
    return ["sinusoid", *argv({**given, "output_dir": folder})]


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_train_or_test_tasks_otherwise_is_refused(tmp_path: Path, case: str) -> None:
    fields, message = REFUSED[case]
    assert_refused(main, options(tmp_path / "run", **fields), message, tmp_path)


def test_a_run_leaves_scores_of_each_task_and_the_network_that_tasks_begin_from(tmp_path: Path) -> None:
    assert main(options(tmp_path / "run", estimator="first_order")) == 0
    head, features = nn.Linear(5, 1), Anil(1, 5).meta
    load_state(head, tmp_path / "run/start")
    load_state(features, tmp_path / "run/meta")
    assert (tmp_path / "run/outcomes.csv").read_text(encoding="utf-8").count("\n") == 2 + SMALL["test_tasks"]
