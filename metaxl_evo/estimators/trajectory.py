"""The walk back through an episode's inner steps, one step's graph at a time (reverse-mode differentiation).

What is linear in the cotangents (alpha on the weights, beta on the optimiser's state) is taken step by step: through
the optimiser's own map first, which leaves a direction for the inner gradient, then through that gradient by one
double backward a part of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from metaxl_evo.bilevel import hyper, tree
from metaxl_evo.bilevel.hypergradients import look_ahead
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import InnerStep
from metaxl_evo.bilevel.products import LAM, W, double_backward, otherwise
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import SGD, UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState, map_trees, trees

TWICE = "use one_step, whose engine auto finds another way, or evograd"  # where the walk back cannot


@dataclass(frozen=True)
class Visit:
    """An inner step as it is gone back through: from `w` and the state before it, by the rule of that step.

    Args:
        w, lam, batch: where the inner loss was differentiated.
        update_state: the optimiser's state before the step.
        rule: the optimiser's map at that step (its learning rate may be scheduled).
        seed: of the randomness of the step's passes.
        stepped: the parameters that had a gradient, and that the optimiser moved.
    """

    w: Tree
    lam: Tree
    batch: Any
    update_state: UpdateState
    rule: UpdateRule
    seed: int
    stepped: frozenset[str]

    @classmethod
    def of(cls, passes: PassContext, step: InnerStep) -> Visit:
        """A copy of a step, which outlives the caller's own tensors."""
        assert step.update_state is not None
        assert step.made is not None
        before = map_trees(tree.clone, step.update_state)
        w, lam, stepped = tree.clone(step.w), tree.clone(step.lam), frozenset(step.made.grad)
        return cls(w, lam, step.batch, before, passes.problem.update, passes.seed, stepped)

    def without_weights(self, lam: Tree) -> Visit:
        """The step alone, to be made again; `lam` is that of another, where it stands still."""
        return replace(self, w={}, lam=lam, update_state={})


def thinned(visits: Sequence[Visit]) -> list[Visit]:
    """The steps so far, of which every so many-th has weights: at most sqrt(T) of T, whatever T will be."""
    every = _every(len(visits))
    if every == _every(len(visits) - 1):
        *before, last = visits
        at = len(before)
        return [*before, last if at % every == 0 else last.without_weights(before[0].lam)]
    first = visits[0].lam
    return [one if at % every == 0 else one.without_weights(first) for at, one in enumerate(visits)]


def _every(steps: int) -> int:
    """The smallest power of 2 that is at least sqrt(steps)."""
    every = 1
    while every**2 < steps:
        every *= 2
    return every


def made_again(passes: PassContext, visits: Sequence[Visit]) -> Iterator[Visit]:
    """The steps, the last one first, those without weights made again from the nearest one before that has them."""
    end = len(visits)
    while end:
        start = max(at for at in range(end) if visits[at].w)
        stretch = [visits[start]]
        for visit in visits[start + 1 : end]:
            stretch.append(_after(passes, stretch[-1], visit))
        while stretch:
            yield stretch.pop()
        end = start


def _after(passes: PassContext, before: Visit, visit: Visit) -> Visit:
    """A step with the weights and the state that the step before it leaves."""
    problem = replace(passes.problem, update=before.rule)
    there = replace(passes.elsewhere(before.seed), problem=problem)
    made = look_ahead(there, InnerStep(before.w, before.lam, before.batch, before.update_state)).made
    assert made is not None
    return replace(visit, w=made.w, update_state=made.update_state)


def walk_back(passes: PassContext, visits: Iterable[Visit], cotangent: Tree) -> Iterator[Tree]:
    """What each step adds to d_lam <w_T, cotangent>, from the last step to the first: B_t^T alpha_t, a tree like lam.

    At the end what the first weights add, where the problem says that they depend on lam. On several processes a share
    of it, of a share of the cotangent.

    Args:
        visits: the steps, the last one first; they may be made on the way.
        cotangent: on the weights after the last step.

    Each step is one double backward a part, where there are several parts with a gradient of the whole batch before;
    the first step's is to lam alone.
    """
    alpha, beta, initial = passes.all_reduce(dict(cotangent)), dict[str, Tree](), passes.problem.initial
    walk = iter(visits)
    visit = next(walk, None)
    while visit is not None:
        earlier = next(walk, None)
        onward = earlier is not None or initial is not None
        alpha, beta, d_lam = _step_back(passes.elsewhere(visit.seed), visit, alpha, beta, onward=onward)
        yield d_lam
        visit = earlier
    if initial is not None:
        yield passes.once(initial.pull_back(alpha))


