"""One contract for every estimator, on every toy problem it serves. A new one joins by its line in `INSTANCES`."""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.bilevel import (
    SGD,
    BilevelProblem,
    Cut,
    Hypergradient,
    InnerStep,
    PassContext,
    Response,
    StepMade,
    Tree,
    hypergradient,
    tree,
)
from metaxl_evo.estimators import ESTIMATORS, Estimator, make_estimator
from tests.estimators.problems import (
    TOYS,
    Toy,
    counted,
    cut_network,
    logged,
    network,
    numerical_error,
    once_differentiable,
    quadratic,
    random_like,
    relative_error,
)

# The settings that the suite runs. Finite differences at a small radius, EvoGrad at a noise that numerical
# differentiation can resolve, conjugate gradients until the system is solved (before that they are not linear).
INSTANCES: dict[str, tuple[dict[str, Any], ...]] = {
    "first_order": ({},),
    "one_step": (
        {},
        {"engine": "double_backward"},
        {"engine": "jvp"},
        {"engine": "finite_difference", "radius": 1e-3},
    ),
    "evograd": (
        {},
        {"copies": 5, "sigma": 0.05, "temperature": 0.5, "noise": "gaussian"},
        {"copies": 4, "sigma": 0.05, "temperature": 0.5, "antithetic": True},
        {"copies": 3, "sigma": 0.05, "temperature": 0.5, "parameters": r"^head\."},
        {"copies": 3, "sigma": 0.05, "temperature": 0.5, "parameters": r"bias$", "share_randomness": False},
        {"copies": 2, "sigma": 0.05, "temperature": 0.5, "share_meta_inputs": False},
    ),
    "sama": ({"radius": 1e-3}, {"engine": "jvp"}),
    "neumann": (
        {"terms": 1},  # the default step solves a system of one unknown with its first term
        {"engine": "double_backward", "terms": 0, "step": 0.1},
        {"engine": "finite_difference", "radius": 1e-3, "damping": 0.5, "step": 0.1},
    ),
    "conjugate_gradient": (
        {"iterations": 60, "damping": 2.0, "tolerance": 1e-13},
        {"engine": "double_backward", "iterations": 60, "damping": 2.0, "tolerance": 1e-13},
    ),
    "unroll": ({}, {"horizon": 2}, {"recompute": True}),
    "drmad": ({},),
    "forward_mode": ({},),
    "greedy": ({}, {"engine": "finite_difference", "radius": 1e-3, "decay": 0.5}),
    "hyperdistill": (
        {},
        {"scale": "fixed", "decay": 0.5, "theta": 0.7},
        {"engine": "finite_difference", "radius": 1e-3, "scale": "one"},
    ),
}
SERVED_PAIRS = {  # counted by hand
    "first_order": 3,
    "one_step": 12,
    "evograd": 15,
    "unroll": 10,
    "drmad": 5,
    "forward_mode": 6,
    "greedy": 8,
    "hyperdistill": 9,
    "sama": 8,
    "neumann": 10,
    "conjugate_gradient": 8,
}

PASSES = {  # by hand, from the papers' algorithms: of each instance, after a step that was made
    "first_order": ("1F 1B",),
    "one_step": ("1F 1B 1J", "1F 1B 1D", "1F 1B 1J", "3F 3B"),
    "evograd": ("3F 3B", "6F 6B", "5F 5B", "4F 4B", "4F 4B", "3F 3B"),
    "sama": ("3F 3B", "1F 1B 1J"),
    "neumann": ("1F 1B 7J", "1F 1B 1D", "9F 9B"),
    "conjugate_gradient": ("1F 1B 61J", "1F 1B 61D"),  # at most
    "unroll": ("1F 1B 1D", "1F 1B 1D", "1F 1B 1D"),
    "drmad": ("1F 1B 1D",),
    "forward_mode": ("1F 1B 1J",),  # a product for each entry of lam
    "greedy": ("2F 2B 1J", "4F 4B"),
    "hyperdistill": ("1F 1B 1J", "1F 1B 1J", "3F 3B"),
}
# Which differentiate the inner optimiser's step where it was made, and so for its own numbers.
TUNING = {"one_step", "unroll", "drmad", "forward_mode", "greedy", "hyperdistill"}
NETWORKS = ("network", "cut_network")
# Whose vjp is of something else than the derivative of their value: nothing, implicit, decayed, averaged.
OF_SOMETHING_ELSE = {"first_order", "sama", "neumann", "conjugate_gradient", "drmad", "greedy", "hyperdistill"}


