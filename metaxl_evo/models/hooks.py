"""How a meta network enters a model: forward hooks on its layers, which do nothing while the network is off."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from metaxl_evo.models.remembered import on_host, remembered


class HookedTransform(nn.Module, ABC):
    """A meta network that changes what layers of a model return, and is no part of that model.

    Nothing is registered in the model: its state dict and saved files do not change, and a deep copy of it alone
    carries an idle transform of its own. Attach before compiling: compiled code does not see later hooks.
    """

    @abstractmethod
    def apply_layer(self, output: Tensor, layer: Any) -> Tensor | None:
        """The output of a hooked layer changed; None, which keeps it, while the transform is off."""

    def _hook(self, model: nn.Module, layers: Mapping[Any, nn.Module]) -> list[RemovableHandle]:
        """Hook these layers of `model`, by the names that `apply_layer` knows them by, in place of former hooks.

        The hooks come first among a layer's hooks, so that `output_hidden_states` shows the changed states.
        """
        self.detach(model)
        return [layer.register_forward_hook(_LayerHook(self, name), prepend=True) for name, layer in layers.items()]

    def hooks_in(self, model: nn.Module) -> int:
        """How many layers of `model` this transform has hooked."""
        held = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        return sum(isinstance(hook, _LayerHook) and hook.transform is self for hook in held)

    def detach(self, model: nn.Module) -> None:
        """Remove this transform's hooks from `model`; nothing happens where there are none."""
        for module in model.modules():
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _LayerHook) and hook.transform is self]:
                del hooks[key]


@dataclass(eq=False)
class _LayerHook:
    """The forward hook of one layer; an object, so that deep copies of model and transform stay paired."""

    transform: HookedTransform
    layer: Hashable

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The layer's output changed; None, which keeps it, while the transform is off.

        Layers return a tensor in transformers 5 and a tuple in 4.
        """
        hidden = output if isinstance(output, Tensor) else output[0]
        changed = self.transform.apply_layer(hidden, self.layer)
        return changed if changed is None or isinstance(output, Tensor) else (changed, *output[1:])


def encoder_layers(model: nn.Module, module_path: str | None = None) -> nn.ModuleList:
    """The encoder layers of `model`: the list at `module_path`, or the one that is as long as it has hidden layers.

    Only lists below the base model count that lie in no other list; `config.num_hidden_layers` tells the length.

    Raises ValueError where that is no list or several, with all there are as choices of `module_path`.
    """
    lists = dict(_outermost_lists(model))
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if module_path is None:
        found = [layers for layers in lists.values() if len(layers) == count]
        problem = f"{len(found) or 'no'} lists of {count or 'its'} encoder layers"
    else:
        place = dict(model.named_modules()).get(module_path)
        found = [place] if isinstance(place, nn.ModuleList) and len(place) else []
        problem = f"no encoder layers at {module_path}"
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{path} ({len(layers)})" for path, layers in lists.items())
    advice = f"set rtn_module_path (module_path) to one of {there}" if there else "it holds no list of modules"
    raise ValueError(f"{type(model).__name__} has {problem} to hook: {advice}")


def _outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of modules below the base model that lie in no other, by their path from `model`."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    outer: tuple[str, ...] = ()
    for path, module in model.named_modules() if base is None else base.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and len(module) and not path.startswith(outer):
            outer += (f"{path}.",)
            yield path, module


@dataclass(frozen=True, eq=False)
class RowRoute:
    """Which network each row of a batch meets.

    `languages` (B,) indexes the transform's languages, -1 leaves the row alone; `layers` (B,) indexes its layers, one
    a row: several layers work on copies of the row. `attention_mask` (B, T) is read by attention networks only. The
    two index tensors live on the CPU, so that no layer waits for the device.
    """

    languages: Tensor
    layers: Tensor
    attention_mask: Tensor | None = None

    @classmethod
    def make(
        cls,
        languages: Tensor | Sequence[int],
        layers: Tensor | Sequence[int] | None,
        attention_mask: Tensor | None,
        *,
        n_languages: int,
        n_layers: int,
    ) -> RowRoute:
        """The route of these values, checked against the sizes of the transform.

        Raises ValueError for indices out of range, lengths that differ, and `layers` left out where there are several.
        """
        if layers is None and n_layers > 1:
            raise ValueError(f"the RTN has {n_layers} layers: give active() the layer index of each row")

        def checked() -> tuple[Tensor, Tensor]:
            by_language = on_host(languages) if isinstance(languages, Tensor) else torch.tensor(languages)
            by_layer = torch.zeros_like(by_language) if layers is None else torch.as_tensor(layers, device="cpu")
            _check_indices("languages", by_language, -1, n_languages)
            _check_indices("layers", by_layer, 0, n_layers)
            return by_language, by_layer

        if layers is None and isinstance(languages, Tensor):
            by_language, by_layer = remembered(("route", n_languages), checked, languages)
        else:
            by_language, by_layer = checked()
        lengths = {len(by_language), len(by_layer)} | ({len(attention_mask)} if attention_mask is not None else set())
        if len(lengths) > 1:
            raise ValueError(f"languages, layers and attention_mask of the RTN differ in rows: {sorted(lengths)}")
        return cls(by_language, by_layer, attention_mask)

    def rows(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Numbers (N,), on a device, of the rows transformed at a layer (its index), and their languages (N,)."""

        def find() -> tuple[Tensor, Tensor]:
            rows = ((self.languages >= 0) & (self.layers == layer)).nonzero().squeeze(1)
            return rows.to(device), self.languages[rows]

        return remembered(("rows", layer, device), find, self.languages, self.layers)


def _check_indices(name: str, indices: Tensor, low: int, stop: int) -> None:
    """ValueError unless `indices` is one-dimensional, of whole numbers in [low, stop)."""
    whole = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if indices.dim() != 1 or not whole or bool(((indices < low) | (indices >= stop)).any()):
        raise ValueError(
            f"{name} of active() must be one whole number a row, from {low} to {stop - 1}, got {indices.tolist()}"
        )


@contextmanager
def states_below_head(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """The states (B, T, H) that the model below the head returns inside."""
    states: list[Tensor] = []
    if not wanted:
        yield states
        return
    hook = model.base_model.register_forward_hook(lambda module, given, out: states.append(out[0]))
    try:
        yield states
    finally:
        hook.remove()
