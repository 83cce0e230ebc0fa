"""The products with second derivatives of the inner loss, written once, with three engines.

The mixed product is d_lam <grad_w L_T(w, lam), v>, the Hessian product d_w <grad_w L_T(w, lam), v>. Either is how much
the gradient to lam, or to w, changes along v.

| engine | passes | needs |
|---|---|---|
| `double_backward` | a forward, a backward with its graph, a double backward | second-order kernels, most memory |
| `jvp` | one forward and backward, each with its tangent (forward over reverse) | second-order kernels |
| `finite_difference` | two forwards and backwards, at w +- radius v/|v| | nothing; error O(radius^2) |
| the same, one-sided | one, at w + radius v/|v|, and the gradient at w | nothing; error O(radius) |

The first two are exact and agree to rounding. Reverse over forward is not offered: torch's layer_norm is wrong there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from metaxl_evo.bilevel import gate, tree
from metaxl_evo.bilevel.base_weights import Sharded
from metaxl_evo.bilevel.directions import moved
from metaxl_evo.bilevel.dual_weights import tangent_of_gradient
from metaxl_evo.bilevel.passes import PassContext, is_out_of_memory
from metaxl_evo.bilevel.replay import Inputs
from metaxl_evo.bilevel.samples import alone, first_part, smaller, untested
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.value_test import LAM_MOVES
from metaxl_evo.messages import first_line, unknown

logger = logging.getLogger(__name__)
Found = TypeVar("Found")

AUTO = "auto"
ENGINES = ("double_backward", "jvp", "finite_difference")
ORDER = ("jvp", "double_backward", "finite_difference")  # in which `auto` tries them
INSTEAD = {
    "jvp": "use engine double_backward, or auto",
    "double_backward": "use engine finite_difference, or evograd",
    "finite_difference": "use evograd",
}
MISSING = (
    "forward AD",
    "derivative for",
    "not implemented",
    "setup_context",
    "have storage",
    "functorch",
    "vmap",
    "(vjp, jvp",
)
BF16_RADIUS = (
    0.1  # on a tagger of 12M weights: an error of 2 %, at 0.01 one of 13 % (tests/training/test_precision.py)
)
W, LAM = 0, 1  # the argument of the inner loss that a product is with respect to


def mixed_product(
    passes: PassContext,
    engine: str,
    w: Tree,
    lam: Tree,
    batch: object,
    v: Tree,
    *,
    radius: float = 0.01,
    length: float | None = None,
    at_w: Tree | None = None,
) -> Tree:
    """d_lam <grad_w L_T(w, lam; batch), v> at the given point, a tree like `lam`; on several processes a share of it.

    Args:
        engine: one of `ENGINES`, or `auto`: the first of jvp, double_backward and finite_difference that is right.
        v: a direction with the keys of `w`, whole.
        radius: length of the finite-difference perturbation, in the units of w (DARTS, footnote 2: 0.01).
        length: |v|, where it is known.
        at_w: d_lam L_T(w, lam; batch), this process's share of it: finite differences then are one-sided.

    Raises:
        ValueError: for an unknown engine.
    """
    return _product(passes, engine, w, lam, batch, v, radius, LAM, length, at_w)


def hessian_product(
    passes: PassContext, engine: str, w: Tree, lam: Tree, batch: object, v: Tree, *, radius: float = 0.01
) -> Tree:
    """d_w <grad_w L_T(w, lam; batch), v> at the given point, a tree like `w`, whole; arguments as of `mixed_product`.

    Raises:
        ValueError: for an unknown engine.
    """
    return passes.all_reduce(_product(passes, engine, w, lam, batch, v, radius, W))


def _product(
    passes: PassContext,
    engine: str,
    w: Tree,
    lam: Tree,
    batch: object,
    v: Tree,
    radius: float,
    wrt: int,
    length: float | None = None,
    at_w: Tree | None = None,
) -> Tree:
    if engine not in (AUTO, *ENGINES):
        raise ValueError(unknown("engine", engine, (AUTO, *ENGINES)))
    length = tree.norm(v) if length is None else length
    if length == 0:
        return tree.zeros_like((w, lam)[wrt])

    def run(one: str) -> Tree:
        if one != "finite_difference":
            return _exact_product(passes, one, w, lam, batch, v, wrt)
        _require_radius(passes, radius)
        return _finite_difference(passes, w, lam, batch, v, radius / length, wrt, at_w)

    return _with(passes, engine, run)


def prepare(passes: PassContext, engine: str, w: Tree, lam: Tree, batch: object, *, radius: float = 0.01) -> None:
    """Find out early in a run whether an engine is right for this inner loss, or which one `auto` takes.

    Raises:
        ValueError: where it is not (`require_forward_ad`, `gate.require`), or `radius` too small for the precision.
    """

    def look(one: str) -> None:
        if one == "jvp":
            require_forward_ad(passes, w, lam, batch)
        elif one == "finite_difference":
            _require_radius(passes, radius)
            gate.require(passes, w, lam, batch, frozenset(w))
        elif engine == AUTO:
            require_double_backward(passes, w, lam, batch)

    _with(passes, engine, look)


def _with(passes: PassContext, engine: str, run: Callable[[str], Found]) -> Found:
    """`run` of an engine; for `auto` of the first one that the inner loss allows, which is said once.

    Raises:
        ValueError, RuntimeError: that of the engine, of the first one where none works.
    """
    if engine != AUTO:
        on_shards = passes.problem.weights.sharded and engine == "jvp"
        with otherwise(f"engine {engine}", "use engine finite_difference" if on_shards else INSTEAD[engine]):
            return run(engine)
    facts = passes.problem.facts
    first: Exception | None = None
    last: Exception | None = None
    for one in ORDER[ORDER.index(facts.engine or ORDER[0]) :]:
        try:
            found = run(one)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            first, last = first or error, error
            continue
        if first is not None:
            logger.warning("engine auto takes %s here (%s)", one, first_line(first))
        facts.engine = one
        return found
    assert first is not None
    if first is not last and isinstance(last, ValueError):  # of the value test, which names the line
        raise NoDerivative(f"{last}; no other engine differentiates this loss ({first_line(first)})") from first
    raise first


def _exact_product(passes: PassContext, engine: str, w: Tree, lam: Tree, batch: object, v: Tree, wrt: int) -> Tree:
    if engine == "jvp":
        require_forward_ad(passes, w, lam, batch, (wrt,))
    product = tree.zeros_like((w, lam)[wrt])
    for index, part in passes.parts(batch, lam_only=wrt == LAM):
        with passes.scope(index, second_order=True):
            if engine == "double_backward":
                (one,) = double_backward(passes, w, lam, part, lambda grad: v, (wrt,))
            else:
                one = _jvp(passes, w, lam, part, v, wrt)
            product = tree.add(product, one)
    return product


def _require_radius(passes: PassContext, radius: float) -> None:
    if passes.precision == "bf16" and radius < BF16_RADIUS:
        raise ValueError(
            f"finite differences of radius {radius:g} drown in the rounding of bf16: set the estimator's radius to "
            f"{BF16_RADIUS} or more, take engine double_backward or jvp, or set meta_precision: float32"
        )


class NoDerivative(ValueError, NotImplementedError):
    """The inner loss lacks a derivative that an engine or an estimator takes."""


@contextmanager
def otherwise(who: str, way_out: str) -> Iterator[None]:
    """Give torch's errors about missing derivatives as one line.

    Raises:
        NoDerivative: with the way out.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, NotImplementedError) and not any(sign in str(error) for sign in MISSING):
            raise
        raise NoDerivative(f"{who} cannot differentiate this inner loss ({first_line(error)}): {way_out}") from error


