"""In which precision a pass computes with float32 numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

PRECISIONS = ("float32", "tf32", "bf16")
_LIBRARIES = {"cuda": ("cuda", "cudnn"), "cpu": ("mkldnn",)}  # that compute on a kind of device


@contextmanager
def computing(precision: str, devices: Iterable[str]) -> Iterator[None]:
    """Compute in one of `PRECISIONS` on the kinds of `devices`, whatever was set outside, which then is so again.

    `float32` is that of IEEE 754: the ten bits of TF32, in which GPUs convolve unless told otherwise, are fewer than a
    difference of two passes needs. `tf32` leaves the kernels as they are set. `bf16` is autocast, without a cache, as
    passes differ in their weights.
    """
    with ExitStack() as stack:
        for device in devices:
            low = precision == "bf16"
            stack.enter_context(
                torch.autocast(device, torch.bfloat16 if low else None, enabled=low, cache_enabled=False)
            )
        if precision == "float32":
            stack.enter_context(_ieee())
        yield


def computes_in_float32(devices: Iterable[str], module: nn.Module) -> bool:
    """Whether the layers of a module compute float32 numbers as such on these kinds of devices, as torch is set."""
    layers = {"conv": nn.modules.conv._ConvNd, "rnn": nn.RNNBase}
    kinds = {kind for kind, layer in layers.items() if any(isinstance(one, layer) for one in module.modules())}
    libraries = {library for device in devices for library in _LIBRARIES.get(device, ())}
    return all(
        value == exact
        for library, kind, _, _, value, exact in _switches()
        if library in libraries and kind in {"matmul", *kinds}
    )


@contextmanager
def _ieee() -> Iterator[None]:
    changed = [(*place, value, exact) for _, _, *place, value, exact in _switches() if value != exact]
    for holder, name, _, exact in changed:
        setattr(holder, name, exact)
    try:
        yield
    finally:
        for holder, name, value, _ in changed:
            setattr(holder, name, value)


def _switches() -> Iterator[tuple[str, str, Any, str, Any, Any]]:
    """Library, kind of kernel, what decides on its precision, by which name, its value, and that of float32."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        for library, kind, holder in (
            ("cuda", "matmul", torch.backends.cuda.matmul),
            ("cudnn", "conv", torch.backends.cudnn),
        ):
            yield library, kind, holder, "allow_tf32", holder.allow_tf32, False
        return
    for library in ("cuda", "cudnn", "mkldnn"):
        for kind in ("matmul", "conv", "rnn"):
            kernels: Any = getattr(getattr(torch.backends, library), kind, None)
            if kernels is not None:
                value = kernels.fp32_precision
                yield library, kind, kernels, "fp32_precision", value, value if value == "none" else "ieee"
