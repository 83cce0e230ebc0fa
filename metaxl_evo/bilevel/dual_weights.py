"""Forward mode through a module under `fully_shard`: what it gathers carries a tangent, which is gathered beside it.

Neither `torch.func.jvp` nor dual numbers know DTensors. So each layer computes with its gathered weights, which are
made dual where its forward begins. What autograd keeps of a layer for its backward keeps the layer's tangents, whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.base_weights import Sharded, reshard
from metaxl_evo.bilevel.problem import Loss
from metaxl_evo.bilevel.tree import Tree

_MARKS = "torch.distributed.fsdp._fully_shard._fsdp_param_group"  # torch's own, which another release may move
Place = tuple[Any, str, Tensor]  # the `_parameters` that hold a weight, its key there, and its tangent


def tangent_of_gradient(weights: Sharded, loss: Loss, w: Tree, lam: Tree, part: object, v: Tree) -> Tree:
    """d_lam <grad_w loss(w, lam; part), v>, this process's share: forward over reverse, the tangent of d_lam loss.

    All processes call it, each with a part of its own, and make the whole backward, to the weights too: those whose
    rows do not read lam would leave the others waiting where these gather a layer again.

    Source: Kemaev et al., MixFlow-MG, ICML 2025; gathering tangents beside the weights is ours.
    """
    at, reached = tree.leaves(lam, lam), list[Tensor]()
    with forward_ad.dual_level(), _dual(weights, v, reached):
        with _Products():
            value = loss(tree.detach(w), at, part)
        found = torch.autograd.grad(value, [*at.values(), *reached], allow_unused=True)
        tangents = {name: _tangent(grad) for name, grad in zip(at, found, strict=False)}
    zeros = tree.zeros_like(lam)
    return {name: zeros[name] if one is None else one.detach() for name, one in tangents.items()}


def _tangent(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else forward_ad.unpack_dual(grad).tangent


@contextmanager
def _dual(weights: Sharded, v: Tree, reached: list[Tensor]) -> Iterator[None]:
    """Let every layer compute with dual weights, of which `v` are the tangents, and which are put into `reached`."""
    hooks = [
        layer.register_forward_pre_hook(_swap(places, reached))  # behind the hook that gathers
        for layer, places in _places(weights, v).items()
    ]
    try:
        with _marks_carry_tangents():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        reshard(weights.root)  # its parameters are its own again


def _swap(places: list[Place], reached: list[Tensor]) -> Callable[..., None]:
    def swap(*_: object) -> None:
        for parameters, key, tangent in places:
            leaf = parameters[key].detach().requires_grad_()
            leaf.register_hook(_nothing)
            reached.append(leaf)
            whole = tangent.full_tensor() if isinstance(tangent, DTensor) else tangent
            parameters[key] = forward_ad.make_dual(leaf, whole.to(leaf.dtype))

    return swap


@contextmanager
def _marks_carry_tangents() -> Iterator[None]:
    """The mark that fully_shard puts on a layer's inputs lets their tangents through, each as a view of itself.

    It hands the inputs on as they are, and dual numbers then want a view of the tangent. Torch 2.13 gives the tangent
    itself ("the jvp is not returning a view"), and torch before it none.
    """
    mark: Any = import_module(_MARKS).RegisterPostBackwardFunction
    own = vars(mark).get("jvp")

    def jvp(ctx: object, group: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if one is None else one.view_as(one) for one in tangents)

    mark.jvp = staticmethod(jvp)
    try:
        yield
    finally:
        del mark.jvp
        if own is not None:
            mark.jvp = own


class _Products(TorchFunctionMode):
    """silu as the product that it is: its own backward has a tangent only beside a graph, which takes much memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.silu:
            return args[0] * args[0].sigmoid()
        return func(*args, **(kwargs or {}))


def _nothing(gradient: Tensor) -> Tensor:
    """In the place of a weight's gradient, which nobody asked for."""
    return gradient.new_zeros(()).expand_as(gradient)


def _places(weights: Sharded, v: Tree) -> Mapping[nn.Module, list[Place]]:
    """Where each layer that gathers weights holds them: tied ones, of one name, in all their places."""
    reshard(weights.root)
    tangents = {id(weights.parameters[name]): tangent for name, tangent in v.items()}
    found: dict[nn.Module, list[Place]] = defaultdict(list)
    seen: set[nn.Module] = set()

    def look(module: nn.Module, layer: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        layer = module if isinstance(module, FSDPModule) else layer
        for key, parameter in module._parameters.items():
            if id(parameter) in tangents:
                found[layer].append((module._parameters, key, tangents[id(parameter)]))
        for child in module.children():
            look(child, layer)

    look(weights.root, weights.root)
    return found
