"""Algebra on trees against plain vectors."""

from __future__ import annotations

import math

import torch
from torch import nn

from metaxl_evo.bilevel import Tree, tree


def trees(dtype: torch.dtype = torch.float64) -> tuple[Tree, Tree]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 3), "b": (), "c": (4,)}
    one, two = ({n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()} for _ in range(2))
    return one, two


def flat(a: Tree) -> torch.Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in a.values()])


def test_add_scale_and_map_are_those_of_vectors() -> None:
    a, b = trees()
    assert torch.equal(flat(tree.add(a, b)), flat(a) + flat(b))
    assert torch.equal(flat(tree.add(a, b, -2.5)), flat(a) - 2.5 * flat(b))
    assert torch.equal(flat(tree.scale(a, 3.0)), 3.0 * flat(a))
    assert torch.equal(flat(tree.tree_map(torch.maximum, a, b)), torch.maximum(flat(a), flat(b)))
    assert list(tree.add(a, b)) == ["a", "b", "c"]


def test_add_passes_a_missing_key_through() -> None:
    a, b = trees()
    total = tree.add(a, {"b": b["b"]}, 2.0)
    assert total["a"] is a["a"]
    assert torch.equal(total["b"], a["b"] + 2.0 * b["b"])


def test_dot_norm_and_size() -> None:
    a, b = trees()
    torch.testing.assert_close(tree.dot(a, b), flat(a) @ flat(b), rtol=1e-14, atol=0)
    assert math.isclose(tree.norm(a), float(flat(a).norm()), rel_tol=1e-14)
    assert tree.size(a) == 11
    assert float(tree.dot({}, {})) == 0.0
    assert tree.norm({}) == 0.0


def test_products_of_float32_are_accumulated_in_float64() -> None:
    """1 + 1e-8 + 1e-8 + ... stays 1 in float32."""
    small = {"x": torch.cat([torch.ones(1), torch.full((10_000,), 1e-4)])}
    exact = 1 + 10_000 * float(small["x"][1] * small["x"][1])
    assert math.isclose(float(tree.dot(small, small)), exact, rel_tol=1e-13)
    assert tree.dot(small, small).dtype == torch.float64


def test_cosine_has_no_floor() -> None:
    a, b = trees()
    true = float(flat(a) @ flat(b) / flat(a).norm() / flat(b).norm())
    for scale in (1.0, 1e-12, 1e-140):
        assert math.isclose(tree.cosine(tree.scale(a, scale), tree.scale(b, scale)), true, rel_tol=1e-13)
    small = {"x": torch.tensor([3e-30, 4e-30])}, {"x": torch.tensor([4e-30, 3e-30])}
    assert float(torch.cosine_similarity(small[0]["x"], small[1]["x"], dim=0)) < 1e-40
    assert math.isclose(tree.cosine(*small), 24 / 25, rel_tol=1e-6)
    assert tree.cosine(a, tree.zeros_like(b)) == tree.cosine(tree.zeros_like(a), b) == 0.0


def test_leaves_share_storage_and_require_only_what_is_asked() -> None:
    module = nn.Linear(2, 2)
    live = dict(module.named_parameters())
    leaves = tree.leaves(live, ["bias"])
    assert leaves["bias"].requires_grad
    assert not leaves["weight"].requires_grad
    assert all(leaf.is_leaf and leaf is not live[name] for name, leaf in leaves.items())
    assert all(leaf.data_ptr() == live[name].data_ptr() for name, leaf in leaves.items())
    leaves["bias"].sum().backward()
    assert module.bias.grad is None


def test_clone_and_detach() -> None:
    live = dict(nn.Linear(2, 2).named_parameters())
    detached, cloned, zeros = tree.detach(live), tree.clone(live), tree.zeros_like(live)
    assert not any(leaf.requires_grad for t in (detached, cloned, zeros) for leaf in t.values())
    assert detached["weight"].data_ptr() == live["weight"].data_ptr()
    assert cloned["weight"].data_ptr() != live["weight"].data_ptr()
    assert torch.equal(cloned["weight"], live["weight"])
    assert not zeros["weight"].any()


def test_all_finite() -> None:
    a, _ = trees()
    assert tree.all_finite(a)
    for bad in (math.nan, math.inf, -math.inf):
        assert not tree.all_finite(a | {"c": torch.tensor([0.0, bad])})
