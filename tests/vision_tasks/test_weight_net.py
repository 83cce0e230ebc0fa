"""Meta-Weight-Net: the losses by hand, hypergradients against plain autograd, batch norm that no meta step moves."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, jvp

from metaxl_evo.bilevel import SGD, hypergradient
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.estimators import Estimator, EvoGrad, FirstOrder, OneStep, make_estimator
from metaxl_evo.models.bilevel_module import TOTALS
from metaxl_evo.models.weight_net import WeightNet
from tests.vision_tasks.small import batch_of, flat, off, small_module
from vision_tasks.weight_net import WeightedClassifier

RATE, TEMPERATURE = 0.3, 0.05
TRAIN, JUDGE = batch_of(6, 1), batch_of(5, 2)
Tree = dict[str, Tensor]


# The formulas, written out


def costs_by_hand(module: WeightedClassifier, w: Tree, batch: Any) -> Tensor:
    """(B,) at the weights `w`, in training mode, without touching the module's own buffers."""
    buffers = {name: buffer.clone() for name, buffer in module.base.named_buffers()}
    pixels = (batch["images"] - 0.375) / 0.25
    logits = functional_call(module.base, w | buffers, (pixels,)).logits
    return torch.logsumexp(logits, 1) - logits[torch.arange(len(logits)), batch["labels"]]


def weights_by_hand(lam: Tree, costs: Tensor) -> Tensor:
    """V(c_i) / sum_j V(c_j), (B,)."""
    hidden = (costs[:, None] @ lam["hidden.weight"].T + lam["hidden.bias"]).clamp(min=0)
    values = 1 / (1 + (-(hidden @ lam["out.weight"].T + lam["out.bias"])[:, 0]).exp())
    return values / values.sum()


def leaves(parameters: Tree) -> Tree:
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}


def gradient(value: Tensor, at: Tree, **settings: Any) -> Tree:
    return dict(zip(at, torch.autograd.grad(value, list(at.values()), **settings), strict=True))


def one_step_by_hand(module: WeightedClassifier) -> Tree:
    """Autograd through one SGD step, in one graph."""
    w, lam = leaves(module.base_parameters()), leaves(module.meta_parameters())
    costs = costs_by_hand(module, w, TRAIN)
    slopes = gradient((weights_by_hand(lam, costs.detach()) * costs).sum(), w, create_graph=True)
    after = {name: leaf - RATE * slopes[name] for name, leaf in w.items()}
    return gradient(costs_by_hand(module, after, JUDGE).mean(), lam)


def by_estimator(module: WeightedClassifier, estimator: Estimator, **settings: Any) -> Tree:
    problem = replace(module.problem(SGD(RATE)), **settings.pop("problem", {}))
    w, lam = module.base_parameters(), module.meta_parameters()
    return hypergradient(problem, estimator, w, lam, [TRAIN], [JUDGE], **settings).grads


# The losses


