"""Where the parameters of a module are held, and the module at other values of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Places = Mapping[str, Sequence[tuple[Any, str]]]  # a parameter's name -> the modules that hold it, and their names


def places_of(module: nn.Module) -> Places:
    """Where each parameter of `module` is held; tied ones in several places under one name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    places: dict[str, list[tuple[Any, str]]] = defaultdict(list)
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                places[names[id(parameter)]].append((owner, key))
    return places


@contextmanager
def swapped(places: Places, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Evaluate a module at other parameter values: pointers are swapped, nothing is copied, tied weights stay tied.

    Unlike `torch.func.functional_call` the swap can outlast the forward, so that a backward that recomputes it
    (activation checkpointing) sees the same weights.

    Args:
        places: `places_of` the module.
        tensors: values by parameter name.

    Raises:
        ValueError: for a name that the module does not have.
    """
    missing = tensors.keys() - places.keys()
    if missing:
        raise ValueError(f"the module has no parameter {sorted(missing)[0]!r}")
    before = [
        (owner._parameters, key, owner._parameters[key], tensor)
        for name, tensor in tensors.items()
        for owner, key in places[name]
    ]
    for held, key, _, tensor in before:
        held[key] = tensor
    try:
        yield
    finally:
        for held, key, parameter, _ in before:
            held[key] = parameter
