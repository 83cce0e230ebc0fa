"""Finds the line of a loss that takes a value out of the graph which depends on the weights, and reads it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

if TYPE_CHECKING:
    from metaxl_evo.bilevel.gate import Trial

DETACHES = {Tensor.detach: "detach", torch.detach: "detach"}
OTHERS = {
    Tensor.data.__get__: ".data",  # type: ignore[attr-defined]
    Tensor.detach_: "detach_",
    Tensor.item: ".item()",
    Tensor.tolist: ".tolist()",
    Tensor.numpy: ".numpy()",
    Tensor.__float__: "float()",
    Tensor.__array__: ".numpy()",
}
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "metaxl_evo")
APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
MOST = 200  # places that are tried
MOVED = 1.01


def culprit(trial: Trial, detaches: bool) -> str | None:
    """`file:line (what)` of the first place whose value the loss reads: moving that value alone moves the loss.

    Args:
        detaches: look at plain detaches, or at everything else.
    """
    watch = _Watch(detaches)
    before = _value(trial, watch)
    for number, place in enumerate(watch.places[:MOST]):
        if _value(trial, _Watch(detaches, moved=number)) != before:
            return place
    return None


def _value(trial: Trial, watch: _Watch) -> float:
    w = {name: leaf.detach().requires_grad_(name in trial.names) for name, leaf in trial.w.items()}
    with trial.passes.elsewhere().scope(0):
        with watch:
            loss = trial.passes.problem.inner_loss(w, trial.metas[1], trial.batch)
        return float(loss.detach())


class _Watch(TorchFunctionMode):
    """Notes where values that depend on the weights leave the graph; the one of number `moved` is changed."""

    def __init__(self, detaches: bool, moved: int | None = None):
        super().__init__()
        self.detaches, self.moved = detaches, moved
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        what = DETACHES.get(func) if self.detaches else self._what(func)
        severs = what is not None and tree_any(_depends, (args, kwargs))  # before `detach_` has done so
        found = func(*args, **kwargs)
        if not severs:
            return found
        line = _line()
        if line is None:
            return found
        self.places.append(f"{line} ({what})")
        return tree_map(_moved, found) if len(self.places) - 1 == self.moved else found

    def _what(self, func: Any) -> str | None:
        if func in DETACHES:
            return None
        return OTHERS.get(func) or (None if torch.is_grad_enabled() else "no_grad")


def _depends(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _moved(x: Any) -> Any:
    moves = x.is_floating_point() if isinstance(x, Tensor) else type(x) is float or hasattr(x, "__array__")
    return x * MOVED if moves else x


def _line() -> str | None:
    """The innermost frame that is the user's own; None inside an autograd function, which has its own backward."""
    folders = [Path(str(sys.modules[name].__file__)).parent for name in LIBRARIES if name in sys.modules]
    found, frame = "the model", cast(Any, sys._getframe(2))
    while frame is not None:
        if frame.f_code is APPLY:
            return None
        file = Path(frame.f_code.co_filename)
        if found == "the model" and not any(file.is_relative_to(folder) for folder in folders):
            found = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return found
