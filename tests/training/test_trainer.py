"""MetaTrainer against a plain Trainer, against hypergradients written out here, and against itself when resumed."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers import (
    AutoModelForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    pipeline,
)

from metaxl_evo.bilevel import PassContext, Tree
from metaxl_evo.bilevel.hypergradients import estimate
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.synthetic import SyntheticFamily
from metaxl_evo.ner.synthetic_tagger import make_synthetic_tagger
from metaxl_evo.ner.tagger import IGNORED, TARGET, CrossLingualTagger
from metaxl_evo.training import meta_level
from metaxl_evo.training.base_optimizer import unwrapped
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.tiny import (
    ESTIMATES,
    NO_DROPOUT,
    ORDERS,
    PAD,
    SHALLOW,
    Hypergradients,
    base_weights,
    close,
    collate,
    different,
    logged,
    meta_weights,
    minus,
    random_rows,
    same,
    tiny_arguments,
    tiny_base,
    tiny_tagger,
    tiny_trainer,
)

# The estimator off is a plain Trainer


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


def plain_and_meta(folder: Path, accumulation: int, **fields: Any) -> tuple[Trainer, MetaTrainer]:
    rows = random_rows(20, seed=1)
    settings: dict[str, Any] = {
        "estimator": "none",
        "max_steps": 8,
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "weight_decay": 0.1,
        "learning_rate": 5e-3,
        "gradient_accumulation_steps": accumulation,
        **fields,
    }
    meta = tiny_trainer(folder, train=rows, trainer={"meta_dataset": None}, **settings)
    meta.train()
    plain = Trainer(
        tiny_base(),
        tiny_arguments(folder, **settings),
        train_dataset=rows.remove_columns("language"),
        data_collator=collate,
        compute_loss_func=None if accumulation == 1 else summed_loss,
    )
    plain.train()
    return plain, meta


def test_without_an_estimator_it_is_a_plain_trainer_bit_for_bit(tmp_path: Path) -> None:
    plain, meta = plain_and_meta(tmp_path, 1)
    assert plain.args.optim == "adamw_torch_fused"
    assert different({n: p.detach() for n, p in plain.model.named_parameters()}, base_weights(meta)) == []
    assert different(base_weights(meta), {n: p.detach() for n, p in tiny_base().named_parameters()})
    for key in ("grad_norm", "learning_rate"):
        assert logged(meta, key) == logged(plain, key)
        assert len(set(logged(meta, key))) > 3
    assert min(logged(meta, "grad_norm")) > 1.0  # every step is clipped
    assert logged(meta, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)


def test_with_accumulation_it_is_a_plain_trainer_that_is_given_the_right_loss(tmp_path: Path) -> None:
    plain, meta = plain_and_meta(tmp_path, 2)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(base_weights(meta)[name], parameter.detach(), rtol=1e-6, atol=1e-8)
    assert logged(meta, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-6)
    assert logged(meta, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)


# The meta step is the derivative of the step, written out


class Recorder(TrainerCallback):
    """Both levels before and after each optimizer step, with the optimiser's numbers and the windows."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.steps: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer
        names = {p: n for n, p in self.trainer.model.base.named_parameters()}
        self.steps.append(
            {
                "w": base_weights(self.trainer),
                "lam": meta_weights(self.trainer),
                "state": {names[p]: copy.deepcopy(dict(optimizer.state[p])) for p in names},
                "hyper": {
                    names[p]: {key: value for key, value in group.items() if key != "params"}
                    for group in optimizer.param_groups
                    for p in group["params"]
                },
            }
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = {"w": base_weights(self.trainer), "lam": meta_weights(self.trainer)}
        self.steps[-1] |= {"after": after, "window": self.trainer.window}


class ByHand:
    """Both losses of the tiny tagger, its network behind layer 1, in eager attention: differentiable twice."""

    def __init__(self) -> None:
        self.base = tiny_base(torch.float64, **NO_DROPOUT, attn_implementation="eager").eval()
        self.network: Any = tiny_tagger(torch.float64).meta.nets[0]
        self.network = self.network[0]

    def logits(
        self, w: Tree, batch: Any, lam: Tree | None = None, frozen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits, and the states that the network has read."""
        seen: list[Tensor] = []

        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            seen.append(output.detach() if frozen is None else frozen)
            if lam is None:
                return output
            own = {name.removeprefix("nets.0.0."): leaf for name, leaf in lam.items()}
            change = functional_call(self.network, own, (seen[0], None))
            return output + change * (batch["language"] >= 0)[:, None, None]

        handle = self.base.roberta.encoder.layer[0].register_forward_hook(hook)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        out = functional_call(self.base, w, (), inputs).logits
        handle.remove()
        return out, seen[0]

    @staticmethod
    def rows(logits: Tensor, batch: Any) -> Tensor:
        """Summed cross-entropy of each row."""
        labelled = batch["labels"] != IGNORED
        chosen = logits.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None]).squeeze(-1)
        return -(chosen * labelled).sum(1)

    def inner(self, w: Tree, lam: Tree, window: Any, frozen: list[Tensor] | None = None) -> Tensor:
        source, target, counts = 0.0, 0.0, [0, 0]
        for index, batch in enumerate(window):
            logits, _ = self.logits(w, batch, lam, None if frozen is None else frozen[index])
            losses, of_target = self.rows(logits, batch), batch["language"] < 0
            source, target = source + losses[~of_target].sum(), target + losses[of_target].sum()
            for side, chosen in enumerate((~of_target, of_target)):
                counts[side] += int((batch["labels"][chosen] != IGNORED).sum())
        return source / counts[0] + target / counts[1]

    def outer(self, w: Tree, window: Any) -> Tensor:
        total = sum(self.rows(self.logits(w, batch)[0], batch).sum() for batch in window)
        return total / sum(int((batch["labels"] != IGNORED).sum()) for batch in window)

    def step(self, kind: str, record: dict[str, Any], lam: Tree, limit: float) -> Tree:
        """The optimiser's step from the recorded point, as a function of lam."""
        w = {name: leaf.requires_grad_() for name, leaf in record["w"].items()}
        loss = self.inner(w, lam, record["window"][0])
        grads = torch.autograd.grad(loss, list(w.values()), create_graph=True, materialize_grads=True)
        norm = sum(g.square().sum() for g in grads).sqrt()
        factor = limit / (norm + 1e-6) if limit and norm + 1e-6 > limit else 1.0
        return {
            name: one_step(kind, w[name], g * factor, record["hyper"][name], record["state"][name])
            for name, g in zip(w, grads, strict=True)
        }

    def through_the_step(self, kind: str, record: dict[str, Any], limit: float) -> tuple[Tree, Tree]:
        """The hypergradient of one_step, and the weights after the step."""
        lam = {name: leaf.requires_grad_() for name, leaf in record["lam"].items()}
        after = self.step(kind, record, lam, limit)
        found = torch.autograd.grad(self.outer(after, record["window"][1]), list(lam.values()))
        return dict(zip(lam, found, strict=True)), {name: leaf.detach() for name, leaf in after.items()}

    def through_the_copies(self, record: dict[str, Any], noise: list[Tree], temperature: float) -> Tree:
        """The hypergradient of evograd with given perturbations: from before the step, in either order."""
        w = {n: leaf.detach() for n, leaf in record["w"].items()}
        lam = {name: leaf.detach().requires_grad_() for name, leaf in record["lam"].items()}
        train, judge = record["window"]
        frozen = [self.logits(w, batch, lam)[1] for batch in train]
        copies = [{name: leaf + eps[name] for name, leaf in w.items()} for eps in noise]
        losses = torch.stack([self.inner(one, lam, train, frozen) for one in copies])
        shares = torch.softmax(-losses / temperature, 0)
        value = {name: sum(share * one[name] for share, one in zip(shares, copies, strict=True)) for name in w}
        return dict(zip(lam, torch.autograd.grad(self.outer(value, judge), list(lam.values())), strict=True))


def one_step(kind: str, w: Tensor, g: Tensor, hyper: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """torch's update of one tensor from its published formulas."""
    lr, decay = hyper["lr"], hyper["weight_decay"]
    if kind == "sgd":
        return w - lr * (g + decay * w)
    if kind == "torch":
        return torchs_own_step(w, g, hyper, state)
    if kind == "adam":
        g = g + decay * w
    else:
        w = w * (1 - lr * decay)
    (b1, b2), t = hyper["betas"], int(state.get("step", 0)) + 1
    m = b1 * state.get("exp_avg", 0.0) + (1 - b1) * g
    v = b2 * state.get("exp_avg_sq", 0.0) + (1 - b2) * g**2
    seen = v > 0  # embeddings that never occurred have no gradient, for any lam
    root = torch.where(seen, v / (1 - b2**t), 1.0).sqrt()
    return w - lr * torch.where(seen, m / (1 - b1**t) / (root + hyper["eps"]), 0.0)


def torchs_own_step(w: Tensor, g: Tensor, hyper: dict[str, Any], state: dict[str, Any]) -> Tensor:
    """The step that torch.optim.SGD makes, on a buffer that is there already, differentiable in the gradient."""
    after = w.detach().clone()
    optimizer = torch.optim.SGD([after], lr=1.0, differentiable=True)
    optimizer.param_groups[0].update({**hyper, "differentiable": True, "foreach": False})
    optimizer.state[after]["momentum_buffer"] = state["momentum_buffer"].clone()
    after.grad = g
    optimizer.step()
    return after


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {"optim": "adamw_torch_fused", "weight_decay": 0.1, "learning_rate": 1e-2}),
    "coupled": ("adam", {"optimizer_class": "Adam", "weight_decay": 0.1, "learning_rate": 1e-2}),
    "sgd": ("sgd", {"optim": "sgd", "learning_rate": 0.1}),
    "nesterov": (
        "torch",
        {
            "optimizer_class": "SGD",
            "optimizer_kwargs": {"momentum": 0.9, "nesterov": True},
            "weight_decay": 0.1,
            "learning_rate": 0.1,
        },
    ),
    "dampened": (
        "torch",
        {
            "optimizer_class": "SGD",
            "optimizer_kwargs": {"momentum": 0.9, "dampening": 0.4},
            "learning_rate": 0.1,
        },
    ),
    "decayed_sgd": ("sgd", {"optimizer_class": "SGD", "weight_decay": 0.1, "learning_rate": 0.1}),
}


def recorded_run(folder: Path, **fields: Any) -> Recorder:
    """Four steps of two micro-batches under a scheduled rate, the meta parameters moved by minus the hypergradient."""
    recorder = Recorder()
    recorder.trainer = tiny_trainer(
        folder,
        tagger=tiny_tagger(torch.float64, dropout=False),
        trainer={"callbacks": [recorder]},
        max_steps=4,
        warmup_steps=1,
        gradient_accumulation_steps=2,
        meta_optim="SGD",
        meta_learning_rate=1.0,
        meta_lr_scheduler_type="constant",
        **fields,
    )
    recorder.trainer.train()
    assert len(recorder.steps) == 4
    assert len({step["hyper"]["classifier.bias"]["lr"] for step in recorder.steps}) == 4
    return recorder


LIMITS = (0.0, 0.3, 100.0)
REAL_STEPS = [  # AdamW with every limit, each optimiser clipped after the step, engines ahead of it
    *(("double_backward", "adamw", "lookahead", limit) for limit in LIMITS),
    *(("double_backward", name, "after_step", 0.3) for name in OPTIMIZERS),
    ("jvp", "adamw", "after_step", 100.0),
    ("jvp", "nesterov", "lookahead", 0.0),
    ("finite_difference", "adamw", "after_step", 0.3),
    ("finite_difference", "sgd", "lookahead", 100.0),
]


@pytest.mark.parametrize(
    ("engine", "optimizer", "order", "limit"),
    REAL_STEPS,
    ids=lambda value: value if isinstance(value, str) else f"clip {value}",
)
def test_one_step_is_the_derivative_of_the_real_step(
    tmp_path: Path, engine: str, optimizer: str, order: str, limit: float
) -> None:
    kind, settings = OPTIMIZERS[optimizer]
    recorder = recorded_run(tmp_path, meta_order=order, max_grad_norm=limit, **settings, **ESTIMATES[engine])
    norms = logged(recorder.trainer, "grad_norm")
    assert all(0.3 < norm < 100 for norm in norms)  # one limit clips every step, the other none
    first, *others = recorder.steps
    assert different(first["lam"], first["after"]["lam"]) == []  # at a learning rate of zero
    by_hand = ByHand()
    for index, record in enumerate(others):
        # The base step of `lookahead` is made with the new meta parameters.
        expected, after = by_hand.through_the_step(kind, record, limit)
        close(minus(record["lam"], record["after"]["lam"]), expected, 1e-8 if engine != "finite_difference" else 1e-6)
        if order == "lookahead":
            after = {n: x.detach() for n, x in by_hand.step(kind, record, record["after"]["lam"], limit).items()}
        close(record["after"]["w"], after, 1e-10)
        assert logged(recorder.trainer, "meta_loss")[index] == pytest.approx(
            by_hand.outer(by_hand.step(kind, record, record["lam"], limit), record["window"][1]).item(), rel=1e-9
        )


@pytest.mark.parametrize(("name", "order"), [("evograd", "lookahead"), ("evograd_head", "after_step")])
def test_evograd_is_the_derivative_of_its_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, order: str
) -> None:
    generator = torch.Generator().manual_seed(8)
    head = ESTIMATES[name]["estimator_kwargs"].get("parameters") is not None
    noise = [
        {
            key: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            * (0.05 if not head or key.startswith("classifier") else 0.0)
            for key, leaf in tiny_base(torch.float64).named_parameters()
        }
        for _ in range(3)
    ]

    def injected(passes: PassContext, *args: Any) -> Any:
        rows = passes.problem.rows
        here = [{key: eps[rows[key]] if key in rows else eps for key, eps in one.items()} for one in noise]
        return estimate(replace(passes, noise=here), *args)

    monkeypatch.setattr(meta_level, "estimate", injected)
    settings = OPTIMIZERS["adamw"][1]
    recorder = recorded_run(tmp_path, meta_order=order, **settings, **ESTIMATES[name])
    first, *others = recorder.steps
    assert different(first["lam"], first["after"]["lam"]) == []
    for record in others:
        expected = ByHand().through_the_copies(record, noise, temperature=0.05)
        close(minus(record["lam"], record["after"]["lam"]), expected, 1e-9)


