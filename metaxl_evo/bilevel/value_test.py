"""The value test: whether passes at perturbed weights see the function that autograd differentiates.

Finite differences and EvoGrad move the weights and read what the inner loss becomes. Something that depends on the
weights and was taken out of the graph (`detach`, `.data`, `no_grad`, `.tolist()`, a straight-through estimator) then
moves along, which exact differentiation does not see. So before anything is estimated that way, the slope of the loss
along random directions, as autograd has it, is compared with central differences: of the loss itself, and of its
change between two values of lam, which a hypergradient is made of. Both are taken at weights beside those at which the
inputs of `stop_gradient` were recorded, which shows as well whether they are replayed wherever they are computed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metaxl_evo.bilevel import shards, tree
from metaxl_evo.bilevel.directions import moved, random_like, sizes
from metaxl_evo.bilevel.float64 import promoted
from metaxl_evo.bilevel.passes import PassContext, is_out_of_memory
from metaxl_evo.bilevel.replay import Inputs, plain_detaches
from metaxl_evo.bilevel.samples import alone, mapped, smaller
from metaxl_evo.bilevel.severed import ALLOW, culprit, refusal
from metaxl_evo.bilevel.tree import Tree

logger = logging.getLogger(__name__)

STEPS = (1e-5, 8e-5, 6.4e-4, 5.12e-3, 4.096e-2)  # of the central differences, relative to the size of the weights
FIRST = (1, 2)  # those that will do for a loss in float64
DIRECTIONS = 3
LAM_MOVES = (0.1, 1e-3, 0.0)  # relative to its size, until the loss is finite there
W_MOVES = (0.03, 3e-3)
TOLERANCE = 1e-5  # of a slope, relative to its size
CLEAR = 0.02  # a comparison that is no better than this says nothing
REPEATED = 2e-6  # what sums in another order may change
NOTHING = 1e-8  # of the slope of the loss: what its change with lam is where it does not read lam


def differs(first: float, second: float) -> bool:
    """Whether two numbers are further apart than their rounding."""
    return abs(first - second) > REPEATED * max(abs(first), abs(second))


class _Fault(Exception):
    """What is wrong with a loss, in words."""


class Trial:
    """The inner loss on one part, at one precision, at weights and meta parameters of its own.

    Args:
        passes: a context for single parts.
        dtype: None leaves everything as it is.
        names: the weights that are moved.

    Attributes:
        error: what an attempt ended with.
        showed: the loss, and its change with lam, moved with the weights at all.
    """

    def __init__(
        self, passes: PassContext, w: Tree, lam: Tree, part: Any, names: frozenset[str], dtype: torch.dtype | None
    ):
        self.passes, self.dtype, self.names = passes, dtype, sorted(names)
        self.facts = passes.problem.facts
        self.start, self.lam, self.part = w, lam, part
        self.w: Tree = {}
        self.signs: Sequence[int] = ()
        self.clear = True  # as far as the precision goes
        self.showed = False
        self.moves = torch.zeros(1)  # the largest slopes and differences that were seen, of the quantities
        self.error: Exception | None = None

    def attempt(self) -> str | None:
        """What is wrong, empty if nothing is; None where this trial cannot tell."""
        manager = nullcontext() if self.dtype is None else self.passes.problem.cast(self.dtype)
        try:
            with manager, torch.no_grad():
                good = self._holds()
                if good is False and not self.facts.replay_detach:
                    good = self._holds_replayed()
                if good and not self.clear:
                    good = self._holds_by_looking()
                if good is False:
                    return self._refusal()
                return "" if good else None
        except _Fault as fault:
            return str(fault)
        except Exception as error:  # of the loss, at another precision, of fewer rows or beside its parameters
            self.error = error
            return None
        finally:
            self.w = {}

    def _refusal(self) -> str:
        return refusal(self._culprit(detaches=False), self._culprit(detaches=True))

    def _holds_by_looking(self) -> bool:
        """Where numbers of few digits show nothing clearly: whether the loss reads no value that left the graph."""
        if self._culprit(detaches=False) is not None:
            return False
        if self._culprit(detaches=True) is not None and not self.facts.replay_detach:
            logger.warning("that it is right to replay detach in passes at perturbed weights was tested roughly only")
            return self._holds_replayed()
        return True

    def _holds_replayed(self) -> bool:
        """Whether all is well once plain detaches are replayed, which they then are from here on."""
        self.facts.replay_detach, good = True, None
        try:
            good = self._holds()
        except RuntimeError as error:  # a backward that computes again has seen others than were replayed
            if is_out_of_memory(error):
                raise
            logger.debug("plain detach cannot be replayed: %s", error)
        finally:
            self.facts.replay_detach = bool(good)
        if good:
            logger.info("plain detach is replayed in passes at perturbed weights (%s)", self._culprit(detaches=True))
        return bool(good)

    def _holds(self) -> bool | None:
        """Whether autograd's slopes are the loss's; None where it is not finite."""
        for lam_move, w_move in product(LAM_MOVES, W_MOVES):
            self.signs = (1, -1) if lam_move else (1,)
            self._place(lam_move)
            self._refuse(*(float(self._recorded(1)) for _ in range(2)))
            agrees = self._agrees_beside(w_move)
            self.showed = bool((self.moves > NOTHING * self.moves[0]).all())
            if agrees and self._is_replayed():
                return self._replays_for_lam(lam_move, w_move)
            if agrees is not None:
                return agrees
        return None

    def _agrees_beside(self, w_move: float, of_lam: bool = False) -> bool | None:
        """Whether the slopes are right beside the weights at which the inputs of `stop_gradient` were recorded."""
        for sign in self.signs:
            self._recorded(sign, keep=True)
        self._vary(self.w, self.names)
        self._move(DIRECTIONS, w_move)
        if of_lam:
            self._vary(self.metas[1], list(self.lam))
        return self._agrees()

    def _replays_for_lam(self, lam_move: float, w_move: float) -> bool:
        """Whether the gradient to lam sees the replayed inputs too, where a backward computes them again.

        It does not if it is right at the recorded weights and wrong beside them. What is kept out of its graph for a
        reason of its own is wrong at both, and none of a hypergradient's business.
        """
        self.signs, found = (1,), []
        for move in (w_move, 0.0):
            self._place(lam_move)
            found.append(self._agrees_beside(move, of_lam=True))
            if found[0] is not False:
                return True
        return found[1] is False

    def _refuse(self, first: float, second: float) -> None:
        """Refuse what the recorded pass shows by itself."""
        if math.isfinite(first) and math.isfinite(second) and differs(first, second):
            raise _Fault(
                f"the same pass of the inner loss gave {first:.6g} and {second:.6g}: it draws random numbers that no "
                "seed of ours reaches, and differences of passes would be noise: draw them from torch's, numpy's or "
                "Python's global generators, or take an exact engine (engine: double_backward)"
            )
        if self.facts.stop_gradients and self.passes.problem.stop_gradients is False:
            raise _Fault(
                "the inner loss calls stop_gradient, and stop_gradients = False says that it does not: leave the "
                f"flag out, {ALLOW}"
            )

    def _culprit(self, detaches: bool) -> str | None:
        return culprit(self._watched, detaches)

    def _watched(self, watch: TorchFunctionMode) -> float:
        """The loss, evaluated under a mode that looks at what it does."""
        w = {name: leaf.detach().requires_grad_(name in self.names) for name, leaf in self.w.items()}
        with self.passes.elsewhere().scope(0):
            with watch:
                loss = self.passes.problem.inner_loss(w, self.metas[1], self.batch)
            return float(loss.detach())

    # ---- where the loss is evaluated

    def _place(self, lam_move: float) -> None:
        """The weights as they were given, and lam moved to either side."""
        self.w = {}
        for name, leaf in self.start.items():
            self.w[name] = leaf.detach().to(self._dtype(leaf), copy=name in self.names)
        self.metas: dict[int, Tree] = {}
        self.batch = mapped(lambda x: x.to(self._dtype(x)) if x.is_floating_point() else x, self.part)
        lam = {name: leaf.detach().to(self._dtype(leaf)) for name, leaf in self.lam.items()}
        for sign in self.signs:
            self.metas[sign] = moved(lam, sign * lam_move)
        self.contexts = {sign: self.passes.elsewhere() for sign in self.signs}

    def _dtype(self, leaf: Tensor) -> torch.dtype:
        return leaf.dtype if self.dtype is None else self.dtype

    def _along(self, direction: int) -> dict[str, Callable[[], Tensor]]:
        """A direction, its leaves made when they are asked for: two copies of the weights would be too many."""

        def leaf(index: int, name: str) -> Callable[[], Tensor]:
            return lambda: random_like(self.varied[name], direction * len(self.varied) + index, self.sizes[name])

        return {name: leaf(index, name) for index, name in enumerate(self.varied)}

    def _vary(self, leaves: Tree, names: Sequence[str]) -> None:
        """Move these, of w or of lam, from here on."""
        self.varied = {name: leaves[name] for name in names}
        self.sizes = sizes(self.varied)

    def _move(self, direction: int, amount: float) -> None:
        for name, leaf in self._along(direction).items():
            self.varied[name].add_(leaf(), alpha=amount)

    def _recorded(self, sign: int, keep: bool = False) -> Tensor:
        return self._value(self.contexts[sign] if keep else self.passes.elsewhere(), sign, Inputs.RECORD)

    def _value(self, context: PassContext, sign: int, inputs: Inputs) -> Tensor:
        return context.inner_value(self.w, self.metas[sign], self.batch, inputs=inputs)

    def _is_replayed(self) -> bool:
        """Whether there is anything that a perturbed pass replays."""
        return self.facts.stop_gradients or self.facts.replay_detach

    # ---- the comparison

    def _agrees(self) -> bool | None:
        """Whether slopes and differences agree, of the loss and of its change with lam; None if they are not finite.

        All directions have to disagree (two where the precision shows them clearly, and none agrees): a kink may lie
        between the two points of a difference.
        """
        slopes = self._combined({sign: self._slopes(sign) for sign in self.signs})  # (quantities, DIRECTIONS)
        if not bool(slopes.isfinite().all()):
            return None
        failed, clearly, passed = [0] * len(slopes), [0] * len(slopes), [False] * len(slopes)
        self.moves = slopes.abs().amax(1)
        for direction in range(DIRECTIONS):
            found: dict[int, Tensor] = {}
            for steps in (FIRST, range(len(STEPS))):
                for k in steps:
                    if k not in found:
                        found[k] = self._difference(direction, STEPS[k])
                if not all(bool(one.isfinite().all()) for one in found.values()):
                    return None
                self.moves = torch.stack([self.moves, *(one.abs() for one in found.values())]).amax(0)
                judged = [_judge(found, q, float(slopes[q, direction]), self._noise) for q in range(len(slopes))]
                if all(error <= bound <= 1e-4 for error, bound in judged):
                    break
            for q, (error, bound) in enumerate(judged):
                passed[q] |= error <= bound <= CLEAR
                failed[q] += error > bound
                clearly[q] += error > bound and bound <= CLEAR
            if all(passed):
                return True
        self.clear = passed[0] or clearly[0] > 1 or failed[0] == DIRECTIONS
        wrong = [one == DIRECTIONS or two > 1 for one, two in zip(failed, clearly, strict=True)]
        return not any(bad and not good for bad, good in zip(wrong, passed, strict=True))

    def _slopes(self, sign: int) -> Tensor:
        """Autograd's slopes of the loss along the directions, float64 (DIRECTIONS,)."""
        problem, slopes = self.passes.problem, torch.zeros(DIRECTIONS, dtype=torch.float64, requires_grad=True)
        directions = [self._along(direction) for direction in range(DIRECTIONS)]

        def live(leaves: Tree) -> Tree:
            return {
                name: _Slopes.apply(slopes, leaf, [along[name] for along in directions])
                if leaf is self.varied.get(name)
                else leaf
                for name, leaf in leaves.items()
            }

        with self.contexts[sign].scope(0, inputs=Inputs.REPLAY):
            w, lam = live(self.w), live(self.metas[sign])
            with plain_detaches():
                loss = problem.inner_loss(w, lam, self.batch)
            if not loss.requires_grad:
                return torch.zeros(DIRECTIONS, dtype=torch.float64)
            (found,) = torch.autograd.grad(loss, slopes, allow_unused=True, materialize_grads=True)
        return found.detach()

    def _difference(self, direction: int, step: float) -> Tensor:
        """The central differences, float64 (quantities,)."""
        sides = []
        for move in (step, -2 * step):
            self._move(direction, move)
            sides.append(
                {sign: self._value(self.contexts[sign], sign, Inputs.REPLAY).double().cpu() for sign in self.signs}
            )
        self._move(direction, step)
        self._largest = max(abs(float(value)) for side in sides for value in side.values())
        return self._combined({sign: (sides[0][sign] - sides[1][sign]) / (2 * step) for sign in self.signs})

    def _noise(self, step: float) -> float:
        """What the rounding of the loss makes of a difference."""
        dtype = self.dtype or next(iter(self.w.values())).dtype
        return 8 * torch.finfo(dtype).eps * self._largest / step

    def _combined(self, of: dict[int, Tensor]) -> Tensor:
        return torch.stack([of[1]] if len(of) == 1 else [of[1], of[1] - of[-1]])


