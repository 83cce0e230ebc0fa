"""A MetaTrainer under FSDP2: N processes with a part of the base each = one process with all of it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, XLMRobertaForTokenClassification

from metaxl_evo.benchmark.memory import live_tensors
from metaxl_evo.bilevel import Tree, tree
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.tagger import CrossLingualTagger
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import on_processes
from tests.sharded import ShardedTrainer
from tests.training.tiny import (
    PAD,
    Hypergradients,
    logged,
    meta_weights,
    random_rows,
    same,
    stack,
    tiny_arguments,
    tiny_base,
    tiny_tagger,
    tiny_trainer,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FINE = {"engine": "finite_difference", "radius": 1e-4}
EXACT = {"engine": "jvp"}
UNEVEN = {"vocab_size": 103, "intermediate_size": 50}  # rows that no two or four processes share evenly
ROWS, STEPS = 8, 2  # of all processes in a step
CASES: dict[str, dict[str, Any]] = {
    "one_step": {"estimator": "one_step", "estimator_kwargs": FINE},
    "one_step exact": {"estimator": "one_step", "estimator_kwargs": EXACT},
    "one_step lookahead": {
        "estimator": "one_step",
        "estimator_kwargs": FINE,
        "meta_order": "lookahead",
        "optim": "sgd",
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
    },
    "evograd": {"estimator": "evograd", "estimator_kwargs": {"sigma": 0.05, "copies": 3}},
    "evograd of the head": {
        "estimator": "evograd",
        "estimator_kwargs": {"sigma": 0.05, "copies": 3, "parameters": "^classifier"},
    },
    "greedy exact": {"estimator": "greedy", "estimator_kwargs": EXACT, "meta_order": "lookahead"},
    # With a step: the power iterations that find one begin elsewhere where rows that no batch looks up are left out.
    "neumann": {"estimator": "neumann", "estimator_kwargs": FINE | {"terms": 1, "step": 0.01}},
    "conjugate_gradient": {"estimator": "conjugate_gradient", "estimator_kwargs": FINE | {"iterations": 2}},
    "sama": {"estimator": "sama", "estimator_kwargs": FINE, "gradient_checkpointing": True},
}


def trained(case: str, folder: Path, processes: int) -> tuple[MetaTrainer, dict[str, Any]]:
    """Rows of very different numbers of tokens; the last draw of meta rows is one, which one process has."""
    sharded: dict[str, Any] = {"trainer_class": ShardedTrainer, "fsdp": True} if processes > 1 else {}
    settings = CASES[case]
    rows = ROWS // settings.get("gradient_accumulation_steps", 1) // processes
    tagger = tiny_tagger(torch.float64, dropout=False, base=UNEVEN)
    tagger.straight_through = case != next(iter(CASES))  # the value test is the same for all
    tagger.base.roberta.embeddings.requires_grad_(case != "greedy exact")  # frozen weights are gathered too
    trainer = tiny_trainer(
        folder,
        tagger=tagger,
        train=random_rows(STEPS * ROWS, seed=1, language=0, length=20),
        meta=random_rows(ROWS + 1, seed=2, length=20),
        max_steps=STEPS,
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
        "base": whole(trainer),
    }


def logits(trainer: MetaTrainer) -> Tensor:
    return torch.from_numpy(trainer.predict(random_rows(4, seed=3, length=4)).predictions)


def whole(trainer: MetaTrainer) -> dict[str, Tensor]:
    parameters = trainer.model.base_parameters()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in parameters.items()}


def on_shards(processes: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            trainer, found[case] = trained(case, Path(folder), processes)
            assert all(isinstance(p, DTensor) for p in trainer.model.base_parameters().values())
            held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in trainer.model.base_parameters().values()}  # the optimiser's are the model's
            assert not any(isinstance(p, DTensor) for p in trainer.model.meta_parameters().values())
        found["logits"] = logits(trainer)
        trainer.save_model(folder)
        if trainer.args.process_index == 0:
            read = XLMRobertaForTokenClassification.from_pretrained(folder, dtype=torch.float64)
            found["saved"] = {name: p.detach() for name, p in read.named_parameters()}
        for engine, settings in TIED.items():
            found[engine] = tied(settings, Path(folder), processes)
    return found


@cache
def alone() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {}
        for case in CASES:
            trainer, found[case] = trained(case, Path(folder), 1)
        found |= {engine: tied(settings, Path(folder), 1) for engine, settings in TIED.items()}
        return found | {"logits": logits(trainer)}


def apart(found: list[Tree], other: list[Tree]) -> float:
    """The largest relative difference of two lists of trees."""
    pairs = zip(found, other, strict=True)
    return max(tree.norm(tree.add(a, b, -1.0)) / tree.norm(b) for a, b in pairs)


@pytest.mark.parametrize("count", [2, 4])
def test_training_on_shards_is_training_on_one_process(count: int) -> None:
    ranks = on_processes(count, on_shards, count)
    for case in (*CASES, *TIED):
        found, one = ranks[0][case], alone()[case]
        error = apart(found["hypergradients"], one["hypergradients"])
        drift = apart([found["base"]], [one["base"]])
        print(f"{case}: hypergradients {error:.1e}, base weights {drift:.1e}")
        assert len(one["hypergradients"]) == STEPS
        assert error < LARGEST.get(case, 1e-10 if "exact" in case or "evograd" in case else 1e-6), case
        assert drift < 1e-9, case
        for key, values in one.get("logs", {}).items():
            assert found["logs"][key] == pytest.approx(values, rel=1e-6), (case, key)
        for other in ranks[1:]:
            assert same(other[case]["meta"], found["meta"])
    torch.testing.assert_close(ranks[0]["logits"], alone()["logits"], rtol=0, atol=1e-9)
    assert same(ranks[0]["saved"], ranks[0]["sama"]["base"])
    for engine in TIED:
        assert "lm_head.weight" not in ranks[0][engine]["base"]
        assert same(ranks[0][engine]["saved"], ranks[0][engine]["base"])
        # against what is exact: its norms compute in float32
        assert apart(ranks[0][engine]["hypergradients"], alone()["tied, exact"]["hypergradients"]) < 1e-3


# Memory


def held(weights: int) -> float:
    """What all live tensors hold, in multiples of all base weights."""
    storages = {one.data_ptr(): one.nbytes() for one in (tensor.untyped_storage() for tensor in live_tensors())}
    return sum(storages.values()) / weights


def held_when(processes: int, estimator: str) -> dict[str, float]:
    """At rest, behind the backward, and at most before a pass begins."""
    wide = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    tagger = CrossLingualTagger(
        tiny_base(**wide), RepresentationTransform(128, layers=(1,), languages=("source",)), pad_token_id=PAD
    )
    tagger.straight_through = True  # the value test has copies of its own
    size = sum(p.nbytes for p in tagger.base.parameters())
    found = {"rest": 0.0, "backward": 0.0, "pass": 0.0}

    class Looks(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found["backward"] = held(size)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found["rest"] = held(size)

    def before_a_pass(*args: Any) -> None:
        found["pass"] = max(found["pass"], held(size))

    with tempfile.TemporaryDirectory() as folder:
        settings = {"estimator": estimator, "max_steps": 2, "per_device_train_batch_size": 1}
        trainer = tiny_trainer(folder, tagger=tagger, trainer_class=ShardedTrainer, fsdp=True, **settings)
        trainer.add_callback(Looks())
        tagger.base.register_forward_pre_hook(before_a_pass)
        trainer.train()
    return found


COPIES = {  # of weights: with moments; gradients and those before; a direction or noise, those perturbed and displaced
    "one_step": (3, 5, 7),
    "evograd": (3, 5, 8),  # the noise of two copies, which is drawn anew where it is larger
}


def memory(processes: int) -> dict[str, dict[str, float]]:
    return {estimator: held_when(processes, estimator) for estimator in COPIES}


@pytest.mark.parametrize("count", [2, 4])
def test_weights_gradients_and_moments_are_shared_out(count: int) -> None:
    found = on_processes(count, memory, count)[0]
    for estimator, copies in COPIES.items():
        for when, expected in zip(("rest", "backward", "pass"), copies, strict=True):
            print(f"{estimator}, {count} processes, {when}: {found[estimator][when] * count:.2f} / {count}")
            assert found[estimator][when] * count < expected + 0.7, (estimator, when)


# Tied weights

TIED: dict[str, dict[str, Any]] = {"tied": {"engine": "finite_difference"}, "tied, exact": EXACT}
LARGEST = {"tied": 1e-3, "tied, exact": 1e-6}


class DomainWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))


class WeightedDomains(BilevelModule):
    """A language model on two domains, whose weights are learned."""

    def inner_loss(self, batch: Batch) -> Tensor:
        weights: Tensor = self.meta.logits.sigmoid()[batch["domain"]]
        return self.losses(batch) * weights

    def outer_loss(self, batch: Batch) -> Tensor:
        return self.losses(batch)


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).double()


def sentences(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (count, 10), generator=generator)
    return [{"input_ids": row, "labels": row, "domain": torch.tensor(i % 2)} for i, row in enumerate(ids)]


def tied(settings: dict[str, Any], folder: Path, processes: int) -> dict[str, Any]:
    kind, fields = (ShardedTrainer, {"fsdp": True}) if processes > 1 else (MetaTrainer, {})
    trainer = kind(
        WeightedDomains(language_model(), DomainWeights()),
        tiny_arguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=4 // processes,
            per_device_meta_batch_size=4 // processes,
            meta_portion=1,
            meta_optim="SGD",
            estimator_kwargs=settings,
            **fields,
        ),
        train_dataset=sentences(8, 1),
        meta_dataset=sentences(8, 2),
        data_collator=stack,
    )
    noted = Hypergradients()
    trainer.add_callback(noted)
    trainer.train()
    trainer.save_model(str(folder / "tied"))
    found: dict[str, Any] = {"hypergradients": noted.grads, "base": whole(trainer), "meta": meta_weights(trainer)}
    if trainer.args.process_index == 0:
        read = LlamaForCausalLM.from_pretrained(folder / "tied", dtype=torch.float64)
        found["saved"] = {name: p.detach() for name, p in read.named_parameters()}
    return found


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
    names, states = {p: name for name, p in trainer.model.base_parameters().items()}, trainer.optimizer.state.items()
    state = {names[p]: {key: gathered(one) for key, one in held.items()} for p, held in states}
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
