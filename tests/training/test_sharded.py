"""A MetaTrainer under FSDP2: N processes with a part of the base each = one process with all of it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import XLMRobertaForTokenClassification

from metaxl_evo.bilevel import tree
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import on_processes
from tests.sharded import ShardedTrainer
from tests.training.tiny import Hypergradients, logged, meta_weights, random_rows, same, tiny_tagger, tiny_trainer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FINE = {"engine": "finite_difference", "radius": 1e-4}
CASES: dict[str, dict[str, Any]] = {
    "one_step": {"estimator": "one_step", "estimator_kwargs": FINE},
    "one_step lookahead": {
        "estimator": "one_step",
        "estimator_kwargs": FINE,
        "meta_order": "lookahead",
        "optim": "sgd",
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
    },
    "evograd": {"estimator": "evograd", "estimator_kwargs": {"sigma": 0.05, "copies": 3}},
    "sama": {"estimator": "sama", "estimator_kwargs": FINE, "gradient_checkpointing": True},
}


def trained(case: str, folder: Path, processes: int) -> tuple[MetaTrainer, dict[str, Any]]:
    """Rows of very different numbers of tokens; the last draw of meta rows is one, which one process has."""
    sharded: dict[str, Any] = {"trainer_class": ShardedTrainer, "fsdp": True} if processes > 1 else {}
    settings = CASES[case]
    rows = 4 // settings.get("gradient_accumulation_steps", 1) // processes
    trainer = tiny_trainer(
        folder,
        tagger=tiny_tagger(torch.float64, dropout=False),
        train=random_rows(24, seed=1, language=0, length=20),
        meta=random_rows(9, seed=2, length=20),
        meta_optim="SGD",
        per_device_train_batch_size=rows,
        per_device_meta_batch_size=rows,
        **sharded | settings,
    )
    noted = Hypergradients()
    trainer.add_callback(noted)
    trainer.train()
    return trainer, {
        "hypergradients": noted.grads,
        "logs": {key: logged(trainer, key) for key in ("loss", "grad_norm", "meta_loss")},
        "meta": meta_weights(trainer),
    }


def whole(trainer: MetaTrainer) -> dict[str, Tensor]:
    parameters = trainer.model.base_parameters()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in parameters.items()}


def on_shards(processes: int) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            trainer, found[case] = trained(case, Path(folder), processes)
            found[case]["base"] = whole(trainer)
            assert all(isinstance(p, DTensor) for p in trainer.model.base_parameters().values())
            held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in trainer.model.base_parameters().values()}  # the optimiser's are the model's
        trainer.save_model(folder)
        if trainer.args.process_index == 0:
            read = XLMRobertaForTokenClassification.from_pretrained(folder, dtype=torch.float64)
            found["saved"] = {name: p.detach() for name, p in read.named_parameters()}
    return found


@cache
def alone() -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            trainer, found[case] = trained(case, Path(folder), 1)
            found[case]["base"] = whole(trainer)
    return found


@pytest.mark.parametrize("count", [2])
def test_training_on_shards_is_training_on_one_process(count: int) -> None:
    ranks = on_processes(count, on_shards, count)
    for case, one in alone().items():
        found = ranks[0][case]
        pairs = zip(found["hypergradients"], one["hypergradients"], strict=True)
        errors = [tree.norm(tree.add(a, b, -1.0)) / tree.norm(b) for a, b in pairs]
        drift = tree.norm(tree.add(found["base"], one["base"], -1.0)) / tree.norm(one["base"])
        print(f"{case}: hypergradients {max(errors):.1e}, base weights {drift:.1e}")
        assert len(errors) == 3
        assert max(errors) < 1e-6, case
        assert drift < 1e-9, case
        for key, values in one["logs"].items():
            assert found["logs"][key] == pytest.approx(values, rel=1e-6), (case, key)
        for other in ranks[1:]:
            assert all(torch.equal(other[case]["meta"][name], leaf) for name, leaf in found["meta"].items())
    assert all(torch.equal(leaf, ranks[0]["sama"]["base"][name]) for name, leaf in ranks[0]["saved"].items())


# Checkpoints


def saved_and_resumed(folder: str, processes: int, start: str | None = None) -> dict[str, Any]:
    """Where four steps end, from the start or from a checkpoint: weights and the optimiser's state, whole."""
    sharded: dict[str, Any] = {"trainer_class": ShardedTrainer, "fsdp": True} if processes > 1 else {}
    trainer = tiny_trainer(
        folder,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        estimator="greedy",
        estimator_kwargs={"engine": "finite_difference"},
        per_device_train_batch_size=4 // processes,
        per_device_meta_batch_size=4 // processes,
        **sharded,
    )
    trainer.train(resume_from_checkpoint=start)
    names = {parameter: name for name, parameter in trainer.model.base_parameters().items()}
    state = {names[p]: {key: gathered(one) for key, one in held.items()} for p, held in trainer.optimizer.state.items()}
    return {"base": whole(trainer), "meta": meta_weights(trainer), "moments": state, "step": trainer.state.global_step}


def gathered(held: Tensor) -> Tensor:
    return held.full_tensor() if isinstance(held, DTensor) else held.clone()


def test_checkpoints_of_shards_are_resumed_from(tmp_path: Path) -> None:
    """On as many processes bit by bit, with dropout; on others, and on one without shards, the state is the same."""
    straight = on_processes(2, saved_and_resumed, str(tmp_path), 2)[0]
    assert straight["step"] == 4
    assert {key for held in straight["moments"].values() for key in held} == {"step", "exp_avg", "exp_avg_sq"}
    halfway, end = str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-4")
    resumed = on_processes(2, saved_and_resumed, str(tmp_path), 2, halfway)
    assert all(same(rank, straight) for rank in resumed)
    assert same(on_processes(4, saved_and_resumed, str(tmp_path), 4, end)[0], straight)
    assert same(saved_and_resumed(str(tmp_path), 1, end), straight)
    one = saved_and_resumed(str(tmp_path / "one"), 1)
    whole_end = str(tmp_path / "one/checkpoint-4")
    assert same(on_processes(2, saved_and_resumed, str(tmp_path / "one"), 2, whole_end)[0], one)
    saved = XLMRobertaForTokenClassification.from_pretrained(end)
    assert same({name: p.detach() for name, p in saved.named_parameters()}, straight["base"])
