"""Learned initialisations (MAML), rates for each parameter (Meta-SGD) and steps of one's own, against autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaxl_evo.bilevel import SGD, Adam, AdamW, BilevelProblem, Tree, Windowed, hypergradient, run_episode, tree
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState
from metaxl_evo.estimators import ESTIMATORS, Estimator, ForwardMode, OneStep, Unroll, make_estimator
from tests.processes import on_processes

F64 = torch.float64
ENGINES = ("double_backward", "jvp", "finite_difference")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64) if len(values) > 1 else torch.tensor(values[0], dtype=F64)


BATCHES = [(random(10 + t, 5, 3), random(20 + t, 5)) for t in range(3)]
JUDGE = (random(30, 4, 3), random(31, 4))


def errors(w: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return torch.tanh(x @ w["a"]) * w["b"] - y


def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
    weights = torch.sigmoid(lam["v"] * batch[1]) if "v" in lam else 1.0
    return (weights * errors(w, batch).square()).mean()


def outer(w: Tree, lam: Tree, batch: Any) -> Tensor:
    return errors(w, batch).square().mean()


def weights() -> Tree:
    return {"a": random(1, 3), "b": leaf(0.7)}


def problem_of(rule: UpdateRule) -> BilevelProblem:
    return BilevelProblem(inner, outer, rule)


Step = Callable[[Tree, Tree, Tree], Tree]  # (w, g, lam) -> w after


def by_autograd(step: Step, w: Tree, lam: Tree, batches: Sequence[Any], judges: Sequence[Any] = (JUDGE,)) -> Tree:
    """Of an episode of plain steps, with whatever graph there is from lam to the first weights."""
    for batch in batches:
        w = {n: x.clone() if x.requires_grad else x.clone().requires_grad_() for n, x in w.items()}  # w[m] of no w[n]
        found = torch.autograd.grad(inner(w, lam, batch), list(w.values()), create_graph=True)
        w = step(w, dict(zip(w, found, strict=True)), lam)
    loss = torch.stack([outer(w, lam, judge) for judge in judges]).mean()
    return dict(zip(lam, torch.autograd.grad(loss, list(lam.values()), materialize_grads=True), strict=True))


def plain(w: Tree, g: Tree, lam: Tree) -> Tree:
    return {n: w[n] - 0.1 * g[n] for n in w}


# A learned initialisation --------------------------------------------------------------------------------------------

START = {"a": random(1, 3), "b": leaf(0.7), "v": leaf(0.2)}
STARTS: dict[str, Callable[[Tree], Tree]] = {
    "itself": lambda lam: {"a": lam["a"], "b": lam["b"]},
    "one leaf of two": lambda lam: {"a": lam["a"], "b": leaf(0.7)},
    "computed": lambda lam: {"a": 2 * lam["a"].sin(), "b": lam["b"] * lam["a"].sum() * lam["v"]},
    "itself and computed": lambda lam: {"a": lam["a"], "b": lam["b"] * lam["a"].prod()},
    "a view of a part": lambda lam: {"a": lam["a"][:3], "b": lam["a"][0]},
}
LEARNERS: dict[str, Estimator] = {"unroll": Unroll(), "forward_mode": ForwardMode()}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", LEARNERS)
def test_the_derivative_through_the_first_weights_is_in(name: str, start: str) -> None:
    lam = tree.leaves(START, START)
    w = STARTS[start](lam)
    expected = by_autograd(plain, STARTS[start](lam), lam, BATCHES)
    for _ in range(2):  # the caller's graph is left to him
        found = run_episode(problem_of(SGD(0.1)), LEARNERS[name], w, lam, BATCHES, JUDGE).grads
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert all(not leaf.requires_grad for leaf in found.values())


def test_parameters_of_one_module_are_one_initialisation() -> None:
    """By `named_parameters` and `state_dict`, which shares their memory; what is cloned is a constant."""
    module = nn.ParameterDict({"a": nn.Parameter(START["a"].clone()), "b": nn.Parameter(START["b"].clone())})
    lam = dict(module.named_parameters())
    expected = by_autograd(plain, lam, lam, BATCHES)
    for w in (dict(module.named_parameters()), module.state_dict(), {n: p.data for n, p in lam.items()}):
        found = run_episode(problem_of(SGD(0.1)), Unroll(), w, lam, BATCHES, JUDGE).grads
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    constant = run_episode(problem_of(SGD(0.1)), Unroll(), tree.clone(lam), lam, BATCHES, JUDGE).grads
    assert tree.norm(constant) == 0


def test_one_step_from_the_initialisation_is_an_episode_of_one() -> None:
    lam = tree.leaves(START, START)
    w = STARTS["itself and computed"](lam)
    expected = by_autograd(plain, STARTS["itself and computed"](lam), lam, BATCHES[:1])
    for estimator in LEARNERS.values():
        found = hypergradient(problem_of(SGD(0.1)), estimator, w, lam, BATCHES[0], JUDGE).grads
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_all_others_refuse_a_learned_initialisation() -> None:
    lam = tree.leaves(START, START)
    others = [make_estimator(name) for name in ESTIMATORS if name not in LEARNERS] + [Unroll(2)]
    assert len(others) == len(ESTIMATORS) - 1
    for estimator in others:
        for w in (STARTS["itself"](lam), STARTS["computed"](lam)):
            with pytest.raises(ValueError, match=r"w\['a'\] is a meta parameter or computed.*unroll.*forward_mode"):
                run_episode(problem_of(SGD(0.1)), estimator, w, lam, BATCHES, JUDGE)
            with pytest.raises(ValueError, match=r"w\['a'\] is a meta parameter or computed.*run_episode"):
                hypergradient(problem_of(SGD(0.1)), estimator, w, lam, BATCHES[0], JUDGE)
    state = Unroll().init(problem_of(SGD(0.1)), weights(), lam)
    with pytest.raises(ValueError, match="in the middle of an episode"):
        hypergradient(problem_of(SGD(0.1)), Unroll(), STARTS["itself"](lam), lam, BATCHES[0], JUDGE, state=state)


def test_a_part_of_lams_memory_without_a_graph_is_refused() -> None:
    flat = {"flat": random(1, 4)}
    w = {"a": flat["flat"][:3], "b": leaf(0.7)}
    with pytest.raises(ValueError, match=r"w\['a'\] is a part of the memory of lam\['flat'\]"):
        run_episode(problem_of(SGD(0.1)), Unroll(), w, flat, BATCHES, JUDGE)
    apart = torch.cat([random(1, 3), random(2, 2)])  # one memory, no overlap: as safetensors hands tensors out
    w = {"a": apart[:3], "b": leaf(0.7)}
    found = run_episode(problem_of(SGD(0.1)), Unroll(), w, {"v": apart[3]}, BATCHES, JUDGE).grads
    assert float(found["v"]) != 0


def half_episodes() -> dict[str, Tree]:
    """Two halves of every batch: on one process, or one each on two."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if size > 1 else 0

    def mine(batch: tuple[Tensor, Tensor]) -> list[Any]:
        halves = [tuple(x[i::2][:2] for x in batch) for i in range(2)]
        return halves if size == 1 else halves[rank : rank + 1]

    problem = BilevelProblem(
        lambda w, lam, part: inner(w, lam, part) / 2, lambda w, lam, part: outer(w, lam, part) / 2, SGD(0.1),
        parts=lambda parts: parts, processes=Processes(rank, size),
    )  # fmt: skip
    lam = tree.leaves(START, START)
    w, batches = STARTS["itself and computed"](lam), [mine(batch) for batch in BATCHES]
    return {name: run_episode(problem, one, w, lam, batches, mine(JUDGE)).grads for name, one in LEARNERS.items()}


