"""Image tasks on several processes: one hypergradient, and batch norms whose statistics are those of all rows."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from metaxl_evo.bilevel import tree
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.synchrony import different
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import on_processes
from vision_tasks.backbones import BACKBONES
from vision_tasks.fewshot_arguments import EpisodicTrainingArguments, FewShotArguments
from vision_tasks.fewshot_task import FewShotTask
from vision_tasks.hyper_cleaning import CleanedClassifier, ImageWeights, NumberedRows
from vision_tasks.images import ImageRows, drawn
from vision_tasks.rotation import RotatedClassifier, Rotation
from vision_tasks.weight_net import WeightedClassifier

pytestmark = pytest.mark.distributed

ROWS = 8  # of an optimizer step
ESTIMATES: dict[str, dict[str, Any]] = {
    "one_step": {"estimator": "one_step", "estimator_kwargs": {"engine": "double_backward"}},
    "evograd": {"estimator": "evograd", "estimator_kwargs": {"sigma": 0.01, "copies": 4}},
    "greedy": {"estimator": "greedy", "episode_length": 2, "episode_reset": "restart", "meta_order": "after_step"},
}


TRAINED = {"rotation": "one_step", "weight_net": "evograd", "hyper_cleaning": "greedy"}


def made(task: str, estimate: str, processes: int, accumulation: int, folder: str, **fields: Any) -> MetaTrainer:
    """A trainer in float64 whose optimizer steps see the same rows however they are cut up."""
    rows = ROWS // processes // accumulation
    args = MetaTrainingArguments(
        output_dir=folder,
        **ESTIMATES[estimate],
        meta_portion=1,
        per_device_train_batch_size=rows,
        per_device_meta_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        **{"max_steps": 3, "save_strategy": "no"} | fields,
        optimizer_class="SGD",
        optimizer_kwargs={"momentum": 0.9},
        learning_rate=0.1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    name = "resnet32" if task == "batch_norm" else "convnet"
    base = BACKBONES[name](image_size=28, num_labels=10, **({"blocks": 1} if name == "resnet32" else {}))
    if task == "rotation":
        module: Any = RotatedClassifier(base, Rotation())
    elif task == "hyper_cleaning":
        module = CleanedClassifier(base, ImageWeights(4 * ROWS))
    else:
        module = WeightedClassifier(base, WeightNet(8), normalisation="mean")
    images, rows_of = drawn(8, seed=0), NumberedRows if task == "hyper_cleaning" else ImageRows
    return MetaTrainer(
        module.double(),
        args,
        train_dataset=[_double(row) for row in rows_of(images.take(slice(0, 4 * ROWS)))],
        meta_dataset=[_double(row) for row in ImageRows(images.take(slice(4 * ROWS, 80)))],
        data_collator=default_collate,
    )


def _double(row: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in row.items()}


def trained(task: str, estimate: str, processes: int, accumulation: int) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(task, estimate, processes, accumulation, folder)
        trainer.train()
        return tree.clone({**trainer.model.base_parameters(), **trainer.model.meta_parameters()})


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two processes found, one task after the other: starting them takes longer than they do."""
    return on_processes(2, all_tasks)


def all_tasks() -> dict[str, Any]:
    found = {task: trained(task, estimate, 2, 1) for task, estimate in TRAINED.items()}
    return {**found, "statistics": statistics(), "few_shot": few_shot()}


@pytest.mark.parametrize("task", TRAINED)
def test_processes_and_micro_batches_are_one_batch(task: str, ranks: list[dict[str, Any]]) -> None:
    estimate = TRAINED[task]
    whole = trained(task, estimate, 1, 1)
    first, second = (rank[task] for rank in ranks)
    for found in (trained(task, estimate, 1, 2), first, second):
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11)
    assert all(torch.equal(first[name], second[name]) for name in first)


def statistics() -> dict[str, Any]:
    """Two steps with a checkpoint, before which the trainer compares the processes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = made("batch_norm", "evograd", 2, 1, folder, max_steps=2, save_strategy="steps", save_steps=1)
        inputs: list[Tensor] = []
        norm = trainer.model.base.stem[1]
        forward = norm.forward

        def noted(x: Tensor) -> Tensor:
            if norm.track_running_stats:  # the base step's own
                inputs.append(x.detach().clone())
            return forward(x)

        norm.forward = noted
        trainer.train()
        assert different(dict(trainer.model.named_buffers())) == []
        return {"inputs": inputs, "mean": norm.running_mean.clone(), "var": norm.running_var.clone()}


def test_running_statistics_are_the_mean_over_the_processes(ranks: list[dict[str, Any]]) -> None:
    """By hand: torch's update with momentum 0.1 from 0 and 1, averaged over the two processes at each step."""
    found = [rank["statistics"] for rank in ranks]
    mean, var = torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    assert [len(one["inputs"]) for one in found] == [2, 2]
    for inputs in zip(*(one["inputs"] for one in found), strict=True):
        mean = 0.9 * mean + 0.1 * torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        var = 0.9 * var + 0.1 * torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    assert not torch.allclose(*(one["inputs"][0].mean((0, 2, 3)) for one in found))
    for one in found:
        torch.testing.assert_close(one["mean"], mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one["var"], var, rtol=1e-12, atol=1e-12)


def few_shot() -> dict[str, Tensor]:
    """Three steps of episodes with an auxiliary classifier, and a checkpoint after each, where the ranks compare."""
    settings = FewShotArguments(
        width=4, image_size=16, n_way=2, n_shot=1, n_query=2, test_n_query=2, test_episodes=2, episodes_per_epoch=4,
        aux_domain="ink", aux_images=4,
    )  # fmt: skip
    task = FewShotTask()
    with tempfile.TemporaryDirectory() as folder:
        args = EpisodicTrainingArguments(
            output_dir=folder, estimator="evograd", max_steps=3, save_strategy="steps", save_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True, meta_learning_rate=0.01,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = task.build_trainer(settings, args, task.load(settings, args))
        trainer.train()
        assert different(dict(trainer.model.named_buffers())) == []
        return tree.clone({**trainer.model.base_parameters(), **trainer.model.meta_parameters()})


def test_episodes_on_two_processes_keep_the_ranks_alike(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["few_shot"] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    gammas = [value for name, value in first.items() if name.endswith("gamma")]
    assert gammas
    assert all((gamma != 0.3).any() for gamma in gammas)