def test_each_step_draws_its_own_noise_from_the_meta_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def spy(passes: PassContext, *args: Any) -> Any:
        seeds.append(passes.seed)
        return estimate(passes, *args)

    monkeypatch.setattr(meta_level, "estimate", spy)
    for meta_seed in (5, 5, 6):
        tiny_trainer(tmp_path, meta_seed=meta_seed, max_steps=2, **ESTIMATES["evograd_head"]).train()
    assert len(set(seeds[:2])) == 2
    assert seeds[:2] == seeds[2:4]
    assert not set(seeds[:2]) & set(seeds[4:])


def test_the_windows_hold_the_meta_rows_in_their_two_parts(tmp_path: Path) -> None:
    meta = random_rows(24, seed=2)
    recorder = Recorder()
    recorder.trainer = tiny_trainer(
        tmp_path, meta=meta, trainer={"callbacks": [recorder]}, gradient_accumulation_steps=2, meta_portion=0.25
    )
    recorder.trainer.train()

    def sentences(batches: Any, language: int) -> list[tuple[int, ...]]:
        return sorted(
            tuple(ids[mask.bool()].tolist())
            for batch in batches
            for ids, mask, of in zip(batch["input_ids"], batch["attention_mask"], batch["language"], strict=True)
            if int(of) == language
        )

    pool, seen = {tuple(ids) for ids in meta["input_ids"]}, []
    for record in recorder.steps:
        train, judge = record["window"]
        assert [len(sentences(train, 0)), len(sentences(train, TARGET)), len(sentences(judge, TARGET))] == [8, 6, 2]
        seen += sentences(train, TARGET) + sentences(judge, TARGET)
    assert set(seen) == pool
    assert len(seen) == len(pool)  # one pass in three windows of twice four