def worker() -> dict[str, Tree]:
    torch.distributed.init_process_group("gloo")
    return half_episodes()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_learn_one_initialisation() -> None:
    expected = half_episodes()
    for found in on_processes(2, worker):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


# Numbers for each parameter ------------------------------------------------------------------------------------------

NUMBERS = {
    "v": leaf(0.2), "all": leaf(0.1), "la": leaf(0.1, 0.3, 0.2), "lb": leaf(0.05), "da": leaf(0.3), "db": leaf(0.1),
    "rates": leaf(0.1, 0.2, 0.05),
}  # fmt: skip
RATES: dict[str, tuple[Callable[[Tree], UpdateRule], Step]] = {
    "an element's": (
        lambda lam: SGD({"a": "la", "b": "lb"}),
        lambda w, g, lam: {"a": w["a"] - lam["la"] * g["a"], "b": w["b"] - lam["lb"] * g["b"]},
    ),
    "the tensors themselves": (
        lambda lam: SGD({"a": lam["la"], "b": lam["lb"]}),
        lambda w, g, lam: {"a": w["a"] - lam["la"] * g["a"], "b": w["b"] - lam["lb"] * g["b"]},
    ),
    "a tensor for all": (
        lambda lam: SGD(lam["all"]),
        lambda w, g, lam: {n: w[n] - lam["all"] * g[n] for n in w},
    ),
    "shared, with a number and decays": (
        lambda lam: SGD({"a": "all", "b": 0.2}, {"a": "da", "b": "all"}),
        lambda w, g, lam: {
            "a": w["a"] - lam["all"] * (g["a"] + lam["da"] * w["a"]),
            "b": w["b"] - 0.2 * (g["b"] + lam["all"] * w["b"]),
        },
    ),
    "a constant tensor": (
        lambda lam: SGD({"a": leaf(0.1, 0.2, 0.3), "b": "lb"}),
        lambda w, g, lam: {"a": w["a"] - leaf(0.1, 0.2, 0.3) * g["a"], "b": w["b"] - lam["lb"] * g["b"]},
    ),
}
EXACT: list[Estimator] = [Unroll(), ForwardMode(), *(OneStep(engine) for engine in ENGINES[:2])]


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_rates_and_decays_of_each_parameter(name: str, estimator: Estimator) -> None:
    lam = tree.leaves(NUMBERS, NUMBERS)
    make, step = RATES[name]
    batches = BATCHES[:1] if isinstance(estimator, OneStep) else BATCHES
    found = run_episode(problem_of(make(lam)), estimator, weights(), lam, batches, JUDGE).grads
    expected = by_autograd(step, weights(), lam, batches)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert tree.norm(found) > 0.01


