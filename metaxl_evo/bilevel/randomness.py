"""The random numbers that the passes of one meta step share: torch's, numpy's and Python's global generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_KEPT: ContextVar[bool] = ContextVar("metaxl_evo_random_numbers_kept", default=False)


def devices_of(*trees: Mapping[str, Tensor]) -> tuple[torch.device, ...]:
    """The distinct CUDA devices of the leaves, whose random state a pass has to keep."""
    return tuple({leaf.device for t in trees for leaf in t.values() if leaf.device.type == "cuda"})


def mix_seed(seed: int, *keys: int) -> int:
    """A 63-bit seed for (seed, keys) that does not depend on the process (splitmix64)."""
    value = seed & 0xFFFFFFFFFFFFFFFF
    for key in keys:
        value = (value + 0x9E3779B97F4A7C15 * (key + 1)) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 1


@contextmanager
def seeded(seed: int, devices: Sequence[torch.device]) -> Iterator[None]:
    """Seed the global generators, of torch on the CPU and the given devices; put their states back at the end."""
    with torch.random.fork_rng(devices=list(devices)), kept():
        seed_all(seed, devices)
        yield


@contextmanager
def kept() -> Iterator[None]:
    """Put numpy's and Python's random numbers back at the end; what lies within leaves that to the outermost block.

    It takes numpy longer than many a pass, so that an estimate does it once.
    """
    if _KEPT.get():
        yield
        return
    numpy, held = _numpy(), random.getstate()
    held_by_numpy = None if numpy is None else numpy.get_state()
    token = _KEPT.set(True)
    try:
        yield
    finally:
        _KEPT.reset(token)
        random.setstate(held)
        if numpy is not None:
            numpy.set_state(held_by_numpy)


def random_state(devices: Sequence[torch.device]) -> tuple[object, ...]:
    """Where the global generators stand, to be compared."""
    numpy = _numpy()
    _, drawn, *place = (None, b"") if numpy is None else numpy.get_state()
    return (
        torch.get_rng_state().numpy().tobytes(),
        *(torch.cuda.get_rng_state(device).numpy().tobytes() for device in devices),
        random.getstate(),
        bytes(drawn),
        *place,
    )


def seed_all(seed: int, devices: Sequence[torch.device]) -> None:
    """Put the global generators to the start of a seed."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.seed(seed % 2**32)


def _numpy() -> Any:
    """numpy's random numbers, where somebody has imported them."""
    return getattr(sys.modules.get("numpy"), "random", None)