# What a meta step leaves alone


def everything(trainer: MetaTrainer) -> dict[str, Any]:
    model, optimizer = trainer.model, unwrapped(trainer.optimizer)
    return copy.deepcopy(
        {
            "values": dict(model.state_dict()),
            "buffers": dict(model.named_buffers()),
            "modes": [module.training for module in model.modules()],
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "optimizer": optimizer.state_dict(),
            "random": [torch.random.get_rng_state(), random.getstate(), np.random.get_state()],  # noqa: NPY002
            "requires": [p.requires_grad for p in model.parameters()],
        }
    )


@pytest.mark.parametrize(
    ("name", "order", "dropout"),
    [(name, ORDERS[index % 2], index % 4 < 2) for index, name in enumerate(ESTIMATES)],
)
def test_estimating_changes_nothing_but_the_meta_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, order: str, dropout: bool
) -> None:
    calls = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = everything(trainer)
        result = estimate(*args, **kwargs)
        after = everything(trainer)
        calls.append({key: same(before[key], after[key]) for key in before})
        return result

    monkeypatch.setattr(meta_level, "estimate", watched)
    settings: dict[str, Any] = {"max_steps": 4, "meta_order": order, "meta_dropout": dropout, "warmup_steps": 1}
    trainer = tiny_trainer(
        tmp_path, tagger=tiny_tagger(base=SHALLOW), meta_learning_rate=0.0, **settings, **ESTIMATES[name]
    )
    trainer.train()
    assert calls == [dict.fromkeys(calls[0], True)] * 3
    plain = tiny_trainer(tmp_path, tagger=tiny_tagger(base=SHALLOW), estimator="none", **settings)
    plain.train()
    assert different(base_weights(trainer), base_weights(plain)) == []
    assert logged(trainer, "grad_norm") == logged(plain, "grad_norm")
    assert logged(trainer, "loss") == logged(plain, "loss")
    assert same(everything(trainer)["optimizer"], everything(plain)["optimizer"])