def require_double_backward(passes: PassContext, w: Tree, lam: Tree, batch: object) -> None:
    """See to it, once a run, that the inner loss has second derivatives, on a few rows.

    Raises:
        RuntimeError: where it has none.
    """
    facts, failed = passes.problem.facts, None
    for here, part in [] if facts.twice else _samples(passes, batch):
        try:
            with here.scope(0, second_order=True):
                double_backward(here, w, lam, part, lambda grad: grad, (LAM,))
        except RuntimeError as error:  # perhaps of fewer rows
            failed = error
            continue
        facts.twice = True
        return
    if failed is not None:
        raise failed


def require_forward_ad(passes: PassContext, w: Tree, lam: Tree, batch: object, wrt: Sequence[int] = (LAM,)) -> None:
    """See to it, once a run, that forward mode differentiates this inner loss as autograd does.

    `torch.func.jvp` carries tangents through what `no_grad` and `.data` keep from autograd. So a few rows are
    differentiated by double backward too; where there is none, by finite differences, as far as they can be trusted.
    On sharded weights there is none, and all processes compare what they sum of a part each.

    Args:
        wrt: the arguments (`W`, `LAM`) by whose gradient it is asked for.

    Raises:
        NoDerivative: where the two disagree.
        RuntimeError, ValueError: where forward mode is missing, or nothing can be compared with it.
    """
    known, here, names = passes.problem.facts.forward_ad, alone(passes), frozenset(wrt)
    for kind, part, size in untested(passes, batch, known, names):
        failed, showed = None, None
        for one in [part] if here.problem.weights.sharded else smaller(part, size):
            try:
                showed = _forward_agrees(here, w, lam, one, wrt)
            except NoDerivative:
                raise
            except RuntimeError as error:  # perhaps of fewer rows
                if is_out_of_memory(error):
                    return
                failed = error
                continue
            if showed:
                break
        if showed is not None:
            known.note(kind, names, showed)
        elif failed is not None:
            raise failed


