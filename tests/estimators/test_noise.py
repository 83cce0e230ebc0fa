"""EvoGrad's perturbations: one stream for ever, keyed by tensor and row, and as random as they are taken for."""

from __future__ import annotations

import math
import zlib
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.bilevel import Tree, tree
from metaxl_evo.estimators import noise as noise_module
from metaxl_evo.estimators.noise import NOISES, Perturbations

SIGMA, SEED = 1e-3, 2021
on_kinds = pytest.mark.parametrize("kind", NOISES)


def perturbations(like: Tree, seed: int = SEED, **settings: Any) -> Perturbations:
    return Perturbations(like, seed, **{"copies": 4, "kind": "sign", "sigma": SIGMA, **settings})


def random_tree(dtype: torch.dtype = torch.float64) -> Tree:
    """Leaves of every number of dimensions, none a multiple of 64 wide but one."""
    shapes = {"scalar": (), "bias": (7,), "embedding": (50, 33), "kernel": (5, 3, 2, 2), "wide": (3, 128)}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


# The stream


def mix(seed: int, *keys: int) -> int:
    """The seed of (seed, keys), written out: splitmix64 with the key in its step, the last bit dropped."""
    for key in keys:
        seed = finish((seed + 0x9E3779B97F4A7C15 * (key + 1)) % 2**64)
    return seed >> 1


def finish(z: int) -> int:
    """splitmix64's output of a state (Steele et al., OOPSLA 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def row_by_hand(kind: str, seed: int, copy: int, name: str, row: int, columns: int) -> list[float]:
    """A row of a perturbation in Python's own integers: 64 signs, or two normal numbers, of one word."""
    start = mix(seed, 0xE70, copy, zlib.crc32(name.encode()))
    count = math.ceil(columns / (64 if kind == "sign" else 2))
    found: list[float] = []
    for number in range(row * count, (row + 1) * count):
        word = finish((start + 0x9E3779B97F4A7C15 * number) % 2**64)
        if kind == "sign":
            found += [SIGMA if word >> bit & 1 else -SIGMA for bit in range(64)]
        else:
            low, high = ((half ^ 2**31) + 0.5 for half in (word % 2**32, word >> 32))  # two's complement, from 0
            radius, angle = SIGMA * math.sqrt(-2 * math.log(low / 2**32)), 2 * math.pi * high / 2**32
            found += [radius * math.cos(angle), radius * math.sin(angle)]
    return found[:columns]


@on_kinds
def test_the_stream_is_the_one_written_out(kind: str) -> None:
    like = random_tree()
    drawn = perturbations(like, kind=kind)
    for copy in range(4):
        for name, leaf in like.items():
            flat = drawn[copy][name].reshape(leaf.shape[0] if leaf.dim() > 1 else 1, -1)
            assert drawn[copy][name].shape == leaf.shape
            for row, found in enumerate(flat):
                expected = row_by_hand(kind, SEED, copy, name, row, flat.shape[1])
                torch.testing.assert_close(found, torch.tensor(expected, dtype=leaf.dtype), rtol=1e-12, atol=1e-18)


def test_the_stream_never_changes() -> None:
    """Pinned numbers: a published run can be drawn again."""
    like = {"classifier.weight": torch.zeros(2, 8, dtype=torch.float64)}
    signs = perturbations(like, kind="sign", sigma=1.0)[1]["classifier.weight"]
    assert ["".join("-+"[int(x > 0)] for x in row) for row in signs] == ["+-+----+", "-++--+--"]
    normals = perturbations(like, kind="gaussian", sigma=1.0)[1]["classifier.weight"]
    expected = torch.tensor([[0.954278119, 1.147463195, -0.225992088], [0.673546793, -0.493597222, 0.355399884]])
    torch.testing.assert_close(normals[:, :3], expected.double(), rtol=0, atol=1e-7)


@on_kinds
@pytest.mark.parametrize("antithetic", [False, True])
def test_a_row_is_drawn_alike_whatever_else_there_is(kind: str, antithetic: bool) -> None:
    """Not on the other rows, the other tensors, their order, the number of copies, or how many are drawn together."""
    like = random_tree()
    whole = perturbations(like, kind=kind, antithetic=antithetic)
    rows = torch.tensor([0, 1, 5, 17, 49])
    compact = {"embedding": like["embedding"][rows], "bias": like["bias"]}
    some = perturbations(compact, kind=kind, antithetic=antithetic, copies=6, rows={"embedding": rows})
    for k in range(4):
        assert torch.equal(some[k]["embedding"], whole[k]["embedding"][rows])
        assert torch.equal(some[k]["bias"], whole[k]["bias"])


@on_kinds
def test_all_precisions_draw_the_same_numbers(kind: str) -> None:
    exact = perturbations(random_tree(), kind=kind)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = perturbations(random_tree(dtype), kind=kind)
        for k in range(4):
            for name, leaf in rounded[k].items():
                assert leaf.dtype == dtype
                assert torch.equal(leaf, exact[k][name].to(dtype))


# What is made of it


