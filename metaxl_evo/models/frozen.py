"""What stands still in a task's modules while a meta pass runs, and comes back behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from transformers.modeling_layers import GradientCheckpointingLayer

from metaxl_evo.bilevel import tree
from metaxl_evo.models.norms import normalises_batches, widened, without_update


@contextmanager
def frozen(
    task: nn.Module, base: nn.Module, *, dropout: bool, embeddings: Sequence[tuple[nn.Module, Tensor]]
) -> Iterator[None]:
    """Dropout off unless asked for, running statistics without a memory, buffers on copies that are thrown away.

    Layers still checkpoint. Frozen weights of 16 bits are widened to float32 for the pass, unless autocast is on.

    Args:
        task: the module of both levels, and `base` in it.
        embeddings: those that hold some rows only, with the sorted numbers of these; rows are looked up by place.
    """
    modules = list(task.modules())  # a walk costs as much as a layer of a small network
    modes = [(module, module.training) for module in modules]
    recomputed = [module for module, training in modes if training and not dropout and _is_checkpointed(module)]
    norms = [module for module in modules if normalises_batches(module)]
    tracking = [(norm, norm.track_running_stats) for norm in norms if isinstance(norm, _BatchNorm)]
    buffers = [(m, key, b) for m in modules for key, b in m._buffers.items() if b is not None]
    hooks = [module.register_forward_pre_hook(_renumber(rows)) for module, rows in embeddings]
    hooks += [hook for norm in norms if isinstance(norm, _InstanceNorm) for hook in without_update(norm)]
    try:
        copies = tree.clone({str(number): buffer for number, (_, _, buffer) in enumerate(buffers)})
        for (owner, key, _), copy in zip(buffers, copies.values(), strict=True):
            owner._buffers[key] = copy
        for module in [] if dropout else base.modules():
            if module.training and module not in norms:
                module.training = False
        for norm, _ in tracking:  # an update in place is beyond torch.func, even on a copy
            norm.track_running_stats = False
        with _recomputing(recomputed), _in_float32(task):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for owner, key, buffer in buffers:
            owner._buffers[key] = buffer
        for module, mode in modes:
            if module.training != mode:
                module.training = mode
        for norm, tracked in tracking:
            norm.track_running_stats = tracked


def _in_float32(task: nn.Module) -> AbstractContextManager[None]:
    low = {p.device.type for p in task.parameters() if p.element_size() < 4}
    return nullcontext() if not low or any(map(torch.is_autocast_enabled, low)) else widened(task)


def _is_checkpointed(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing


@contextmanager
def _recomputing(layers: Sequence[Any]) -> Iterator[None]:
    """Let these layers of transformers checkpoint their activations in evaluation mode.

    They do so only while their own `training` is on, which some of them (BART's) read for dropout as well: it is off
    again wherever their forward runs.
    """
    before = [(layer, layer._gradient_checkpointing_func) for layer in layers]
    try:
        for layer, checkpointed in before:
            layer.training, layer._gradient_checkpointing_func = True, _in_evaluation(layer, checkpointed)
        yield
    finally:
        for layer, checkpointed in before:
            layer.training, layer._gradient_checkpointing_func = False, checkpointed


def _in_evaluation(layer: nn.Module, checkpointed: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's checkpointing function that takes its `training` back for each run of its forward."""

    def run(forward: Callable[..., Any], *args: Any) -> Any:
        def evaluated(*args: Any) -> Any:
            layer.training = False
            try:
                return forward(*args)
            finally:
                layer.training = True

        return checkpointed(evaluated, *args)

    return run


def _renumber(rows: Tensor) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    """A hook that turns the row numbers an embedding is asked for into their places among `rows`."""
    return lambda module, inputs: torch.searchsorted(rows, inputs[0])
