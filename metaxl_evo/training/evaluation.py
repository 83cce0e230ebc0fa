"""What the base gives in evaluation: a loss where there is one, and its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def outputs_of(outputs: Any, ignore_keys: list[str] | None, model: Any) -> tuple[Tensor | None, tuple[Any, ...]]:
    """A loss, if there is one, and what else a base gave: a mapping, a tuple whose first is a number, or a tensor."""
    if isinstance(outputs, Mapping):
        if ignore_keys is None:
            ignore_keys = getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"])
        loss = outputs.get("loss")
        rest = tuple(value for key, value in outputs.items() if key not in [*ignore_keys, "loss"])
    elif isinstance(outputs, tuple):
        first = outputs[0] if isinstance(outputs[0], Tensor) and outputs[0].dim() == 0 else None
        loss, rest = first, outputs if first is None else outputs[1:]
    else:
        loss, rest = None, (outputs,)
    return None if loss is None else loss.detach().mean(), rest
