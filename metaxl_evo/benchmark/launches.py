"""What a step asks of an accelerator: operators that are launched there, and how often the host waits for it.

Counted by torch's dispatcher on any device, the CPU included: a `_foreach_` or a fused operator is one launch, though
it may be several kernels, and an operator that is made of others counts as these. Copies between devices do not exist
where all is on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

IDLE = {  # beside views: allocations, and questions that the host answers
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "record_stream"),
    *("detach", "alias", "lift_fresh", "view", "reshape", "_reshape_alias", "_unsafe_view", "as_strided"),
    *("is_pinned", "is_same_size", "resolve_conj", "resolve_neg", "_has_same_storage_numel", "sym_size", "sym_numel"),
    "_local_scalar_dense",  # a wait
}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}


def is_launched(operator: Any) -> bool:
    """Whether an operator (an OpOverload) computes anything on its device."""
    return not operator.is_view and operator.overloadpacket.__name__ not in IDLE


def wait(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why the host waits for the device in this call, if it does."""
    name = operator.overloadpacket.__name__
    if name in WAITS:
        return str(name)
    if name in INDEXES and any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1]):
        return "index by a mask"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return str(name)
    if name == "_to_copy":
        target = kwargs.get("device")
        return "copy" if target is not None and torch.device(target).type != args[0].device.type else None
    if name == "copy_":
        return "copy" if args[0].device.type != args[1].device.type else None
    return None


class Launches(TorchDispatchMode):
    """Counts while it is entered, in backward passes as well.

    Attributes:
        launched: how often each operator was launched, by its name.
        waited: how often the host waited, by the reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched, self.waited = Counter[str](), Counter[str]()

    def note(self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take a call into account."""
        if is_launched(operator):
            self.launched[str(operator)] += 1
        reason = wait(operator, args, kwargs)
        if reason is not None:
            self.waited[reason] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.note(func, args, kwargs)
        return func(*args, **kwargs)
