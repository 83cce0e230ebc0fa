"""The task of docs/adding_a_task.md, as printed: its hypergradient by every estimator, and however it is cut."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import BertConfig, BertForSequenceClassification

from metaxl_evo import BilevelModule, MetaTrainer, WeightNet, hypergradient, make_estimator, run_episode
from metaxl_evo.bilevel import SGD, stop_gradient
from metaxl_evo.bilevel.tree import cosine
from tests.processes import on_processes
from tests.training.tiny import meta_weights, minus, stack, tiny_arguments

RATE, ROWS = 0.5, 8
Batch = dict[str, Tensor]


class Reweight(BilevelModule):
    """Each example's loss times a weight that a small network reads off the loss itself."""

    def inner_loss(self, batch):
        losses = self.losses(batch)  # (B,)
        return self.meta(losses.detach()) * losses  # (B,)

    def outer_loss(self, batch):
        return self.losses(batch)  # (B,)


class Named(Reweight):
    """The same with what is meant said by name, which a backward that computes again needs."""

    def inner_loss(self, batch):
        losses = self.losses(batch)
        return self.meta(stop_gradient(losses, key="losses")) * losses


def task(form: type[Reweight] = Reweight, dtype: torch.dtype = torch.float64) -> Reweight:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(
        vocab_size=21, num_hidden_layers=1, max_position_embeddings=6, initializer_range=0.5, **sizes,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    return form(BertForSequenceClassification(config), WeightNet(3)).to(dtype).train()


def rows(count: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 21, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": (row[0] > 10).long()} for row in ids]


TRAIN, JUDGE = stack(rows(ROWS, 1)), stack(rows(ROWS, 2))


def by_autograd(model: Reweight, steps: int = 1, *, after: bool = True) -> dict[str, Tensor]:
    """Through `steps` steps of SGD; `after=False` judges the one step's change at the weights before it."""
    lam = {name: p.detach().clone().requires_grad_() for name, p in model.meta.named_parameters()}
    w = {name: p.detach().clone().requires_grad_() for name, p in model.base.named_parameters()}
    first = w

    def losses(w: Any, batch: Batch) -> Tensor:
        logits = functional_call(model.base, w, kwargs={"input_ids": batch["input_ids"]}).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    for _ in range(steps):
        each = losses(w, TRAIN)
        loss = (functional_call(model.meta, lam, (each.detach(),)) * each).mean()
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True, materialize_grads=True)
        w = {name: leaf - RATE * grad for (name, leaf), grad in zip(w.items(), grads, strict=True)}
    if after:
        outer = losses(w, JUDGE).mean()
    else:
        slopes = torch.autograd.grad(losses(first, JUDGE).mean(), list(first.values()), materialize_grads=True)
        outer = torch.stack([(leaf * slope).sum() for leaf, slope in zip(w.values(), slopes, strict=True)]).sum()
    return dict(zip(lam, torch.autograd.grad(outer, list(lam.values())), strict=True))


def estimated(model: Reweight, name: str, **settings: Any) -> dict[str, Tensor]:
    w, lam, problem = model.base_parameters(), model.meta_parameters(), model.problem(SGD(lr=RATE))
    return hypergradient(problem, make_estimator(name, **settings), w, lam, TRAIN, JUDGE).grads


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    a, b = (torch.cat([one[name].flatten() for name in expected]) for one in (found, expected))
    return float((a - b).norm() / b.norm())


def test_exact_engines_and_finite_differences_are_autograd() -> None:
    model, expected = task(), by_autograd(task())
    for engine in ("jvp", "double_backward", "auto"):
        assert error(estimated(model, "one_step", engine=engine), expected) < 1e-10, engine
    assert error(estimated(model, "one_step", engine="finite_difference", radius=1e-4), expected) < 1e-6
    w, lam, problem = model.base_parameters(), model.meta_parameters(), model.problem(SGD(lr=RATE))
    three = by_autograd(model, steps=3)
    for name in ("unroll", "forward_mode"):
        assert error(run_episode(problem, make_estimator(name), w, lam, [TRAIN] * 3, JUDGE).grads, three) < 1e-10, name


@pytest.mark.slow
def test_evograd_is_it_in_expectation() -> None:
    """Its factor is sigma^2 (K - 1) / (K tau rate), and its outer loss is judged at the weights before the step."""
    copies, sigma, temperature = 500, 1e-3, 0.05
    settings = {"copies": copies, "sigma": sigma, "temperature": temperature, "noise": "gaussian"}
    model, expected = task(), by_autograd(task(), after=False)
    found = estimated(model, "evograd", **settings)
    factor = sigma**2 * (copies - 1) / (copies * temperature * RATE)
    assert cosine(found, expected) > 0.95
    assert error({name: leaf / factor for name, leaf in found.items()}, expected) < 0.3


@pytest.mark.parametrize("name", ["finite_difference", "evograd"])
def test_under_activation_checkpointing_it_is_right_in_either_form(name: str) -> None:
    settings: dict[str, Any] = {"copies": 3, "sigma": 1e-3} if name == "evograd" else {"engine": name, "radius": 1e-4}
    estimator = name if name == "evograd" else "one_step"
    plain = estimated(task(Named), estimator, **settings)
    assert error(estimated(task(), estimator, **settings), plain) < 1e-10
    for form in (Reweight, Named):
        model = task(form)
        model.activation_checkpointing_enable()
        assert error(estimated(model, estimator, **settings), plain) < 1e-6  # the detach is behind what is recomputed


@cache
def moved(layout: tuple[int, int]) -> dict[str, dict[str, Tensor]]:
    """How far three base and plain meta steps move lam, by estimator; a step is `ROWS` rows in all."""
    processes, accumulation = layout
    size = ROWS // processes // accumulation
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for estimator in ("one_step", "evograd"):
            args = tiny_arguments(
                Path(folder) / estimator, max_steps=3, per_device_train_batch_size=size, learning_rate=0.1,
                per_device_meta_batch_size=size, gradient_accumulation_steps=accumulation, estimator=estimator,
                meta_optim="SGD", meta_learning_rate=1.0, lr_scheduler_type="constant", optim="sgd",
                logging_strategy="no",
            )  # fmt: skip
            trainer = InOrder(
                task(), args, train_dataset=rows(3 * ROWS, 3), meta_dataset=rows(2 * ROWS, 4), data_collator=stack
            )
            before = meta_weights(trainer)
            trainer.train()
            found[estimator] = minus(before, meta_weights(trainer))
    return found


class InOrder(MetaTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def test_eight_by_one_is_four_by_two() -> None:
    whole = moved((1, 1))
    for estimator, found in moved((1, 2)).items():
        assert error(found, whole[estimator]) < 1e-9, estimator


@pytest.mark.distributed
def test_two_processes_are_one() -> None:
    assert "WORLD_SIZE" not in os.environ
    whole = moved((1, 1))
    for of_rank in on_processes(2, moved, (2, 2)):
        for estimator, found in of_rank.items():
            assert error(found, whole[estimator]) < 1e-9, estimator
