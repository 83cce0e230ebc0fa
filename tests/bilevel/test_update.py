"""Update rules against torch.optim's own steps, their pullbacks against autograd through torch.optim's own algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.bilevel import SGD, Adam, AdamW, Tree, Windowed, tree
from metaxl_evo.bilevel.torch_optimizers import from_optimizer
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState

LRS = {"a": 0.1, "b": 0.03}
DECAYS = {"a": 0.2, "b": 0.0}
NAMES = ("a", "b")

# rule, torch's class, the settings of its two parameter groups
RULES: dict[str, tuple[UpdateRule, type[torch.optim.Optimizer], list[dict[str, Any]]]] = {}


def case(name: str, rule: UpdateRule, optimizer: type[torch.optim.Optimizer], *groups: dict[str, Any]) -> None:
    RULES[name] = (rule, optimizer, list(groups) if len(groups) == 2 else [*groups, *groups])


case("sgd", SGD(0.1), torch.optim.SGD, {"lr": 0.1})
case("sgd_l2", SGD(0.1, 0.2), torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2})
case("momentum", SGD(0.1, momentum=0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
case(
    "dampened", SGD(0.1, 0.2, momentum=0.9, dampening=0.3), torch.optim.SGD,
    {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "dampening": 0.3},
)  # fmt: skip
case(
    "nesterov", SGD(0.1, 0.2, momentum=0.9, nesterov=True), torch.optim.SGD,
    {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": True},
)  # fmt: skip
case("adam", Adam(0.1), torch.optim.Adam, {"lr": 0.1})
case("adam_large_eps", Adam(0.1, eps=1e-3), torch.optim.Adam, {"lr": 0.1, "eps": 1e-3})
case(
    "adam_l2", Adam(0.1, 0.2, betas=(0.8, 0.95), eps=1e-3), torch.optim.Adam,
    {"lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-3},
)  # fmt: skip
case("adamw", AdamW(0.1, 0.2, eps=1e-3), torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-3})
case(
    "sgd_groups", SGD(LRS, DECAYS, momentum=0.9), torch.optim.SGD,
    {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}, {"lr": 0.03, "momentum": 0.9},
)  # fmt: skip
case(
    "sgd_momenta", SGD(LRS, momentum={"a": 0.9, "b": 0.0}, dampening=0.3), torch.optim.SGD,
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, {"lr": 0.03, "dampening": 0.3},
)  # fmt: skip
case(
    "adamw_groups", AdamW(LRS, DECAYS, eps=1e-3), torch.optim.AdamW,
    {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-3}, {"lr": 0.03, "weight_decay": 0.0, "eps": 1e-3},
)  # fmt: skip

on_rules = pytest.mark.parametrize("name", RULES)


@pytest.fixture
def default_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


LIMITS: dict[str, dict[str, float]] = {
    "unclipped": {},
    "clip_active": {"max_grad_norm": 0.5},
    "clip_idle": {"max_grad_norm": 100.0},
    "clamped": {"max_grad_value": 0.8},
    "clamped_and_clipped": {"max_grad_value": 0.8, "max_grad_norm": 0.5},
    "clamped_clip_idle": {"max_grad_value": 0.8, "max_grad_norm": 100.0},
}
on_clipping = pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())


def random_tree(seed: int, dtype: torch.dtype = torch.float64) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 2, generator=generator, dtype=torch.float64).to(dtype),
        "b": torch.randn(4, generator=generator, dtype=torch.float64).to(dtype),
    }


def clipped(rule: UpdateRule, **limits: float | None) -> UpdateRule:
    return replace(rule, **limits)  # type: ignore[arg-type]


def torch_optimizer(name: str, params: Sequence[Tensor], **extra: Any) -> torch.optim.Optimizer:
    _, cls, groups = RULES[name]
    given = [{"params": [p], **group} for p, group in zip(params, groups, strict=True)]
    return cls(given, **extra)


def error(found: Tree, expected: Tree) -> float:
    difference = tree.norm(tree.add(found, expected, -1.0))
    return difference / tree.norm(expected)


@on_rules
@on_clipping
def test_several_steps_equal_torch(name: str, limits: dict[str, float]) -> None:
    rule = clipped(RULES[name][0], **limits)
    params = [torch.nn.Parameter(leaf) for leaf in random_tree(0).values()]
    optimizer = torch_optimizer(name, params)
    w, state = random_tree(0), rule.init(random_tree(0))
    for step in range(5):
        gradient = random_tree(step + 1)
        for p, g in zip(params, gradient.values(), strict=True):
            p.grad = g.clone()
        if "max_grad_value" in limits:
            torch.nn.utils.clip_grad_value_(params, limits["max_grad_value"])
        if "max_grad_norm" in limits:
            max_grad_norm = limits["max_grad_norm"]
            norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
            assert (norm > max_grad_norm) == (max_grad_norm < 1), (
                "the clip must be active in one case, idle in the other"
            )
        optimizer.step()
        w, state = rule(w, state, gradient, {})
        for p, leaf in zip(params, w.values(), strict=True):
            torch.testing.assert_close(leaf, p.detach(), rtol=1e-13, atol=1e-15)
    assert state["step"] == 5


def torch_step_graph(name: str, t: int, limits: dict[str, float]) -> tuple[Tree, Tree]:
    """Weights after torch's own `t`-th step, with the graph to that step's gradient (returned last).

    torch cuts the graph where it makes the first momentum buffer: a first step on a buffer of zeros, undampened, is
    the same step. Its bias correction is in the default dtype.
    """
    live = [leaf.clone() for leaf in random_tree(0).values()]
    optimizer = torch_optimizer(name, live, differentiable=True)
    if t == 1 and isinstance(optimizer, torch.optim.SGD):
        for p, group in zip(live, optimizer.param_groups, strict=True):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            group["dampening"] = 0.0
    for step in range(1, t + 1):
        gradient = {n: g.requires_grad_(step == t) for n, g in random_tree(step).items()}
        clamped, factor = gradient, 1.0
        if "max_grad_value" in limits:
            value = limits["max_grad_value"]
            clamped = {n: torch.where(g.abs() > value, value * g.sign(), g) for n, g in gradient.items()}
        if "max_grad_norm" in limits:
            norm = torch.cat([g.reshape(-1) for g in clamped.values()]).norm()
            factor = (limits["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)
        for p, g in zip(live, clamped.values(), strict=True):
            p.grad = g * factor
        optimizer.step()
    return dict(zip(NAMES, live, strict=True)), gradient


def rule_state(rule: UpdateRule, t: int) -> tuple[Tree, UpdateState, UpdateState]:
    """Weights and state before the `t`-th step, state after it."""
    w, state = random_tree(0), rule.init(random_tree(0))
    for step in range(1, t):
        w, state = rule(w, state, random_tree(step), {})
    return w, state, rule(w, state, random_tree(t), {})[1]


@on_rules
@on_clipping
@pytest.mark.usefixtures("default_float64")
def test_grad_vjp_is_autograd_through_torchs_step(name: str, limits: dict[str, float]) -> None:
    rule, v = clipped(RULES[name][0], **limits), random_tree(50)
    for t in (1, 2, 4):
        after, gradient = torch_step_graph(name, t, limits)
        moved = sum(((after[n] * v[n]).sum() for n in NAMES), torch.zeros((), dtype=torch.float64))
        slopes = torch.autograd.grad(-moved, list(gradient.values()))  # w' = D w - u(g)
        expected = dict(zip(NAMES, slopes, strict=True))

        w, _, state_after = rule_state(rule, t)
        found = rule.grad_vjp(dict(v), w, tree.detach(gradient), state_after, {})
        if name == "adam" and t == 1:
            # The first step is lr g / (|g| + eps): its slope lr eps / Dn^2 is what two terms of size lr / Dn leave.
            terms = {n: 0.1 * v[n] / (gradient[n].detach().abs() + 1e-8) for n in NAMES}
            assert tree.norm(tree.add(found, expected, -1.0)) < 1e-12 * tree.norm(terms)
        else:
            assert error(found, expected) < 1e-12


@on_rules
def test_grad_vjp_is_autograd_through_the_rule_itself(name: str) -> None:
    """The rule's own map is differentiable: what a longer unroll relies on (in w and the state as well)."""
    rule = clipped(RULES[name][0], max_grad_norm=0.5, max_grad_value=0.8)
    w, before, after_state = rule_state(rule, 3)
    gradient = {n: g.requires_grad_() for n, g in random_tree(3).items()}
    v = random_tree(50)
    after, _ = rule({n: x.requires_grad_() for n, x in w.items()}, before, gradient, {})
    moved = sum(((after[n] * v[n]).sum() for n in NAMES), torch.zeros((), dtype=torch.float64))
    found = torch.autograd.grad(moved, [*gradient.values(), *w.values()])
    pulled = rule.grad_vjp(dict(v), tree.detach(w), tree.detach(gradient), after_state, {})
    assert error(tree.scale(pulled, -1.0), dict(zip(NAMES, found, strict=False))) < 1e-12
    assert all(torch.isfinite(leaf).all() for leaf in found)