# When the meta level steps, and what it says


def meta_moves(folder: Path, **fields: Any) -> tuple[MetaTrainer, list[bool]]:
    recorder = Recorder()
    fields = {"tagger": tiny_tagger(base=SHALLOW)} | fields
    recorder.trainer = tiny_trainer(folder, trainer={"callbacks": [recorder]}, **fields)
    recorder.trainer.train()
    return recorder.trainer, [bool(different(step["lam"], step["after"]["lam"])) for step in recorder.steps]


@pytest.mark.parametrize("order", ORDERS)
def test_a_learning_rate_of_zero_has_no_meta_step(tmp_path: Path, order: str) -> None:
    trainer, moves = meta_moves(tmp_path, max_steps=4, warmup_steps=2, meta_order=order)
    assert logged(trainer, "learning_rate")[0] == 0.0
    assert moves == [False, True, True, True]
    assert len(logged(trainer, "meta_loss")) == 3


@pytest.mark.parametrize("order", ORDERS)
def test_meta_every(tmp_path: Path, order: str) -> None:
    _, moves = meta_moves(tmp_path, max_steps=7, meta_every=3, meta_order=order)
    assert moves == [False, False, True, False, False, True, False]


def test_without_an_estimator_nothing_moves(tmp_path: Path) -> None:
    trainer, moves = meta_moves(tmp_path, estimator="none")
    assert moves == [False, False, False]
    assert trainer.meta_optimizer is None
    assert not any(key.startswith("meta_") for entry in trainer.state.log_history for key in entry)


