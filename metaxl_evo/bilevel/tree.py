"""Algebra on trees: flat dictionaries of tensors, keyed by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

Tree = dict[str, Tensor]


def tree_map(fn: Callable[..., Tensor], first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]) -> Tree:
    """Apply `fn` leaf by leaf; every tree has the keys of the first."""
    return {name: fn(leaf, *(tree[name] for tree in rest)) for name, leaf in first.items()}


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: float = 1.0) -> Tree:
    """`a + scale * b`; a key that `b` lacks is passed through."""
    return {name: leaf + scale * b[name] if name in b else leaf for name, leaf in a.items()}


def scale(a: Mapping[str, Tensor], factor: float) -> Tree:
    """`factor * a`."""
    return tree_map(lambda leaf: factor * leaf, a)


def zeros_like(a: Mapping[str, Tensor]) -> Tree:
    """A tree of zeros with the shapes, dtypes and devices of `a`."""
    return tree_map(torch.zeros_like, a)


def detach(a: Mapping[str, Tensor]) -> Tree:
    """The same storages, outside any graph."""
    return tree_map(Tensor.detach, a)


def clone(a: Mapping[str, Tensor]) -> Tree:
    """Copies of the leaves, outside any graph."""
    return tree_map(lambda leaf: leaf.detach().clone(), a)


def dense(a: Mapping[str, Tensor]) -> Tree:
    """The leaves, sparse ones (gradients of `nn.Embedding(sparse=True)`) as dense ones."""
    return tree_map(lambda leaf: leaf.to_dense() if leaf.is_sparse else leaf, a)


def leaves(a: Mapping[str, Tensor], wrt: Iterable[str]) -> Tree:
    """Fresh autograd leaves on the same storages; only the names in `wrt` require a gradient."""
    names = frozenset(wrt)
    return {name: leaf.detach().requires_grad_(name in names) for name, leaf in a.items()}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Inner product over the keys of `a`, accumulated in float64 (a 0-d tensor)."""
    products = [(leaf * b[name]).sum(dtype=torch.float64) for name, leaf in a.items()]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)


def norm(a: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all leaves; row by row, since one long float32 sum would lose digits."""
    rows = [torch.linalg.vector_norm(leaf.detach(), dim=-1) if leaf.dim() else leaf.detach() for leaf in a.values()]
    return math.hypot(*(torch.linalg.vector_norm(norms, dtype=torch.float64).item() for norms in rows))


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """a.b / (|a| |b|), 0 where one of them is zero.

    In float64 and without a floor: `torch.cosine_similarity` clamps the norms at 1e-8, where hypergradients live.
    """
    a, b = tree_map(Tensor.double, a), tree_map(Tensor.double, b)
    lengths = norm(a), norm(b)
    return dot(a, b).item() / lengths[0] / lengths[1] if all(lengths) else 0.0


def size(a: Mapping[str, Tensor]) -> int:
    """Number of scalars in the tree."""
    return sum(leaf.numel() for leaf in a.values())


def all_finite(a: Mapping[str, Tensor]) -> bool:
    """Whether no leaf holds an infinity or a NaN."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in a.values())


def buckets(a: Mapping[str, Tensor], numbers: int) -> Iterator[list[str]]:
    """Names of leaves of one dtype, as many as hold so many numbers together, or a larger one alone."""
    for dtype in dict.fromkeys(leaf.dtype for leaf in a.values()):
        bucket: list[str] = []
        held = 0
        for name, leaf in [(name, leaf) for name, leaf in a.items() if leaf.dtype == dtype]:
            if bucket and held + leaf.numel() > numbers:
                yield bucket
                bucket, held = [], 0
            bucket.append(name)
            held += leaf.numel()
        yield bucket