@pytest.mark.parametrize("rule", [Adam(0.1), AdamW(0.1, 0.2)], ids=["adam", "adamw"])
def test_coordinates_never_touched_give_zero(rule: UpdateRule) -> None:
    """Unused embedding rows: no gradient ever, hence no second moment; 0 and not lr / eps, and no NaN in autograd."""
    gradient = random_tree(1)
    gradient["a"][1] = 0.0
    w, v = random_tree(0), random_tree(50)
    _, state = rule(w, rule.init(w), gradient, {})
    pulled = rule.grad_vjp(dict(v), w, gradient, state, {})
    assert not pulled["a"][1].any()
    assert pulled["a"][0].all()
    leaves = {n: g.requires_grad_() for n, g in gradient.items()}
    after, _ = rule(w, rule.init(w), leaves, {})
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(after["a"].sum(), [leaves["a"]]))


def test_adams_first_slope_in_float32() -> None:
    """lr eps / (|g| + eps)^2 at the first step, where eps is what matters: small gradients, as after clipping."""
    gradient = {"x": torch.tensor([1e-6, 1e-5, 3e-5])}
    rule, w, v = Adam(1.0), {"x": torch.zeros(3)}, {"x": torch.ones(3)}
    _, state = rule(w, rule.init(w), gradient, {})
    exact = 1e-8 / (gradient["x"].double() + 1e-8).square()
    torch.testing.assert_close(rule.grad_vjp(dict(v), w, gradient, state, {})["x"].double(), exact, rtol=2e-3, atol=0)


