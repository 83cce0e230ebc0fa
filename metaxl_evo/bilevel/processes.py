"""The processes among which the rows of every batch are spread, and the sums that make N of them one.

The losses of a batch are sums over its rows, so each process computes its *share* of a loss, a gradient or a product;
the *whole* is the sum over the processes. What is linear stays a share as long as it can and is added up once: that is
why EvoGrad needs a few numbers and one tree like lam. What is not linear in a share (a norm, Adam's step) reads the
whole, which is the same on all processes to the last bit, and so is everything that they make of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed as dist

from metaxl_evo.bilevel import shards, tree
from metaxl_evo.bilevel.tree import Tree

_BUCKET = 2**22  # numbers that are sent together: many small tensors cost one call, and no second copy of all is made


@dataclass(frozen=True)
class Processes:
    """This process among those that share the rows of every batch; by default there is one, and nothing is sent.

    Args:
        rank, size: which one, of how many.
        group: of `torch.distributed` (default: all processes).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def all_reduce(self, shares: Tree) -> Tree:
        """The sums over the processes; `shares` is emptied on the way, so that the two are never both whole.

        Sharded leaves are whole as they are: a backward sums them.
        """
        if self.size == 1:
            return shares
        names = list(shares)
        whole = {name: shares.pop(name) for name in names if shards.is_sharded(shares[name])}
        for bucket in tree.in_groups(shares, _BUCKET):
            leaves = [shares.pop(name) for name in bucket]
            flat = torch.cat([leaf.reshape(-1) for leaf in leaves])
            dist.all_reduce(flat, group=self.group)
            pieces = flat.split([leaf.numel() for leaf in leaves])
            whole |= {name: piece.view(leaf.shape) for name, piece, leaf in zip(bucket, pieces, leaves, strict=True)}
        return {name: whole[name] for name in names}

    def once(self, whole: Tree) -> Tree:
        """What every process has computed alike as a share: that of the first process counts."""
        return whole if self.rank == 0 else tree.zeros_like(whole)
