"""Random directions in which weights and meta parameters are moved, each leaf by its own size."""

from __future__ import annotations

import torch
from torch import Tensor

from metaxl_evo.bilevel import shards, tree
from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.bilevel.tree import Tree

_STREAM = 0x6A7E


def moved(leaves: Tree, amount: float) -> Tree:
    """The leaves, each beside itself by so much of its size at random (a leaf of zeros as if its size were 1).

    A last layer that begins at zero hides what leads through it.
    """
    return {
        name: leaf.detach() + amount * random_like(leaf, number, size_of(leaf) or 1.0).to(leaf.dtype)
        for number, (name, leaf) in enumerate(leaves.items())
    }


def random_like(leaf: Tensor, number: int, size: float) -> Tensor:
    """A random tensor like `leaf`, float32, of mean square `size`^2; the same for a number, and for the rows here."""
    (here,) = shards.local({"": leaf}).values()
    place = (shards.first_row(leaf),) if shards.is_sharded(leaf) else ()
    generator = torch.Generator(leaf.device).manual_seed(mix_seed(_STREAM, number, *place))
    drawn = torch.empty(here.shape, dtype=torch.float32, device=leaf.device)
    drawn.uniform_(-1, 1, generator=generator).mul_(3**0.5 * size)
    return shards.like({"": leaf}, {"": drawn})[""]


def sizes(w: Tree) -> dict[str, float]:
    """The root mean squares of the leaves; a leaf of zeros is moved like the others."""
    sizes = {name: size_of(leaf) for name, leaf in w.items()}
    others = [size for size in sizes.values() if size]
    default = min(0.1, sum(others) / len(others)) if others else 0.1
    return {name: size or default for name, size in sizes.items()}


def size_of(leaf: Tensor) -> float:
    return tree.norm({"": leaf}) / max(leaf.numel(), 1) ** 0.5