# A hyperparameter in lam ---------------------------------------------------------------------------------------------


def sgd_by_hand(w: Tensor, m: Tensor, g: Tensor, lam: Tree) -> Tensor:
    buffer = lam["mom"] * m + g + lam["wd"] * w
    return w - lam["lr"] * (g + lam["wd"] * w + lam["mom"] * buffer)


def adam_by_hand(w: Tensor, m: Tensor, s: Tensor, step: int, g: Tensor, lam: Tree, decoupled: bool) -> Tensor:
    if decoupled:
        w = w - lam["lr"] * lam["wd"] * w
    else:
        g = g + lam["wd"] * w
    m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
    return w - lam["lr"] * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)) ** 0.5 + 1e-8)


Written = Callable[[str, Tree, UpdateState, Tree, Tree], Tensor]
BY_HAND: dict[str, tuple[UpdateRule, Written]] = {
    "sgd": (
        SGD("lr", "wd", momentum="mom", nesterov=True),
        lambda n, w, s, g, lam: sgd_by_hand(w[n], s["momentum_buffer"][n], g[n], lam),
    ),
    "adam": (
        Adam("lr", "wd"),
        lambda n, w, s, g, lam: adam_by_hand(
            w[n], s["exp_avg"][n], s["exp_avg_sq"][n], s["step"] + 1, g[n], lam, False
        ),
    ),
    "adamw": (
        AdamW("lr", "wd"),
        lambda n, w, s, g, lam: adam_by_hand(
            w[n], s["exp_avg"][n], s["exp_avg_sq"][n], s["step"] + 1, g[n], lam, True
        ),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("t", [1, 3])
def test_lam_vjp_is_autograd_through_the_written_out_step(name: str, t: int) -> None:
    rule, by_hand = BY_HAND[name]
    lam = {k: torch.tensor(x, dtype=torch.float64) for k, x in {"lr": 0.1, "wd": 0.2, "mom": 0.7, "else": 3.0}.items()}
    w, state = random_tree(0), rule.init(random_tree(0))
    for step in range(1, t):
        w, state = rule(w, state, random_tree(step), lam)
    gradient, v = random_tree(t), random_tree(50)
    leaves = {k: x.clone().requires_grad_() for k, x in lam.items()}
    moved = torch.stack([(by_hand(n, w, state, gradient, leaves) * v[n]).sum() for n in NAMES]).sum()
    expected = torch.autograd.grad(moved, list(leaves.values()), materialize_grads=True, allow_unused=True)

    found = rule.lam_vjp(v, w, state, gradient, lam)
    assert found.keys() == lam.keys()
    for leaf, value in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(leaf, value, rtol=1e-12, atol=1e-15)
    assert float(found["else"]) == 0.0
    assert rule.tunes == ({"lr", "wd", "mom"} if name == "sgd" else {"lr", "wd"})


def test_lam_vjp_without_tuned_numbers_is_zero() -> None:
    lam = {"lr": torch.ones(())}
    assert float(SGD(0.1).lam_vjp(random_tree(1), random_tree(0), None, random_tree(2), lam)["lr"]) == 0.0
    assert SGD(0.1).tunes == frozenset()


# A schedule in lam ---------------------------------------------------------------------------------------------------

SCHEDULE = {"lr": [0.1, 0.05, 0.2], "wd": [0.2, 0.3, 0.1], "mom": [0.7, 0.9, 0.5]}
SCHEDULED: dict[str, UpdateRule] = {
    "sgd": SGD(Windowed("lr", 7), Windowed("wd", 7), momentum=Windowed("mom", 7), nesterov=True),
    "adam": Adam(Windowed("lr", 7), Windowed("wd", 7)),
    "adamw": AdamW(Windowed("lr", 7), Windowed("wd", 7)),
}
ACTING = [0, 0, 0, 1, 1, 2, 2, 2, 2]  # floor(3 t / 7), then the last


@pytest.mark.parametrize("t", range(len(ACTING)))
def test_a_schedule_acts_and_is_pulled_back_in_its_window(t: int) -> None:
    """The step, (du/dg)^T v and the pull-back to the schedule are those of the number that acts."""
    for name, rule in SCHEDULED.items():
        check_schedule(rule, BY_HAND[name][0], t)


def check_schedule(rule: UpdateRule, plain: UpdateRule, t: int) -> None:
    lam = {k: torch.tensor(x, dtype=torch.float64) for k, x in SCHEDULE.items()}
    acting = {k: x[ACTING[t]] for k, x in lam.items()}
    w, state = random_tree(0), {**rule.init(random_tree(0)), "step": t}
    for key in state.keys() - {"step"}:
        state[key] = {n: x.square() for n, x in random_tree(70).items()}
    gradient, v = random_tree(t), random_tree(50)

    (after, after_state), (expected, expected_state) = rule(w, state, gradient, lam), plain(w, state, gradient, acting)
    torch.testing.assert_close((after, after_state), (expected, expected_state), rtol=0, atol=0)
    pulled = rule.grad_vjp(dict(v), w, gradient, after_state, lam)
    torch.testing.assert_close(pulled, plain.grad_vjp(dict(v), w, gradient, after_state, acting), rtol=0, atol=0)
    found, at_it = rule.lam_vjp(v, w, state, gradient, lam), plain.lam_vjp(v, w, state, gradient, acting)
    for k, leaf in found.items():
        assert torch.equal(leaf, torch.eye(3, dtype=torch.float64)[ACTING[t]] * at_it[k])
    assert rule.tunes == plain.tunes


def test_a_schedule_must_be_a_vector_over_at_least_one_step() -> None:
    with pytest.raises(ValueError, match=r"Windowed\('lr'\): steps must be at least 1"):
        Windowed("lr", 0)
    rule, w = SGD(Windowed("lr", 4)), random_tree(0)
    with pytest.raises(ValueError, match=r"lam\['lr'\] is of shape \[\].*vector"):
        rule(w, rule.init(w), random_tree(1), {"lr": torch.tensor(0.1)})


# Read off a live optimiser -------------------------------------------------------------------------------------------

VARIANTS = {"plain": {}, "foreach": {"foreach": True}, "fused": {"fused": True}, "for_loop": {"foreach": False}}


def live(name: str, steps: int, **extra: Any) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    params = {n: torch.nn.Parameter(leaf) for n, leaf in random_tree(0, torch.float32).items()}
    optimizer = torch_optimizer(name, list(params.values()), **extra)
    for step in range(1, steps + 1):
        for p, g in zip(params.values(), random_tree(step, torch.float32).values(), strict=True):
            p.grad = g
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("dampened", "sgd_momenta")])
@pytest.mark.parametrize(
    ("variant", "steps"), [("plain", 0), ("plain", 1), ("foreach", 3), ("fused", 3), ("for_loop", 3)]
)
def test_from_optimizer_continues_the_live_one(name: str, variant: str, steps: int) -> None:
    params, optimizer = live(name, steps, **VARIANTS[variant])
    rule, state = from_optimizer(optimizer, {p: n for n, p in params.items()}, max_grad_norm=7.0)
    assert rule == clipped(RULES[name][0], max_grad_norm=7.0)
    gradient = random_tree(9, torch.float32)
    after, _ = clipped(rule, max_grad_norm=None)({n: p.detach() for n, p in params.items()}, state, gradient, {})
    for n, p in params.items():
        p.grad = gradient[n].clone()
    optimizer.step()
    for n, p in params.items():
        torch.testing.assert_close(after[n], p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in RULES if n not in ("dampened", "sgd_momenta")])
