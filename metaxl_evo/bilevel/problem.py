"""The bilevel problem, one step of its inner optimiser, and the response of an estimator to it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.bilevel.base_weights import BaseWeights, Whole
from metaxl_evo.bilevel.initial import Initial
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.bilevel.replay import Facts
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState

Loss = Callable[[Tree, Tree, Any], Tensor]


@dataclass(frozen=True)
class Cut:
    """The inner loss in two: a way to hidden states, and a suffix `loss`, which alone reads the parameters `names`.

    Copies that perturb only those share one pass of the rest. In a `BilevelModule` the parameters are swapped in, and
    each function lacks its leading arguments w and lam.

    Args:
        names: the parameters that the suffix reads, and no others.
        hidden: (w, lam, below, batch) -> the states between the pieces; from the start where `below` is None.
        loss: (w, states, batch) -> the inner loss.
        prefix: (w, batch) -> `below`, by neither `names` nor lam, so that what the base step's own forward handed to
            `keep` serves in its place. None where there is no such piece.
    """

    names: frozenset[str]
    hidden: Callable[..., Tensor]
    loss: Callable[..., Any]
    prefix: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Examples:
    """A batch as a sequence of examples, for estimators that draw one batch of several (HyperDistill).

    On several processes examples are numbered over all of them, and each process returns its own of those asked for.

    Args:
        size: batch -> how many.
        take: (batch, their numbers, a 1-d int64 tensor) -> a batch of these; there may be none.
        concat: batches -> one batch. Between steps it is part of an estimator's state, so for a run to be resumed it
            is to hold tensors, in tuples, lists or dicts.
    """

    size: Callable[[Any], int]
    take: Callable[[Any, Tensor], Any]
    concat: Callable[[Sequence[Any]], Any]


def _whole(batch: Any) -> Sequence[Any]:
    return (batch,)


def _same(part: Any) -> Any:
    return part


def _as_it_is(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class BilevelProblem:
    """Base weights w trained on `inner_loss` by `update`; meta parameters lam judged by `outer_loss`.

    Args:
        inner_loss, outer_loss: (w, lam, batch) -> 0-d tensor; w and lam are dicts of tensors.
        update: the inner optimiser's step.
        parts: the micro-batches whose losses add up to the loss of a batch (default: the batch itself).
        scope: a context manager around every pass (frozen buffers, dropout off).
        cut: the cheap form of the inner loss, where only a suffix of the base is perturbed.
        second_order: whether the losses can be differentiated twice and in forward mode.
        stop_gradients: whether the inner loss calls `stop_gradient`, so that perturbed passes have inputs to replay;
            None where that is to be found out.
        straight_through: accept an inner loss whose gradient is not its slope (values that were taken out of the graph
            and move with the weights), which estimators that perturb the weights refuse otherwise
            (`bilevel.value_test`).
        direct_term: whether `outer_loss` reads lam; None where that is not known beforehand.
        reads_lam: the rows of a part through which its inner loss reads lam; the others add nothing to d_lam. It makes
            the same `stop_gradient` calls on them as the whole part does.
        rows: row numbers of the leaves of w that hold only some rows of their parameter (touched embedding rows).
        examples: how batches are taken apart and put together.
        processes: those that hold a share of every batch each; the losses then are shares that add up to the whole.
        weights: where w lives; `Sharded` has losses that enter `weights.at(w)`.
        initial: how the first weights depend on lam, where they do; `hypergradient` and `run_episode` find it out.
        cast: dtype -> a context manager in which what the losses read besides w, lam and batch is of that dtype.
        facts: what was found out about the inner loss, for problems that are made anew at every step.
        split: `cut` by its name up to 0.1; goes after the next release.
    """

    inner_loss: Loss
    outer_loss: Loss
    update: UpdateRule
    parts: Callable[[Any], Sequence[Any]] = _whole
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    cut: Cut | None = None
    second_order: bool = True
    stop_gradients: bool | None = None
    straight_through: bool = False
    direct_term: bool | None = None
    reads_lam: Callable[[Any], Any] = _same
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    examples: Examples | None = None
    processes: Processes = field(default_factory=Processes)
    weights: BaseWeights = field(default_factory=Whole)
    initial: Initial | None = None
    cast: Callable[[torch.dtype], AbstractContextManager[Any]] = _as_it_is
    facts: Facts = field(default_factory=Facts, compare=False)
    split: Cut | None = None

    def __post_init__(self) -> None:
        if self.split is not None:
            warnings.warn("BilevelProblem(split=...) is cut=... now", FutureWarning, stacklevel=3)
            object.__setattr__(self, "cut", self.split)
            object.__setattr__(self, "split", None)
        loss = inspect.unwrap(self.inner_loss)
        if self.facts.loss is None:
            self.facts.loss = loss
        elif self.facts.loss != loss:
            object.__setattr__(self, "facts", Facts(loss))


@dataclass
class StepMade:
    """An inner step that was really made: the weights after it, its gradient (before clipping), the state after it.

    As with torch, the gradient lacks the parameters that the loss did not reach; the step passed them over. Whoever
    reads it last takes it over, so that its memory is free for the passes to come.

    Args:
        lam_grad: what the same backward left at lam, this process's share; None where it was not asked for.
        grad_norm: the norm of `grad`, where it is known.
        product: v -> d_lam <grad_w L_T, v>, this process's share, of the graph that the gradient left; to be called
            once. None where there is no such graph.
    """

    w: Tree
    grad: Tree
    update_state: UpdateState
    lam_grad: Tree | None = None
    grad_norm: float | None = None
    product: Callable[[Tree], Tree] | None = None

    def take_grad(self) -> Tree:
        """The gradient, which is gone from here: reading `grad` again is an AttributeError."""
        grad = self.grad
        del self.grad
        return grad


@dataclass(frozen=True)
class InnerStep:
    """One inner step as an estimator sees it: from `w` on `batch`; `made` where the step has been made already."""

    w: Tree
    lam: Tree
    batch: Any
    update_state: UpdateState | None = None  # before the step
    made: StepMade | None = None
    val_batch: Any = None  # of the outer loss, for estimators that judge every step

    @property
    def current(self) -> Tree:
        """Where the weights are now."""
        return self.w if self.made is None else self.made.w

    def lent(self) -> InnerStep:
        """The same step; a gradient that is taken over from it stays here."""
        return self if self.made is None else replace(self, made=replace(self.made))


@dataclass(frozen=True)
class Response:
    """Where the base weights go, and how a cotangent on them pulls back to lam.

    Args:
        value: where the outer loss is judged; keys and shapes of w.
        vjp: cotangent on value -> cotangent on lam; linear; called once; it owns the cotangent and may overwrite it.
            On several processes it takes this one's share and returns a share.
        offset: what was pulled back already on the way, whole.
        wrt: the keys of value whose cotangent `vjp` reads (default: all); the outer backward stops there.
    """

    value: Tree
    vjp: Callable[[Tree], Tree]
    offset: Tree | None = None
    wrt: Iterable[str] | None = None
