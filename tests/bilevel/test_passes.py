"""The pass context: shared randomness, an untouched world, record and replay, parts, attention kernels."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metaxl_evo import bilevel
from metaxl_evo.bilevel import (
    SGD,
    BilevelProblem,
    PassContext,
    Tree,
    gate,
    hypergradient,
    run_episode,
    stop_gradient,
    tree,
)
from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.bilevel.replay import Facts, Inputs, for_this_pass, kind_of
from metaxl_evo.estimators import Estimator, EvoGrad, OneStep
from tests.estimators.problems import cut_network, network, quadratic, relative_error

ESTIMATES: dict[str, Estimator] = {
    "double_backward": OneStep("double_backward"),
    "jvp": OneStep("jvp"),
    "finite_difference": OneStep("finite_difference", radius=1e-3),
    "evograd": EvoGrad(copies=4, sigma=0.05),
}
on_estimates = pytest.mark.parametrize("name", ESTIMATES)
N = 4000


# Randomness ----------------------------------------------------------------------------------------------------------


@dataclass
class Masks:
    """A problem with dropout, which keeps every mask it drew and the weights it was called with."""

    drawn: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def loss(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        mask = F.dropout(torch.ones(N, dtype=torch.float64), 0.5)
        self.drawn.append(mask)
        self.weights.append(w["x"].detach())
        return (mask * (w["x"] - lam["y"]).square()).mean()

    def problem(self, **options: Any) -> BilevelProblem:
        known = Facts(batched_whole=False)  # no passes to find out about the loss
        known.trusted.note(type(None), frozenset(W), True)
        known.forward_ad.note(type(None), frozenset((0, 1)), True)
        return BilevelProblem(self.loss, lambda w, lam, batch: w["x"].square().sum(), SGD(0.1), facts=known, **options)


W = {"x": torch.linspace(-1, 1, N, dtype=torch.float64)}
LAM = {"y": torch.tensor(0.3, dtype=torch.float64)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@on_estimates
def test_every_pass_of_a_meta_step_has_the_same_mask(name: str) -> None:
    masks = Masks()
    hypergradient(masks.problem(), ESTIMATES[name], W, LAM, None, None, generator=seeded())
    assert len(masks.drawn) >= 2
    assert all(torch.equal(mask, masks.drawn[0]) for mask in masks.drawn)
    assert 0.45 < float((masks.drawn[0] > 0).double().mean()) < 0.55


def test_the_mask_follows_the_generator() -> None:
    masks = [Masks() for _ in range(3)]
    for one, seed in zip(masks, (0, 0, 1), strict=True):
        hypergradient(one.problem(), OneStep(), W, LAM, None, None, generator=seeded(seed))
    assert torch.equal(masks[0].drawn[0], masks[1].drawn[0])
    assert not torch.equal(masks[0].drawn[0], masks[2].drawn[0])


def test_independent_masks_are_an_option_of_evograd() -> None:
    masks = Masks()
    estimator = EvoGrad(copies=4, share_randomness=False)
    hypergradient(masks.problem(), estimator, W, LAM, None, None, generator=seeded())
    assert len({tuple(mask.tolist()) for mask in masks.drawn}) == 4


def test_parts_have_masks_of_their_own() -> None:
    masks = Masks()
    problem = masks.problem(parts=lambda batch: batch)
    hypergradient(problem, ESTIMATES["finite_difference"], W, LAM, [None, None], [None], generator=seeded())
    assert len(masks.drawn) == 6
    assert not torch.equal(masks.drawn[0], masks.drawn[1])
    for index, mask in enumerate(masks.drawn):
        assert torch.equal(mask, masks.drawn[index % 2])


@pytest.mark.parametrize("antithetic", [False, True])
def test_perturbations_are_independent_of_the_masks(antithetic: bool) -> None:
    """Both come from seeds; the same stream for both would tie each weight's noise to whether it is dropped."""
    masks = Masks()
    estimator = EvoGrad(copies=4, sigma=1.0, antithetic=antithetic)
    hypergradient(masks.problem(), estimator, tree.zeros_like(W), LAM, None, None, generator=seeded())
    for noise in masks.weights:
        correlation = float(torch.corrcoef(torch.stack([noise, masks.drawn[0]]))[0, 1])
        assert abs(correlation) < 5 / N**0.5


