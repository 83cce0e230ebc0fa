"""Linear algebra with a symmetric map on trees that is known by its products alone (a Hessian)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metaxl_evo.bilevel import shards, tree
from metaxl_evo.bilevel.tree import Tree

Matvec = Callable[[Tree], Tree]


@dataclass(frozen=True)
class Solution:
    """An approximate solution of A x = v.

    Args:
        x: the solution, a tree like v.
        products: how many products with A it took.
        residual: what is left, relative to |v|: |v - A x| (conjugate gradients), |(I - step A)^terms v| (Neumann).
        negative_curvature: whether a direction p with <p, A p> <= 0 was met, so that A is not positive definite.
    """

    x: Tree
    products: int
    residual: float
    negative_curvature: bool


def neumann_series(matvec: Matvec, v: Tree, *, terms: int, step: float) -> Solution:
    """x = step * sum_{j=0..terms} (I - step A)^j v; converges to A^-1 v where every eigenvalue is in (0, 2 / step)."""
    term = x = tree.scale(v, step)
    negative = False
    for _ in range(terms):
        product = matvec(term)
        negative |= tree.dot(term, product).item() < 0
        term = tree.add(term, product, -step)
        x = tree.add(x, term)
    size = step * tree.norm(v)
    return Solution(x, terms, tree.norm(term) / size if size else 0.0, negative)


def conjugate_gradients(matvec: Matvec, v: Tree, *, iterations: int, tolerance: float) -> Solution:
    """x ~ A^-1 v from x = 0; ends once |v - A x| <= tolerance |v|, or at a direction without positive curvature.

    Source: Hestenes & Stiefel, 1952; the early end as in truncated Newton methods (Steihaug 1983).
    """
    x, residual, direction = tree.zeros_like(v), v, v
    size = start = tree.dot(v, v).item()
    products, negative = 0, False
    while products < iterations and size > tolerance**2 * start:
        product = matvec(direction)
        products += 1
        curvature = tree.dot(direction, product).item()
        if curvature <= 0:
            negative = True
            break
        x = tree.add(x, direction, size / curvature)
        residual = tree.add(residual, product, -size / curvature)
        previous, size = size, tree.dot(residual, residual).item()
        direction = tree.add(residual, direction, size / previous)
    return Solution(x, products, (size / start) ** 0.5 if start else 0.0, negative)


def largest_eigenvalue(matvec: Matvec, like: Tree, *, iterations: int, seed: int) -> float:
    """The largest magnitude of an eigenvalue, approached from below by power iterations from a random start."""
    generator = torch.Generator().manual_seed(seed)
    x = tree.tree_map(lambda leaf: shards.part_of(_normal(leaf, generator), leaf), like)
    found = 0.0
    for _ in range(iterations):
        size = tree.norm(x)
        if size == 0:
            return 0.0
        x = matvec(tree.scale(x, 1 / size))
        found = tree.norm(x)
    return found


def _normal(leaf: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
