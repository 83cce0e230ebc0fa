"""In which precision a pass computes with float32 numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

PRECISIONS = ("float32", "tf32", "bf16")
_KERNELS = [(of, kind) for of in ("cuda", "cudnn", "mkldnn") for kind in ("matmul", "conv", "rnn")]


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


def computes_in_float32() -> bool:
    """Whether all kernels compute float32 numbers as such, as far as torch was told."""
    return all(value == exact for *_, value, exact in _switches())


@contextmanager
def _ieee() -> Iterator[None]:
    changed = [(holder, name, value, exact) for holder, name, value, exact in _switches() if value != exact]
    for holder, name, _, exact in changed:
        setattr(holder, name, exact)
    try:
        yield
    finally:
        for holder, name, value, _ in changed:
            setattr(holder, name, value)


def _switches() -> Iterator[tuple[Any, str, Any, Any]]:
    """What decides on the precision of kernels, its value, and that of float32."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        for holder in (torch.backends.cuda.matmul, torch.backends.cudnn):
            yield holder, "allow_tf32", holder.allow_tf32, False
        return
    for of, kind in _KERNELS:
        kernels: Any = getattr(getattr(torch.backends, of), kind, None)
        if kernels is not None:
            value = kernels.fp32_precision
            yield kernels, "fp32_precision", value, value if value == "none" else "ieee"
