"""The line of a loss that takes a value out of the graph which depends on the weights, and reads it; its refusal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map

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
MOST = 200  # places that are tried
MOVED = 1.01

ALLOW = "or allow a straight-through estimate by straight_through = True"


def culprit(value: Callable[[TorchFunctionMode], float], detaches: bool) -> str | None:
    """`file:line (what)` of the first place whose value the loss reads: moving that value alone moves the loss.

    Args:
        value: the loss, evaluated under a mode.
        detaches: look at plain detaches, or at everything else.
    """
    watch = _Watch(detaches)
    before = value(watch)
    for number, place in enumerate(watch.places[:MOST]):
        if value(_Watch(detaches, moved=number)) != before:
            return place
    return None


def refusal(other: str | None, detach: str | None) -> str:
    """Why passes at perturbed weights would be wrong, and what to do, in one line.

    Args:
        other, detach: the culprit among everything but plain detaches, and among these.
    """
    place, again = other or detach, other is None and detach is not None
    found = f"{place} takes something that depends on the base weights out of the graph" if place else (
        "the gradient of the inner loss is not its slope (a straight-through estimator, or a function with a "
        "backward of its own)"
    )  # fmt: skip
    put = "stop_gradient(x, key=...), a key for each call since the backward computes it again," if again else (
        "stop_gradient(x)"
    )  # fmt: skip
    return (
        f"{found}, so that passes at perturbed weights (finite differences, evograd) would be wrong without a "
        f"word: put metaxl_evo.bilevel.{put} in its place, take an exact engine (engine: double_backward), {ALLOW}"
    )


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
    forwards = set(_forwards(torch.autograd.Function))
    found, frame = "the model", cast(Any, sys._getframe(2))
    while frame is not None:
        if frame.f_code in forwards:
            return None
        file = Path(frame.f_code.co_filename)
        if found == "the model" and not any(file.is_relative_to(folder) for folder in folders):
            found = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return found


def _forwards(function: Any) -> Iterator[Any]:
    """The code of every autograd function's forward: `apply`, which calls it, has no frame since torch 2.15."""
    for kind in function.__subclasses__():
        yield getattr(kind.forward, "__code__", None)
        yield from _forwards(kind)
