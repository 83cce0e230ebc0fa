"""The same step by other libraries; where they are missing, their rows say how to install them."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.memory import PeakMemory, live_tensors
from metaxl_evo.benchmark.peers import INSTALL, PEERS, trainable, weighted_step
from metaxl_evo.benchmark.problems import Episode
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.benchmark.trajectories import by_estimator, through_all_steps
from metaxl_evo.bilevel import Hypergradient, tree
from scripts.benchmark_estimators import main
from vision_tasks.weight_net import WeightedClassifier

CONFIG = Path(__file__).parents[2] / "configs/benchmark/peers.yaml"
LR = 0.01


@pytest.fixture(scope="module")
def step() -> tuple[WeightedClassifier, Episode]:
    module, episode = weighted_step(BenchmarkArguments("unused", batch_size=16, learning_rate=LR, seed=3))
    module.double()
    for batch in (episode.train[0], episode.val):
        batch["images"] = batch["images"].double()
    return module, replace(episode, w=module.base_parameters(), lam=module.meta_parameters())


@pytest.fixture
def module(step: tuple[WeightedClassifier, Episode]) -> WeightedClassifier:
    return step[0]


@pytest.fixture
def episode(step: tuple[WeightedClassifier, Episode]) -> Episode:
    return step[1]


def by_peer(name: str, module: WeightedClassifier, episode: Episode, **settings: str) -> Hypergradient:
    pytest.importorskip(name)
    run = PEERS[name](trainable(module), LR, episode.train[0], episode.val, **settings)
    first = run(0)
    gc.collect()
    with PeakMemory(live_tensors()) as memory:
        before = memory.live
        again = run(0)
        gc.collect()
        assert memory.peak - before > 2**20
        assert memory.live - before < 2**18, (
            "what a run has built is gone when it ends: it would count as the next row's"
        )
    assert error(again, first) < 1e-12, "a run begins where the one before began"
    return again


def error(found: Hypergradient, expected: Hypergradient) -> float:
    return tree.norm(tree.add(found.grads, expected.grads, -1.0)) / tree.norm(expected.grads)


def test_missing_peers_say_how_to_install_them(tmp_path: Path) -> None:
    options = ["--estimators", "one_step", "--repeats", "1", "--batch_size", "4"]
    rows = main(["--config", str(CONFIG), "--output_dir", str(tmp_path), *options])
    assert {row.estimator for row in rows} == {"one_step", *PEERS}
    for row in rows:
        if row.estimator in PEERS and find_spec(row.estimator) is None:
            assert str(row.error).endswith(INSTALL[row.estimator])
        else:
            assert row.error is None
            assert row.time_ratio or row.untimed


@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_differentiable_optimisers_agree(name: str, module: WeightedClassifier, episode: Episode) -> None:
    exact = Hypergradient(through_all_steps(episode), torch.zeros(()))
    assert error(by_peer(name, module, episode), exact) < 1e-12


@pytest.mark.parametrize(("kind", "radius"), [("darts", 0.01), ("sama", 1.0)])
def test_betty_sees_the_costs_move(kind: str, radius: float, module: WeightedClassifier, episode: Episode) -> None:
    """Its finite differences are ours without the replay of what the weight net reads; with it they differ."""
    live = replace(episode, problem=replace(episode.problem, stop_gradients=False, straight_through=True))
    ours = partial(by_estimator, row=Row("sama", {"radius": radius}, "after_step"))
    found = by_peer("betty", module, episode, type=kind)
    assert error(found, ours(live)(0)) < 1e-8
    assert error(found, ours(episode)(0)) > 1e-2