@pytest.mark.parametrize("t", [1, 3])
def test_state_read_after_the_step_gives_that_steps_pullback(name: str, t: int) -> None:
    """The order `after_step`: the optimiser has moved on, its state is the one after the step."""
    params, optimizer = live(name, t)
    rule, state = from_optimizer(optimizer, {p: n for n, p in params.items()})
    w, _, state_after = rule_state(RULES[name][0], t)
    if name == "adam" and t == 1:
        return  # lost in float32, see test_adams_first_slope_in_float32
    gradient, v = random_tree(t), random_tree(50)
    expected = rule.grad_vjp(dict(v), w, gradient, state_after, {})
    narrow = (random_tree(50, torch.float32), {n: x.float() for n, x in w.items()}, random_tree(t, torch.float32))
    assert error(tree.tree_map(torch.Tensor.double, rule.grad_vjp(*map(dict, narrow), state, {})), expected) < 1e-3


def test_from_optimizer_shares_the_states_tensors_and_fills_unstepped_with_zeros() -> None:
    params, optimizer = live("adam", 0)
    params["a"].grad = torch.ones(3, 2)
    optimizer.step()  # b has no gradient, so torch keeps no state for it
    _, state = from_optimizer(optimizer, {p: n for n, p in params.items()})
    assert state["exp_avg"]["a"] is optimizer.state[params["a"]]["exp_avg"]
    assert not state["exp_avg"]["b"].any()
    assert state["exp_avg"]["b"].shape == params["b"].shape