def test_an_episodes_last_step_and_its_estimate_share_their_mask() -> None:
    """T1-T2 differentiates the very step that was made; other steps drop other units."""
    masks = Masks()
    problem = masks.problem()
    for _ in range(2):  # the first finds out about the loss as well
        masks.drawn.clear()
        run_episode(problem, ESTIMATES["jvp"], W, LAM, [None] * 3, None, generator=seeded())
    assert len(masks.drawn) == 4
    assert torch.equal(masks.drawn[2], masks.drawn[3])
    assert not torch.equal(masks.drawn[0], masks.drawn[1])
    assert not torch.equal(masks.drawn[1], masks.drawn[2])


def test_mixed_seeds_do_not_collide() -> None:
    keys = [(s, *k) for s in (0, 1, 2**62) for k in [(0,), (1,), (0, 0), (0, 1), (1, 0), (2, 7), (7, 2), (0, 0, 0)]]
    seeds = [mix_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


# The world outside ---------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Dropout, batch norm and a meta layer in train mode: everything that a pass could leave a trace in."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2))
        self.meta = nn.Linear(2, 2)

    def loss(self, batch: tuple[Tensor, Tensor], through_meta: bool) -> Tensor:
        out = self.base(batch[0])
        return F.cross_entropy(out + self.meta(out) if through_meta else out, batch[1])


def module_problem(module: Tagger) -> BilevelProblem:
    """The module's own parameters swapped in place for the length of a pass, its buffers frozen."""

    @contextmanager
    def swapped(w: Tree, lam: Tree) -> Iterator[None]:
        live = {f"base.{n}": x for n, x in w.items()} | {f"meta.{n}": x for n, x in lam.items()}
        with torch.nn.utils.stateless._reparametrize_module(module, live):
            yield

    @contextmanager
    def frozen_buffers() -> Iterator[None]:
        norm: Any = module.base[1]
        norm.track_running_stats = False  # batch statistics, nothing written
        try:
            yield
        finally:
            norm.track_running_stats = True

    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        with for_this_pass(swapped(w, lam)):
            return module.loss(batch, through_meta=True)

    def outer(w: Tree, lam: Tree, batch: Any) -> Tensor:
        with for_this_pass(swapped(w, lam)):
            return module.loss(batch, through_meta=False)

    return BilevelProblem(inner, outer, SGD(0.1), scope=frozen_buffers)


def parameters(module: nn.Module) -> Tree:
    return {**dict(module.named_parameters())}


def test_a_modules_state_survives_bitwise() -> None:
    torch.manual_seed(0)
    module = Tagger().double().train()
    batch = torch.randn(12, 3, dtype=torch.float64), torch.randint(0, 2, (12,))
    module.loss(batch, True).backward()
    module.base[0].weight.requires_grad_(False)
    before = {n: x.clone() for n, x in module.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    identities = {n: id(p) for n, p in module.named_parameters()}
    rng, modes = torch.get_rng_state(), [m.training for m in module.modules()]

    for estimator in ESTIMATES.values():
        w, lam = parameters(module.base), parameters(module.meta)
        result = hypergradient(module_problem(module), estimator, w, lam, batch, batch, generator=seeded())
        assert tree.norm(result.grads) > 0

    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in module.modules()] == modes
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
    assert {n: id(p) for n, p in module.named_parameters()} == identities
    assert all(torch.equal(x, before[n]) for n, x in module.state_dict().items())
    for n, p in module.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, grads[n])


def test_the_engines_agree_on_swapped_weights_with_dropout_on() -> None:
    torch.manual_seed(0)
    module = Tagger().double().train()
    batch = torch.randn(12, 3, dtype=torch.float64), torch.randint(0, 2, (12,))
    w, lam = parameters(module.base), parameters(module.meta)
    found = {
        name: hypergradient(module_problem(module), ESTIMATES[name], w, lam, batch, batch, generator=seeded()).grads
        for name in ("double_backward", "jvp", "finite_difference")
    }
    assert relative_error(found["jvp"], found["double_backward"]) < 1e-12
    assert relative_error(found["finite_difference"], found["double_backward"]) < 1e-6


def test_an_error_in_the_loss_leaves_nothing_behind() -> None:
    rng = torch.get_rng_state()
    seen: list[str] = []

    @contextmanager
    def scope() -> Iterator[None]:
        try:
            yield
        finally:
            seen.append("left")

    def broken(w: Tree, lam: Tree, batch: Any) -> Tensor:
        torch.rand(3)
        raise ZeroDivisionError

    problem = BilevelProblem(broken, broken, SGD(0.1), scope=scope)
    with pytest.raises(ZeroDivisionError):
        hypergradient(problem, OneStep(), W, LAM, None, None)
    assert seen == ["left"]
    assert torch.equal(torch.get_rng_state(), rng)
    assert stop_gradient(W["x"]).data_ptr() == W["x"].data_ptr()  # no pass is running any more


