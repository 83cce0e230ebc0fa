"""What has no hypergradient or none that is finite, what is no problem at all, and what torch hands over oddly."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaxl_evo.bilevel import SGD, Adam, AdamW, BilevelProblem, Tree, hypergradient, run_episode, tree
from metaxl_evo.bilevel.hypergradients import look_ahead
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import InnerStep
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.estimators import ESTIMATORS, ForwardMode, OneStep, Unroll, make_estimator, takes_any_optimizer
from tests.estimators.test_learned_steps import (
    BATCHES,
    F64,
    JUDGE,
    errors,
    inner,
    leaf,
    outer,
    problem_of,
    random,
    weights,
)


def test_those_that_take_any_optimizer_are_named() -> None:
    assert takes_any_optimizer() == ["first_order", "evograd", "neumann", "conjugate_gradient"]


# A second moment of zero ---------------------------------------------------------------------------------------------


def weighted(w: Tree, lam: Tree, batch: Any) -> Tensor:
    return (lam["eps"] * errors(w, batch).square()).sum()


ADAMS = pytest.mark.parametrize("rule", [Adam(0.1), AdamW(0.1, 0.1)], ids=["adam", "adamw"])
AT_ZERO = {"eps": torch.zeros(5, dtype=F64)}  # weights of examples
NEEDY = [n for n in ESTIMATORS if (e := make_estimator(n)).needs_update_rule and not e.needs_sgd]


@ADAMS
def test_an_inner_gradient_of_zero_under_adam_is_refused_by_all_that_differentiate_its_step(rule: UpdateRule) -> None:
    assert NEEDY == ["one_step", "sama", "unroll", "forward_mode", "greedy"]
    for name in NEEDY:
        with pytest.raises(ValueError, match=r"inner gradient is exactly zero.*SGD \(optim: sgd\).*evograd"):
            run_episode(
                BilevelProblem(weighted, outer, rule), make_estimator(name), weights(), AT_ZERO, BATCHES[:1], JUDGE
            )


@ADAMS
def test_what_that_refusal_names_answers(rule: UpdateRule) -> None:
    for estimator in (OneStep(), Unroll(), ForwardMode(), make_estimator("greedy")):
        problem = BilevelProblem(weighted, outer, SGD(0.1))
        found = run_episode(problem, estimator, weights(), AT_ZERO, BATCHES[:1], JUDGE).grads["eps"]
        torch.testing.assert_close(found, by_hand_at_zero(), rtol=1e-10, atol=1e-13)
    evograd, problem = make_estimator("evograd", copies=64), BilevelProblem(weighted, outer, rule)
    found = hypergradient(problem, evograd, weights(), AT_ZERO, BATCHES[0], JUDGE).grads
    assert tree.cosine(found, {"eps": by_hand_at_zero()}) > 0.9


def by_hand_at_zero() -> Tensor:
    """-lr <grad l_i, grad L_V>."""
    w = tree.leaves(weights(), weights())
    to_val = torch.autograd.grad(outer(w, {}, JUDGE), list(w.values()))
    rows = [
        torch.autograd.grad(errors(w, BATCHES[0]).square()[i], list(w.values()), retain_graph=True) for i in range(5)
    ]
    return torch.stack([-0.1 * sum((a * b).sum() for a, b in zip(row, to_val, strict=True)) for row in rows])


@ADAMS
def test_coordinates_without_a_gradient_are_held_by_all_exact_estimators(rule: UpdateRule) -> None:
    """Half of the weights wait for an example whose weight starts at 0: they add nothing, the others all."""

    def two(w: Tree, lam: Tree, batch: Any) -> Tensor:
        return lam["used"] * (w["a"][:2] - 1).square().sum() + lam["idle"] * (w["a"][2:] - 1).square().sum()

    problem = BilevelProblem(two, lambda w, lam, _: w["a"].square().sum(), rule)
    lam, w = {"used": leaf(0.5), "idle": leaf(0.0)}, {"a": random(1, 3)}
    found = [
        run_episode(problem, e, w, lam, [None], None).grads for e in (OneStep(), Unroll(), Unroll(1), ForwardMode())
    ]
    for one in found:
        torch.testing.assert_close(one, found[0], rtol=1e-9, atol=1e-12)
        assert float(one["idle"]) == 0.0
        assert 1e-12 < abs(float(one["used"])) < 1.0


# Zero, said ----------------------------------------------------------------------------------------------------------

ZEROS: dict[str, tuple[BilevelProblem, str]] = {
    "inner": (
        BilevelProblem(lambda w, lam, b: outer(w, {}, b), outer, SGD(0.1)),
        r"inner loss does not depend on lam",
    ),
    "outer": (
        BilevelProblem(inner, lambda w, lam, b: torch.zeros((), dtype=F64), SGD(0.1)),
        r"outer loss does not depend on the base weights",
    ),
    "between": (
        BilevelProblem(lambda w, lam, b: outer(w, {}, b) + lam["v"], outer, SGD(0.1)),
        r"step between them carries nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", ZEROS)
def test_a_hypergradient_of_zero_says_which_level_is_deaf(which: str, caplog: pytest.LogCaptureFixture) -> None:
    problem, said = ZEROS[which]
    lam = {"v": leaf(0.2)}
    with caplog.at_level(logging.WARNING, "metaxl_evo"):
        assert tree.norm(hypergradient(problem, OneStep(), weights(), lam, BATCHES[0], JUDGE).grads) == 0
        assert tree.norm(run_episode(problem, Unroll(), weights(), lam, BATCHES, JUDGE).grads) == 0
    assert len(caplog.messages) == 2
    assert all(re.search(said, message) for message in caplog.messages)
    caplog.clear()
    hypergradient(problem_of(SGD(0.1)), OneStep(), weights(), lam, BATCHES[0], JUDGE)
    assert not caplog.messages


# What is no dict of parameters ---------------------------------------------------------------------------------------

NO_TREES: dict[str, tuple[Any, str]] = {
    "module": (nn.Linear(2, 1), r"is a Linear: give its parameters, dict\(module.named_parameters\(\)\)"),
    "parameter dict": (nn.ParameterDict({"a": torch.ones(1)}), r"is a ParameterDict: give its parameters"),
    "tensor": (torch.ones(2), r"is a Tensor, and has to be a dict"),
    "list": (list(nn.Linear(2, 1).parameters()), r"is a list, and has to be a dict.*named_parameters"),
    "generator": (nn.Linear(2, 1).named_parameters(), r"is a generator, and has to be a dict"),
    "nothing": ({}, r"is empty"),
    "nested": ({"layer": {"weight": torch.ones(1)}}, r"\['layer'\] is a dict: give one flat dict.*'layer.key'"),
    "modules": ({"layer": nn.Linear(2, 1)}, r"\['layer'\] is a Linear: give one flat dict"),
    "numbers": ({"lr": 0.1}, r"\['lr'\] is str -> float: give tensors by name"),
    "no names": ({0: torch.ones(1)}, r"\[0\] is int -> Tensor: give tensors by name"),
    "integers": ({"x": torch.ones(1, dtype=torch.int64)}, r"\['x'\] has dtype torch.int64"),
}


@pytest.mark.parametrize("which", NO_TREES)
@pytest.mark.parametrize("argument", ["w", "lam"])
def test_what_is_no_dict_of_parameters_is_refused(which: str, argument: str) -> None:
    given, said = NO_TREES[which]
    w, lam = (given, {"v": leaf(0.2)}) if argument == "w" else (weights(), given)
    for run in (hypergradient, run_episode):
        with pytest.raises(ValueError, match=f"^{argument}.*{said}|^{argument}{said}") as caught:
            run(problem_of(SGD(0.1)), OneStep(), w, lam, [BATCHES[0]], JUDGE)
        assert "\n" not in str(caught.value)


# A row that judges is NaN --------------------------------------------------------------------------------------------


def test_greedys_memory_leaves_out_what_is_not_finite() -> None:
    """Its state after a NaN is the decayed one; hyperdistill's fit keeps the last theta."""
    nan = (JUDGE[0], torch.full((4,), torch.nan, dtype=F64))
    problem, lam, greedy = problem_of(SGD(0.1)), {"v": leaf(0.2)}, make_estimator("greedy")
    states = [greedy.init(problem, weights(), lam)]
    for judge in (JUDGE, nan, JUDGE):
        step = look_ahead(PassContext(problem), InnerStep(weights(), lam, BATCHES[0], val_batch=judge))
        states.append(greedy.observe(PassContext(problem), step, states[-1]))
    torch.testing.assert_close(states[2], tree.scale(states[1], 0.9), rtol=0, atol=0)
    torch.testing.assert_close(states[3], tree.add(states[1], states[2], 0.9), rtol=1e-12, atol=0)
    fit = make_estimator("hyperdistill", theta=0.7)
    found = run_episode(problem, fit, weights(), lam, BATCHES, nan)
    assert found.diagnostics["theta"] == 0.7


def test_sparse_gradients_are_those_of_dense_ones() -> None:
    ids, found = torch.tensor([1, 2, 2, 4]), []
    w, lam = {"e": random(1, 6, 3), "o": random(2, 3)}, {"v": random(3, 6)}
    for sparse in (False, True):

        def loss(w: Tree, lam: Tree, ids: Tensor, sparse: bool = sparse) -> Tensor:
            rows = nn.functional.embedding(ids, w["e"], sparse=sparse) @ w["o"]
            return (torch.sigmoid(lam["v"][ids]) * rows.square()).mean()

        problem = BilevelProblem(loss, loss, SGD(0.1, momentum=0.9, max_grad_norm=0.5))
        estimators = [
            OneStep("finite_difference"), OneStep("double_backward"), Unroll(), make_estimator("evograd"),
            make_estimator("neumann", engine="finite_difference"), make_estimator("greedy"), make_estimator("sama"),
        ]  # fmt: skip
        found.append([run_episode(problem, e, w, lam, [ids, ids.flip(0)], ids).grads["v"] for e in estimators])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