def test_clipping_of_the_hypergradient(tmp_path: Path) -> None:
    found = []
    for limit in (None, 1e-6, 1e6):
        trainer = tiny_trainer(
            tmp_path,
            tagger=tiny_tagger(torch.float64, dropout=False),
            max_steps=1,
            meta_optim="SGD",
            meta_learning_rate=100.0,
            meta_max_grad_norm=limit,
        )
        start = meta_weights(trainer)
        trainer.train()
        found.append(minus(start, meta_weights(trainer)))
        norm = logged(trainer, "meta_grad_norm")[0]  # of the hypergradient itself, before clipping
        assert norm > 1e-5
    free, clipped, loose = found
    assert different(free, loose) == []
    close(clipped, {name: leaf * 1e-6 / (norm + 1e-6) for name, leaf in free.items()}, 1e-8)


def test_the_meta_rate_has_its_own_schedule_in_base_steps(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.trainer = trainer = tiny_trainer(
        tmp_path,
        max_steps=5,
        meta_optim="SGD",
        meta_learning_rate=0.3,
        meta_lr_scheduler_type="cosine",
        meta_warmup_steps=0.4,
        tagger=tiny_tagger(torch.float64),
        trainer={"callbacks": [recorder]},
    )
    trainer.train()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=5)
    expected = []
    for _ in range(5):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert logged(trainer, "meta_learning_rate") == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) == 5
    for record, rate, norm in zip(recorder.steps, expected, logged(trainer, "meta_grad_norm"), strict=True):
        moved = sum(float(leaf.square().sum()) for leaf in minus(record["lam"], record["after"]["lam"]).values())
        assert moved**0.5 == pytest.approx(rate * norm, rel=1e-9, abs=1e-15)


