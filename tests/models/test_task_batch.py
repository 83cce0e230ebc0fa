"""A meta-batch of tasks is as many inner problems of one task, each by itself; only their mean judges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaxl_evo.bilevel import SGD, BilevelProblem, run_episode
from metaxl_evo.bilevel.problem import Examples
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import AdamW, UpdateRule
from metaxl_evo.estimators import make_estimator
from metaxl_evo.models.task_batch import MetaLearner, TaskBatch
from tests.training.tiny import close

TASKS, STEPS, ROWS = 3, 4, 6
SLOTS = torch.arange(TASKS)


class Features(MetaLearner):
    """Features that tasks share below a head of each task."""

    direct_term = True

    def costs(self, batch: dict[str, Tensor]) -> Tensor:
        def answers(head: nn.Module, x: Tensor) -> Tensor:
            return head(self.meta(x)).squeeze(1)

        return (self.base.each(answers, batch["slot"], batch["x"]) - batch["y"]).square()


def learner(in_turn: bool = False) -> Features:
    torch.manual_seed(0)
    lower = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.BatchNorm1d(4, track_running_stats=False))
    head = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    return Features(TaskBatch(head, TASKS, in_turn=in_turn).double(), lower.double())


def rows_of_tasks(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TASKS, ROWS, 2, generator=generator, dtype=torch.float64)
    slopes = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)[:, None]
    return {"slot": SLOTS, "x": x, "y": slopes * x.sum(2).sin()}


TRAIN, JUDGE = [rows_of_tasks(seed) for seed in range(1, 1 + STEPS)], rows_of_tasks(9)


def of_task(number: int, model: Features, rule: UpdateRule) -> tuple[BilevelProblem, Callable[[Any], Any]]:
    """The problem of one task written out, and its share of a batch."""

    def loss(w: Tree, lam: Tree, batch: dict[str, Tensor]) -> Tensor:
        features = functional_call(model.meta, lam, (batch["x"],))
        return (functional_call(model.base.start, w, (features,)).squeeze(1) - batch["y"]).square().mean()

    return BilevelProblem(loss, loss, rule), lambda batch: {"x": batch["x"][number], "y": batch["y"][number]}


OF_ONE = Examples(
    size=lambda batch: len(batch["y"]),
    take=lambda batch, numbers: {key: value[numbers] for key, value in batch.items()},
    concat=lambda batches: {key: torch.cat([one[key] for one in batches]) for key in batches[0]},
)
CASES: dict[str, tuple[str, dict[str, Any], UpdateRule]] = {
    "first_order": ("first_order", {}, SGD(0.1, momentum=0.5)),
    "one_step": ("one_step", {"engine": "double_backward"}, AdamW(0.05, weight_decay=0.1)),
    "one_step-jvp": ("one_step", {"engine": "jvp"}, SGD(0.1, momentum=0.5)),
    "neumann": ("neumann", {"terms": 3, "step": 0.1}, SGD(0.1, momentum=0.5)),
    "drmad": ("drmad", {}, SGD(0.1, momentum=0.5)),
    "unroll": ("unroll", {}, AdamW(0.05)),
    "greedy": ("greedy", {"decay": 0.7}, SGD(0.1, momentum=0.5)),
    "hyperdistill": ("hyperdistill", {"scale": "fixed", "theta": 1.3, "decay": 0.8}, SGD(0.1, momentum=0.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_meta_batch_is_the_mean_of_its_tasks(case: str) -> None:
    name, settings, rule = CASES[case]
    model, estimator = learner(), make_estimator(name, **settings)
    lam = model.meta_parameters()
    found = run_episode(model.problem(rule), estimator, model.base_parameters(), lam, TRAIN, JUDGE)
    assert found.w is not None
    each = []
    for number in SLOTS.tolist():
        problem, share = of_task(number, model, rule)
        if name == "hyperdistill":  # D* draws the same rows of every task
            problem = replace(problem, examples=OF_ONE)
        each.append(
            run_episode(
                problem, estimator, dict(model.base.start.named_parameters()), lam, [share(one) for one in TRAIN],
                share(JUDGE),
            )
        )  # fmt: skip
    close(found.grads, {key: sum(one.grads[key] for one in each) / TASKS for key in lam}, 1e-10)
    for key, leaf in found.w.items():
        torch.testing.assert_close(leaf, torch.stack([one.w[key.removeprefix("copies.")] for one in each]))


def test_in_turn_is_at_once() -> None:
    """Also where a batch holds some of the tasks, in any order, as it does on several processes."""
    some = {key: value[[2, 0]] for key, value in JUDGE.items()}
    torch.testing.assert_close(learner(in_turn=True).costs(some), learner().costs(some))
    torch.testing.assert_close(learner().costs(some), learner().costs(JUDGE)[[2, 0]])


def test_held_out_tasks_are_adapted_by_the_steps_of_training() -> None:
    """From the start, by an optimiser of torch; nothing of the learner moves."""
    model = learner().eval()
    model.make_optimizer = lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.5)
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    train = {key: torch.stack([one[key] for one in TRAIN], 1) for key in ("x", "y")}
    judge = {key: JUDGE[key] for key in ("x", "y")}
    with torch.no_grad():
        found = model(task=torch.tensor([7, 8, 9]), train=train, judge=judge)["cost"]
    for number in SLOTS.tolist():
        problem, share = of_task(number, model, SGD(0.1, momentum=0.5))
        start, lam = dict(model.base.start.named_parameters()), model.meta_parameters()
        one = run_episode(
            problem, make_estimator("first_order"), start, lam, [share(batch) for batch in TRAIN], share(JUDGE)
        )
        torch.testing.assert_close(found[number], one.outer_loss)
    torch.testing.assert_close(model.state_dict(), before)
    assert not model.training


def test_running_statistics_of_all_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="track_running_stats=False"):
        TaskBatch(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 3)
