"""Processes that start from the same weights, and keep them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, nn

from metaxl_evo.bilevel.base_weights import reshard
from metaxl_evo.bilevel.shards import is_sharded
from metaxl_evo.models.norms import running_statistics

logger = logging.getLogger(__name__)

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
_BLOCK = 2**22  # elements that are summed together
_FACTOR = 0x9E3779B1  # spreads a place over the bits, so that few changes of values cancel out


def synchronise(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first; a warning names what was not the same before.

    Raises:
        ValueError: where the processes have built different models, naming the first difference.
    """
    held = _tensors(model)
    require_same_shapes({name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in held.items()})
    differing = different(held)
    if differing:
        logger.warning(
            "the processes began with other values of %s, and %d tensors in all: those of the first are taken (set "
            "one seed, and read one checkpoint)",
            differing[0],
            len(differing),
        )
    for tensor in held.values():
        tensor.copy_(broadcast(tensor.clone(memory_format=torch.contiguous_format)))  # nccl sends no other


def average_statistics(model: nn.Module) -> None:
    """Give every process the mean of all processes' running statistics of norms.

    A forward moves them by this process's rows alone, and what evaluates the model reads them.
    """
    held = [statistic for module in model.modules() for statistic in running_statistics(module).values()]
    if held:
        with torch.no_grad():
            means = reduce(torch.cat([tensor.reshape(-1) for tensor in held]), reduction="mean")
            for tensor, mean in zip(held, means.split([tensor.numel() for tensor in held]), strict=True):
                tensor.copy_(mean.view_as(tensor))


def require_synchrony(model: nn.Module, when: str) -> None:
    """Check that all processes hold the same weights, bit for bit.

    Raises:
        RuntimeError: naming a parameter that has drifted apart.
    """
    differing = different(_tensors(model))
    if differing:
        raise RuntimeError(
            f"{when} the processes hold different values of {differing[0]}, and of {len(differing)} tensors in all: "
            "something changes weights on one process alone; train on one process until it is found"
        )


def different(held: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors whose bits are not the same on all processes."""
    sums = torch.stack([_checksum(tensor) for tensor in held.values()]).cpu().tolist()
    everyone = gather_object([sums])
    return [name for name, found in zip(held, zip(*everyone, strict=True), strict=True) if len(set(found)) > 1]


def require_same_shapes(found: Mapping[str, str]) -> None:
    """Refuse processes that hold other tensors, which a broadcast would wait for without end.

    Raises:
        ValueError: naming the first difference.
    """
    for rank, theirs in enumerate(gather_object([dict(found)])):
        names = [name for name in {**found, **theirs} if found.get(name) != theirs.get(name)]
        if names:
            raise ValueError(
                f"the processes hold different models: {names[0]} is {found.get(names[0], 'missing')} here and "
                f"{theirs.get(names[0], 'missing')} on process {rank}: start all with the same settings"
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What all processes are to hold alike: all but weights of which each has other rows."""
    reshard(model)
    held = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in held.items() if not is_sharded(tensor)}


def _checksum(tensor: Tensor) -> Tensor:
    """A number of the bits of a tensor and of their places, int64."""
    words = tensor.contiguous().reshape(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        places = torch.arange(start + 1, start + 1 + len(block), device=words.device)
        total += (block * (places * _FACTOR)).sum()
    return total