class Watch:
    """A scope that knows whether it is open, and losses that check it in the forward and (by a hook) the backward."""

    def __init__(self) -> None:
        self.open, self.entered, self.outside = False, 0, 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        assert not self.open
        self.open, self.entered = True, self.entered + 1
        try:
            yield
        finally:
            self.open = False

    def check(self, *_: Any) -> None:
        self.outside += not self.open

    def watched(self, loss: Any) -> Any:
        def run(*inputs: Any) -> Tensor:
            self.check()
            value = loss(*inputs)
            if value.requires_grad:
                value.register_hook(self.check)
            return value

        return run


@pytest.mark.parametrize("name", ["double_backward", "finite_difference", "evograd"])  # jvp: no hooks under functorch
@pytest.mark.parametrize("gradients", [False, True], ids=["plain", "stop_gradients"])
def test_forward_and_backward_lie_in_one_scope_a_pass(name: str, gradients: bool) -> None:
    toy, watch, facts = network(torch.float64), Watch(), Facts(batched_whole=False)
    facts.trusted.note(kind_of(toy.train), frozenset(toy.w), True)
    problem = replace(
        toy.problem, scope=watch.scope, inner_loss=watch.watched(toy.problem.inner_loss),
        outer_loss=watch.watched(toy.problem.outer_loss), stop_gradients=gradients,
        facts=facts,
    )  # fmt: skip
    counts = hypergradient(problem, ESTIMATES[name], toy.w, toy.lam, toy.train, toy.val).counts
    assert watch.entered == counts.forwards + counts.hvps
    assert watch.outside == 0


def test_a_cut_is_still_known_by_its_old_name() -> None:
    toy = cut_network(torch.float64)
    with pytest.warns(FutureWarning, match="cut=... now"):
        problem = replace(toy.problem, cut=None, split=toy.problem.cut)
    assert problem.cut is toy.problem.cut
    assert replace(problem, rows={}).cut is toy.problem.cut  # and no second warning
    with pytest.warns(FutureWarning, match="Cut now"):
        assert bilevel.Split is bilevel.Cut


def test_the_shared_pass_of_a_cut_runs_its_backward_inside_a_scope() -> None:
    """Swapped-in meta weights and checkpointed layers are only right inside."""
    toy, watch = cut_network(torch.float64), Watch()
    cut = toy.problem.cut
    assert cut is not None
    problem = replace(toy.problem, scope=watch.scope, cut=replace(cut, hidden=watch.watched(cut.hidden)))
    estimator = EvoGrad(parameters="head")
    assert hypergradient(problem, estimator, toy.w, toy.lam, toy.train, toy.val).counts.suffixes > 0
    assert watch.outside == 0


@on_estimates
def test_autocast_around_a_hypergradient_changes_nothing(name: str) -> None:
    """Finite differences would be of the few digits that it leaves."""
    toy = network(torch.float32)
    plain = hypergradient(toy.problem, ESTIMATES[name], toy.w, toy.lam, toy.train, toy.val, generator=seeded()).grads
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hypergradient(toy.problem, ESTIMATES[name], toy.w, toy.lam, toy.train, toy.val, generator=seeded())
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(found.grads[key], plain[key]) for key in plain)


@on_estimates
def test_inference_mode_is_refused_and_no_grad_is_not(name: str) -> None:
    toy = network(torch.float64)
    point = toy.w, toy.lam, toy.train, toy.val
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch.inference_mode\(\) switches off"):
        hypergradient(toy.problem, ESTIMATES[name], *point)
    with torch.no_grad():
        found = hypergradient(toy.problem, ESTIMATES[name], *point, generator=seeded()).grads
    expected = hypergradient(toy.problem, ESTIMATES[name], *point, generator=seeded()).grads
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# Record and replay ---------------------------------------------------------------------------------------------------


def passes() -> PassContext:
    return PassContext(quadratic(torch.float64).problem)


def test_outside_a_pass_stop_gradient_is_detach() -> None:
    x = torch.ones(2, requires_grad=True)
    assert not stop_gradient(x).requires_grad
    assert stop_gradient(x).data_ptr() == x.data_ptr()