def test_momenta_and_schedules_of_each_parameter() -> None:
    """In a mapping too an entry may be a schedule; momentum and rate of b are constants, a's are learned."""
    rule = SGD({"a": Windowed("rates", 3), "b": 0.1}, momentum={"a": "da", "b": 0.0})
    lam, buffer, steps = tree.leaves(NUMBERS, NUMBERS), [torch.zeros(3, dtype=F64)], iter(range(3))

    def step(w: Tree, g: Tree, lam: Tree) -> Tree:
        buffer[0] = lam["da"] * buffer[0] + g["a"]
        return {"a": w["a"] - lam["rates"][next(steps)] * buffer[0], "b": w["b"] - 0.1 * g["b"]}

    expected = by_autograd(step, weights(), lam, BATCHES)
    for estimator in LEARNERS.values():
        found = run_episode(problem_of(rule), estimator, weights(), lam, BATCHES, JUDGE).grads
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert rule.acting(NUMBERS, 1) == {"lr": {"a": 0.2, "b": 0.1}, "momentum": {"a": 0.3, "b": 0.0}}


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_adams_rates_of_each_parameter(cls: type[Adam]) -> None:
    lam = tree.leaves(NUMBERS, NUMBERS)
    rule = cls({"a": "la", "b": "lb"}, {"a": "da", "b": 0.1}, eps=1e-3)
    coupled, memory, count = cls is Adam, dict[str, Any](), [0]

    def step(w: Tree, g: Tree, lam: Tree) -> Tree:
        rate, decay, after = {"a": lam["la"], "b": lam["lb"]}, {"a": lam["da"], "b": 0.1}, {}
        count[0] += 1
        for n in w:
            grad = g[n] + decay[n] * w[n] if coupled else g[n]
            m, s = memory.get(n, (0.0, 0.0))
            memory[n] = m, s = 0.9 * m + 0.1 * grad, 0.999 * s + 0.001 * grad**2
            change = m / (1 - 0.9 ** count[0]) / ((s / (1 - 0.999 ** count[0])) ** 0.5 + 1e-3)
            after[n] = w[n] * (1.0 if coupled else 1 - rate[n] * decay[n]) - rate[n] * change
        return after

    expected = by_autograd(step, weights(), lam, BATCHES)
    for estimator in LEARNERS.values():
        found = run_episode(problem_of(rule), estimator, weights(), lam, BATCHES, JUDGE).grads
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_a_rule_that_holds_the_tensors_of_an_earlier_lam_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    lam = {"v": leaf(0.2), "rate": leaf(0.1)}
    problem = problem_of(SGD(lam["rate"]))
    for moved in (lam, tree.scale(lam, 0.9)):
        assert not caplog.messages
        hypergradient(problem, OneStep(), weights(), moved, BATCHES[0], JUDGE)
    assert ["hypergradient of lam['rate'] is exactly zero" in message for message in caplog.messages] == [True]


