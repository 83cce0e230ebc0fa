"""One pass through an encoder, which shows whether a list of its modules is the list of its layers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

LENGTH = (
    3  # tokens of the pass; more than its one row, so that (length, batch, hidden) is not taken for the usual order
)


class Call(NamedTuple):
    """What one layer, counted from 1, read and returned."""

    layer: int
    read: list[Tensor]
    returned: Any


@dataclass(frozen=True)
class LayerTrace:
    """The calls of a list of modules in one pass, in their order, and the hidden states (1, T, H) that came out."""

    calls: list[Call]
    result: Tensor

    @property
    def order(self) -> list[int]:
        return [call.layer for call in self.calls]

    @property
    def is_chain(self) -> bool:
        """Whether some layer reads what the one before it returned, as those of an encoder do."""
        pairs = [*zip(self.calls, self.calls[1:], strict=False)]
        return not pairs or any(value is before.returned for before, after in pairs for value in after.read)

    @property
    def is_result(self) -> bool:
        """Whether what the last layer returns is what the encoder does, with no norm behind it."""
        return bool(self.calls) and self.calls[-1].returned is self.result


@torch.no_grad()
def trace_layers(model: PreTrainedModel, layers: nn.ModuleList) -> LayerTrace:
    """Run the encoder of `model` on one row without dropout; the model stays as it was."""
    calls: list[Call] = []
    modes = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_hook(_recorder(calls, i), with_kwargs=True) for i, layer in enumerate(layers, 1)]
    try:
        ids = torch.arange(LENGTH, device=model.device)[None]
        result = model.eval().base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return LayerTrace(calls, result)


def _recorder(calls: list[Call], layer: int) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        read = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        calls.append(Call(layer, read, output[0] if isinstance(output, tuple) else output))

    return record


def require_layers(model: PreTrainedModel, layers: nn.ModuleList) -> LayerTrace:
    """See to it that `layers`, run once, are those of an encoder; a list that is no chain of them gets a warning.

    Raises:
        ValueError: for layers that share their weights or are called in another order, whose outputs would be
            transformed more than once, and for outputs that are no hidden states (B, T, H).
    """
    trace, size = trace_layers(model, layers), model.config.hidden_size
    if trace.order != [*range(1, len(layers) + 1)]:
        raise _unfit(model, f"are called {len(trace.calls)} times a pass, not each of {len(layers)} once, in order")
    for _, _, returned in trace.calls:
        shape = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        if len(shape) != 3 or (shape[0], shape[2]) != (1, size):
            raise _unfit(model, f"return {shape} for one sentence, not hidden states (1, length, {size})")
    if not trace.is_chain:
        logger.warning("rtn_module_path: none of these %d modules reads what the one before it returns", len(layers))
    return trace


def _unfit(model: PreTrainedModel, problem: str) -> ValueError:
    return ValueError(
        f"the layers of {type(model).__name__} {problem}: set rtn_module_path (module_path) to another list, or use "
        "another model"
    )
