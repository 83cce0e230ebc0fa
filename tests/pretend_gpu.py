"""A pretend GPU: tensors of a device of their own that hold CPU data, to be used in a process of its own.

What they compute is counted (`Launches`), an operator on tensors of both devices fails, and their backward runs in
autograd's device thread, as on CUDA. The device is there from the first entry on, which has to come before
any backward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from metaxl_evo.benchmark.launches import Launches

NAME = "gpu"
MIXED = ("_to_copy", "copy_", "index", "index_put", "index_put_")  # which take tensors of both devices
aten = torch.ops.aten


class Pretended(Tensor):
    """A tensor that says it is on the device; `held` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        gpu().waited["tolist"] += 1
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return gpu().run(func, args, kwargs or {})


class PretendGPU(Launches):
    """Runs the operators of the device on what its tensors hold.

    Attributes:
        threads: in which its operators were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        name, device = func.overloadpacket.__name__, kwargs.get("device")
        here = torch.device(device).type == NAME if device is not None else bool(ours)
        if not (ours or here):
            return func(*args, **kwargs)
        if name not in MIXED and any(one.dim() and not isinstance(one, Pretended) for one in tensors) and ours:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        self.threads.add(threading.get_ident())
        self.note(func, args, kwargs)
        if device is not None and here:
            kwargs = kwargs | {"device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
        if name == "_efficientzerotensor":
            func = aten.zeros.default
        found = func(*_held(args), **_held(kwargs))
        if name == "copy_":
            return args[0]
        if not here:
            return found
        known = {id(one.held): one for one in ours}  # of an operator in place
        return tree_map(lambda one: known.get(id(one), _on(one)) if isinstance(one, Tensor) else one, found)


class HostGenerator(torch.Generator):
    """A generator of any device, which draws on the host."""

    def __new__(cls, device: Any = "cpu") -> HostGenerator:
        return super().__new__(cls)


def _held(tree: Any) -> Any:
    return tree_map(lambda one: one.held if isinstance(one, Pretended) else one, tree)


def _on(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, Pretended) else Pretended(tensor)


def to_gpu(tree: Any) -> Any:
    """Tensors in nested containers, on the device."""
    return tree_map(lambda one: _on(one.detach()) if isinstance(one, Tensor) else one, tree)


def to_cpu(tree: Any) -> Any:
    """Tensors in nested containers, as they are held."""
    return _held(tree)


_ENTERED: list[PretendGPU] = []


def gpu() -> PretendGPU:
    return _ENTERED[-1]


@contextmanager
def pretend_gpu() -> Iterator[PretendGPU]:
    """With a device that counts what it is asked."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME)
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        for held in (torch.utils._foreach_utils, torch_optimizer):  # as on CUDA
            held._foreach_supported_types.append(Pretended)
        torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    device, generator = PretendGPU(), torch.Generator
    _ENTERED.append(device)
    torch.Generator = HostGenerator  # type: ignore[misc]
    try:
        with device:
            yield device
    finally:
        _ENTERED.pop()
        torch.Generator = generator  # type: ignore[misc]
