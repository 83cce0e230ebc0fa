"""Live diagnostics: how near an estimate is to the exact one-step hypergradient, and what swamps it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.hypergradients import Hypergradient, estimate, look_ahead
from metaxl_evo.bilevel.passes import Counts, PassContext, is_out_of_memory
from metaxl_evo.bilevel.problem import InnerStep
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators import Estimator, OneStep
from metaxl_evo.estimators.local import EngineEstimator
from metaxl_evo.messages import first_line

logger = logging.getLogger(__name__)

IN_A_ROW = 5  # estimates that do not point along the exact hypergradient: more than bad luck
ASTRAY = (
    f"{IN_A_ROW} estimates in a row do not point along the exact one-step hypergradient: unless the estimator looks "
    "further than one step, its error swamps the signal (evograd: raise copies; finite_difference: change radius)"
)
ZERO = (
    "the exact one-step hypergradient is zero: check that the inner loss reads the meta parameters, and the outer "
    "loss base parameters that it trains"
)
SATURATED = (
    "the exact one-step hypergradient is zero at the meta parameters reached, and was not before: where the inner "
    "loss does not feel them any more (a saturated sigmoid), lower meta_learning_rate; a batch may also not read them"
)


def exact_estimator(estimator: Estimator) -> OneStep:
    """The exact one-step estimator, by another engine than that of `estimator`."""
    forward = isinstance(estimator, EngineEstimator) and estimator.engine in ("auto", "jvp")
    return OneStep("double_backward" if forward else "jvp")


@dataclass(frozen=True)
class Exact:
    """The exact one-step hypergradient of a step, and the gradient of the inner loss that the step was made with."""

    grads: Tree
    gradient: Tree


class Diagnostics:
    """Looks at every so many meta steps from outside, and warns of each kind of trouble once.

    Args:
        estimator: the configured one.
        every: base steps between two looks.

    Attributes:
        exact: the estimator that is compared with; finite differences from the first time that it fails.
        warned: the warnings given, by their kind.
    """

    def __init__(self, estimator: Estimator, every: int):
        self.estimator, self.every = estimator, every
        self.exact = exact_estimator(estimator)
        self.warned: dict[str, str] = {}
        self._astray = 0

    def is_due(self, step: int) -> bool:
        """Whether base step number `step` (from 0) is one to look at, if it has a meta step."""
        return (step + 1) % self.every == 0

    def take_exact(self, passes: PassContext, step: InnerStep) -> Exact:
        """The exact one-step hypergradient of `step`, of which nothing is taken over, by passes of its own.

        `passes` and `step` are those of the estimate, except that `step` starts at the weights before it.

        Raises:
            RuntimeError: out of memory.
        """
        passes = replace(passes.elsewhere(), counts=Counts(), precision="float32")
        step = step if step.made is not None else look_ahead(passes, step)
        assert step.made is not None
        if self.exact.second_order and not passes.problem.second_order:
            self._differentiate_once("the task rules second derivatives out")
        try:
            grads = self._exact_grads(passes, step)
        except RuntimeError as error:
            if is_out_of_memory(error):  # perhaps on this process alone, and the others go on with the engine
                raise
            self._differentiate_once(first_line(error))
            grads = self._exact_grads(passes, step)
        return Exact(grads, step.made.grad)

    def compare(self, result: Hypergradient, exact: Exact, *, was_zero: bool = True) -> None:
        """Add to an estimate's diagnostics how near it is to the exact hypergradient; warn of what they show.

        Args:
            was_zero: whether all estimates before this one were zero.
        """
        if not tree.all_finite(result.grads):
            return
        self._warn("regime", self.estimator.advise(exact.gradient, result.diagnostics))
        length = tree.norm(exact.grads)
        if length == 0:
            self._warn("zero", ZERO if was_zero else SATURATED)
        elif tree.all_finite(exact.grads):
            cosine = tree.cosine(result.grads, exact.grads)
            result.diagnostics.update(cosine_to_exact=cosine, norm_by_exact=tree.norm(result.grads) / length)
            self._astray = self._astray + 1 if cosine <= 0 else 0
            self._warn("astray", ASTRAY if self._astray >= IN_A_ROW else None)

    @contextmanager
    def watching(self, optimizer: torch.optim.Optimizer, lam: Tree) -> Iterator[None]:
        """Around a step of the meta optimiser on `lam`: warn where something else than the hypergradient makes it."""
        before = tree.clone(lam)
        yield
        self._warn("weight decay", weight_decay_advice(optimizer, before, lam))
        self._warn("epsilon", epsilon_advice(optimizer, lam))

    def _exact_grads(self, passes: PassContext, step: InnerStep) -> Tree:
        return estimate(passes, self.exact, step.lent(), None).grads

    def _differentiate_once(self, reason: str) -> None:
        self.exact = OneStep("finite_difference")
        self._warn("engine", f"the diagnostics compare with finite differences, not exactly: {reason}")

    def _warn(self, kind: str, text: str | None) -> None:
        if text is not None and kind not in self.warned:
            self.warned[kind] = text
            logger.warning("%s", text)


def weight_decay_advice(optimizer: torch.optim.Optimizer, before: Tree, lam: Tree) -> str | None:
    """Advice where weight decay is more of a step of `optimizer`, just made from `before` to `lam`, than all else.

    Coupled decay is part of the gradient and compared with the hypergradient, |wd lam| > |h|; decoupled decay is part
    of the step and compared with the rest of it, lr |wd lam| > |step|.
    """
    (group,) = optimizer.param_groups
    decay = group["weight_decay"]
    if isinstance(optimizer, torch.optim.AdamW):
        decay *= float(group["lr"])
        start, end = (tree.tree_map(Tensor.double, held) for held in (before, lam))
        rest, what, advice = tree.norm(tree.add(end, start, decay - 1)), "the rest of the step", ""
    else:
        rest, what, advice = tree.norm(_gradients(lam)), "the hypergradient", ", or meta_optim to AdamW"
    term = decay * tree.norm(before)
    if term <= rest:
        return None
    return (
        f"meta_weight_decay swamps the hypergradient (the norm of its term is {term:.1e}, that of {what} {rest:.1e}): "
        f"set meta_weight_decay to 0{advice}"
    )


def epsilon_advice(optimizer: torch.optim.Optimizer, lam: Tree) -> str | None:
    """Advice where eps is more of the denominators of `optimizer`, just stepped, than the hypergradients are.

    Those of Adam are its bias-corrected roots; other adaptive optimisers are judged by |h|. Entries that never had a
    hypergradient do not count.
    """
    (group,) = optimizer.param_groups
    if "eps" not in group:
        return None
    roots = torch.cat([_root(group, optimizer.state[lam[n]], h).flatten() for n, h in _gradients(lam).items()])
    roots = roots[roots > 0]
    if not len(roots) or group["eps"] <= (median := float(roots.median())):
        return None
    return (
        f"meta_adam_epsilon ({group['eps']:.0e}) swamps the hypergradient, whose entries are about {median:.0e}: set "
        f"meta_adam_epsilon to {median / 1000:.0e} or less"
    )


def _root(group: dict[str, Any], state: dict[str, Any], h: Tensor) -> Tensor:
    if "exp_avg_sq" not in state:
        return h.abs()
    return (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt()


def _gradients(lam: Tree) -> Tree:
    return {name: p.grad for name, p in lam.items() if p.grad is not None}