def test_the_meta_optimiser_is_the_one_asked_for(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, meta_optim="Adam", meta_weight_decay=0.2, meta_adam_epsilon=1e-9)
    trainer.train()
    assert type(trainer.meta_optimizer) is torch.optim.Adam
    group = trainer.meta_optimizer.param_groups[0]
    assert (group["weight_decay"], group["eps"]) == (0.2, 1e-9)
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.model.meta.parameters()}


def test_the_meta_optimiser_has_its_further_settings(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.trainer = trainer = tiny_trainer(
        tmp_path,
        tagger=tiny_tagger(torch.float64),
        trainer={"callbacks": [recorder]},
        meta_optim="SGD",
        meta_optim_kwargs={"momentum": 0.9, "nesterov": True},
        meta_learning_rate=0.5,
        meta_weight_decay=0.1,
        meta_lr_scheduler_type="constant",
    )
    noted = Hypergradients()
    trainer.add_callback(noted)
    trainer.train()
    buffers = {name: torch.zeros_like(leaf) for name, leaf in recorder.steps[0]["lam"].items()}
    for record, found in zip(recorder.steps, noted.grads, strict=True):
        decayed = {name: found[name] + 0.1 * leaf for name, leaf in record["lam"].items()}
        buffers = {name: 0.9 * buffers[name] + g for name, g in decayed.items()}
        expected = {name: 0.5 * (g + 0.9 * buffers[name]) for name, g in decayed.items()}
        close(minus(record["lam"], record["after"]["lam"]), expected, 1e-12)


DIAGNOSTICS = {
    "one_step": {"meta_direction_norm"},
    "evograd": {"meta_effective_copies", "meta_loss_spread"},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_logs_of_the_meta_level(tmp_path: Path, name: str, order: str) -> None:
    trainer = tiny_trainer(
        tmp_path,
        max_steps=4,
        estimator=name,
        meta_order=order,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        trainer={"eval_dataset": random_rows(4, seed=9, language=None)},
    )
    trainer.train()
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(training) == 2
    for entry in training:
        keys = {key for key in entry if key.startswith("meta_")}
        assert keys == {"meta_loss", "meta_grad_norm", "meta_learning_rate", "meta_moved", *DIAGNOSTICS[name]}
        assert all(np.isfinite(entry[key]) for key in keys)
        assert "skipped_meta_steps" not in entry
    evaluation = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluation) == 2
    assert not any(key.startswith("meta_") for entry in evaluation for key in entry)


def test_the_logged_meta_loss_is_the_mean_since_the_last_log(tmp_path: Path) -> None:
    found = []
    for interval in (1, 4):
        trainer = tiny_trainer(tmp_path, max_steps=4, logging_steps=interval)
        trainer.train()
        found.append(logged(trainer, "meta_loss"))
    each, mean = found
    assert mean == pytest.approx([np.mean(each)], rel=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "coupled"])
def test_meta_parameters_stay_out_of_the_base_level(tmp_path: Path, optimizer: str) -> None:
    trainer = tiny_trainer(tmp_path, **OPTIMIZERS[optimizer][1])
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.base.parameters()}
    for parameter in trainer.model.meta.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_weight_decay_of_a_named_optimiser_class_is_on_every_parameter(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, optimizer_class="Adam", weight_decay=0.1, adam_epsilon=1e-7)
    trainer.train()
    optimizer = unwrapped(trainer.optimizer)
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["eps"]) == (0.1, 1e-7)
    assert len(group["params"]) == len(list(trainer.model.base.parameters()))


# Hypergradients that are not finite


class Exploding(CrossLingualTagger):
    """Its outer loss is infinite where `bad` says so, by the number of the evaluation."""

    bad: Callable[[int], bool]
    evaluations = 0

    def outer_loss(self, batch: Any) -> dict[str, Tensor]:
        self.evaluations += 1
        factor = float("inf") if self.bad(self.evaluations - 1) else 1.0
        return {name: losses * factor for name, losses in super().outer_loss(batch).items()}


def exploding(bad: Callable[[int], bool]) -> Exploding:
    tagger = tiny_tagger(base=SHALLOW)
    found = Exploding(tagger.base, tagger.meta, pad_token_id=PAD)
    found.bad = bad
    return found