def test_live_passes_see_the_present_and_replayed_ones_the_recorded() -> None:
    context = passes()
    first, second = torch.ones(2, requires_grad=True), torch.full((2,), 5.0)
    with context.scope(0, inputs=Inputs.RECORD):
        assert torch.equal(stop_gradient(first), first)
        assert not stop_gradient(first * 3).requires_grad
    with context.scope(0):
        assert torch.equal(stop_gradient(second), second)
    for _ in range(2):  # every replayed pass starts from the beginning
        with context.scope(0, inputs=Inputs.REPLAY):
            assert torch.equal(stop_gradient(second), torch.ones(2))
            assert torch.equal(stop_gradient(second), torch.full((2,), 3.0))


def test_the_tape_keeps_values_and_not_tensors_that_change() -> None:
    context, x = passes(), torch.ones(2)
    with context.scope(0, inputs=Inputs.RECORD):
        stop_gradient(x)
    x.mul_(7.0)
    with context.scope(0, inputs=Inputs.REPLAY):
        assert torch.equal(stop_gradient(x), torch.ones(2))


def test_every_part_has_a_tape_of_its_own() -> None:
    context = passes()
    for part in (0, 1):
        with context.scope(part, inputs=Inputs.RECORD):
            stop_gradient(torch.full((1,), float(part)))
    for part in (1, 0):
        with context.scope(part, inputs=Inputs.REPLAY):
            assert float(stop_gradient(torch.zeros(1))) == part


def test_more_calls_than_recorded_is_an_error() -> None:
    context = passes()
    with context.scope(0, inputs=Inputs.RECORD):
        stop_gradient(torch.ones(1))
    with context.scope(0, inputs=Inputs.REPLAY):
        stop_gradient(torch.ones(1))
        with pytest.raises(RuntimeError, match="more often than the recorded one"):
            stop_gradient(torch.ones(1))
    with pytest.raises(RuntimeError, match="more often"), context.scope(1, inputs=Inputs.REPLAY):
        stop_gradient(torch.ones(1))


def test_keyed_inputs_are_replayed_however_often_and_in_whatever_order() -> None:
    context = passes()
    first, second, plain = torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0)
    with context.scope(0, inputs=Inputs.RECORD):
        stop_gradient(first, key=0)
        stop_gradient(plain)
        stop_gradient(second, key="b")
        for place, again in (("b", second), (0, first)):  # as a backward recomputes the layers
            assert not stop_gradient(again.clone().requires_grad_(), key=place).requires_grad
    orders: tuple[tuple[int | str, ...], ...] = ((0, "b", "b", 0), ("b", 0))
    for order in orders:
        with context.scope(0, inputs=Inputs.REPLAY):
            moved = [stop_gradient(torch.zeros(2), key=key) for key in order]
            assert torch.equal(stop_gradient(torch.zeros(2)), plain)  # has a tape of its own
        for key, found in zip(order, moved, strict=True):
            assert torch.equal(found, first if key == 0 else second)


@pytest.mark.parametrize("other", [torch.full((2,), 2.0), torch.ones(3), torch.tensor([1.0, float("nan")])])
def test_a_key_that_stands_for_two_inputs_is_an_error(other: Tensor) -> None:
    with passes().scope(0, inputs=Inputs.RECORD):
        stop_gradient(torch.ones(2), key="layer 3")
        with pytest.raises(RuntimeError, match="two different values with key 'layer 3' in one pass: give each call"):
            stop_gradient(other, key="layer 3")


def test_a_recomputed_input_that_is_not_finite_is_the_same_one() -> None:
    """The meta step of a run that diverges is skipped and counted, not a crash."""
    x = torch.tensor([1.0, float("nan"), float("inf")])
    with passes().scope(0, inputs=Inputs.RECORD):
        stop_gradient(x, key=0)
        stop_gradient(x.clone(), key=0)


def test_a_key_that_was_not_recorded_is_an_error() -> None:
    context = passes()
    with context.scope(0, inputs=Inputs.RECORD):
        stop_gradient(torch.ones(1), key=0)
    with (
        context.scope(0, inputs=Inputs.REPLAY),
        pytest.raises(RuntimeError, match="recorded one, with key 1: the loss"),
    ):
        stop_gradient(torch.ones(1), key=1)


def test_recording_happens_once_and_only_where_there_are_stop_gradients() -> None:
    toy = network(torch.float64)
    context = PassContext(toy.problem)
    for _ in range(2):
        assert gate.record(context, toy.w, toy.lam, toy.train) is Inputs.REPLAY
    assert context.counts.forwards == 1
    plain = PassContext(replace(toy.problem, stop_gradients=False))
    assert gate.record(plain, toy.w, toy.lam, toy.train) is Inputs.LIVE
    assert plain.counts.forwards == 0