def build(name: str, settings: dict[str, Any]) -> Estimator:
    return make_estimator(name, **settings)


def serves(estimator: Estimator, toy: Toy) -> bool:
    """Whether the pair is one that the design allows, decided here and not by `check`."""
    pattern = getattr(estimator, "parameters", None)
    if pattern is not None and not any(re.search(pattern, name) for name in toy.w):
        return False
    if getattr(estimator, "noise", None) == "sign" and tree.size(toy.w) == 1:
        return False  # two signs of one number coincide half of the time: nothing to tell the copies apart
    if estimator.needs_sgd and not isinstance(toy.problem.update, SGD):
        return False
    return toy.direct or not estimator.requires_direct_term


ALL = [(name, settings) for name, all_settings in INSTANCES.items() for settings in all_settings]
PAIRS = [  # the first settings on every toy problem, others on the networks
    (name, settings, toy)
    for name, settings in ALL
    for toy in (TOYS if settings == INSTANCES[name][0] else NETWORKS)
    if serves(build(name, settings), TOYS[toy](torch.float64))
]
DERIVATIVES = [pair for pair in PAIRS if pair[0] not in OF_SOMETHING_ELSE]


def label(*parts: Any) -> str:
    return "-".join("_".join(f"{v}" for v in p.values()) if isinstance(p, dict) else str(p) for p in parts if p != {})