LEARNED_OUTSIDE = torch.tensor(0.1, requires_grad=True)
REFUSED: dict[str, tuple[UpdateRule, str]] = {
    "a parameter that is missing": (SGD({"a": 0.1}), r"lr has no value for unknown parameter 'b'"),
    "a name that lam lacks": (SGD({"a": "la", "b": "lc"}), r"reads \['lc'\], which lam lacks"),
    "another shape": (SGD({"a": "lb", "b": "la"}), r"lr of 'b' is lam\['la'\] of shape \[3\].*of shape \[\]"),
    "another dtype": (SGD({"a": torch.ones(3, dtype=F64), "b": 0.1}), r"lr of 'a' is a tensor of.*float64.*float32"),
    "a schedule that is none": (SGD({"a": Windowed("lb", 3), "b": 0.1}), r"lam\['lb'\] is of shape \[\]: give a vec"),
    "a tensor that nobody learns": (SGD(LEARNED_OUTSIDE), r"lr is a tensor that requires a gradient and is no entry"),
    "one that is computed": (SGD(0.1, momentum=LEARNED_OUTSIDE.exp()), r"momentum is a tensor that requires a grad"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_numbers_that_cannot_be_are_refused(what: str) -> None:
    rule, said = REFUSED[what]
    dtype = torch.float32 if what == "another dtype" else F64
    w, lam = ({n: x.to(dtype) for n, x in held.items()} for held in (weights(), NUMBERS))
    with pytest.raises(ValueError, match=said) as caught:
        hypergradient(problem_of(rule), OneStep(), w, lam, BATCHES[0], JUDGE)
    assert "\n" not in str(caught.value)


def test_an_entry_is_one_schedule() -> None:
    with pytest.raises(ValueError, match=r"reads lam\['r'\] as .*Windowed.*choose one"):
        SGD({"a": Windowed("r", 3), "b": "r"})


# A step of one's own -------------------------------------------------------------------------------------------------


class MetaCurvature(SGD):
    """w - lr M g, for the leaf a."""

    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        return super()._step(w, state, grad | {"a": lam["M"] @ grad["a"]}, lam)


class Signed(UpdateRule):
    """w - lr tanh(s g), nothing inherited; s is read of lam, and the clip is in front of it."""

    def init(self, w: Tree) -> UpdateState:
        return {"step": 0}

    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        after = {n: w[n] - self.lr * torch.tanh(lam["s"] * g) for n, g in grad.items()}  # type: ignore[operator]
        return after, {"step": state["step"] + 1}


OWN_LAM = {"v": leaf(0.2), "M": torch.eye(3, dtype=F64) + 0.1 * random(3, 3, 3), "s": leaf(2.0)}


def clipped(g: Tree) -> Tree:
    norm = torch.stack([x.square().sum() for x in g.values()]).sum().sqrt()
    assert float(norm.detach()) > 0.1, "an active clip is part of what is tested"
    return {n: x * 0.1 / (norm + 1e-6) for n, x in g.items()}


OWN: dict[str, tuple[UpdateRule, Step]] = {
    "meta-curvature": (
        MetaCurvature(0.1), lambda w, g, lam: {"a": w["a"] - 0.1 * lam["M"] @ g["a"], "b": w["b"] - 0.1 * g["b"]}
    ),
    "from scratch, clipped": (
        Signed(0.1, max_grad_norm=0.1),
        lambda w, g, lam: {n: w[n] - 0.1 * torch.tanh(lam["s"] * x) for n, x in clipped(g).items()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("estimator", [*EXACT, OneStep("finite_difference", radius=1e-4)], ids=str)
def test_a_step_of_ones_own_that_reads_lam(name: str, estimator: Estimator) -> None:
    rule, step = OWN[name]
    batches = BATCHES[:1] if isinstance(estimator, OneStep) else BATCHES
    found = run_episode(problem_of(rule), estimator, weights(), OWN_LAM, batches, JUDGE).grads
    expected = by_autograd(step, weights(), tree.leaves(OWN_LAM, OWN_LAM), batches)
    rough = isinstance(estimator, OneStep) and estimator.engine == "finite_difference"
    torch.testing.assert_close(found, expected, rtol=1e-6 if rough else 1e-10, atol=1e-13)


def test_a_step_of_ones_own_that_was_made() -> None:
    """With momentum inherited, and no closed form of its own: that of SGD would leave M out."""
    momentum = replace(OWN["meta-curvature"][0], momentum=0.9)  # type: ignore[call-arg]
    problem, w = problem_of(momentum), weights()
    assert type(momentum) is MetaCurvature
    found = [
        run_episode(problem, estimator, w, OWN_LAM, BATCHES[:1], JUDGE).grads for estimator in (OneStep(), Unroll())
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)
    assert momentum.reads(w, OWN_LAM) == {"M"}
    assert SGD(0.1).reads(w, OWN_LAM) == frozenset()
    for name in ("drmad", "hyperdistill"):  # whose line knows SGD's own algebra
        with pytest.raises(ValueError, match=r"inner optimiser is MetaCurvature: use SGD, or unroll"):
            run_episode(problem, make_estimator(name), w, OWN_LAM, BATCHES, JUDGE)


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if not make_estimator(n).tunes_optimizer])
def test_estimators_that_do_not_see_the_step_refuse_one_that_reads_lam(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not contain the optimiser's own \['M'\].*use one_step"):
        hypergradient(problem_of(MetaCurvature(0.1)), make_estimator(name), weights(), OWN_LAM, BATCHES[0], JUDGE)
    if name != "first_order":  # it needs a direct term
        mute = type("Mute", (SGD,), {})(0.1)
        hypergradient(problem_of(mute), make_estimator(name), weights(), OWN_LAM, BATCHES[0], JUDGE)