@pytest.mark.parametrize(
    ("name", "order"), [("jvp", "after_step"), ("evograd_head", "after_step"), ("evograd_head", "lookahead")]
)
def test_an_infinite_hypergradient_skips_the_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, order: str
) -> None:
    with caplog.at_level(logging.WARNING, logger=meta_level.__name__):
        trainer, moves = meta_moves(
            tmp_path,
            tagger=exploding(lambda index: index in (1, 2, 4)),
            max_steps=6,
            max_skipped_meta_steps=3,
            meta_order=order,
            **ESTIMATES[name],
        )
    assert moves == [True, False, False, True, False, True]
    assert trainer.skipped_meta_steps == 3
    assert logged(trainer, "skipped_meta_steps") == [1, 2, 2, 3, 3]
    assert len(logged(trainer, "meta_loss")) == 3
    assert sum("not finite" in record.message for record in caplog.records) == 3
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_too_many_in_a_row_stop_the_run_with_advice(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path, tagger=exploding(lambda index: index in (0, 2, 3, 4)), max_steps=8, max_skipped_meta_steps=3
    )
    with pytest.raises(FloatingPointError, match=r"3 hypergradients in a row were not finite.*lower learning_rate"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.skipped_meta_steps == 4


@pytest.mark.parametrize(
    ("fields", "step"), [({"logging_steps": 1}, 1), ({"save_steps": 2}, 2), ({"logging_strategy": "no"}, 3)]
)
def test_weights_that_are_not_finite_stop_any_run_with_advice(
    tmp_path: Path, fields: dict[str, Any], step: int
) -> None:
    fields = {"max_steps": 3, "logging_steps": 100, "save_strategy": "steps", "save_steps": 100} | fields
    trainer = tiny_trainer(tmp_path, estimator="none", learning_rate=1e300, **fields)
    with pytest.raises(FloatingPointError, match=rf"step {step}: \d+ of \d+ weights are not finite.*lower learning_"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# Trained twice


def test_training_twice_starts_the_meta_rows_anew(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    drawn = trainer.meta_rows.drawn
    trainer.train()
    assert trainer.meta_rows.drawn == drawn == 12  # rows, in three draws


# The saved folder


def test_the_saved_folder_is_a_plain_model_with_its_transform_beside(tmp_path: Path) -> None:
    model, tokenizer = make_synthetic_tagger(SyntheticFamily())
    rtn = RepresentationTransform(model.config.hidden_size, layers=[1])
    tagger = CrossLingualTagger(model, rtn, pad_token_id=tokenizer.pad_token_id)
    trainer = tiny_trainer(tmp_path, tagger=tagger, trainer={"processing_class": tokenizer})
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == make_synthetic_tagger(SyntheticFamily())[0].state_dict().keys()
    assert different(dict(loaded.state_dict()), dict(model.cpu().state_dict())) == []
    assert loaded.config.id2label == model.config.id2label
    transform = RepresentationTransform.from_pretrained(tmp_path)
    assert different(dict(transform.state_dict()), dict(rtn.state_dict())) == []
    assert transform.config == rtn.config
    classify = pipeline("token-classification", model=str(tmp_path), device="cpu")
    found = classify("ka mo bi")
    assert all(entry["entity"] in model.config.label2id for entry in found)
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).estimator == "one_step"


def test_evaluation_never_runs_the_transform(tmp_path: Path) -> None:
    rows = random_rows(6, seed=9, language=0)  # as source rows, which training would transform
    trainer = tiny_trainer(tmp_path, trainer={"eval_dataset": rows})
    trainer.train()
    before, loss = trainer.predict(rows), trainer.evaluate()["eval_loss"]
    plain = Trainer(trainer.model.base, tiny_arguments(tmp_path), data_collator=collate)
    expected = plain.predict(rows.remove_columns("language"))
    for parameter in trainer.model.meta.parameters():
        parameter.data.normal_()
    after = trainer.predict(rows)
    for one in (after, expected):
        assert np.array_equal(before.predictions, one.predictions)
    assert trainer.evaluate()["eval_loss"] == loss == pytest.approx(expected.metrics["test_loss"], rel=1e-6)


# Refusals


@pytest.mark.parametrize("engine", ["double_backward", "jvp"])
def test_second_order_engines_refuse_fused_kernels(tmp_path: Path, engine: str) -> None:
    tagger = tiny_tagger()
    tagger.base.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="use one_step with engine finite_difference, or evograd"):
        tiny_trainer(tmp_path, tagger=tagger, meta_precision="bf16", **ESTIMATES[engine])
    for name in ("finite_difference", "evograd"):
        tiny_trainer(tmp_path, tagger=tagger, meta_precision="bf16", **ESTIMATES[name])


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"trainer": {"meta_dataset": None}}, "estimator 'one_step' needs meta rows: give meta_dataset"),
        ({"meta_portion": 0.0}, "needs meta rows: .*a meta_portion above 0"),
        ({"estimator": "first_order"}, "first_order keeps only the direct term"),
        ({"estimator": "evograd", "estimator_kwargs": {"parameters": "nowhere"}}, "finds none of the base parameters"),
        ({"meta": random_rows(1, seed=1)}, r"the target \(meta\) data set has 1 rows, too few"),
        ({"per_device_meta_batch_size": 1}, "a draw of meta rows has 1 rows, too few"),
        ({"trainer": {"compute_loss_func": summed_loss}}, "has its own losses: leave out compute_loss_func"),
    ],
)
def test_refusals_at_construction(tmp_path: Path, fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what) as error:
        tiny_trainer(tmp_path, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"optim": "rmsprop"}, {"optimizer_class": "RMSprop"}], ids=str)
