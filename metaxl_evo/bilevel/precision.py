"""In which precision a pass computes with float32 numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

PRECISIONS = ("float32", "tf32", "bf16")
_KERNELS = ("matmul", "conv", "rnn")
_OF = {"cpu": ("mkldnn",), "cuda": ("cuda", "cudnn")}  # what computes on a kind of device


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


def computes_in_float32(device: str) -> bool:
    """Whether kernels of a kind of device compute float32 numbers as such, as far as torch was told."""
    return all(value == exact for *_, value, exact in _switches(_OF.get(device, ())))


@contextmanager
def _ieee() -> Iterator[None]:
    _be_warned()
    switches = list(_switches([of for held in _OF.values() for of in held]))
    for holder, name, value, exact in switches:
        if value != exact:
            setattr(holder, name, exact)
    try:
        yield
    finally:
        for holder, name, value, exact in switches:
            if value != exact:
                setattr(holder, name, value)


@cache
def _be_warned() -> None:
    """Take torch's one warning about cuDNN's old switch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = _allows_tf32()


def _switches(backends: Iterable[str]) -> Iterator[tuple[Any, str, Any, Any]]:
    """What decides on the precision of kernels, its value, and that of float32; in the order to set them in.

    cuDNN's old switch comes first, as it sets the new ones: were it left alone, torch would raise wherever a loss asks
    for it (`torch.backends.cudnn.flags`).
    """
    new = hasattr(torch.backends, "fp32_precision")  # since torch 2.9
    for of in backends:
        holder: Any = getattr(torch.backends, of)
        if of == "cudnn":
            yield holder, "allow_tf32", _allows_tf32(), False
        if of == "cuda" and not new:
            yield holder.matmul, "allow_tf32", holder.matmul.allow_tf32, False
        for kernels in (getattr(holder, kind, None) for kind in _KERNELS if new):
            if kernels is not None:
                value = kernels.fp32_precision
                yield kernels, "fp32_precision", value, value if value == "none" else "ieee"


def _allows_tf32() -> bool:
    """cuDNN's old switch; it cannot be read where only the new ones were switched off."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return True