def _forward_agrees(here: PassContext, w: Tree, lam: Tree, part: object, wrt: Sequence[int]) -> bool:
    """Whether there was anything to compare.

    Raises:
        NoDerivative: where the two disagree.
    """
    v, whole = moved(tree.zeros_like(w), 1.0), _for_all(here)
    for amount in LAM_MOVES:
        point = moved(lam, amount)
        with here.scope(0, second_order=True):
            forward = [whole(_jvp(here, w, point, part, v, one)) for one in wrt]
        if all(map(tree.all_finite, forward)):
            break
    other, slack = _otherwise_found(here, w, point, part, v, wrt)
    grads, showed = [whole(one) for one in here.inner_grad(w, point, part, wrt_w=w, wrt_lam=lam)[1:]], True
    for index, one, reference, allowed in zip(wrt, forward, other, slack, strict=True):
        eps = max(torch.finfo(leaf.dtype).eps for leaf in one.values())
        rounding = 100 * eps * tree.norm(grads[index])  # of products that are zero but for it
        size = max(tree.norm(one), tree.norm(reference))
        if tree.norm(tree.add(one, reference, -1.0)) > 30 * eps**0.5 * size + rounding + allowed:
            raise NoDerivative(
                "forward mode and double backward, or differences, disagree, as they do where the loss "
                "reads what torch.no_grad() or .data took out of the graph"
            )
        showed &= size > rounding
    return showed


def _otherwise_found(
    here: PassContext, w: Tree, point: Tree, part: object, v: Tree, wrt: Sequence[int]
) -> tuple[list[Tree], list[float]]:
    """The products by double backward, or by differences where there is none; and how far off these may be."""
    if not here.problem.weights.sharded:
        try:
            with here.scope(0, second_order=True):
                return double_backward(here, w, point, part, lambda grad: v, wrt), [0.0] * len(wrt)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
    step, whole = 0.01 / tree.norm(v), _for_all(here)
    other, finer = (
        [whole(_finite_difference(here, w, point, part, v, h, one)) for one in wrt] for h in (step, step / 2)
    )
    return other, [10 * tree.norm(tree.add(a, b, -1.0)) for a, b in zip(other, finer, strict=True)]


def _for_all(here: PassContext) -> Callable[[Tree], Tree]:
    """What makes a number of a test the same on all processes where they make it together, on sharded weights."""
    return here.all_reduce if here.problem.weights.sharded else dict


def _samples(passes: PassContext, batch: object) -> list[tuple[PassContext, object]]:
    """Contexts for a few rows of a part and for that part; none where this process has no rows."""
    found = first_part(passes, batch)
    return [] if found is None else [(alone(passes), part) for part in smaller(*found)]


def double_backward(
    passes: PassContext, w: Tree, lam: Tree, part: object, direction: Callable[[Tree], Tree], wrt: Sequence[int]
) -> list[Tree]:
    """The derivatives of <grad_w L_T(w, lam; part), v> at the arguments `wrt` (`W`, `LAM`), within a pass.

    v = `direction`(grad_w L_T) is held constant, and may be made of the gradient that the pass itself computes.
    """
    grads, products = _with_graph(passes, w, lam, part, wrt)
    return products(direction({n: grads[n] if n in grads else torch.zeros_like(leaf) for n, leaf in w.items()}))