def test_an_optimiser_without_a_rule_is_refused_before_the_first_step(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    trainer = tiny_trainer(tmp_path, **settings)
    start = base_weights(trainer)
    with pytest.raises(ValueError, match="RMSprop has no rule: use torch's SGD, Adam or AdamW"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert different(start, base_weights(trainer)) == []
    evolved = tiny_trainer(tmp_path, **settings, **ESTIMATES["evograd_head"])
    evolved.train()  # which does not differentiate the step
    assert evolved.state.global_step == 3


# Activation checkpointing


@pytest.mark.parametrize(
    ("with_it", "without"),
    [({}, ESTIMATES["finite_difference"]["estimator_kwargs"]), ({"engine": "finite_difference"}, None)],
    ids=["auto", "finite_difference"],
)
def test_the_auto_engine_is_finite_differences_under_checkpointing(
    tmp_path: Path, with_it: dict[str, Any], without: dict[str, Any] | None, caplog: Any
) -> None:
    order = ORDERS["engine" in with_it]
    radius = {"radius": 1e-4}
    found = []
    for checkpointing, kwargs in (
        (True, {**with_it, **radius}),
        (False, without or {"engine": "finite_difference", **radius}),
    ):
        trainer = tiny_trainer(
            tmp_path,
            tagger=tiny_tagger(torch.float64),
            activation_checkpointing=checkpointing,
            estimator_kwargs=kwargs,
            meta_order=order,
            meta_optim="SGD",
            meta_learning_rate=10.0,
        )
        start = meta_weights(trainer)
        trainer.train()
        assert trainer.model.base.is_activation_checkpointing == checkpointing
        found.append((base_weights(trainer), minus(start, meta_weights(trainer))))
    for one, other in zip(*found, strict=True):
        assert different(one, other) == []
    said = "engine auto takes finite differences here (activation_checkpointing" in caplog.text
    assert said == ("engine" not in with_it)


def test_evograd_is_the_same_under_checkpointing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (True, False):
        trainer = tiny_trainer(
            tmp_path,
            tagger=tiny_tagger(torch.float64),
            activation_checkpointing=checkpointing,
            meta_optim="SGD",
            meta_learning_rate=10.0,
            **ESTIMATES["evograd"],
        )
        start = meta_weights(trainer)
        trainer.train()
        found.append((base_weights(trainer), minus(start, meta_weights(trainer))))
    (base, moved), (plain_base, plain_moved) = found
    close(base, plain_base, 1e-12)
    close(moved, plain_moved, 1e-8)


def test_calls_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(
        ValueError, match=r"^MetaTrainer takes MetaTrainingArguments, and args is a TrainingArguments$"
    ):
        MetaTrainer(tiny_tagger(), arguments)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^unknown argument of MetaTrainer 'meta_dateset': did you mean 'meta_dataset'"
    ):
        tiny_trainer(tmp_path, trainer={"meta_dateset": []})


@pytest.mark.parametrize("estimator", ["one_step", "evograd", "none"])
def test_a_base_that_is_wholly_frozen_is_refused(tmp_path: Path, estimator: str) -> None:
    tagger = tiny_tagger()
    tagger.base.requires_grad_(False)
    trainer = tiny_trainer(tmp_path, tagger=tagger, estimator=estimator)
    with pytest.raises(
        ValueError, match=r"^all parameters of the base \(XLMR.*\) are frozen.*: set requires_grad of some"
    ):
        trainer.train()
