"""The mixed product d_lam <grad_w L_T(w, lam), v>, written once, with three engines.

| engine | passes | needs |
|---|---|---|
| `double_backward` | a forward, a backward with its graph, a double backward | second-order kernels, most memory |
| `jvp` | one forward and backward to lam, each with its tangent (forward over reverse) | second-order kernels |
| `finite_difference` | two forwards and backwards to lam, at w +- radius v/|v| | nothing; error O(radius^2) |

The first two are exact and agree to rounding. Reverse over forward is not offered: torch's layer_norm is wrong there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.messages import unknown

ENGINES = ("double_backward", "jvp", "finite_difference")


def mixed_product(
    passes: PassContext, engine: str, w: Tree, lam: Tree, batch: object, v: Tree, *, radius: float = 0.01
) -> Tree:
    """d_lam <grad_w L_T(w, lam; batch), v> at the given point, a tree like `lam`.

    Args:
        engine: one of `ENGINES`.
        v: a direction with the keys of `w`.
        radius: length of the finite-difference perturbation, in the units of w (DARTS, footnote 2: 0.01).

    Raises:
        ValueError: for an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(unknown("engine", engine, ENGINES))
    norm = tree.norm(v)
    if norm == 0:
        return tree.zeros_like(lam)
    if engine == "finite_difference":
        return _finite_difference(passes, w, lam, batch, v, radius / norm)
    product = tree.zeros_like(lam)
    for index, part in passes.parts(batch):
        with passes.scope(index, second_order=True):
            one = _double_backward if engine == "double_backward" else _jvp
            product = tree.add(product, one(passes, w, lam, part, v))
    return product


def _double_backward(passes: PassContext, w: Tree, lam: Tree, part: object, v: Tree) -> Tree:
    w_leaves, lam_leaves = tree.leaves(w, w), tree.leaves(lam, lam)
    loss = passes.problem.inner_loss(w_leaves, lam_leaves, part)
    grads = torch.autograd.grad(loss, list(w_leaves.values()), create_graph=True, allow_unused=True)
    passes.counts.hvps += 1
    inner: list[Tensor] = [
        (g * v[name]).sum() for name, g in zip(w_leaves, grads, strict=True) if g is not None and g.requires_grad
    ]
    if not inner:
        return tree.zeros_like(lam)
    along = torch.stack(inner).sum()
    _refuse_once_differentiable(along)
    found = torch.autograd.grad(along, list(lam_leaves.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(lam, found, strict=True))


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


def _jvp(passes: PassContext, w: Tree, lam: Tree, part: object, v: Tree) -> Tree:
    def grad_lam(point: Tree) -> Tree:
        return torch.func.grad(lambda meta: passes.problem.inner_loss(point, meta, part))(tree.detach(lam))

    direction = {name: v[name].to(leaf.dtype) for name, leaf in w.items()}
    tangent = torch.func.jvp(grad_lam, (tree.detach(w),), (direction,))[1]
    passes.counts.jvps += 1
    return tree.detach(tangent)


def _finite_difference(passes: PassContext, w: Tree, lam: Tree, batch: object, v: Tree, step: float) -> Tree:
    inputs = passes.record(w, lam, batch)
    plus = passes.inner_grad(tree.add(w, v, step), lam, batch, wrt_lam=lam, inputs=inputs)[2]
    minus = passes.inner_grad(tree.add(w, v, -step), lam, batch, wrt_lam=lam, inputs=inputs)[2]
    return tree.tree_map(lambda p, m: (p - m) / (2 * step), plus, minus)