class _Together(Trial):
    """On sharded weights: of the losses of all processes, each on a part of its own, as they compute.

    All take the same way through it: what decides is summed. So nobody looks for the line that is to blame, and plain
    detaches are not replayed, of which torch makes some of its own where it gathers weights.
    """

    def _value(self, context: PassContext, sign: int, inputs: Inputs) -> Tensor:
        return context.all_reduce_one(super()._value(context, sign, inputs))

    def _is_replayed(self) -> bool:
        return True

    def _culprit(self, detaches: bool) -> str | None:
        return None

    def _holds_replayed(self) -> bool:
        return False

    def _refusal(self) -> str:
        return (
            "the gradient of the inner loss is not its slope: it reads something that depends on the sharded base "
            "weights and is out of the graph (detach, .data, .item(), a straight-through estimator); put "
            f"stop_gradient(x) in its place (a check on one process names the line), {ALLOW}"
        )

    def _slopes(self, sign: int) -> Tensor:
        names = list(self.varied)
        wrt: dict[str, Any] = {"wrt_w": names} if shards.any_sharded(self.varied) else {"wrt_lam": names}
        at, context = (self.w, self.metas[sign], self.batch), self.contexts[sign]
        _, of_w, of_lam = context.inner_grad(*at, inputs=Inputs.REPLAY, **wrt)
        grads = context.all_reduce(of_w or of_lam)
        directions = (self._along(direction) for direction in range(DIRECTIONS))
        return torch.stack([tree.dot(grads, {n: leaf() for n, leaf in one.items()}) for one in directions]).cpu()


