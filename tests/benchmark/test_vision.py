"""The vision tasks as problems: their data, what the yardstick leaves out, what Meta-Weight-Net needs of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.memory import PeakMemory, live_tensors
from metaxl_evo.benchmark.problems import MeasuredTrainer
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.benchmark.steps import measure_weight_net
from metaxl_evo.benchmark.vision import fewshot, noisy_images, rotation, weight_net
from metaxl_evo.bilevel import SGD
from metaxl_evo.bilevel.hypergradients import hypergradient
from metaxl_evo.estimators import Estimator, EvoGrad, OneStep
from metaxl_evo.estimators import noise as noise_module
from vision_tasks.images import ImageRows

SMALL: dict[str, dict[str, Any]] = {
    "weight_net": {"backbone": "resnet32", "blocks": 1, "widths": [1], "image_size": 8, "image_channels": 3},
    "rotation": {"backbone": "lenet", "image_size": 16},
    "fewshot": {"backbone": "resnet10", "widths": [4], "image_size": 16},
}
MAKERS: dict[str, Callable[[BenchmarkArguments], MeasuredTrainer]] = {
    "weight_net": lambda settings: weight_net(settings, 1, 7),
    "rotation": lambda settings: rotation(settings, None),
    "fewshot": lambda settings: fewshot(settings, 4),
}


def small(problem: str, batch_size: int = 4, **fields: Any) -> BenchmarkArguments:
    training = {"use_cpu": True, "per_device_train_batch_size": batch_size, "per_device_meta_batch_size": batch_size}
    training |= fields.pop("training", {})
    plain = {"repeats": 1, "warmup": 1, "noise_draws": 1, "orders": ["lookahead"], **SMALL[problem]}
    return BenchmarkArguments(**{"output_dir": "unused", **plain, **fields}, problem=problem, training=training)


@pytest.mark.parametrize("problem", MAKERS)
def test_the_yardstick_has_no_meta_network(problem: str) -> None:
    trainer = MAKERS[problem](small(problem, 2))
    batch = next(iter(trainer.get_train_dataloader()))

    def loss(on: bool) -> Tensor:
        trainer.switch(on)
        return trainer.model.mean_inner_loss(batch).detach()

    on, off = loss(True), loss(False)
    with torch.no_grad():
        for parameter in trainer.model.meta.parameters():
            parameter.add_(torch.rand_like(parameter))
    assert loss(True) != on
    assert loss(False) == off


@pytest.mark.parametrize("problem", MAKERS)
def test_batches_are_whole_and_rows_are_no_tensors(problem: str) -> None:
    trainer = MAKERS[problem](small(problem, 2))
    for rows in (trainer.train_dataset, trainer.meta_dataset):
        assert len(rows) % 2 == 0
        assert len(rows) >= 10
        assert all(isinstance(value, np.ndarray) for row in rows for value in row.values())


def test_two_labels_in_five_are_wrong_and_those_that_judge_are_right() -> None:
    settings = BenchmarkArguments("unused", image_size=8, image_channels=3)
    noisy = noisy_images(settings, 1000, 500)
    assert noisy.train.images.shape == (1000, 8, 8, 3)
    assert 0.35 < noisy.wrong.mean() < 0.45
    assert noisy.meta.counts().tolist() == [50] * 10


def test_images_that_judge_a_rotation_are_askew() -> None:
    trainer = rotation(small("rotation", 20), None)
    means = [np.mean([row["images"] for row in rows], 0) for rows in (trainer.train_dataset, trainer.meta_dataset)]
    corners = [mean[0, :2, :2].mean() for mean in means]
    assert corners[1] < 0.5 * corners[0], "what is turned into the corner is black"


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_sizes_are_combined_or_varied_one_at_a_time() -> None:
    lists: dict[str, Any] = {"backbone": "resnet32", "widths": [1, 2, 3], "weight_net_hidden": [10, 20]}
    assert BenchmarkArguments("unused", **lists).sizes() == [(1, 10), (1, 20), (2, 10), (2, 20), (3, 10), (3, 20)]
    assert BenchmarkArguments("unused", **lists, one_at_a_time=True).sizes() == [(1, 10), (1, 20), (2, 10), (3, 10)]
    assert BenchmarkArguments("unused").sizes() == [(None, 100)]


def measured(**fields: Any) -> list[Row]:
    rows = [row for rows in measure_weight_net(small("weight_net", **fields)) for row in rows]
    assert [row.error for row in rows] == [None] * len(rows)
    return rows


def test_a_case_is_measured_as_if_it_were_alone() -> None:
    """The tensors of the case before are gone; those of width 4 would be most of what width 1 holds."""
    (alone,) = measured(widths=[1], estimators=["sama"], warmup=0)
    first, after = measured(widths=[4, 1], estimators=["sama"], warmup=0)
    assert first.case == {"width": 4, "meta_parameters": 301}
    assert after.case == alone.case == {"width": 1, "meta_parameters": 301}
    assert first.peak_mib is not None
    assert alone.peak_mib is not None
    assert first.peak_mib > 5 * alone.peak_mib
    assert after.peak_mib == pytest.approx(alone.peak_mib, rel=0.02)


@pytest.mark.slow
def test_meta_weight_net_holds_no_graph_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights enter behind the network: only double backward keeps the graph, here of a ResNet-32."""
    monkeypatch.setattr(noise_module, "_BLOCK", 2**16)  # in proportion to the network, lest the noise of two be kept
    settings = small("weight_net", 16, blocks=5, image_size=32)
    module = weight_net(settings, 1, 100).model
    noisy = noisy_images(settings, 20, 20)
    train, val = (default_collate([ImageRows(one)[i] for i in range(16)]) for one in (noisy.train, noisy.meta))
    w, lam, problem = module.base_parameters(), module.meta_parameters(), module.problem(SGD(0.1))

    def peak(run: Callable[[], object]) -> int:
        with PeakMemory(live_tensors()) as memory:
            run()
        return memory.peak

    def estimated(estimator: Estimator) -> int:
        return peak(lambda: hypergradient(problem, estimator, w, lam, [train], [val]))

    def plain_step() -> None:
        module.mean_inner_loss(train).backward()
        torch.optim.SGD(w.values(), lr=0.1).step()

    for estimator in (OneStep(engine="jvp"), EvoGrad(copies=2)):  # finds out about the loss, once a run
        hypergradient(problem, estimator, w, lam, [train], [val])
    exact, double = estimated(OneStep(engine="jvp")), estimated(OneStep(engine="double_backward"))
    two, five = estimated(EvoGrad(copies=2)), estimated(EvoGrad(copies=5))
    plain = peak(plain_step)
    assert plain > 30 * 2**20
    assert 0.9 * plain < exact <= 1.15 * plain
    assert double > 1.8 * plain
    assert two <= 1.15 * plain
    assert five == pytest.approx(two, rel=0.03)