def on(pairs: list[tuple[str, dict[str, Any], str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "settings", "toy_name"), pairs, ids=[label(*pair) for pair in pairs])


on_pairs = on(PAIRS)
on_instances = pytest.mark.parametrize(("name", "settings"), ALL, ids=[label(*one) for one in ALL])


def tolerance(estimator: Estimator, exact: float) -> float:
    """Exact products to rounding; finite differences to their O(radius^2), which is 1e-6 at radius 1e-3."""
    return 1e-6 if getattr(estimator, "engine", None) == "finite_difference" else exact


def respond(estimator: Estimator, toy: Toy, lam: Tree, seed: int = 9) -> Response:
    passes = PassContext(toy.problem, seed=seed)
    state = estimator.init(toy.problem, toy.w, lam)
    step = InnerStep(toy.w, lam, toy.train, toy.update_state, val_batch=toy.val)
    return estimator.respond(passes, step, state, {})


def reads_no_cotangent(estimator: Estimator, toy: Toy) -> bool:
    """Whether nothing is left for `vjp`, and the outer backward is asked for nothing."""
    return respond(estimator, toy, toy.lam).wrt == ()


def estimate(estimator: Estimator, toy: Toy, *, seed: int = 9, **options: Any) -> Hypergradient:
    generator = torch.Generator().manual_seed(seed)
    return hypergradient(
        toy.problem,
        estimator,
        toy.w,
        toy.lam,
        toy.train,
        toy.val,
        generator=generator,
        **({"update_state": toy.update_state} | options),
    )


def step_made(toy: Toy) -> StepMade:
    """The inner step, its gradient by autograd on the joined loss."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in toy.w.items()}
    found = torch.autograd.grad(toy.problem.inner_loss(leaves, toy.lam, toy.train), list(leaves.values()))
    grad = dict(zip(leaves, found, strict=True))
    before = toy.update_state or toy.problem.update.init(toy.w)
    after, state = toy.problem.update(toy.w, before, grad, toy.lam)
    return StepMade(after, grad, state)


# The suite itself ----------------------------------------------------------------------------------------------------


def test_every_estimator_has_instances() -> None:
    assert INSTANCES.keys() == ESTIMATORS.keys(), "give every entry of ESTIMATORS a line in INSTANCES"
    assert all(INSTANCES.values())


def test_the_suite_is_not_empty() -> None:
    assert Counter(name for name, _, _ in PAIRS) == SERVED_PAIRS
    assert SERVED_PAIRS.keys() == PASSES.keys() == ESTIMATORS.keys()
    assert all(len(PASSES[name]) == len(settings) for name, settings in INSTANCES.items())
    assert {toy for _, _, toy in PAIRS} == TOYS.keys()


# The response --------------------------------------------------------------------------------------------------------


@on_pairs
def test_value_is_like_w_and_vjp_linear(name: str, settings: dict[str, Any], toy_name: str) -> None:
    toy, estimator = TOYS[toy_name](torch.float64), build(name, settings)
    response = respond(estimator, toy, toy.lam)
    assert {n: x.shape for n, x in response.value.items()} == {n: x.shape for n, x in toy.w.items()}
    assert response.wrt is None or set(response.wrt) <= toy.w.keys()
    u, v = random_like(toy.w, 100), random_like(toy.w, 200)

    def pull(cotangent: Tree) -> Tree:
        return respond(estimator, toy, toy.lam).vjp(dict(cotangent))  # called once: a fresh response each time

    expected = tree.add(tree.scale(pull(u), 2.0), pull(v), -3.0)
    found = pull(tree.add(tree.scale(u, 2.0), v, -3.0))
    assert found.keys() == toy.lam.keys()
    if response.wrt == ():  # nothing is left for it
        assert not any(leaf.any() for leaf in [*found.values(), *expected.values()])
    else:
        assert tree.norm(expected) > 0
        assert relative_error(found, expected) < tolerance(estimator, 1e-10)


@on(DERIVATIVES)
def test_vjp_is_the_derivative_of_value(name: str, settings: dict[str, Any], toy_name: str) -> None:
    toy, estimator = TOYS[toy_name](torch.float64), build(name, settings)
    u = random_like(toy.w, 300)
    found = respond(estimator, toy, toy.lam).vjp(dict(u))

    def moved(lam: Tree) -> float:
        value = respond(estimator, toy, lam).value
        return float(tree.dot(tree.add(value, toy.w, -1.0), u))

    assert numerical_error(found, moved, toy.lam) < tolerance(estimator, 1e-7)


@on([pair for pair in [*DERIVATIVES, ("first_order", {}, "cut_network")] if pair[2] == "cut_network"])
def test_hypergradient_is_the_derivative_of_the_outer_loss_at_value(
    name: str, settings: dict[str, Any], toy_name: str
) -> None:
    """Direct term and indirect term together, by differences of outer_loss(value(lam), lam)."""
    toy, estimator = TOYS[toy_name](torch.float64), build(name, settings)

    def outer(lam: Tree) -> float:
        value = respond(estimator, toy, toy.lam if name in OF_SOMETHING_ELSE else lam).value
        return float(toy.problem.outer_loss(value, lam, toy.val))

    fixed = hypergradient_at_seed(estimator, toy)
    assert numerical_error(fixed, outer, toy.lam) < tolerance(estimator, 1e-6)


def hypergradient_at_seed(estimator: Estimator, toy: Toy, seed: int = 9) -> Tree:
    """d outer / d lam + vjp(d outer / d w) + offset, both cotangents by autograd on the loss itself."""
    response = respond(estimator, toy, toy.lam, seed)
    w = {n: x.detach().clone().requires_grad_() for n, x in response.value.items()}
    lam = {n: x.detach().clone().requires_grad_() for n, x in toy.lam.items()}
    found = torch.autograd.grad(
        toy.problem.outer_loss(w, lam, toy.val),
        [*w.values(), *lam.values()],
        materialize_grads=True,
        allow_unused=True,
    )
    direct, indirect = dict(zip(lam, found[len(w) :], strict=True)), response.vjp(dict(zip(w, found, strict=False)))
    return tree.add(tree.add(direct, indirect), response.offset or tree.zeros_like(lam))


@on_pairs
def test_hypergradient_is_direct_term_plus_pulled_back_cotangent(
    name: str, settings: dict[str, Any], toy_name: str
) -> None:
    toy, estimator = TOYS[toy_name](torch.float64), build(name, settings)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(9)))
    expected, value = hypergradient_at_seed(estimator, toy, seed), respond(estimator, toy, toy.lam, seed).value
    found = estimate(estimator, toy)
    assert relative_error(found.grads, expected) < 1e-12
    torch.testing.assert_close(found.outer_loss, toy.problem.outer_loss(value, toy.lam, toy.val), rtol=1e-13, atol=0)
    assert {n: g.shape for n, g in found.grads.items()} == {n: x.shape for n, x in toy.lam.items()}
    assert all(bool(g.any()) is (n not in toy.unused) for n, g in found.grads.items())  # exact zeros


# Promises about the surroundings -------------------------------------------------------------------------------------


@on_pairs
def test_nothing_around_is_changed(name: str, settings: dict[str, Any], toy_name: str) -> None:
    """Live parameters with gradients of their own: values, .grad, flags, batches and random state stay bitwise."""
    toy = TOYS[toy_name](torch.float64)
    made = step_made(toy)
    toy = replace(
        toy,
        w={n: torch.nn.Parameter(x) for n, x in toy.w.items()},
        lam={n: x.requires_grad_() for n, x in toy.lam.items()},
    )
    for leaf in [*toy.w.values(), *toy.lam.values()]:
        leaf.grad = torch.full_like(leaf, 3.0)
    frozen = next(iter(toy.w.values()))
    frozen.requires_grad_(False)
    before, batches = snapshot(toy, made), copy.deepcopy((toy.train, toy.val))

    choices: list[dict[str, Any]] = [{}, {"made": made}]
    for options in choices:
        result = estimate(build(name, settings), toy, **options)
        assert not any(leaf.requires_grad for leaf in result.grads.values())
        assert not result.outer_loss.requires_grad

    after = snapshot(toy, made)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, key
    torch.testing.assert_close((toy.train, toy.val), batches, rtol=0, atol=0)


def snapshot(toy: Toy, made: StepMade) -> dict[str, Any]:
    state: dict[str, Any] = {"rng": torch.get_rng_state(), "grad_enabled": torch.is_grad_enabled()}
    held = {"w": toy.w, "lam": toy.lam, "made.w": made.w, "made.grad": made.grad}
    for group, leaves in held.items():
        for name, leaf in leaves.items():
            state[f"{group}.{name}"] = leaf.detach().clone()
            state[f"{group}.{name}.requires_grad"] = leaf.requires_grad
            if leaf.is_leaf and leaf.grad is not None:
                state[f"{group}.{name}.grad"] = leaf.grad.clone()
    for key, value in made.update_state.items():
        for name, leaf in value.items() if isinstance(value, dict) else ():
            state[f"state.{key}.{name}"] = leaf.clone()
    return state


@on_pairs
def test_the_seed_alone_decides_and_only_what_is_exact_in_expectation_reads_it(
    name: str, settings: dict[str, Any], toy_name: str
) -> None:
    toy, estimator = TOYS[toy_name](torch.float64), build(name, settings)
    torch.manual_seed(1)
    one = estimate(estimator, toy).grads
    torch.manual_seed(2)
    with torch.no_grad():
        same, other = (estimate(estimator, toy, seed=seed).grads for seed in (9, 12))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert (relative_error(other, one) > 1e-9) is (estimator.exact == "in expectation")


@on_pairs
def test_float32_stays_float32_and_agrees(name: str, settings: dict[str, Any], toy_name: str) -> None:
    if settings.get("engine") == "finite_difference":
        settings = settings | {"radius": 0.01}
    estimator = build(name, settings)
    narrow, wide = (estimate_with_noise(estimator, TOYS[toy_name](dtype)) for dtype in (torch.float32, torch.float64))
    assert {leaf.dtype for leaf in narrow.grads.values()} == {torch.float32}
    assert {leaf.dtype for leaf in wide.grads.values()} == {torch.float64}
    assert relative_error(narrow.grads, wide.grads) < 5e-3


def estimate_with_noise(estimator: Estimator, toy: Toy) -> Hypergradient:
    """The same perturbations in every dtype, drawn here."""
    if estimator.exact != "in expectation":
        return estimate(estimator, toy)
    wide = {n: x.double() for n, x in toy.w.items()}
    noise = [tree.scale(random_like(wide, 40 * (k + 1)), 0.05) for k in range(2)]
    return estimate(estimator, toy, noise=[{n: x.to(toy.w[n]) for n, x in one.items()} for one in noise])


@on_pairs
def test_after_the_step_it_judges_the_point_it_says(name: str, settings: dict[str, Any], toy_name: str) -> None:
    """With the step made: the same as looking ahead over it, or as starting from where the weights are now.

    One that is judged there and reads the step itself (its gradient, its state) needs the weights before it no more.
    """
    toy, estimator = TOYS[toy_name](torch.float64), build(name, settings)
    made = step_made(toy)
    found = estimate(estimator, toy, made=made)
    if estimator.evaluated_at == "previous":
        expected = estimate(estimator, toy)
    else:
        reads = {"made": made} if estimator.needs_update_rule else {}
        expected = estimate(estimator, replace(toy, w=made.w), **reads)
    assert relative_error(found.grads, expected.grads) < tolerance(estimator, 1e-12)
    torch.testing.assert_close(found.outer_loss, expected.outer_loss, rtol=1e-12, atol=0)


# Passes and order ----------------------------------------------------------------------------------------------------


@on_pairs
def test_passes_are_those_counted_by_hand(name: str, settings: dict[str, Any], toy_name: str) -> None:
    """One that differentiates a step to come needs its gradient first, which a double backward takes on its way."""
    toy, estimator = TOYS[toy_name](torch.float64), build(name, settings)
    plain = replace(toy, problem=replace(toy.problem, stop_gradients=False, straight_through=True, cut=None))
    for made in (None, step_made(toy)):
        on_the_way = name == "one_step" and settings.get("engine") == "double_backward"
        to_come = "1F 1B" if estimator.needs_update_rule and made is None and not on_the_way else ""
        expected = counted(PASSES[name][INSTANCES[name].index(settings)], to_come)
        if name == "forward_mode":
            expected = replace(expected, jvps=expected.jvps * tree.size(toy.lam))
        if reads_no_cotangent(estimator, toy) and not toy.direct:  # the outer loss leads nowhere
            expected = replace(expected, backwards=expected.backwards - 1)
        counts = estimate(estimator, plain, made=made).counts
        if name != "conjugate_gradient":
            assert counts == expected
        else:  # stops when the system is solved
            assert all(n <= expected.as_dict()[key] for key, n in counts.as_dict().items())


@on_pairs
def test_counts_are_the_calls_of_the_losses(name: str, settings: dict[str, Any], toy_name: str) -> None:
    """Each forward, double backward, jvp and suffix is one evaluation of a loss or of a cut's half."""
    toy, calls = TOYS[toy_name](torch.float64), list[Any]()
    problem, cut = toy.problem, toy.problem.cut
    watched = replace(
        problem,
        inner_loss=logged(problem.inner_loss, calls),
        outer_loss=logged(problem.outer_loss, calls),
        cut=cut and cut_logged(cut, calls),
    )
    estimate(build(name, settings), replace(toy, problem=watched))  # which finds out what is to be known of the losses
    calls.clear()
    watched.facts.batched = watched.facts.batched_whole = False  # a call counts once for each copy that it evaluates
    counts = estimate(build(name, settings), replace(toy, problem=watched)).counts
    assert counts.forwards + counts.hvps + counts.jvps + counts.suffixes == len(calls)


def cut_logged(cut: Cut, calls: list[Any]) -> Cut:
    assert cut.prefix is not None
    pieces = {name: logged(getattr(cut, name), calls) for name in ("prefix", "hidden", "loss")}
    return replace(cut, **pieces)


@on_pairs
def test_declared_order_is_the_order_used(name: str, settings: dict[str, Any], toy_name: str) -> None:
    """First-order instances run, with the same answer, on losses whose backward refuses to be differentiated."""
    toy, estimator = TOYS[toy_name](torch.float64), build(name, settings)
    if not estimator.second_order:
        # Where `auto` settles for finite differences it is no longer exact: its own O(radius^2).
        auto = getattr(estimator, "engine", None) == "auto"
        once = estimate(build(name, settings | {"radius": 3e-4} if auto else settings), toy.once()).grads
        assert relative_error(once, estimate(estimator, toy).grads) < (1e-6 if auto else 1e-12)
        return
    with pytest.raises(ValueError, match=r"differentiates the inner loss twice.*finite_difference"):
        estimate(estimator, toy.once())
    with pytest.raises(RuntimeError):  # not even where the problem claims otherwise
        estimate(estimator, replace(toy, problem=once_differentiable(toy.problem)))


# The instance as its own configuration -------------------------------------------------------------------------------


@on_instances
def test_estimator_is_its_own_configuration(name: str, settings: dict[str, Any]) -> None:
    estimator = build(name, settings)
    assert type(estimator) is ESTIMATORS[name]
    assert is_dataclass(estimator)
    assert make_estimator(name, **asdict(estimator)) == estimator
    assert hash(make_estimator(name, **asdict(estimator))) == hash(estimator)
    assert len(estimator.citation) > 20
    for field in fields(estimator):
        assert field.name in (type(estimator).__doc__ or "")
        with pytest.raises(FrozenInstanceError):
            setattr(estimator, field.name, None)
    with pytest.raises(ValueError, match="radios") as error:
        make_estimator(name, **settings, radios=1.0)
    assert all(field.name in str(error.value) for field in fields(estimator))


@on_instances
def test_facts_have_the_promised_types(name: str, settings: dict[str, Any]) -> None:
    estimator = build(name, settings)
    flags = (
        estimator.second_order, estimator.online, estimator.needs_state_before, estimator.needs_update_rule,
        estimator.needs_sgd, estimator.learns_initial, estimator.requires_direct_term,
    )  # fmt: skip
    assert all(isinstance(flag, bool) for flag in flags)
    assert estimator.exact in ("always", "at optimum", "in expectation", "never")
    assert estimator.evaluated_at in ("previous", "current")
    assert estimator.remembers in ("nothing", "meta", "base", "trajectory")
    assert estimator.max_meta_size is None or estimator.max_meta_size > 0


@on_pairs
def test_only_those_that_say_so_read_the_update_rule(name: str, settings: dict[str, Any], toy_name: str) -> None:
    """A caller may put a placeholder where `needs_update_rule` is False."""
    toy, estimator = TOYS[toy_name](torch.float64), build(name, settings)
    expected = estimate(estimator, toy).grads
    placeholder = replace(toy, problem=replace(toy.problem, update=SGD(0.0)))
    state = {"step": 0, "momentum_buffer": {}}
    found = estimate(estimator, placeholder, update_state=state).grads
    same = all(torch.equal(found[n], expected[n]) for n in expected)
    assert same is not estimator.needs_update_rule


# Refusals ------------------------------------------------------------------------------------------------------------


def test_unknown_estimator_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="evograd") as error:
        make_estimator("evogard")
    assert all(name in str(error.value) for name in ESTIMATORS)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("one_step", {"engine": "jpv"}, "double_backward.*jvp.*finite_difference"),
        ("one_step", {"radius": 0.0}, "radius"),
        ("one_step", {"radius": float("nan")}, "radius"),
        ("one_step", {"engine": "finite_difference", "differences": "one sided"}, "did you mean 'one_sided'"),
        ("greedy", {"differences": "one_sided"}, "of engine finite_difference, and engine is auto: set engine"),
        ("evograd", {"copies": 1}, "copies"),
        ("evograd", {"copies": 2.0}, "copies"),
        ("evograd", {"copies": True}, "copies"),
        ("evograd", {"sigma": -1e-3}, "sigma"),
        ("evograd", {"sigma": float("inf")}, "sigma"),
        ("evograd", {"temperature": 0.0}, "temperature"),
        ("evograd", {"noise": "laplace"}, "sign.*gaussian"),
        ("evograd", {"copies": 3, "antithetic": True}, "pairs"),
        ("evograd", {"parameters": "head("}, "regular expression"),
        ("sama", {"engine": "fd"}, "double_backward.*jvp.*finite_difference"),
        ("neumann", {"engine": "fd"}, "double_backward.*jvp.*finite_difference"),
        ("neumann", {"radius": -1.0}, "radius"),
        ("neumann", {"damping": -1e-3}, "damping"),
        ("neumann", {"terms": -1}, "terms"),
        ("neumann", {"terms": 1.0}, "terms"),
        ("neumann", {"step": 0.0}, "step"),
        ("neumann", {"step": float("inf")}, "step"),
        ("neumann", {"power_iterations": 0}, "power_iterations"),
        ("conjugate_gradient", {"damping": float("nan")}, "damping"),
        ("conjugate_gradient", {"iterations": 0}, "iterations"),
        ("conjugate_gradient", {"iterations": True}, "iterations"),
        ("conjugate_gradient", {"tolerance": -1e-9}, "tolerance"),
        ("unroll", {"horizon": 0}, "horizon"),
        ("unroll", {"horizon": True}, "horizon"),
        ("unroll", {"horizon": 2.0}, "horizon"),
        ("unroll", {"horizon": 2, "recompute": True}, "recompute is for whole episodes"),
        ("forward_mode", {"windows": 0}, "windows"),
        ("forward_mode", {"windows": 2.0}, "windows"),
        ("forward_mode", {"clamp": -1.0}, "clamp"),
        ("forward_mode", {"clamp": float("nan")}, "clamp"),
        ("greedy", {"engine": "fd"}, "double_backward.*jvp.*finite_difference"),
        ("greedy", {"decay": 1.1}, "decay"),
        ("greedy", {"decay": float("nan")}, "decay"),
        ("hyperdistill", {"engine": "fd"}, "double_backward.*jvp.*finite_difference"),
        ("hyperdistill", {"decay": -0.1}, "decay"),
        ("hyperdistill", {"scale": "pi"}, "fit.*fixed.*one.*normalize"),
        ("hyperdistill", {"fit_every": 1}, "fit_every"),
        ("hyperdistill", {"fit_every": 50.0}, "fit_every"),
        ("hyperdistill", {"theta": float("inf")}, "theta"),
    ],
)
def test_values_out_of_range_are_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_estimator(name, **settings)