@on_kinds
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("block", [1, 200, 2**20], ids=lambda block: f"block {block}")
def test_points_means_and_products(kind: str, antithetic: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sums over the copies one by one, in blocks of one copy, of some and of all."""
    monkeypatch.setattr(noise_module, "_BLOCK", block)
    w, v, weights = random_tree(), random_tree(), [0.1, 0.0, 0.6, 0.3]
    perturbed = {name: w[name] for name in ("bias", "embedding", "kernel")}
    eps = perturbations(perturbed, kind=kind, antithetic=antithetic)
    before = {name: leaf.clone() for name, leaf in w.items()}
    points = [eps.perturbed(w, k) for k in range(4)]
    combined, along = eps.combined(w, torch.tensor(weights, dtype=torch.float64)), eps.along(v)
    for name, leaf in w.items():
        own = [eps[k].get(name, torch.zeros_like(leaf)) for k in range(4)]
        for k, point in enumerate(points):
            torch.testing.assert_close(point[name], leaf + own[k], rtol=1e-15, atol=1e-16)
        expected = leaf + sum(weight * one for weight, one in zip(weights, own, strict=True))
        torch.testing.assert_close(combined[name], expected, rtol=1e-14, atol=1e-16)
        assert torch.equal(leaf, before[name])
    products = torch.stack([tree.dot(eps[k], v) for k in range(4)])
    torch.testing.assert_close(along, products, rtol=1e-12, atol=1e-16)


def test_antithetic_copies_are_each_others_negative() -> None:
    pairs, single = perturbations(random_tree(), antithetic=True), perturbations(random_tree())
    for name, leaf in pairs[0].items():
        assert torch.equal(pairs[1][name], -leaf)
        assert torch.equal(pairs[3][name], -pairs[2][name])
        assert torch.equal(leaf, single[0][name])
        assert torch.equal(pairs[2][name], single[1][name])


def test_injected_perturbations_are_taken_as_they_are() -> None:
    like = {"a": torch.zeros(3, 2), "b": torch.zeros(2)}
    given = [{name: torch.full_like(leaf, k + 1.0) for name, leaf in like.items()} for k in range(3)]
    eps = perturbations(like, injected=given, copies=9)
    assert eps.copies == 3
    assert [float(eps.perturbed(like, k)["b"][0]) for k in range(3)] == [1.0, 2.0, 3.0]
    assert eps.along({name: torch.ones_like(leaf) for name, leaf in like.items()}).tolist() == [8.0, 16.0, 24.0]
    with pytest.raises(ValueError, match="noise must hold at least 2 perturbations, not 1"):
        perturbations(like, injected=given[:1])


# How random it is

COUNT = 2**16
BOUND = 5 / math.sqrt(COUNT)  # five standard errors of a mean of independent numbers of variance 1


def test_signs_are_fair() -> None:
    drawn = perturbations({"x": torch.zeros(COUNT // 64, 64, dtype=torch.float64)}, sigma=1.0)
    for k in range(4):
        signs = drawn[k]["x"]
        assert bool((signs.abs() == 1).all())
        assert abs(float(signs.mean())) < BOUND
        assert float(signs.mean(0).abs().max()) < 5 / math.sqrt(len(signs))  # each bit of a word
        assert float(signs.mean(1).abs().max()) < 5 / math.sqrt(64)  # each row
        pairs = signs.T @ signs / len(signs) - torch.eye(64)  # any two bits
        assert float(pairs.abs().max()) < 5.5 / math.sqrt(len(signs))


def test_normals_are_normal() -> None:
    drawn = perturbations({"x": torch.zeros(COUNT, dtype=torch.float64)}, kind="gaussian", sigma=1.0)
    for k in range(4):
        x = drawn[k]["x"]
        for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
            assert abs(float((x**power).mean()) - moment) < BOUND * math.sqrt(variance)
        for limit in (0.1, 0.5, 1.0, 2.0, 3.0):
            share = math.erf(limit / math.sqrt(2))
            assert abs(float((x.abs() < limit).double().mean()) - share) < BOUND * math.sqrt(share * (1 - share))
        assert float(x.abs().max()) < 6


@on_kinds
def test_tensors_copies_rows_and_seeds_are_independent(kind: str) -> None:
    """No two of them correlate, nor do their neighbouring entries, nor their squares."""
    side = math.isqrt(COUNT)
    like = {name: torch.zeros(side, side, dtype=torch.float64) for name in ("a", "b", "layer.0.w", "layer.1.w")}

    def draws(seed: int, k: int = 0, kind: str = kind) -> Tree:
        return perturbations(like, seed, kind=kind, sigma=1.0)[k]

    first = draws(0)
    streams: dict[str, Tensor] = {
        **first,
        "row": first["a"].roll(1, 0),
        "column": first["a"].roll(1, 1),
        "word": first["a"].roll(64, 1),
        **{f"copy {k}": draws(0, k)["a"] for k in (1, 2, 3)},
        **{f"seed {seed}": draws(seed)["a"] for seed in (1, 2, 2**31, 2**62)},
    }
    assert len(streams) == 14
    for one, other in combinations(streams, 2):
        assert abs(float((streams[one] * streams[other]).mean())) < BOUND, (one, other)
        if kind == "gaussian":
            squares = ((streams[one] ** 2 - 1) * (streams[other] ** 2 - 1)).mean() / 2
            assert abs(float(squares)) < BOUND, (one, other)
