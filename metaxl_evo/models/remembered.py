"""What is found out about the tensors of a batch once, and asked in every pass of a step.

On a GPU the host waits for each such answer: how many tokens are labelled, which rows are of a language.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Found = TypeVar("Found")
_FOUND = WeakTensorKeyDictionary()  # by the first of the tensors, with which the answers go


def remembered(what: Hashable, find: Callable[[], Found], first: Tensor, *others: Tensor) -> Found:
    """`find()`, or what it has found for these very tensors before; one that is changed in place is looked at anew.

    What is found must not hold the tensors themselves, which would live as long as it does, and is not to be changed.
    """
    tensors = (first, *others)
    if not all(map(_is_plain, tensors)):
        return find()
    held: dict[Hashable, Any] = _FOUND.setdefault(first, {})
    versions = [tensor._version for tensor in tensors]
    if what in held:
        then, theirs, found = held[what]
        if then == versions and all(ref() is one for ref, one in zip(theirs, others, strict=True)):
            return found
    with torch._C._DisableFuncTorch():  # what is made within a transform ends with it
        found = find()
    held[what] = versions, [weakref.ref(one) for one in others], found
    return found


def on_host(tensor: Tensor) -> Tensor:
    """A copy of a small tensor on the CPU, made once."""
    return remembered("on the host", lambda: tensor.detach().to("cpu", copy=True), tensor)


def _is_plain(tensor: Any) -> bool:
    known = isinstance(tensor, Tensor) and not tensor.is_inference()
    return known and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