@pytest.mark.parametrize("draw", [torch.rand, random.random, np.random.rand, None])
def test_nothing_is_kept_of_a_forward_with_random_numbers_of_its_own(draw: Any) -> None:
    """The passes draw others: what it detached is not what they would detach."""
    toy = network(torch.float64)
    context = PassContext(replace(toy.problem, stop_gradients=True))
    with context.recording(0):
        toy.problem.inner_loss(toy.w, toy.lam, toy.train)
        if draw is not None:
            draw(*[1] * (draw is torch.rand))
    gate.record(context, toy.w, toy.lam, toy.train)
    assert context.counts.forwards == (draw is not None)


def test_managers_for_a_pass_end_with_it() -> None:
    state: list[str] = []

    @contextmanager
    def manager(name: str) -> Iterator[None]:
        state.append(f"+{name}")
        yield
        state.append(f"-{name}")

    with for_this_pass(manager("alone")):
        pass
    with passes().scope(0):
        with for_this_pass(manager("a")):
            pass
        with for_this_pass(manager("b")):
            pass
        state.append("backward")
    assert state == ["+alone", "-alone", "+a", "+b", "backward", "-b", "-a"]


# Activation checkpointing --------------------------------------------------------------------------------------------


def checkpointed(meta_inside: bool, on: bool, *, keyed: bool = True) -> BilevelProblem:
    """Two layers that are computed again in the backward, with or without the meta network's inputs in them."""
    segment = (lambda fn, x: checkpoint(fn, x, use_reentrant=False)) if on else (lambda fn, x: fn(x))

    def inner(w: Tree, lam: Tree, x: Tensor) -> Tensor:
        for name in ("first", "second"):

            def net(h: Tensor, name: str = name) -> Tensor:
                return h + torch.tanh(stop_gradient(h, key=name if keyed else None) @ lam[name])

            def layer(h: Tensor, name: str = name) -> Tensor:
                h = torch.tanh(h @ w[name])
                return net(h, name) if meta_inside else h

            x = segment(layer, x) if meta_inside else net(segment(layer, x))
        return (x @ w["head"]).square().mean()

    def outer(w: Tree, lam: Tree, x: Tensor) -> Tensor:
        return (
            (segment(lambda h: torch.tanh(torch.tanh(h @ w["first"]) @ w["second"]), x) @ w["head"] - 1)
            .square()
            .mean()
        )

    return BilevelProblem(inner, outer, SGD(0.1), stop_gradients=True)


def checkpointed_point() -> tuple[Tree, Tree, Tensor]:
    generator = seeded(7)

    def draw(**shapes: tuple[int, ...]) -> Tree:
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}

    w, lam = draw(first=(3, 4), second=(4, 4), head=(4,)), draw(first=(4, 4), second=(4, 4))
    return w, lam, draw(x=(6, 3))["x"]


@pytest.mark.parametrize(
    ("name", "meta_inside"),
    [
        ("double_backward", False),
        ("double_backward", True),
        ("finite_difference", False),
        ("finite_difference", True),
        ("evograd", False),
        ("evograd", True),
    ],
)
def test_checkpointing_changes_nothing(name: str, meta_inside: bool) -> None:
    w, lam, x = checkpointed_point()
    found, expected = (
        hypergradient(checkpointed(meta_inside, on), ESTIMATES[name], w, lam, x, x, generator=seeded()).grads
        for on in (True, False)
    )
    assert relative_error(found, expected) < 1e-12


def test_checkpointing_needs_keys() -> None:
    w, lam, x = checkpointed_point()
    with pytest.raises(RuntimeError, match="with a key where activation checkpointing repeats them"):
        hypergradient(checkpointed(True, True, keyed=False), ESTIMATES["finite_difference"], w, lam, x, x)


# Parts ---------------------------------------------------------------------------------------------------------------