@on_instances
def test_a_learned_learning_rate_needs_an_estimator_that_sees_it(name: str, settings: dict[str, Any]) -> None:
    estimator = build(name, settings)
    toy = quadratic(torch.float64, update=SGD(lr="log_lr"))
    toy = replace(toy, lam=toy.lam | {"log_lr": torch.tensor(0.1, dtype=torch.float64)})
    if getattr(estimator, "parameters", None) is not None:
        estimator = replace(estimator, parameters="th")  # type: ignore[call-arg]
    if name in TUNING:
        assert estimate(estimator, toy).grads["log_lr"].abs() > 1e-3
    else:
        with pytest.raises(ValueError, match=r"log_lr.*one_step"):
            estimate(estimator, toy)


@on_instances
def test_a_hyperparameter_that_lam_lacks_is_named(name: str, settings: dict[str, Any]) -> None:
    toy = quadratic(torch.float64, update=SGD(lr="missing"))
    with pytest.raises(ValueError, match="missing"):
        estimate(build(name, settings), toy)


@on([pair for pair in PAIRS if build(*pair[:2]).requires_direct_term and pair[2] == "quadratic"])
def test_without_a_direct_term(name: str, settings: dict[str, Any], toy_name: str) -> None:
    """Refused beforehand where the problem says so, at the first estimate where it did not know."""
    toy = quadratic(torch.float64, rho=0.0)
    for direct_term in (False, None):
        problem = replace(toy.problem, direct_term=direct_term)
        with pytest.raises(ValueError, match="direct term"):
            estimate(build(name, settings), replace(toy, problem=problem))


