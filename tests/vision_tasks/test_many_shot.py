"""Many-shot tasks of image classes: what a task draws, what its learners learn, and bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaxl_evo.bilevel import SGD, run_episode
from metaxl_evo.cli import main
from metaxl_evo.estimators import make_estimator
from metaxl_evo.experiments.scores import read_outcomes
from tests.scripts.refusals import assert_refused
from tests.scripts.runs import argv
from tests.training.tiny import tiny_arguments
from vision_tasks.many_shot import LEARNERS, ManyShotLearner, make_learner
from vision_tasks.many_shot_rows import ClassPool, ManyShotSize, ManyShotTasks
from vision_tasks.many_shot_task import ManyShotArguments, ManyShotTask

SIZE = ManyShotSize(way=3, images=8, batch=6, test=12)
COUNTS = (5, 9, 8, 40, 6)


def pool() -> ClassPool:
    """Pixels tell the class and the image: (class, image)."""
    held = {}
    for number, count in enumerate(COUNTS):
        images = torch.zeros(count, 1, 2, 1, dtype=torch.uint8)
        images[:, 0, 0, 0], images[:, 0, 1, 0] = number, torch.arange(count)
        held[f"class{number}"] = images
    return ClassPool(held)


def seen(rows: dict[str, Tensor]) -> list[tuple[int, int]]:
    """(class, image) of each row."""
    return [tuple(one) for one in (rows["x"].flatten(1) * 255).round().int().tolist()]


def test_a_task_is_a_few_classes_whose_images_train_or_judge() -> None:
    tasks = ManyShotTasks(pool(), SIZE, seed=1)
    drawn = set()
    for task in range(5):
        train = {one for step in range(30) for one in seen(tasks.train(task, step))}
        judge = {one for step in range(30) for one in seen(tasks.judge(task, step))}
        assert train.isdisjoint(judge)
        classes = {label: {number for number, _ in train if number == label} for label, _ in train}
        assert len(classes) == SIZE.way
        for label in classes:  # of 8 images at most a half each
            assert sum(number == label for number, _ in train) == min(SIZE.images, COUNTS[label]) // 2
            assert sum(number == label for number, _ in judge) == -(-min(SIZE.images, COUNTS[label]) // 2)
        assert set(seen(tasks.test(task))) == judge
        rows = tasks.train(task, 0)
        assert rows["y"].bincount().tolist() == [2, 2, 2]
        assert len({(label, number) for label, (number, _) in zip(rows["y"].tolist(), seen(rows), strict=True)}) == 3
        drawn.add(tuple(sorted(classes)))
    assert len(drawn) > 1
    again = ManyShotTasks(pool(), SIZE, seed=1)
    assert torch.equal(again.train(4, 7)["x"], tasks.train(4, 7)["x"])
    assert not torch.equal(tasks.train(4, 7)["x"], tasks.train(4, 8)["x"])


def test_flipped_labels_stay_flipped_and_judges_are_right() -> None:
    right, flipped = (ManyShotTasks(pool(), SIZE, seed=1, flip_rate=rate) for rate in (0.0, 0.4))
    known: dict[Any, int] = {}
    wrong = []
    for task in range(20):
        for step in range(6):
            one, other = right.train(task, step), flipped.train(task, step)
            assert torch.equal(one["x"], other["x"])
            for place, label in zip(seen(other), other["y"].tolist(), strict=True):
                assert known.setdefault((task, place), label) == label
            wrong.append((one["y"] != other["y"]).float().mean())
        assert torch.equal(right.judge(task, 0)["y"], flipped.judge(task, 0)["y"])
        assert torch.equal(right.test(task)["y"], flipped.test(task)["y"])
    assert float(torch.stack(wrong).mean()) == pytest.approx(0.4, abs=0.1)


def test_no_class_is_in_two_splits_and_bad_splits_are_refused() -> None:
    parts = pool().split((2, 2, 1), SIZE)
    names = [name for part in parts for name in part.images]
    assert len(set(names)) == len(names) == 5
    with pytest.raises(ValueError, match="3 train, 2 validation, 1 test classes are 6, and there are 5: lower train"):
        pool().split((3, 2, 1), SIZE)
    with pytest.raises(ValueError, match="class few has 3 images, and a task needs 4"):
        ClassPool({**pool().images, "few": torch.zeros(3, 1, 2, 1)}).split((2, 2, 2), SIZE)


def learner(kind: str, **fields: Any) -> ManyShotLearner:
    torch.manual_seed(0)
    made = {"tasks": 2, "way": 3, "image": (1, 4), "layers": 2, "channels": 4, "hidden": 5, "in_turn": False}
    return make_learner(kind, **made | fields).double()


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 6, 1, 4, 4, generator=generator, dtype=torch.float64)
    return {"slot": torch.arange(2), "x": x, "y": torch.randint(3, (2, 6), generator=generator)}


@pytest.mark.parametrize("kind", LEARNERS)
def test_what_is_learned(kind: str) -> None:
    """Warps begin as the identity, weights are between a tenth and one, and all of lam has a hypergradient."""
    model, plain, train = learner(kind), learner("weight_net"), batch(1)
    if kind == "warpgrad":
        torch.testing.assert_close(model.costs(train), plain.costs(train))
    if kind == "weight_net":
        costs, weighted = model.costs(train), model.train_costs(train)
        weights = weighted / costs
        torch.testing.assert_close(weights.flatten(), 0.1 + 0.9 * model.meta(costs.flatten()))
    lam = model.meta_parameters()
    found = run_episode(
        model.problem(SGD(0.1, momentum=0.9)), make_estimator("unroll"), model.base_parameters(), lam,
        [train, batch(2)], batch(3),
    )  # fmt: skip
    assert all(
        bool(leaf.abs().max() > 0) for name, leaf in found.grads.items() if not name.endswith("convolution.bias")
    )
    turn = learner(kind, in_turn=True)
    torch.testing.assert_close(turn.costs(train), model.costs(train))
    assert type(model).direct_term == (kind != "weight_net")


SMALL: dict[str, Any] = {
    "n_way": 2, "images_per_class": 20, "batch_images": 4, "test_images": 20, "conv_layers": 2, "conv_channels": 2,
    "image_size": 8, "train_classes": 6, "validation_classes": 3, "test_classes": 3, "meta_batch": 2,
    "test_tasks": 3, "validation_tasks": 2,
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "optimizer_class": "SGD", "learning_rate": 0.01, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
    "episode_length": 2, "episode_reset": "reptile", "estimator": "one_step", "max_steps": 4, "use_cpu": "true",
    "report_to": "none", "save_strategy": "no",
}  # fmt: skip


def test_a_run_tests_classes_that_did_not_train(tmp_path: Path) -> None:
    """The cost of each task is that of a net from the start that the run left, with the same steps by hand."""
    settings = {**SMALL, "learner": "warpgrad"}
    given = argv({**settings, **TRAINING, "domains": '["synthetic:ink"]', "output_dir": tmp_path / "run"})
    assert main(["many-shot", *given]) == 0
    made = ManyShotArguments(**settings, domains=["synthetic:ink"])
    data = ManyShotTask().load(made, tiny_arguments(tmp_path))
    model = ManyShotTask().make_learner(made, data)
    model.load_pretrained(tmp_path / "run")
    costs = []
    for task in range(SMALL["test_tasks"]):
        net = copy.deepcopy(model.base.start).requires_grad_(True)
        optimizer = torch.optim.SGD(net.parameters(), lr=TRAINING["learning_rate"])
        for step in range(TRAINING["episode_length"]):
            rows = data.test.train(task, step)
            optimizer.zero_grad()
            F.cross_entropy(net(rows["x"], model.meta), rows["y"]).backward()
            optimizer.step()
        rows = data.test.test(task)
        costs.append(float(F.cross_entropy(net(rows["x"], model.meta), rows["y"])))
    assert read_outcomes(tmp_path / "run")["cost"][:, 0].tolist() == pytest.approx(costs, rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learner": "maml"}, "unknown learner 'maml': Valid: anil, warpgrad, alternating, weight_net"),
        ({"batch_images": 5}, "batch_images 5 is not a multiple of n_way 2"),
        ({"flip_rate": 1}, "flip_rate must be at least 0 and below 1"),
        ({"train_classes": 60}, "60 train, 3 validation, 3 test classes are 66, and there are 24"),
        ({"n_way": 4, "test_images": 8}, "a task has n_way 4 classes, and there are 6 train, 3 validation, 3 test"),
        ({"conv_layers": 4}, "images of 8 pixels are too small for 4 blocks: lower conv_layers"),
        ({"image_channels": 2}, "image_channels must be 1 or 3"),
        ({"data": "nowhere"}, "data must be synthetic or the folder where the domains are, nowhere is neither"),
    ],
)
def test_bad_input(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    given = argv({**SMALL, **TRAINING, "domains": '["synthetic:ink"]', **fields, "output_dir": tmp_path / "run"})
    assert_refused(main, ["many-shot", *given], message, tmp_path)
