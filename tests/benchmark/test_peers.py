"""The same step by other libraries; where they are missing, their rows say how to install them."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.memory import PeakMemory, live_tensors
from metaxl_evo.benchmark.peers import INSTALL, PEERS, STEPS, first_step
from metaxl_evo.benchmark.problems import Episode
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.benchmark.trajectories import by_estimator, through_all_steps
from metaxl_evo.bilevel import Hypergradient, tree
from metaxl_evo.models.bilevel_module import BilevelModule
from scripts.benchmark_estimators import main

CONFIG = Path(__file__).parents[2] / "configs/benchmark/peers.yaml"
LR = 0.01
MODEL = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 20,
}  # fmt: skip
TAGGER: dict[str, Any] = {"length": 8, "rtn_layer": [1], "model": MODEL}


@pytest.fixture(scope="module", params=STEPS)
def step(request: pytest.FixtureRequest) -> tuple[BilevelModule, Episode]:
    settings = BenchmarkArguments("unused", batch_size=16, learning_rate=LR, seed=3, **TAGGER)
    module, episode = STEPS[request.param](settings)
    module.double()
    train, val = (
        {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        for batch in (episode.train[0], episode.val)
    )
    return module, first_step(module, LR, train, val)


@pytest.fixture
def module(step: tuple[BilevelModule, Episode]) -> BilevelModule:
    return step[0]


@pytest.fixture
def episode(step: tuple[BilevelModule, Episode]) -> Episode:
    return step[1]


def by_peer(name: str, module: BilevelModule, episode: Episode, **settings: str) -> Hypergradient:
    pytest.importorskip(name)
    start = tree.clone(module.base_parameters())
    run = PEERS[name](module, LR, episode.train[0], episode.val, **settings)
    first = run(0)
    gc.collect()
    with PeakMemory(live_tensors()) as memory:
        before = memory.live
        again = run(0)
        gc.collect()
        assert memory.live - before < (memory.peak - before) / 4, (
            "what a run has built is gone when it ends: it would count as the next row's"
        )
    assert error(again, first) < 1e-12, "a run begins where the one before began"
    assert all(torch.equal(start[name], leaf) for name, leaf in module.base_parameters().items())
    return again


def error(found: Hypergradient, expected: Hypergradient) -> float:
    return tree.norm(tree.add(found.grads, expected.grads, -1.0)) / tree.norm(expected.grads)


def test_missing_peers_say_how_to_install_them(tmp_path: Path) -> None:
    cases = {"net": {"problem": "weight_net"}, "tiny": {"problem": "tagger", **TAGGER}}
    options = ["--estimators", "one_step", "--repeats", "1", "--batch_size", "4", "--cases", json.dumps(cases)]
    rows = main(["--config", str(CONFIG), "--output_dir", str(tmp_path), *options])
    assert {(row.case["problem"], row.estimator) for row in rows} == {
        (case, name) for case in cases for name in ("one_step", *PEERS)
    }
    for row in rows:
        if row.estimator in PEERS and find_spec(row.estimator) is None:
            assert str(row.error).endswith(INSTALL[row.estimator])
        else:
            assert row.error is None
            assert row.time_ratio or row.untimed


def test_exact_is_what_central_differences_of_plain_steps_say(module: BilevelModule, episode: Episode) -> None:
    """Embeddings included, of which an episode holds the touched rows alone."""
    start, lam = tree.clone(module.base_parameters()), module.meta_parameters()
    torch.manual_seed(0)
    direction = {name: torch.randn_like(leaf) for name, leaf in lam.items()}

    def outer(amount: float) -> float:
        optimizer = torch.optim.SGD(module.base.parameters(), lr=LR)
        with torch.no_grad():
            torch._foreach_add_(list(lam.values()), list(direction.values()), alpha=amount)
        module.mean_inner_loss(episode.train[0]).backward(inputs=list(module.base.parameters()))
        optimizer.step()
        found = module.mean_outer_loss(episode.val).item()
        module.zero_grad()
        with torch.no_grad():
            torch._foreach_add_(list(lam.values()), list(direction.values()), alpha=-amount)
            for name, leaf in module.base_parameters().items():
                leaf.copy_(start[name])
        return found

    exact = float(tree.dot(through_all_steps(episode), direction))
    assert (outer(1e-4) - outer(-1e-4)) / 2e-4 == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_differentiable_optimisers_agree(name: str, module: BilevelModule, episode: Episode) -> None:
    exact = Hypergradient(through_all_steps(episode), torch.zeros(()))
    assert error(by_peer(name, module, episode), exact) < 1e-12


@pytest.mark.parametrize(("kind", "radius"), [("darts", 0.01), ("sama", 1.0)])
def test_betty_sees_the_costs_move(kind: str, radius: float, module: BilevelModule, episode: Episode) -> None:
    """Its finite differences are ours without the replay of what the meta network reads; with it they differ."""
    live = replace(episode, problem=replace(episode.problem, stop_gradients=False, straight_through=True))
    ours = partial(by_estimator, row=Row("sama", {"radius": radius}, "after_step"))
    found = by_peer("betty", module, episode, type=kind)
    assert error(found, ours(live)(0)) < 1e-8
    assert error(found, ours(episode)(0)) > 1e-2