def test_from_optimizer_reads_only_the_named_parameters() -> None:
    params, optimizer = live("adamw_groups", 2)
    rule, state = from_optimizer(optimizer, {params["b"]: "b"})
    assert (rule.lr, rule.weight_decay) == (0.03, 0.0)
    assert state["exp_avg"].keys() == {"b"}


def test_from_optimizer_reads_the_scheduled_learning_rate() -> None:
    params, optimizer = live("sgd", 0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert from_optimizer(optimizer, {p: n for n, p in params.items()})[0].lr == 0.05


def test_adam_with_decoupled_decay_is_adamw() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p], weight_decay=0.1, decoupled_weight_decay=True)
    assert type(from_optimizer(optimizer, {p: "p"})[0]) is AdamW


REFUSED: dict[str, tuple[Callable[[list[Tensor]], torch.optim.Optimizer], str]] = {
    "rmsprop": (torch.optim.RMSprop, "RMSprop.*SGD, Adam or AdamW"),
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), "AdamW.amsgrad=True.*amsgrad=False"),
    "maximize": (lambda p: torch.optim.SGD(p, maximize=True), "SGD.maximize=True"),
    "dampening": (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.1), "dampening=0"),
    "groups that differ": (
        lambda p: torch.optim.SGD([{"params": p[:1], "nesterov": True}, {"params": p[1:]}], momentum=0.9),
        "differ in 'nesterov'",
    ),
    "a parameter it does not hold": (lambda p: torch.optim.SGD(p[:1]), r"does not hold.*\['b'\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_from_optimizer_refuses_what_it_cannot_model(what: str) -> None:
    make, said = REFUSED[what]
    params = {n: torch.nn.Parameter(leaf) for n, leaf in random_tree(0).items()}
    with pytest.raises(ValueError, match=said):
        from_optimizer(make(list(params.values())), {p: n for n, p in params.items()})


def test_a_subclass_of_a_known_optimizer_is_not_taken_for_it() -> None:
    class Surprise(torch.optim.SGD):
        pass

    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="Surprise"):
        from_optimizer(Surprise([p]), {p: "p"})
