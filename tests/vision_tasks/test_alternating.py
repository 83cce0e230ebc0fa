"""Every second convolution learned across tasks: the net by hand, what is whose, the rows of a few shots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vision_tasks.many_shot import make_learner
from vision_tasks.many_shot_rows import ClassPool, ManyShotSize, ManyShotTasks

WAY, CHANNELS, SIDE, TASKS = 3, 2, 8, 2
SIZE = ManyShotSize(WAY, images=6, batch=WAY, test=4 * WAY, shots=1, judge=5 * WAY)


def normed(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """The batch norm by hand, and a ReLU."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    scale, shift = (weights[f"{name}.{part}"].view(-1, 1, 1) for part in ("weight", "bias"))
    return (scale * (x - mean) / (var + 1e-5).sqrt() + shift).relu()


def convolved(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)


@pytest.mark.parametrize("in_turn", [True, False])
def test_layers_2_4_and_6_are_shared_and_the_others_those_of_a_task(in_turn: bool) -> None:
    torch.manual_seed(0)
    learner = make_learner(
        "alternating", tasks=TASKS, way=WAY, image=(1, SIDE), layers=3, channels=CHANNELS, hidden=1, in_turn=in_turn
    ).double()
    with torch.no_grad():
        for leaf in (*learner.base.parameters(), *learner.meta.parameters()):
            leaf.normal_()  # also norms, and every task another way
    images = torch.rand(TASKS, 5, 1, SIDE, SIDE, dtype=torch.float64)
    found = learner.logits({"slot": torch.arange(TASKS), "x": images})
    lam, stacked = learner.meta_parameters(), learner.base.weights()
    assert sum(name.endswith("weight") and leaf.dim() == 4 for name, leaf in lam.items()) == 3
    for task in range(TASKS):
        w, x = {name: leaf[task] for name, leaf in stacked.items()}, images[task]
        for block in range(3):
            x = convolved(x, w, f"blocks.{block}.convolution")  # layers 1, 3, 5
            x = convolved(normed(x, lam, f"{block}.0"), lam, f"{block}.2")  # 2, 4, 6
            x = F.max_pool2d(normed(x, w, f"blocks.{block}.norm"), 2)
        torch.testing.assert_close(found[task], F.linear(x.flatten(1), w["out.weight"], w["out.bias"]))


def test_few_shots_are_the_same_in_every_step_and_never_judge() -> None:
    pool = ClassPool({f"c{c}": torch.full((6, 2, 2, 1), c) * 6 + torch.arange(6).view(6, 1, 1, 1) for c in range(5)})
    tasks = ManyShotTasks(pool, SIZE, seed=1)

    def shown(rows: dict[str, Tensor]) -> list[int]:
        return sorted((255 * rows["x"][:, 0, 0, 0]).round().int().tolist())

    for task in range(4):
        train, judge, test = tasks.train(task, 0), tasks.judge(task, 0), tasks.test(task)
        assert train["y"].tolist() == [0, 1, 2]
        assert judge["y"].bincount().tolist() == [5, 5, 5]
        assert shown(tasks.train(task, 3)) == shown(train)
        classes = [number // 6 for number in shown(train)]
        assert sorted(shown(train) + shown(judge)) == [6 * c + i for c in classes for i in range(6)]
        assert set(shown(test)) <= set(shown(judge))


def test_shots_leave_images_to_judge() -> None:
    with pytest.raises(ValueError, match="shots 6 leave none of images_per_class 6"):
        ManyShotSize(WAY, images=6, batch=WAY, test=WAY, shots=6)
    with pytest.raises(ValueError, match="judge_images 4 is not a multiple of n_way 3"):
        ManyShotSize(WAY, images=6, batch=WAY, test=WAY, judge=4)
    few = ClassPool({f"c{c}": torch.zeros(1 + (c > 0), 2, 2, 1) for c in range(9)})
    with pytest.raises(ValueError, match="class c0 has 1 images, and a task needs 2, some of them to judge"):
        few.split((3, 3, 3), SIZE)