def test_the_inner_loss_by_hand() -> None:
    module = small_module()
    costs = costs_by_hand(module, module.base_parameters(), TRAIN)
    weights = weights_by_hand(module.meta_parameters(), costs.detach())
    assert float(weights.sum()) == pytest.approx(1, rel=1e-12)
    assert float(weights.max() / weights.min()) > 1.2
    torch.testing.assert_close(module.mean_inner_loss(TRAIN), (weights * costs).sum(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(module.train()(**TRAIN)["loss"], (weights * costs).sum(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(module.mean_outer_loss(TRAIN), costs.mean(), rtol=1e-12, atol=0.0)
    plain = small_module(weighted=False)
    torch.testing.assert_close(plain.mean_inner_loss(TRAIN), costs.mean(), rtol=1e-12, atol=0.0)
    mean = small_module(normalisation="mean")
    expected = (mean.meta(costs) * costs).mean()
    torch.testing.assert_close(mean.mean_inner_loss(TRAIN), expected, rtol=1e-12, atol=0.0)
    with pytest.raises(ValueError, match=r"unknown weight_normalisation 'max': .*Valid: sum, mean"):
        small_module(normalisation="max")


def test_the_evaluation_is_the_bases_own() -> None:
    module = small_module().eval()
    found = module(**TRAIN)
    expected = module.base((TRAIN["images"] - 0.375) / 0.25, TRAIN["labels"])
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_weights_that_are_all_zero_are_taken_as_they_are() -> None:
    module = small_module()
    with torch.no_grad():
        module.meta.out.weight.zero_()
        module.meta.out.bias.fill_(-1e4)
    assert float(module.meta(torch.ones(1, dtype=torch.float64))) == 0
    module.meta.requires_grad_()
    loss = module.mean_inner_loss(TRAIN)
    assert loss == 0
    slopes = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True)
    assert all(torch.equal(slope, torch.zeros_like(slope)) for slope in slopes)


def test_the_normaliser_carries_gradient() -> None:
    module = small_module()
    lam = leaves(module.meta_parameters())
    costs = costs_by_hand(module, module.base_parameters(), TRAIN).detach()
    expected = gradient((weights_by_hand(lam, costs) * costs).sum(), lam)
    problem = module.problem(SGD(RATE))
    found = PassContext(problem).lam_grad(module.base_parameters(), module.meta_parameters(), [TRAIN])
    assert off(found, expected) < 1e-12
    total = module.meta(costs).sum().detach()
    without = gradient((functional_call(module.meta, lam, (costs,)) / total * costs).sum(), lam)
    assert off(without, expected) > 0.5


@pytest.mark.parametrize("normalisation", ["sum", "mean"])
def test_micro_batches_are_shares_of_their_window(normalisation: str) -> None:
    module, totals = small_module(normalisation=normalisation), {"items": torch.tensor(6)}
    parts = [{key: held[rows] for key, held in TRAIN.items()} for rows in (slice(0, 2), slice(2, 6))]
    losses = [module.mean_inner_loss(part | {TOTALS: totals}) for part in parts]
    alone = [module.mean_inner_loss(part) for part in parts]
    torch.testing.assert_close(sum(losses), (2 * alone[0] + 4 * alone[1]) / 6, rtol=1e-12, atol=0.0)
    whole = module.mean_inner_loss(TRAIN)
    assert torch.allclose(sum(losses), whole, rtol=1e-12) == (normalisation == "mean")  # a sum is of one micro-batch
    judged = sum(module.mean_outer_loss(part | {TOTALS: totals}) for part in parts)
    torch.testing.assert_close(judged, module.mean_outer_loss(TRAIN), rtol=1e-12, atol=0.0)


def test_there_is_no_direct_term() -> None:
    module = small_module()
    for problem in ({}, {"direct_term": None}):
        with pytest.raises(ValueError, match="first_order keeps only the direct term, and this outer loss does not"):
            by_estimator(module, FirstOrder(), problem=problem)
    assert not module.direct_term
    assert module.stop_gradients


# Hypergradients


@pytest.mark.parametrize("base", ["convnet", "resnet"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"engine": "double_backward"}, 1e-12),
        ({"engine": "jvp"}, 1e-12),
        ({"engine": "finite_difference", "radius": 1e-5}, 1e-6),
    ],
)
def test_one_step_is_autograd_through_the_step(base: str, settings: dict[str, Any], tolerance: float) -> None:
    """Of a resnet in training mode, whose batch norm uses the batch's own statistics in both passes."""
    module = small_module(base).train()
    expected = one_step_by_hand(module)
    assert off(by_estimator(module, OneStep(**settings)), expected) < tolerance
    if base == "resnet":
        assert off(by_estimator(module.eval(), OneStep(**settings)), expected) > 0.1


def test_the_cheap_form_needs_no_graph_of_the_network() -> None:
    """h = -rate sum_i d wt_i / d lam <grad_w c_i, v>: a jvp of the costs, and a backward through V alone."""
    module = small_module()
    w, lam = {name: p.detach() for name, p in module.base_parameters().items()}, leaves(module.meta_parameters())
    here = leaves(w)
    costs = costs_by_hand(module, here, TRAIN)
    slopes = gradient((weights_by_hand(lam, costs).detach() * costs).sum(), here)
    after = leaves({name: leaf - RATE * slopes[name] for name, leaf in w.items()})
    v = gradient(costs_by_hand(module, after, JUDGE).mean(), after)
    _, along = jvp(lambda at: costs_by_hand(module, at, TRAIN), (w,), (v,))
    expected = gradient(-RATE * (weights_by_hand(lam, costs.detach()) * along).sum(), lam)
    for engine in ("double_backward", "jvp"):
        assert off(by_estimator(module, make_estimator("one_step", engine=engine)), expected) < 1e-12
    assert off(expected, one_step_by_hand(module)) < 1e-12


def test_live_inputs_would_give_something_else() -> None:
    """V of the perturbed costs, as a finite difference without recorded inputs sees it, is another derivative."""
    module = small_module()
    naive = by_estimator(
        module, OneStep("finite_difference", 1e-5), problem={"stop_gradients": False, "straight_through": True}
    )
    assert off(naive, one_step_by_hand(module)) > 0.1


def evograd_by_hand(module: WeightedClassifier, noise: list[Tree], *, frozen: bool) -> Tree:
    """sum_k a_k d_lam l_k, a_k = -(w_k / temperature) (s_k - sum_j w_j s_j)."""
    w, lam = {name: p.detach() for name, p in module.base_parameters().items()}, leaves(module.meta_parameters())
    here = costs_by_hand(module, w, TRAIN)
    losses = []
    for eps in noise:
        costs = costs_by_hand(module, {name: leaf + eps[name] for name, leaf in w.items()}, TRAIN)
        losses.append((weights_by_hand(lam, here if frozen else costs) * costs).sum())
    share = torch.softmax(-torch.stack(losses).detach() / TEMPERATURE, 0)
    mixed = leaves(
        {name: leaf + sum(s * eps[name] for s, eps in zip(share, noise, strict=True)) for name, leaf in w.items()}
    )
    v = gradient(costs_by_hand(module, mixed, JUDGE).mean(), mixed)
    along = torch.stack([flat(v) @ flat(eps) for eps in noise])
    factors = -share / TEMPERATURE * (along - share @ along)
    return gradient((factors * torch.stack(losses)).sum(), lam)


@pytest.mark.parametrize("base", ["convnet", "resnet"])
def test_evograd_is_its_closed_form_on_the_recorded_costs(base: str) -> None:
    module = small_module(base).train()
    generator = torch.Generator().manual_seed(3)
    noise = [
        {name: 1e-2 * torch.randn(p.shape, generator=generator).to(p) for name, p in module.base_parameters().items()}
        for _ in range(3)
    ]
    found = {
        frozen: by_estimator(module, EvoGrad(copies=3, temperature=TEMPERATURE, share_meta_inputs=frozen), noise=noise)
        for frozen in (True, False)
    }
    for frozen, grads in found.items():
        assert off(grads, evograd_by_hand(module, noise, frozen=frozen)) < 1e-10
    assert off(found[False], found[True]) > 0.1


# Batch norm


def state_of(module: WeightedClassifier) -> dict[str, Any]:
    return {
        "tensors": {name: value.clone() for name, value in module.state_dict(keep_vars=False).items()},
        "pixels": (module.image_mean.clone(), module.image_std.clone()),
        "places": [id(held) for held in (*module.parameters(), *module.buffers())],
        "modes": [part.training for part in module.modules()],
        "tracking": [getattr(part, "track_running_stats", None) for part in module.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "random": (torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),  # noqa: NPY002
    }


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(np.all(a == b))


@pytest.mark.parametrize(
    ("name", "training"), [("one_step", True), ("one_step", False), ("evograd", True), ("hyperdistill", True)]
)
def test_a_hypergradient_leaves_everything_as_it_was(name: str, training: bool) -> None:
    module = small_module("resnet", hidden=2, dtype=torch.float32).train()
    train, judge = batch_of(6, 1, dtype=torch.float32), batch_of(5, 2, dtype=torch.float32)
    module(**train)["loss"].backward()
    module.train(training)
    module.base.blocks[1].first_norm.eval()  # which the user froze
    before = state_of(module)
    assert sum("running" in key or "tracked" in key for key in before["tensors"]) == 3 * 7
    result = hypergradient(
        module.problem(SGD(RATE)),
        make_estimator(name),
        module.base_parameters(),
        module.meta_parameters(),
        [train],
        [judge],
    )
    assert flat(result.grads).norm() > 0
    assert bool(flat(result.grads).isfinite().all())
    after = state_of(module)
    assert {key: alike(before[key], after[key]) for key in before} == dict.fromkeys(before, True)


def test_the_base_step_moves_the_statistics() -> None:
    module, train = small_module("resnet", dtype=torch.float32).train(), batch_of(6, 1, dtype=torch.float32)
    before = state_of(module)["tensors"]
    module(**train)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    buffers = {f"base.{name}" for name, _ in module.base.named_buffers()}
    assert moved == buffers
    assert len(buffers) == 3 * 7
    stem = module.base.stem[0]((train["images"] - 0.375) / 0.25)
    expected = 0.1 * stem.mean((0, 2, 3))
    torch.testing.assert_close(module.base.stem[1].running_mean, expected.detach())


# Files


def test_both_levels_are_saved_and_loaded_bit_by_bit(tmp_path: Path) -> None:
    module = small_module("resnet", dtype=torch.float32).train()
    module(**batch_of(6, 1, dtype=torch.float32))
    module.save_pretrained(tmp_path)
    assert sorted(path.name for path in (tmp_path / "weight_net").iterdir()) == ["config.json", "model.safetensors"]
    fresh = small_module("resnet", dtype=torch.float32)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    fresh.load_pretrained(tmp_path)
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    assert torch.equal(WeightNet.from_pretrained(tmp_path)(torch.arange(3.0)), module.meta(torch.arange(3.0)))
