"""EvoGrad's perturbations: a counter-based generator, so that nothing is stored and every launch draws the same.

The entries of row r of a tensor are a hash of (seed, copy, tensor name, r): they do not depend on the device, on the
other tensors, or on which rows of an embedding are there. Sixty-four signs come of one word.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property

import torch
from torch import Tensor

from metaxl_evo.bilevel import shards, tree
from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.bilevel.tree import Tree

NOISES = ("sign", "gaussian")
_STREAM = 0xE70  # keeps the perturbations' seeds apart from those of the passes (dropout)
_BLOCK = 2**20  # numbers that are drawn together
_GOLDEN, _FIRST, _SECOND = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Perturbations:
    """The K perturbations eps_k of the leaves `like`: drawn on demand, or injected.

    The leaves of a dtype are drawn together, as many as fit a block (`_BLOCK` numbers, eight times that off the CPU).
    Where all leaves of all copies fit one they are kept for the next use, else their random words where these fit.

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
        self.whole, self.like, self.seed, self.kind = like, shards.local(like), seed, kind
        self.sigma, self.antithetic, self.injected = sigma, antithetic, injected
        self.rows = {**(rows or {}), **_rows_here(like)}
        self.copies = copies if injected is None else len(injected)
        device = next(iter(like.values())).device
        self._block = _BLOCK if device.type == "cpu" else 8 * _BLOCK  # no cache to fit, and launches to save
        alone = [name for name in like if name in self.rows or shards.is_sharded(like[name])]
        others = {name: leaf for name, leaf in like.items() if name not in alone}
        self._blocks = [*tree.in_groups(others, self._block), *([name] for name in alone)]
        self._kept = self._store(tree.size(self.like))
        self._kept_words = self._store(sum(map(self._count, like)))

    def __getitem__(self, k: int) -> Tree:
        found: Tree = {}
        for block in range(len(self._blocks)):
            found |= self._leaves(block, self._eps(block, range(k, k + 1))[0])
        return shards.like(self.whole, found)

    def perturbed(self, w: Tree, k: int) -> Tree:
        """w + eps_k; leaves without noise are passed through."""
        found = {name: leaf[0] for name, leaf in self.points(w, range(k, k + 1)).items()}
        return {**w, **shards.like(self.whole, found)}

    def points(self, w: Tree, copies: range) -> Tree:
        """w + eps_k of the leaves with noise, for some copies: (copies, *shape) each, of the rows that are here."""
        found: Tree = {}
        for block, names in enumerate(self._blocks):
            eps, at = self._eps(block, copies), _flat(w, names)
            found |= self._leaves(block, eps.add_(at) if self._kept is None else eps + at)
        return found

    def combined(self, w: Tree, weights: Tensor) -> Tree:
        """w + sum_k weights_k eps_k, weights (K,)."""
        moved: Tree = {}
        for block, names in enumerate(self._blocks):
            flat = _flat(w, names).clone()
            for copies in self._together(block):
                flat.addmv_(self._eps(block, copies).T, weights[copies.start : copies.stop].to(flat.dtype))
            moved |= self._leaves(block, flat)
        return {**w, **shards.like(self.whole, moved)}

    def along(self, v: Tree) -> Tensor:
        """The inner products <v, eps_k>, (K,) in float64; of sharded leaves a share, that of the rows here."""
        products = []
        for block, names in enumerate(self._blocks):
            flat = _flat(v, names)
            found = [(self._eps(block, copies) * flat).sum(1, dtype=torch.float64) for copies in self._together(block)]
            products.append(torch.cat(found))
        return torch.stack(products).sum(0)

    def _together(self, block: int) -> Iterator[range]:
        """The copies in groups: as many of a small block as fit one, of a large one, one at a time."""
        size = max(1, self._block // max(1, sum(self.like[name].numel() for name in self._blocks[block])))
        for first in range(0, self.copies, size):
            yield range(first, min(first + size, self.copies))

    def _leaves(self, block: int, flat: Tensor) -> Tree:
        """The numbers of a block (..., n) as leaves (..., *shape), views of it."""
        like = {name: self.like[name] for name in self._blocks[block]}
        pieces = flat.split([leaf.numel() for leaf in like.values()], dim=-1)
        return {
            name: piece.view((*flat.shape[:-1], *leaf.shape))
            for (name, leaf), piece in zip(like.items(), pieces, strict=True)
        }

    def _store(self, size: int) -> dict[int, Tensor] | None:
        """For so many numbers a copy, by block; None where they do not fit."""
        return {} if self.copies * size <= self._block else None

    def _once(
        self, store: dict[int, Tensor] | None, draw: Callable[[int, range], Tensor], block: int, copies: range
    ) -> Tensor:
        """What is drawn for some copies: fresh, or a view of what is kept."""
        if store is None:
            return draw(block, copies)
        if block not in store:
            store[block] = draw(block, range(self.copies))
        return store[block][copies.start : copies.stop]

    def _eps(self, block: int, copies: range) -> Tensor:
        """eps_k of a block for some copies, (copies, n)."""
        return self._once(self._kept, self._drawn, block, copies)

    def _drawn(self, block: int, copies: range) -> Tensor:
        like = [self.like[name] for name in self._blocks[block]]
        if self.injected is not None:
            given = [_flat(self.injected[k], self._blocks[block]) for k in copies]
            return torch.stack(given).to(like[0])
        if not sum(leaf.numel() for leaf in like):
            return like[0].new_zeros(len(copies), 0)
        draw, numbers_of_word = (_signs, 64) if self.kind == "sign" else (_normals, 2)
        words = self._once(self._kept_words, self._words, block, copies)
        drawn = draw(words, like[0].dtype, self.sigma)
        if self.antithetic:
            drawn[1 - copies.start % 2 :: 2].neg_()
        if drawn.shape[1] == sum(leaf.numel() for leaf in like):
            return drawn
        if like[0].dim() == 1 and (whole := self.whole[self._blocks[block][0]]).shape != like[0].shape:
            first = shards.first_row(whole)
            return drawn[:, first : first + len(like[0])]
        pieces = drawn.split([self._count(name) * numbers_of_word for name in self._blocks[block]], dim=1)
        rows = [
            piece.view(len(copies), _rows(leaf), -1)[:, :, : leaf.numel() // max(1, _rows(leaf))].flatten(1)
            for leaf, piece in zip(like, pieces, strict=True)
        ]
        return torch.cat(rows, dim=1)

    def _words(self, block: int, copies: range) -> Tensor:
        """The random 64-bit words of a block, (copies, words): splitmix64 of each word's own number in its leaf."""
        names = self._blocks[block]
        first, count = sum(map(len, self._blocks[:block])), sum(map(self._count, names))
        table = self._table[:, first : first + len(names)]
        seeds, numbers = table[copies.start : copies.stop], torch.arange(count, device=table.device)
        if len(names) > 1:
            seeds = seeds.repeat_interleave(table[-1], dim=1, output_size=count)
        elif names[0] in self.rows:
            rows = self.rows[names[0]].long().unsqueeze(1)
            each = count // max(1, len(rows))
            numbers = (rows * each + numbers[:each]).flatten()
        return _mixed(numbers * _GOLDEN + seeds)

    @cached_property
    def _table(self) -> Tensor:
        """A column a leaf, block by block: the seeds of its copies and its number of words, (K + 1, leaves).

        A block's words are numbered through; the seed takes off what comes before the leaf.
        """
        columns = []
        for names in self._blocks:
            before = 0
            for name in names:
                key, count = zlib.crc32(name.encode()), self._count(name)
                pairs = [k // 2 if self.antithetic else k for k in range(self.copies)]
                seeds = [mix_seed(self.seed, _STREAM, pair, key) - before * _GOLDEN for pair in pairs]
                columns.append([*((seed + 2**63) % 2**64 - 2**63 for seed in seeds), count])
                before += count
        device = next(iter(self.like.values())).device
        return torch.tensor(columns).T.contiguous().to(device)

    def _count(self, name: str) -> int:
        """The number of words of a leaf: each of its rows begins with a new one; of a vector those of the whole."""
        leaf = self.like[name] if self.like[name].dim() > 1 else self.whole[name]
        rows = _rows(leaf)
        return rows * math.ceil(leaf.numel() / max(1, rows) / (64 if self.kind == "sign" else 2))


def _rows(leaf: Tensor) -> int:
    return leaf.shape[0] if leaf.dim() > 1 else 1


def _rows_here(like: Tree) -> Tree:
    """The numbers of the rows that are here, of sharded matrices."""
    here = {
        name: leaf for name, leaf in shards.local(like).items() if shards.is_sharded(like[name]) and leaf.dim() > 1
    }
    firsts = {name: shards.first_row(like[name]) for name in here}
    return {name: torch.arange(len(leaf), device=leaf.device) + firsts[name] for name, leaf in here.items()}


def _flat(a: Tree, names: Sequence[str]) -> Tensor:
    """The numbers of some leaves one behind the other, those here; those of a single one are not copied."""
    leaves = [leaf.reshape(-1) for leaf in shards.local({name: a[name] for name in names}).values()]
    return leaves[0] if len(leaves) == 1 else torch.cat(leaves)


def _mixed(word: Tensor) -> Tensor:
    """splitmix64's output of its states, in place."""
    word.bitwise_xor_((word >> 30).bitwise_and_((1 << 34) - 1)).mul_(_FIRST)  # >> keeps the sign, the mask drops it
    word.bitwise_xor_((word >> 27).bitwise_and_((1 << 37) - 1)).mul_(_SECOND)
    return word.bitwise_xor_((word >> 31).bitwise_and_((1 << 33) - 1))


def _signs(words: Tensor, dtype: torch.dtype, sigma: float) -> Tensor:
    """+-sigma, 64 of a word, (K, words * 64)."""
    octets = words.flatten().view(torch.uint8).int()
    return _sign_table(sigma, dtype, words.device).index_select(0, octets).view(len(words), -1)


@cache
def _sign_table(sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs, times sigma, that a byte stands for, (256, 8)."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (2 * bits - 1).to(device=device, dtype=dtype) * sigma


def _normals(words: Tensor, dtype: torch.dtype, sigma: float) -> Tensor:
    """Normal numbers of standard deviation sigma, two of a word, (K, words * 2): Box-Muller."""
    halves = words.flatten().view(torch.int32).view(*words.shape, 2)
    uniform = halves.double().add_(2**31 + 0.5).mul_(2.0**-32)  # in (0, 1)
    radius, angle = (-2 * uniform[..., 0].log()).sqrt() * sigma, 2 * math.pi * uniform[..., 1]
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.view(len(words), -1).to(dtype)
