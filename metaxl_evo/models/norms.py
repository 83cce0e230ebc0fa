"""What a module holds besides its trainable parameters: running statistics of norms, buffers, frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle


def normalises_batches(module: nn.Module) -> bool:
    """Whether a layer is another function in evaluation than in training, not one with less noise as dropout is."""
    return isinstance(module, _BatchNorm) or bool(running_statistics(module))


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """The buffers in which a norm averages over batches (`running_mean`, `running_var`, ..), its children's left out.

    Batch norms have them, instance norms with `track_running_stats`, and norms of a user's own.
    """
    held = {name: b for name, b in module._buffers.items() if b is not None and b.is_floating_point()}
    return {name: b for name, b in held.items() if name.startswith(("running_", "moving_"))}


def without_update(norm: nn.Module) -> list[RemovableHandle]:
    """Hooks under which an instance norm does without its running statistics wherever it is run in training mode.

    It would update them in place, which is beyond `torch.func`; a batch norm does not with `track_running_stats` off.
    """
    held: dict[str, Tensor] = {}

    def before(module: nn.Module, inputs: Any) -> None:
        if module.training:
            held.update(running_statistics(module))
            module._buffers.update(dict.fromkeys(held))

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        module._buffers.update(held)
        held.clear()

    return [norm.register_forward_pre_hook(before), norm.register_forward_hook(after, always_call=True)]


def cast(module: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    """The module's buffers and frozen parameters of another dtype; its trainable parameters are swapped in anyway."""
    return _exchanged(module, lambda held: held.to(dtype))


def widened(module: nn.Module) -> AbstractContextManager[None]:
    """Those of 16 bits in float32, which has all of their numbers."""
    return _exchanged(module, lambda held: held.float() if held.element_size() < 4 else held)


@contextmanager
def _exchanged(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    held: list[tuple[Any, str, Tensor]]
    held = [(m._buffers, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    held += [
        (m._parameters, name, p)
        for m in module.modules()
        for name, p in m._parameters.items()
        if p is not None and not p.requires_grad
    ]
    try:
        for owner, name, tensor in held:
            if tensor.is_floating_point():
                owner[name] = change(tensor.detach())
        yield
    finally:
        for owner, name, tensor in held:
            owner[name] = tensor