def test_two_parts_are_one_joined_batch() -> None:
    toy = network(torch.float64)
    x, y = toy.train

    def summed(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return len(batch[1]) * toy.problem.inner_loss(w, lam, batch)

    joined = PassContext(replace(toy.problem, inner_loss=summed))
    split = PassContext(replace(toy.problem, inner_loss=summed, parts=lambda batch: batch))
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]
    for one, two in zip(
        joined.inner_grad(toy.w, toy.lam, toy.train, wrt_w=toy.w, wrt_lam=toy.lam),
        split.inner_grad(toy.w, toy.lam, halves, wrt_w=toy.w, wrt_lam=toy.lam),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        joined.inner_value(toy.w, toy.lam, toy.train), split.inner_value(toy.w, toy.lam, halves), rtol=1e-13, atol=0
    )
    assert (joined.counts.forwards, joined.counts.backwards) == (2, 1)
    assert (split.counts.forwards, split.counts.backwards) == (4, 2)


@on_estimates
def test_the_hypergradient_of_two_parts_is_that_of_the_joined_batch(name: str) -> None:
    toy = network(torch.float64)
    problem = replace(toy.problem, update=SGD(0.1))
    x, y = toy.train
    u, v = toy.val
    halved = replace(
        problem,
        inner_loss=lambda w, lam, batch: 0.5 * problem.inner_loss(w, lam, batch),
        outer_loss=lambda w, lam, batch: 0.5 * problem.outer_loss(w, lam, batch),
        parts=lambda batch: batch,
    )
    joined = hypergradient(problem, ESTIMATES[name], toy.w, toy.lam, toy.train, toy.val, generator=seeded())
    parts = [(x[:4], y[:4]), (x[4:], y[4:])], [(u[:2], v[:2]), (u[2:], v[2:])]
    split = hypergradient(halved, ESTIMATES[name], toy.w, toy.lam, *parts, generator=seeded())
    assert relative_error(split.grads, joined.grads) < 1e-10
    torch.testing.assert_close(split.outer_loss, joined.outer_loss, rtol=1e-12, atol=0)


def test_gradients_only_where_asked() -> None:
    toy = network(torch.float64)
    context = PassContext(toy.problem)
    _, grad_w, grad_lam = context.inner_grad(toy.w, toy.lam, toy.train, wrt_w=["head.bias"], wrt_lam=["unused"])
    assert list(grad_w) == ["head.bias"]
    assert list(grad_lam) == ["unused"]
    assert not grad_lam["unused"].any()


# Attention kernels ---------------------------------------------------------------------------------------------------


def attention_problem() -> BilevelProblem:
    def inner(w: Tree, lam: Tree, batch: Tensor) -> Tensor:
        x = batch @ w["x"] * lam["y"]  # (1, 2, 4, 8)
        return F.scaled_dot_product_attention(x, x, x).square().sum()

    return BilevelProblem(inner, lambda w, lam, batch: w["x"].square().sum(), SGD(0.01))


def attention_point() -> tuple[Tree, Tree, Tensor]:
    generator = seeded(3)
    w = {"x": 0.3 * torch.randn(8, 8, generator=generator, dtype=torch.float64)}
    return (
        w,
        {"y": torch.ones(8, dtype=torch.float64)},
        torch.randn(1, 2, 4, 8, generator=generator, dtype=torch.float64),
    )


def double_backward(problem: BilevelProblem) -> Tensor:
    w, lam, batch = attention_point()
    w, lam = {"x": w["x"].requires_grad_()}, {"y": lam["y"].requires_grad_()}
    (g,) = torch.autograd.grad(problem.inner_loss(w, lam, batch), w["x"], create_graph=True)
    return torch.autograd.grad(g.sum(), lam["y"])[0]


def test_the_stock_kernel_cannot_be_differentiated_twice() -> None:
    """The trap is real; if this starts to pass, the scope below has nothing left to do."""
    with pytest.raises(RuntimeError, match=r"derivative for .*attention"):
        double_backward(attention_problem())
    with pytest.raises(RuntimeError, match=r"derivative for .*attention"), PassContext(attention_problem()).scope(0):
        double_backward(attention_problem())


def test_second_order_passes_confine_attention_to_the_kernel_that_can() -> None:
    problem = attention_problem()
    with PassContext(problem).scope(0, second_order=True):
        assert torch.isfinite(double_backward(problem)).all()
    with pytest.raises(RuntimeError, match=r"derivative for .*attention"):  # and gives the kernels back
        double_backward(problem)


@pytest.mark.parametrize("name", ["double_backward", "jvp"])
def test_exact_engines_work_on_stock_attention(name: str) -> None:
    w, lam, batch = attention_point()
    found = hypergradient(attention_problem(), ESTIMATES[name], w, lam, batch, None).grads
    approximate = hypergradient(attention_problem(), ESTIMATES["finite_difference"], w, lam, batch, None).grads
    assert relative_error(found, approximate) < 1e-6
