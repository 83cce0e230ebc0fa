"""Algebra on trees: flat dictionaries of tensors, keyed by parameter name.

On a GPU a small model's step is as long as its launches: leaves without a graph are computed together (`_foreach_`),
and the host asks for a number once a tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from metaxl_evo.bilevel import shards

Tree = dict[str, Tensor]

TOGETHER = 2**20  # entries of leaves for which memory is taken at a time; a larger leaf comes alone


def tree_map(fn: Callable[..., Tensor], first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]) -> Tree:
    """Apply `fn` leaf by leaf; every tree has the keys of the first."""
    return {name: fn(leaf, *(tree[name] for tree in rest)) for name, leaf in first.items()}


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: float = 1.0) -> Tree:
    """`a + scale * b`; a key that `b` lacks is passed through."""
    names = [name for name in a if name in b]
    ours, theirs = [a[name] for name in names], [b[name] for name in names]
    if _have_graph(ours + theirs):
        return {**a, **{n: one + scale * other for n, one, other in zip(names, ours, theirs, strict=True)}}
    return {**a, **dict(zip(names, torch._foreach_add(ours, theirs, alpha=scale) if names else (), strict=True))}


def scale(a: Mapping[str, Tensor], factor: float) -> Tree:
    """`factor * a`."""
    if not a or _have_graph(a.values()):
        return tree_map(lambda leaf: factor * leaf, a)
    return dict(zip(a, torch._foreach_mul(list(a.values()), factor), strict=True))


def _have_graph(leaves: Iterable[Tensor]) -> bool:
    return any(leaf.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(leaf) for leaf in leaves)


def in_groups(leaves: Mapping[str, Tensor], size: int | None = None) -> Iterator[list[str]]:
    """The names in groups of one dtype and at most `size` (`TOGETHER`) entries, and those of larger leaves alone."""
    limit = TOGETHER if size is None else size
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves.values()):
        group: list[str] = []
        held = 0
        for name, leaf in [(name, leaf) for name, leaf in leaves.items() if leaf.dtype == dtype]:
            if group and held + leaf.numel() > limit:
                yield group
                group, held = [], 0
            group.append(name)
            held += leaf.numel()
        yield group


def zeros_like(a: Mapping[str, Tensor]) -> Tree:
    """A tree of zeros with the shapes, dtypes and devices of `a`."""
    if not a or any(map(torch._C._functorch.is_functorch_wrapped_tensor, a.values())):
        return tree_map(torch.zeros_like, a)
    zeros = tree_map(lambda leaf: torch.empty_like(leaf, requires_grad=False), a)
    torch._foreach_zero_(list(zeros.values()))
    return zeros


def detach(a: Mapping[str, Tensor]) -> Tree:
    """The same storages, outside any graph."""
    return tree_map(Tensor.detach, a)


def clone(a: Mapping[str, Tensor]) -> Tree:
    """Copies of the leaves, outside any graph."""
    copies = tree_map(lambda leaf: torch.empty_like(leaf, requires_grad=False), a)
    copy_into(copies, a)
    return copies


@torch.no_grad()
def copy_into(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Give the leaves of `a`, in place, the values of those of `b`."""
    ours, theirs = shards.local(a), shards.local(b)
    if ours:
        torch._foreach_copy_(list(ours.values()), [theirs[name] for name in ours])


def dense(a: Mapping[str, Tensor]) -> Tree:
    """The leaves, sparse ones (gradients of `nn.Embedding(sparse=True)`) as dense ones."""
    return tree_map(lambda leaf: leaf.to_dense() if leaf.is_sparse else leaf, a)


def leaves(a: Mapping[str, Tensor], wrt: Iterable[str]) -> Tree:
    """Fresh autograd leaves on the same storages; only the names in `wrt` require a gradient."""
    names = frozenset(wrt)
    return {name: leaf.detach().requires_grad_(name in names) for name, leaf in a.items()}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Inner product over the keys of `a`, accumulated in float64 (a 0-d tensor)."""
    if _have_graph([*a.values(), *(b[name] for name in a)]):
        return torch.stack([(leaf * b[name]).sum(dtype=torch.float64) for name, leaf in a.items()]).sum()
    ours, theirs, products = shards.local(a), shards.local(b), []
    for names in in_groups(ours):
        found = torch._foreach_mul([ours[name] for name in names], [theirs[name] for name in names])
        products.append(torch.cat([one.flatten() for one in found]).sum(dtype=torch.float64))
    return shards.total(a, torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64))


def norm(a: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all leaves, accumulated in float64; of a large leaf row by row, which takes no memory."""
    length = math.hypot(*numbers(norms(a)))
    return math.sqrt(_total(a, length**2)) if shards.any_sharded(a) else length


def norms(a: Mapping[str, Tensor]) -> list[Tensor]:
    """Those of the leaves, 0-d tensors in float64: not a number, or infinite, where one of their entries is.

    Of a sharded leaf that of the rows here.
    """
    leaves = [leaf.detach() for leaf in shards.local(a).values()]
    small = [leaf for leaf in leaves if leaf.numel() <= TOGETHER]
    large = [
        torch.linalg.vector_norm(torch.linalg.vector_norm(leaf, dim=-1), dtype=torch.float64)
        for leaf in leaves
        if leaf.numel() > TOGETHER
    ]
    return large + list(torch._foreach_norm(small, 2, torch.float64) if small else ())


def _total(a: Mapping[str, Tensor], number: float) -> float:
    device = next(iter(a.values())).device
    return float(shards.total(a, torch.tensor(number, dtype=torch.float64, device=device)))


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """0-d tensors of a device and a dtype as numbers, asked for once."""
    found: list[float] = torch.stack(list(scalars)).tolist() if scalars else []
    return found


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
    leaves = [leaf.detach() for leaf in shards.local(a).values() if leaf.numel()]
    finite = all(map(math.isfinite, numbers(torch._foreach_norm(leaves, math.inf)))) if leaves else True
    return _total(a, float(not finite)) == 0 if shards.any_sharded(a) else finite
