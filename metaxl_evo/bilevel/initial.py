"""A learned initialisation: first weights that are meta parameters themselves, or are computed from them (MAML)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaxl_evo.bilevel import shards, tree
from metaxl_evo.bilevel.tree import Tree


@dataclass(frozen=True)
class Initial:
    """How the first weights of an episode depend on lam.

    Args:
        lam: the meta parameters as the caller gave them, inside the graph of `computed`.
        same: the weights that are an entry of lam, by its name.
        computed: the weights that have a graph to entries of lam, which is kept for whoever made it.
    """

    lam: Tree
    same: Mapping[str, str]
    computed: Tree

    @property
    def first(self) -> str:
        """The name of one of these weights."""
        return next(iter({**self.same, **self.computed}))

    def pull_back(self, cotangent: Tree) -> Tree:
        """d_lam <w_0, cotangent>, a tree like lam."""
        return tree.detach(self._pulled(cotangent))

    def columns(self, w: Tree) -> Tree:
        """The derivatives of the weights along each entry of lam, like w with a leading axis of the size of lam."""
        with torch.enable_grad():  # the pullback is linear in its cotangent: its derivative is the push-forward
            cotangent = tree.leaves(tree.zeros_like(w), w)
            flat = torch.cat([leaf.reshape(-1) for leaf in self._pulled(cotangent, create_graph=True).values()])
            rows = [
                torch.autograd.grad(one, list(cotangent.values()), retain_graph=True, materialize_grads=True)
                if one.requires_grad
                else [torch.zeros_like(leaf) for leaf in cotangent.values()]
                for one in flat
            ]
        return {name: torch.stack(column).detach() for name, column in zip(w, zip(*rows, strict=True), strict=True)}

    def _pulled(self, cotangent: Tree, *, create_graph: bool = False) -> Tree:
        pulled = tree.zeros_like(self.lam)
        for name, key in self.same.items():
            pulled[key] = pulled[key] + cotangent[name]
        leaves = {key: entry for key, entry in self.lam.items() if entry.requires_grad}
        if self.computed:
            found = torch.autograd.grad(
                list(self.computed.values()),
                list(leaves.values()),
                [cotangent[name] for name in self.computed],
                retain_graph=True,
                create_graph=create_graph,
                materialize_grads=True,
            )
            pulled = tree.add(pulled, dict(zip(leaves, found, strict=True)))
        return pulled


def initial_of(w: Mapping[str, Tensor], lam: Mapping[str, Tensor]) -> Initial | None:
    """How first weights depend on lam; None where they do not.

    A weight that shares the memory of an entry of lam, whole and in its shape, is that entry: `named_parameters` and
    `state_dict` of one module are the same parameters. A clone is a constant.

    Raises:
        ValueError: for a weight that is some part of an entry's memory without a graph that says which.
    """
    held: dict[int, list[str]] = defaultdict(list)
    for key, entry in lam.items():
        held[entry.untyped_storage().data_ptr()].append(key)
    same: dict[str, str] = {}
    computed: Tree = {}
    for name, leaf in w.items():
        if shards.is_sharded(leaf):  # which is no part of a whole lam, nor computed from one
            continue
        for key in held.get(leaf.untyped_storage().data_ptr(), ()):
            if leaf is lam[key] or _place(leaf) == _place(lam[key]):
                same[name] = key
            elif leaf.grad_fn is None and _overlap(leaf, lam[key]):
                raise ValueError(
                    f"w[{name!r}] is a part of the memory of lam[{key!r}]: let lam[{key!r}] require a gradient before "
                    "w is made of it if it is to be learned (run_episode with unroll), or give a clone"
                )
        if name not in same and leaf.grad_fn is not None:
            computed[name] = leaf
    if not _reach(computed, [entry for entry in lam.values() if entry.requires_grad]):
        computed = {}
    return Initial(dict(lam), same, computed) if same or computed else None


def _place(a: Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    return a.data_ptr(), a.shape, a.stride(), a.dtype


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two parts of one memory overlap, from the first to the last element of each."""
    if not (a.numel() and b.numel()):
        return False
    (start, end), (other_start, other_end) = (_extent(one) for one in (a, b))
    return start < other_end and other_start < end


def _extent(a: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(a.shape, a.stride(), strict=True))
    return a.data_ptr(), a.data_ptr() + (last + 1) * a.element_size()


def _reach(ends: Tree, leaves: Sequence[Tensor]) -> bool:
    if not ends or not leaves:
        return False
    cotangents = [torch.zeros_like(end) for end in ends.values()]
    found = torch.autograd.grad(list(ends.values()), leaves, cotangents, retain_graph=True, allow_unused=True)
    return any(one is not None for one in found)
