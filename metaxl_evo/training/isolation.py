"""Looks at a training that leave it as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Whatever is drawn inside: the global random states of torch, numpy and Python are as they were afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class Snapshot:
    """A model as it is now, to be restored bit by bit: tensors, gradients, modes, hooks, attributes, own generators.

    The model itself stays in use. A copy would not do: hooks and closures of a copy act on the model that they were
    made for.
    """

    def __init__(self, model: nn.Module):
        self._modules = [(module, _shallow(vars(module))) for module in model.modules()]
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors = [(t, t.detach().clone(), None if t.grad is None else t.grad.clone()) for t in tensors]
        self._flags = [(t, t.requires_grad) for t in tensors]
        held = [value for module, _ in self._modules for value in vars(module).values()]
        self._generators = [(value, _state(value)) for value in held if _state(value) is not None]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for module, attributes in self._modules:
            vars(module).clear()
            vars(module).update(_shallow(attributes))
        for tensor, value, grad in self._tensors:
            tensor.copy_(value)
            tensor.grad = None if grad is None else grad.clone()
        for tensor, flag in self._flags:
            tensor.requires_grad_(flag)
        for generator, state in self._generators:
            _set_state(generator, state)


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes, their containers copied: entries may come and go, but not what they hold."""
    return {key: value.copy() if isinstance(value, dict | list | set) else value for key, value in attributes.items()}


def _state(value: Any) -> Any:
    """The state of a random generator; None of anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return value.getstate() if isinstance(value, random.Random) else None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)
