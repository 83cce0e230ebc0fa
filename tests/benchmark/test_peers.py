"""The same step by other libraries; where they are missing, their rows say how to install them."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from metaxl_evo.benchmark.episodes import estimator_run, through_all_steps
from metaxl_evo.benchmark.memory import PeakMemory
from metaxl_evo.benchmark.peers import INSTALL, PEERS, trainable
from metaxl_evo.benchmark.problems import Episode
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.benchmark.weight_net import WeightedClassifier
from metaxl_evo.bilevel import SGD, Hypergradient, tree
from scripts.benchmark_estimators import main

CONFIG = Path(__file__).parents[2] / "configs/benchmark/peers.yaml"
LR = 0.01


@pytest.fixture(scope="module")
def module() -> WeightedClassifier:
    torch.manual_seed(3)
    return WeightedClassifier().double()


@pytest.fixture(scope="module")
def episode(module: WeightedClassifier) -> Episode:
    torch.manual_seed(4)
    train, val = (default_collate([module.image(noise) for _ in range(16)]) for noise in (0.4, 0.0))
    train["images"], val["images"] = train["images"].double(), val["images"].double()
    return Episode(module.problem(SGD(LR)), module.base_parameters(), module.meta_parameters(), [train], val)


def by_peer(name: str, module: WeightedClassifier, episode: Episode, **settings: str) -> Hypergradient:
    pytest.importorskip(name)
    run = PEERS[name](trainable(module), LR, episode.train[0], episode.val, **settings)
    first = run(0)
    gc.collect()
    with PeakMemory() as memory:
        again = run(0)
        gc.collect()
        assert memory.peak > 2**20
        assert memory.live < 2**18, "what a run has built is gone when it ends: it would count as the next row's"
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
            assert row.time_ratio is not None


@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_differentiable_optimisers_agree(name: str, module: WeightedClassifier, episode: Episode) -> None:
    exact = Hypergradient(through_all_steps(episode), torch.zeros(()))
    assert error(by_peer(name, module, episode), exact) < 1e-12


@pytest.mark.parametrize(("kind", "radius"), [("darts", 0.01), ("sama", 1.0)])
def test_betty_sees_the_costs_move(kind: str, radius: float, module: WeightedClassifier, episode: Episode) -> None:
    """Its finite differences are ours without the replay of what the weight net reads; with it they differ."""
    live = replace(episode, problem=replace(episode.problem, stop_gradients=False))
    ours = partial(estimator_run, row=Row("sama", {"radius": radius}, "after_step"))
    found = by_peer("betty", module, episode, type=kind)
    assert error(found, ours(live)(0)) < 1e-8
    assert error(found, ours(episode)(0)) > 1e-2
