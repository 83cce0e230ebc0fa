"""The products with second derivatives of the inner loss, written once, with three engines.

The mixed product is d_lam <grad_w L_T(w, lam), v>, the Hessian product d_w <grad_w L_T(w, lam), v>. Either is how much
the gradient to lam, or to w, changes along v.

| engine | passes | needs |
|---|---|---|
| `double_backward` | a forward, a backward with its graph, a double backward | second-order kernels, most memory |
| `jvp` | one forward and backward, each with its tangent (forward over reverse) | second-order kernels |
| `finite_difference` | two forwards and backwards, at w +- radius v/|v| | nothing; error O(radius^2) |

The first two are exact and agree to rounding. Reverse over forward is not offered: torch's layer_norm is wrong there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.messages import unknown

ENGINES = ("double_backward", "jvp", "finite_difference")
W, LAM = 0, 1  # the argument of the inner loss that a product is with respect to


def mixed_product(
    passes: PassContext, engine: str, w: Tree, lam: Tree, batch: object, v: Tree, *, radius: float = 0.01
) -> Tree:
    """d_lam <grad_w L_T(w, lam; batch), v> at the given point, a tree like `lam`; on several processes a share of it.

    Args:
        engine: one of `ENGINES`.
        v: a direction with the keys of `w`, whole.
        radius: length of the finite-difference perturbation, in the units of w (DARTS, footnote 2: 0.01).

    Raises:
        ValueError: for an unknown engine.
    """
    return _product(passes, engine, w, lam, batch, v, radius, LAM)


def hessian_product(
    passes: PassContext, engine: str, w: Tree, lam: Tree, batch: object, v: Tree, *, radius: float = 0.01
) -> Tree:
    """d_w <grad_w L_T(w, lam; batch), v> at the given point, a tree like `w`, whole; arguments as of `mixed_product`.

    Raises:
        ValueError: for an unknown engine.
    """
    return passes.whole(_product(passes, engine, w, lam, batch, v, radius, W))


def _product(
    passes: PassContext, engine: str, w: Tree, lam: Tree, batch: object, v: Tree, radius: float, wrt: int
) -> Tree:
    if engine not in ENGINES:
        raise ValueError(unknown("engine", engine, ENGINES))
    norm, like = tree.norm(v), (w, lam)[wrt]
    if norm == 0:
        return tree.zeros_like(like)
    if engine == "finite_difference":
        return _finite_difference(passes, w, lam, batch, v, radius / norm, wrt)
    product = tree.zeros_like(like)
    for index, part in passes.parts(batch, lam_only=wrt == LAM):
        with passes.scope(index, second_order=True):
            if engine == "double_backward":
                (one,) = double_backward(passes, w, lam, part, lambda grad: v, (wrt,))
            else:
                one = _jvp(passes, w, lam, part, v, wrt)
            product = tree.add(product, one)
    return product


def double_backward(
    passes: PassContext, w: Tree, lam: Tree, part: object, direction: Callable[[Tree], Tree], wrt: Sequence[int]
) -> list[Tree]:
    """The derivatives of <grad_w L_T(w, lam; part), v> at the arguments `wrt` (`W`, `LAM`), within a pass.

    v = `direction`(grad_w L_T) is held constant, and may be made of the gradient that the pass itself computes.
    """
    at = tree.leaves(w, w), tree.leaves(lam, lam)
    loss = passes.problem.inner_loss(*at, part)
    found = torch.autograd.grad(loss, list(at[W].values()), create_graph=True, materialize_grads=True)
    passes.counts.hvps += 1
    grads = dict(zip(w, found, strict=True))
    v = direction(tree.detach(grads))
    inner: list[Tensor] = [(g * v[name]).sum() for name, g in grads.items() if g.requires_grad]
    if not inner:
        return [tree.zeros_like(at[index]) for index in wrt]
    along = torch.stack(inner).sum()
    _refuse_once_differentiable(along)
    targets = [leaf for index in wrt for leaf in at[index].values()]
    products = iter(torch.autograd.grad(along, targets, materialize_grads=True))
    return [{name: next(products) for name in at[index]} for index in wrt]


def _refuse_once_differentiable(value: Tensor) -> None:
    """Raise where the graph of `value` holds a function marked `once_differentiable`.

    Autograd raises only if that node lies on a way to the inputs it is asked for, and the mark cuts every such way:
    the product would silently lack what goes through it.
    """
    todo, seen = [value.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("Error"):
            raise RuntimeError(
                "the inner loss contains a function that can be differentiated only once: use engine finite_difference"
            )
        seen.add(node)
        todo.extend(edge[0] for edge in node.next_functions)


def _jvp(passes: PassContext, w: Tree, lam: Tree, part: object, v: Tree, wrt: int) -> Tree:
    def loss(base: Tree, meta: Tree) -> Tensor:
        return passes.problem.inner_loss(base, meta, part)

    def gradient(point: Tree) -> Tree:
        return torch.func.grad(loss, argnums=wrt)(point, tree.detach(lam))

    direction = {name: v[name].to(leaf.dtype) for name, leaf in w.items()}
    tangent = torch.func.jvp(gradient, (tree.detach(w),), (direction,))[1]
    passes.counts.jvps += 1
    return tree.detach(tangent)


def _finite_difference(passes: PassContext, w: Tree, lam: Tree, batch: object, v: Tree, step: float, wrt: int) -> Tree:
    inputs = passes.record(w, lam, batch)

    def gradient(point: Tree) -> Tree:
        if wrt == LAM:
            return passes.lam_grad(point, lam, batch, inputs=inputs)
        return passes.inner_grad(point, lam, batch, wrt_w=w, inputs=inputs)[1]

    point = tree.add(w, v, step)
    plus = gradient(point)
    for name, leaf in v.items():
        torch.add(w[name], leaf, alpha=-step, out=point[name])
    minus = gradient(point)
    return tree.tree_map(lambda p, m: (p - m) / (2 * step), plus, minus)