def gradient_and_product(
    passes: PassContext, w: Tree, lam: Tree, index: int, part: object
) -> tuple[Tree, Callable[[Tree], Tree]]:
    """grad_w L_T of a part where the loss reached w, and v -> d_lam <it, v>, which can be called once.

    Both are of one graph, which is in memory until then.
    """
    with passes.scope(index, second_order=True), otherwise("engine double_backward", INSTEAD["double_backward"]):
        grads, products = _with_graph(passes, w, lam, part, (LAM,))

    def product(v: Tree) -> Tree:
        with passes.scope(index, second_order=True), otherwise("engine double_backward", INSTEAD["double_backward"]):
            return products(v)[0]

    return tree.dense(grads), product


def _with_graph(
    passes: PassContext, w: Tree, lam: Tree, part: object, wrt: Sequence[int]
) -> tuple[Tree, Callable[[Tree], list[Tree]]]:
    """The gradient where the loss reached w, and v -> the derivatives of <it, v> at the arguments `wrt`."""
    at = tree.leaves(w, w), tree.leaves(lam, lam)
    loss = passes.problem.inner_loss(*at, part)
    grads: Tree = {}
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(at[W].values()), create_graph=True, allow_unused=True)
        grads = {name: grad for name, grad in zip(w, found, strict=True) if grad is not None}

    def products(v: Tree) -> list[Tree]:
        passes.counts.hvps += 1
        inner = [name for name, grad in grads.items() if grad.requires_grad]
        if not inner:
            return [tree.zeros_like(at[index]) for index in wrt]
        ends = [grads[name] for name in inner]
        _refuse_once_differentiable(ends)
        targets = [leaf for index in wrt for leaf in at[index].values()]
        products = iter(torch.autograd.grad(ends, targets, [v[name] for name in inner], materialize_grads=True))
        # Materialised zeros of torch 2.8 require a gradient.
        return [{name: next(products).detach() for name in at[index]} for index in wrt]

    return tree.detach(grads), products


def _refuse_once_differentiable(values: Sequence[Tensor]) -> None:
    """Raise where the graph of `values` holds a function marked `once_differentiable`.

    Autograd raises only if that node lies on a way to the inputs it is asked for, and the mark cuts every such way:
    the product would silently lack what goes through it.
    """
    todo, seen = [value.grad_fn for value in values], set()
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
    passes.counts.jvps += 1
    if isinstance(passes.problem.weights, Sharded):
        assert wrt == LAM
        return tangent_of_gradient(passes.problem.weights, passes.problem.inner_loss, w, lam, part, v)

    def loss(base: Tree, meta: Tree) -> Tensor:
        return passes.problem.inner_loss(base, meta, part)

    def gradient(point: Tree) -> Tree:
        return torch.func.grad(loss, argnums=wrt)(point, tree.detach(lam))

    direction = {name: v[name].to(leaf.dtype) for name, leaf in w.items()}
    tangent = torch.func.jvp(gradient, (tree.detach(w),), (direction,))[1]
    return tree.detach(tangent)


def _finite_difference(
    passes: PassContext,
    w: Tree,
    lam: Tree,
    batch: object,
    v: Tree,
    step: float,
    wrt: int,
    at_w: Tree | None = None,
) -> Tree:
    def difference(inputs: Inputs) -> Tree:
        def gradient(point: Tree) -> Tree:
            if wrt == LAM:
                return passes.lam_grad(point, lam, batch, inputs=inputs)
            return passes.inner_grad(point, lam, batch, wrt_w=w, inputs=inputs)[1]

        point = tree.add(w, v, step)
        plus = gradient(point)
        if at_w is not None:
            return tree.scale(tree.add(plus, at_w, -1.0), 1 / step)
        tree.copy_into({name: point[name] for name in v}, w)
        torch._foreach_add_([point[name] for name in v], list(v.values()), alpha=-step)
        minus = gradient(point)
        return tree.scale(tree.add(plus, minus, -1.0), 1 / (2 * step))

    return gate.perturbed(passes, w, lam, batch, difference)
