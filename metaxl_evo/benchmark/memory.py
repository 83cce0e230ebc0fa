"""Peak memory: of all live tensor storage on the CPU, of the caching allocator on a CUDA device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from metaxl_evo.bilevel.shards import is_sharded, local


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensor storages held at one time inside: those made there, and the `resident` ones.

    Every operator's results are looked at, those of a backward too, and a storage counts until it is freed; another
    one that was there before counts from the first view of it on. What an operator allocates for itself and frees
    before it returns is not seen.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known = WeakIdKeyDictionary()
        for tensor in resident:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                for holder in _holders(leaf):
                    self._see(holder)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage.nbytes()).atexit = False

    def _forget(self, size: int) -> None:
        self.live -= size


class CudaPeakMemory:
    """The same on a CUDA device, as its allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> CudaPeakMemory:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *exception: object) -> None:
        self.peak = torch.cuda.max_memory_allocated(self.device)


def live_tensors() -> Iterator[Tensor]:
    """Every tensor that Python knows, and the gradients, which autograd may hold alone; of sparse ones the parts, of
    sharded ones the rows that are here.

    What only has a shape is left out: tensors on the meta device, and the fake ones that a compilation leaves behind.
    """
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            yield from _holders(thing)
            if thing.is_leaf and thing.grad is not None:
                yield from _holders(thing.grad)


def _holders(tensor: Tensor) -> Iterator[Tensor]:
    if is_sharded(tensor):
        yield from local({"": tensor}).values()
    elif tensor.is_sparse:
        yield from (tensor._indices(), tensor._values())
    elif tensor.untyped_storage().device.type != "meta":
        yield tensor