class _Slopes(torch.autograd.Function):
    """A leaf as it is; its gradient is taken along directions and given to their slopes, and never kept."""

    @staticmethod
    def forward(ctx: Any, slopes: Tensor, leaf: Tensor, directions: Sequence[Callable[[], Tensor]]) -> Tensor:
        ctx.directions = directions
        return leaf.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        along = [(gradient * direction()).sum(dtype=torch.float64).cpu() for direction in ctx.directions]
        return torch.stack(along), None, None


def trials(passes: PassContext, w: Tree, lam: Tree, part: Any, size: int | None, names: frozenset[str]) -> list[Trial]:
    """The same test on a few rows in float64, on all rows of a part, and as the loss itself computes.

    What a backward computes again does not know of the casts that are left out, so that they are left in then. Sharded
    weights are gathered as they are, so that the last test alone is of use.
    """
    here = alone(passes)
    if passes.problem.weights.sharded:
        return [_Together(here, w, lam, part, names, None)]

    def in_float64(casts: bool) -> PassContext:
        return replace(here, problem=replace(here.problem, inner_loss=promoted(here.problem.inner_loss, casts)))

    return [
        Trial(in_float64(casts), w, lam, one, names, torch.float64)
        for one in smaller(part, size)
        for casts in (True, False)
    ] + [Trial(here, w, lam, part, names, None)]


def _judge(found: Mapping[int, Tensor], q: int, slope: float, noise: Callable[[float], float]) -> tuple[float, float]:
    """Error of the best difference against a slope, and its bound, both relative to the larger of the two.

    Two neighbouring steps show the error of the smaller: that of the rule shrinks with the step, that of rounding
    grows, so that finer steps tell it too.
    """
    best, seen = (math.inf, math.inf), 0.0
    for k, following in pairwise(sorted(found)):
        quotient, step = float(found[k][q]), STEPS[k]
        seen = max(seen, step * abs(quotient - float(found[following][q])))
        scale = max(abs(slope), abs(quotient))
        bound = max(10 * seen / step, noise(step), TOLERANCE * scale)
        one = (abs(slope - quotient) / scale, bound / scale) if scale else (0.0, 0.0)
        best = min(best, one, key=lambda pair: pair[1])
    return best