def test_evograd_pattern_that_finds_nothing_shows_the_names() -> None:
    with pytest.raises(ValueError, match=r"clasifier.*body\.weight"):
        estimate(make_estimator("evograd", parameters="clasifier"), network(torch.float64))


def test_injected_noise_must_be_a_sample() -> None:
    toy = cut_network(torch.float64)
    with pytest.raises(ValueError, match="at least 2"):
        estimate(make_estimator("evograd"), toy, noise=[toy.w])


@pytest.mark.parametrize("which", ["w", "lam"])
def test_parameters_must_be_floating_point_and_there(which: str) -> None:
    toy = quadratic(torch.float64)
    for bad, said in (({}, "empty"), ({"k": torch.arange(3)}, "floating point")):
        given: dict[str, Any] = {which: bad}
        with pytest.raises(ValueError, match=f"{which}.*{said}"):
            estimate(make_estimator("one_step"), replace(toy, **given))


def test_the_outer_loss_may_ignore_everything() -> None:
    """A constant outer loss has the hypergradient 0."""
    toy = quadratic(torch.float64)
    problem = BilevelProblem(
        toy.problem.inner_loss, lambda w, lam, batch: torch.ones((), dtype=torch.float64), SGD(lr=0.1)
    )
    for name in ("one_step", "evograd"):
        grads = estimate(make_estimator(name), replace(toy, problem=problem)).grads
        assert not grads["lam"].any()
