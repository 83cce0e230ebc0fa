"""What a module holds besides its trainable parameters: running statistics of norms, buffers, frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """The buffers in which a norm averages over batches (`running_mean`, `running_var`, ..), its children's left out.

    A module that has some (batch norm, instance norm with `track_running_stats`, a norm of the user's own) is another
    function in evaluation than in training, not one with less noise as dropout is.
    """
    held = {name: b for name, b in module._buffers.items() if b is not None and b.is_floating_point()}
    return {name: b for name, b in held.items() if name.startswith(("running_", "moving_"))}


@contextmanager
def cast(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The module's buffers and frozen parameters of another dtype; its trainable parameters are swapped in anyway."""
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
                owner[name] = tensor.detach().to(dtype)
        yield
    finally:
        for owner, name, tensor in held:
            owner[name] = tensor
