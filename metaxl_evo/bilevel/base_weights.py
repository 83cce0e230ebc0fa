"""Where base weights live: in tensors that a loss is handed, or in a module of which every process holds a part.

A module under `fully_shard` computes with weights that it gathers itself, so that a pass at other ones has to put them
into it: all of this process's rows, in place, with nothing left gathered of those before; and back, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from metaxl_evo.bilevel import shards, tree
from metaxl_evo.bilevel.tree import Tree

Found = Sequence[Tensor | None]


class BaseWeights(Protocol):
    """What a pass needs to know of them."""

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part, so that all of them have to make the same passes."""

    def at(self, w: Tree) -> AbstractContextManager[None]:
        """Around a pass at weights `w`, its backward included."""

    def gradients(self, loss: Tensor, w: Tree, lam: Tree) -> tuple[Found, Found]:
        """Of a loss that was evaluated at `w`: to these of its leaves, and to these of lam; None where none leads.

        Those to `w` are whole where the weights are sharded, else of this process's rows as those to `lam` are.
        """


class Whole:
    """Weights in tensors that a loss is handed."""

    sharded = False

    def at(self, w: Tree) -> AbstractContextManager[None]:
        return nullcontext()

    def gradients(self, loss: Tensor, w: Tree, lam: Tree) -> tuple[Found, Found]:
        found = torch.autograd.grad(loss, [*w.values(), *lam.values()], allow_unused=True)
        return found[: len(w)], found[len(w) :]


class Sharded:
    """Weights in a module under `fully_shard`, which is called as a whole.

    Args:
        root: the module.
        parameters: those that are trained, by the names that `w` has for them.

    Raises:
        ValueError: for weights that are not sharded by rows over one mesh, or gathered in fewer bits than they have.
    """

    sharded = True

    def __init__(self, root: nn.Module, parameters: Mapping[str, Tensor]):
        shards.require_rows(parameters)
        _require_all_bits(root, parameters)
        self.root, self.parameters = root, dict(parameters)

    @contextmanager
    def at(self, w: Tree) -> Iterator[None]:
        """Put `w` into the module, and behind the pass what was there before."""
        moved = [name for name, leaf in w.items() if not _same_memory(leaf, self.parameters[name])]
        kept = tree.clone({name: self.parameters[name] for name in moved})
        self._put({name: w[name] for name in moved})
        try:
            yield
        finally:
            self._put(kept)

    def gradients(self, loss: Tensor, w: Tree, lam: Tree) -> tuple[Found, Found]:
        """By a backward, the only way in which the module sums its gradients; those that it held are there again."""
        held = {name: parameter.grad for name, parameter in self.parameters.items()}
        self._set_gradients({})
        try:
            loss.backward()
            found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        finally:
            self._set_gradients(held)
        if not found:
            raise RuntimeError("the backward summed no gradient: leave no_sync and set_requires_gradient_sync out")
        processes = shards.processes_of(found)  # of which it takes the mean
        found = {name: found[name].mul_(processes) for name in w if name in found}
        return [found.get(name) for name in w], [leaf.grad for leaf in lam.values()]

    def _put(self, w: Tree) -> None:
        reshard(self.root)  # what was gathered of the weights before would be used again
        tree.copy_into({name: self.parameters[name] for name in w}, w)

    def _set_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = gradients.get(name)


def reshard(root: nn.Module) -> None:
    """Let go of all weights that are gathered, so that the module's parameters are its shards."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _require_all_bits(root: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a policy under which small perturbations vanish in a cast, without a word."""
    bits = min(leaf.element_size() for leaf in parameters.values())
    for module in root.modules():
        if not isinstance(module, FSDPModule):
            continue
        policy = module._get_fsdp_state()._mp_policy
        for dtype in (policy.param_dtype, policy.reduce_dtype, policy.output_dtype):
            if dtype is not None and dtype.itemsize < bits:
                raise ValueError(
                    f"fully_shard computes with {dtype} here (mp_policy), in which small perturbations of the weights "
                    "are lost: leave mp_policy out"
                )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two sharded leaves are the same rows in one place."""
    (first, second) = shards.local({"a": a, "b": b}).values()
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape
