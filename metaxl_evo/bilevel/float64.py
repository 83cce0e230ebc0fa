"""A loss evaluated in float64, whatever constants and casts it brings along."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

_LESS = (torch.float32, torch.float16, torch.bfloat16)  # than float64


def promoted(loss: Callable[..., Tensor], casts: bool) -> Callable[..., Tensor]:
    """A loss in float64 that brings constants of other dtypes along; with `casts` also one that casts on its way."""

    @wraps(loss)
    def run(*arguments: Any) -> Tensor:
        with _Promotes(casts):
            return loss(*arguments)

    return run


class _Promotes(TorchFunctionMode):
    """Takes every floating-point argument for float64 where one is; casts to less (of an RMS norm) are left out."""

    def __init__(self, casts: bool):
        super().__init__()
        self.casts = casts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if tree_any(lambda x: isinstance(x, Tensor) and x.dtype is torch.float64, (args, kwargs)):
            args, kwargs = tree_map(self._in_float64, (args, kwargs))
            func = Tensor.double if self.casts and func in (Tensor.float, Tensor.half, Tensor.bfloat16) else func
        return func(*args, **kwargs)

    def _in_float64(self, x: Any) -> Any:
        if isinstance(x, torch.dtype):
            return torch.float64 if self.casts and x in _LESS else x
        return x.double() if isinstance(x, Tensor) and x.dtype in _LESS else x
