"""EvoGrad's perturbations: a counter-based generator, so that nothing is stored and every launch draws the same.

The entries of row r of a tensor are a hash of (seed, copy, tensor name, r): they do not depend on the device, on the
other tensors, or on which rows of an embedding are there. Sixty-four signs come of one word.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.bilevel.tree import Tree

NOISES = ("sign", "gaussian")
_STREAM = 0xE70  # keeps the perturbations' seeds apart from those of the passes (dropout)
_BLOCK = 2**16  # numbers that are drawn together
_GOLDEN, _FIRST, _SECOND = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Perturbations:
    """The K perturbations eps_k of the leaves `like`: drawn on demand, or injected.

    Args:
        copies: K; with `antithetic` they come in pairs +eps, -eps.
        kind: `sign` (sigma times a fair sign) or `gaussian` (standard deviation sigma).
        rows: row numbers of the leaves that hold only some rows of their parameter.
        injected: K trees at true scale to use instead.
    """

    def __init__(
        self,
        like: Tree,
        seed: int,
        *,
        copies: int,
        kind: str,
        sigma: float,
        antithetic: bool = False,
        rows: Mapping[str, Tensor] | None = None,
        injected: Sequence[Tree] | None = None,
    ) -> None:
        if injected is not None and len(injected) < 2:
            raise ValueError(f"evograd: noise must hold at least 2 perturbations, not {len(injected)}")
        self.like, self.seed, self.kind, self.sigma, self.antithetic = like, seed, kind, sigma, antithetic
        self.rows, self.injected = rows or {}, injected
        self.copies = copies if injected is None else len(injected)

    def __getitem__(self, k: int) -> Tree:
        return {name: self._drawn(name, range(k, k + 1))[0] for name in self.like}

    def perturbed(self, w: Tree, k: int) -> Tree:
        """w + eps_k; leaves without noise are passed through."""
        return {**w, **{name: eps.add_(w[name]) for name, eps in self[k].items()}}

    def combined(self, w: Tree, weights: Sequence[float]) -> Tree:
        """w + sum_k weights_k eps_k."""
        moved = dict(w)
        for name, leaf in self.like.items():
            moved[name] = w[name].clone()
            for copies in self._blocks(leaf):
                for k, eps in zip(copies, self._drawn(name, copies), strict=True):
                    moved[name].add_(eps, alpha=weights[k])
        return moved

    def along(self, v: Tree) -> Tensor:
        """The inner products <v, eps_k>, (K,) in float64."""
        return torch.stack([self._along_leaf(name, v[name]) for name in self.like]).sum(0)

    def _along_leaf(self, name: str, v: Tensor) -> Tensor:
        products = [
            (self._drawn(name, copies) * v).reshape(len(copies), -1).sum(1, dtype=torch.float64)
            for copies in self._blocks(v)
        ]
        return torch.cat(products)

    def _blocks(self, leaf: Tensor) -> Iterator[range]:
        """The copies in groups: as many of a small leaf as fit the block, one of a large one, at a time."""
        size = max(1, _BLOCK // leaf.numel())
        for first in range(0, self.copies, size):
            yield range(first, min(first + size, self.copies))

    def _drawn(self, name: str, copies: range) -> Tensor:
        """eps_k of one leaf for some copies, (copies, *shape): a fresh tensor of the leaf's dtype."""
        like = self.like[name]
        if self.injected is not None:
            return torch.stack([self.injected[k][name].to(like) for k in copies])
        flat = like.reshape(1, -1) if like.dim() < 2 else like.reshape(like.shape[0], -1)  # (rows, columns)
        rows = self.rows[name] if name in self.rows else torch.arange(flat.shape[0], device=like.device)
        pairs = [divmod(k, 2) if self.antithetic else (k, 0) for k in copies]
        seeds = [mix_seed(self.seed, _STREAM, pair, zlib.crc32(name.encode())) for pair, _ in pairs]
        draw = _signs if self.kind == "sign" else _normals
        drawn = draw(torch.tensor(seeds, device=like.device), rows, flat.shape[1], like.dtype, self.sigma)
        for block, (_, negative) in zip(drawn, pairs, strict=True):
            if negative:
                block.neg_()
        return drawn.reshape(len(copies), *like.shape)


def _words(seeds: Tensor, rows: Tensor, count: int) -> Tensor:
    """`count` random 64-bit words a copy and row, (K, R, count): splitmix64 of the word's own number."""
    number = rows.long().unsqueeze(1) * count + torch.arange(count, device=rows.device)
    word = number.mul_(_GOLDEN) + seeds[:, None, None]
    word.bitwise_xor_((word >> 30).bitwise_and_((1 << 34) - 1)).mul_(_FIRST)  # >> keeps the sign, the mask drops it
    word.bitwise_xor_((word >> 27).bitwise_and_((1 << 37) - 1)).mul_(_SECOND)
    return word.bitwise_xor_((word >> 31).bitwise_and_((1 << 33) - 1))


def _signs(seeds: Tensor, rows: Tensor, columns: int, dtype: torch.dtype, sigma: float) -> Tensor:
    """+-sigma, (K, R, columns)."""
    octets = _words(seeds, rows, math.ceil(columns / 64)).view(torch.uint8)  # (K, R, words * 8)
    signs = _sign_table(sigma, dtype, rows.device).index_select(0, octets.flatten().int())
    return signs.view(len(seeds), len(rows), -1)[:, :, :columns]


@cache
def _sign_table(sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs, times sigma, that a byte stands for, (256, 8)."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (2 * bits - 1).to(device=device, dtype=dtype) * sigma


def _normals(seeds: Tensor, rows: Tensor, columns: int, dtype: torch.dtype, sigma: float) -> Tensor:
    """Normal numbers of standard deviation sigma, (K, R, columns): Box-Muller, two of a word."""
    halves = _words(seeds, rows, math.ceil(columns / 2)).view(torch.int32).view(len(seeds), len(rows), -1, 2)
    uniform = (halves.double() + 2**31 + 0.5) / 2**32  # in (0, 1), (K, R, words, 2)
    radius, angle = (-2 * uniform[..., 0].log()).sqrt() * sigma, 2 * math.pi * uniform[..., 1]
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.view(len(seeds), len(rows), -1)[:, :, :columns].to(dtype)