def check_straight_line(name: str, rule: UpdateRule) -> None:
    """Refuse an SGD step that depends on what `straight_line` does not know: the true gradient's size, or a buffer.

    Raises:
        ValueError: with the reason and the way out.
    """
    if rule.max_grad_norm is not None or rule.max_grad_value is not None:
        raise ValueError(
            f"{name} does not model the clipping of the inner gradient, of which it does not know the true size: "
            "leave max_grad_norm (in a Trainer: 0) and max_grad_value out, or use unroll"
        )
    learned = replace(rule, weight_decay=0.0).tunes
    if isinstance(rule, SGD) and not hyper.is_zero(rule.momentum) and learned:
        raise ValueError(
            f"{name} keeps no momentum buffers, which the learned {sorted(learned)} multiply: "
            "learn them with momentum=0.0 (the weight decay also with it), or use unroll"
        )


def straight_line(visits: Sequence[Visit], start: Tree, end: Tree) -> Iterator[Visit]:
    """The steps, the last one first, with their weights moved to the line from w_0 to w_T, t/T of the way along.

    The line knows nothing of the optimiser's buffers: they are those before a first step, at the step's own number.

    Source: Fu et al., IJCAI 2016 (DrMAD).
    """
    for t in reversed(range(len(visits))):
        visit, way = visits[t], t / len(visits)
        w = tree.tree_map(lambda a, b, way=way: torch.lerp(a, b, way), start, end)
        yield replace(visit, w=w, update_state=visit.rule.init(w) | visit.update_state)


def _step_back(
    passes: PassContext, visit: Visit, alpha: Tree, beta: dict[str, Tree], *, onward: bool
) -> tuple[Tree, dict[str, Tree], Tree]:
    """The cotangents on the weights and on the state before the step, and on lam; the first is whole only if `onward`.

    The rule reads the gradient of the whole batch. Where that is one part, the graph which is differentiated again
    gives it; several parts take a pass of their own for it.
    """
    parts, pulled = passes.parts(visit.batch), dict[str, Tree]()
    wrt = {LAM: visit.lam, W: visit.w} if onward else {LAM: visit.lam}
    products = {index: tree.zeros_like(like) for index, like in wrt.items()}

    def direction(grad: Tree) -> Tree:
        pulled.update(_through_rule(visit, passes.all_reduce(tree.dense(grad)), alpha, beta))
        return pulled["grad"]

    if len(parts) != 1:  # without any, the other processes' gradient is still to be waited for
        v = direction(passes.inner_grad(visit.w, visit.lam, visit.batch, wrt_w=visit.w)[1])
    for index, part in parts:
        with passes.scope(index, second_order=True), otherwise("the walk back through the steps", TWICE):
            found = double_backward(
                passes, visit.w, visit.lam, part, direction if len(parts) == 1 else lambda grad: v, tuple(wrt)
            )
        products = {index: tree.add(products[index], one) for index, one in zip(wrt, found, strict=True)}
    if onward:
        pulled["w"] = tree.add(pulled["w"], passes.all_reduce(products[W]))
    d_lam = tree.add(passes.once(pulled["lam"]), products[LAM])
    return pulled["w"], {key: pulled[key] for key in visit.update_state.keys() & pulled.keys()}, d_lam


def _through_rule(visit: Visit, grad: Tree, alpha: Tree, beta: dict[str, Tree]) -> dict[str, Tree]:
    """The cotangents on what one step of the rule reads: the keys of the state's trees, "w", "grad" and "lam".

    That on the gradient is whole: zeros for the parameters that sat the step out.
    """
    state, grad = trees(visit.update_state), {name: leaf for name, leaf in grad.items() if name in visit.stepped}
    at = {
        key: tree.leaves(held, held) for key, held in (state | {"w": visit.w, "grad": grad, "lam": visit.lam}).items()
    }
    with torch.enable_grad():
        w, after = visit.rule(at["w"], visit.update_state | {key: at[key] for key in state}, at["grad"], at["lam"])
    ends = [(w[name], leaf) for name, leaf in alpha.items()]
    ends += [(after[key][name], leaf) for key, held in beta.items() for name, leaf in held.items()]
    found = iter(
        torch.autograd.grad(
            [end for end, _ in ends],
            [leaf for held in at.values() for leaf in held.values()],
            [cotangent for _, cotangent in ends],
            allow_unused=True,
            materialize_grads=True,
        )
    )
    # Materialised zeros of torch 2.8 require a gradient.
    pulled = {key: tree.detach(dict(zip(held, found, strict=False))) for key, held in at.items()}
    return pulled | {"grad": {n: pulled["grad"].get(n, torch.zeros_like(leaf)) for n, leaf in visit.w.items()}}
