"""EvoGrad's mean and noise over many samples, against the theory of its linear regime (section 3 of the reference)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.bilevel import Hypergradient, hypergradient
from metaxl_evo.estimators import EvoGrad
from metaxl_evo.estimators.noise import Perturbations
from tests.estimators.problems import Quadratic, Toy, known, logged, quadratic

SIGMA, TAU, SAMPLES = 1e-3, 0.5, 200_000


def estimate(toy: Toy, estimator: EvoGrad, **options: Any) -> Hypergradient:
    return hypergradient(toy.problem, estimator, toy.w, toy.lam, toy.train, toy.val, **options)


def drawn(kind: str, copies: int, antithetic: bool, count: int = SAMPLES, sigma: float = SIGMA) -> Tensor:
    """Many draws of EvoGrad's own perturbations of six weights: the rows of one tall tensor. -> (R, K, M)"""
    tall = {"th": torch.zeros(count, 6, dtype=torch.float64)}
    noise = Perturbations(tall, copies, copies=copies, kind=kind, sigma=sigma, antithetic=antithetic)
    return torch.stack([noise[k]["th"] for k in range(copies)], dim=1)


def evograd_samples(q: Quadratic, toy: Toy, noise: Tensor, tau: float) -> Tensor:
    """The indirect term for many draws of noise (R, K, M) at once, from the written-out formulas. -> (R, N)"""
    off = toy.w["th"] - q.C @ toy.lam["lam"] - q.c + noise
    losses = 0.5 * torch.einsum("rkm,mn,rkn->rk", off, q.A, off)
    weights = torch.softmax(-losses / tau, dim=1)
    value = toy.w["th"] + torch.einsum("rk,rkm->rm", weights, noise)
    along = torch.einsum("rkm,rm->rk", noise, (value - q.b) @ q.V)
    coefficients = -(weights / tau) * (along - (weights * along).sum(1, keepdim=True))
    return -torch.einsum("rk,rkm,mn->rn", coefficients, off @ q.A, q.C)


def predicted_mean(q: Quadratic, toy: Toy, copies: int, antithetic: bool) -> Tensor:
    """-(sigma^2 / tau) B g_V(theta), times (K - 1)/K for independent copies."""
    factor = 1.0 if antithetic else (copies - 1) / copies
    return factor * SIGMA**2 / TAU * q.C.T @ q.A @ q.g_val(toy.w["th"])


def predicted_noise(q: Quadratic, toy: Toy, kind: str, copies: int, antithetic: bool) -> float:
    """Noise-to-signal (1 + kappa) / degrees of freedom: K - 1, or K/2 pairs.

    A sign has no fourth moment beyond its second's square. That takes 2 sum_i g_i^2 |B_i|^2 / |B g|^2 off the
    numerator, times (K - 1)/K where the copies' own mean is subtracted.
    """
    mixed, g = q.C.T @ q.A, q.g_val(toy.w["th"])
    signal = (mixed @ g).square().sum()
    kappa = mixed.square().sum() * g.square().sum() / signal
    spared = 2 * (mixed.square().sum(0) * g.square()).sum() / signal if kind == "sign" else 0.0
    if antithetic:
        return float(1 + kappa - spared) / (copies / 2)
    return float(1 + kappa - spared * (copies - 1) / copies) / (copies - 1)


def check_statistics(found: Tensor, mean: Tensor, noise: float) -> None:
    """The mean within 4 standard errors, the noise-to-signal ratio within 10 %."""
    ratio = float((found - mean).square().sum(1).mean() / mean.square().sum())
    assert float((found.mean(0) - mean).norm() / mean.norm()) < 4 * math.sqrt(ratio / len(found))
    assert abs(ratio / noise - 1) < 0.1


@pytest.mark.parametrize("kind", ["gaussian", "sign"])
@pytest.mark.parametrize(
    ("copies", "antithetic"), [(2, False), (4, False), (8, False), (2, True), (8, True)],
    ids=["2", "4", "8", "one_pair", "four_pairs"],
)  # fmt: skip
def test_mean_and_noise_over_many_samples(kind: str, copies: int, antithetic: bool) -> None:
    q, toy = Quadratic.make(), quadratic(torch.float64)
    found = evograd_samples(q, toy, drawn(kind, copies, antithetic), TAU)
    check_statistics(
        found,
        predicted_mean(q, toy, copies, antithetic),
        predicted_noise(q, toy, kind, copies, antithetic),
    )


def test_a_pair_is_worth_two_copies_and_more_pairs_less_than_as_many_copies() -> None:
    """K/2 degrees of freedom against K - 1: equal at K = 2, 4 against 7 at K = 8."""
    q, toy = Quadratic.make(), quadratic(torch.float64)
    laws = {(k, pairs): predicted_noise(q, toy, "gaussian", k, pairs) for k in (2, 8) for pairs in (False, True)}
    assert laws[2, True] == laws[2, False]
    assert laws[8, True] / laws[8, False] == pytest.approx(7 / 4)


@pytest.mark.parametrize(
    "settings",
    [{"noise": "gaussian"}, {"noise": "gaussian", "antithetic": True}, {"noise": "sign"}],
    ids=["gaussian", "antithetic", "sign"],
)
def test_the_estimators_own_samples_are_the_formulas(settings: dict[str, Any]) -> None:
    """At the perturbations at which it evaluates the inner loss, which have the mean and the noise promised."""
    q, toy = Quadratic.make(rho=0.0), quadratic(torch.float64, rho=0.0)
    calls, generator = list[Any](), torch.Generator().manual_seed(12)
    facts = replace(known(), batched_whole=False)  # one call a copy
    problem = replace(toy.problem, inner_loss=logged(toy.problem.inner_loss, calls), facts=facts)
    estimator = EvoGrad(copies=4, sigma=0.1, temperature=TAU, **settings)
    found, noise = [], []
    for _ in range(400):
        calls.clear()
        found.append(estimate(replace(toy, problem=problem), estimator, generator=generator).grads["lam"])
        noise.append(torch.stack([w["th"] - toy.w["th"] for w, _, _ in calls]))
    drawn = torch.stack(noise)  # (R, K, M)
    expected = evograd_samples(q, toy, drawn, TAU)
    assert float((torch.stack(found) - expected).norm() / expected.norm()) < 1e-10
    assert float(drawn.mean((0, 1)).abs().max()) < 4 * 0.1 / math.sqrt(400 * 4)
    assert float(drawn.square().mean()) == pytest.approx(0.1**2, rel=0.1)
    pairs = drawn[:, 0::2] + drawn[:, 1::2]
    assert bool(pairs.abs().max() < 1e-12) is estimator.antithetic


def test_estimates_are_the_formula_sample_by_sample() -> None:
    q, toy = Quadratic.make(), quadratic(torch.float64)
    noise = drawn("gaussian", 5, False, count=20, sigma=0.1)  # far from the linear regime
    expected = evograd_samples(q, toy, noise, 2.0)
    for one, indirect in zip(noise, expected, strict=True):
        found = estimate(toy, EvoGrad(temperature=2.0), noise=[{"th": row} for row in one]).grads["lam"]
        assert float((found - q.direct(toy.lam["lam"]) - indirect).norm() / indirect.norm()) < 1e-10
