"""The copies of EvoGrad: their losses, and how much these move with lam."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.bilevel import gate, tree
from metaxl_evo.bilevel.batched import Made, agree, at_once, say_one_by_one, vectorised
from metaxl_evo.bilevel.passes import Counts, PassContext
from metaxl_evo.bilevel.problem import Cut, InnerStep
from metaxl_evo.bilevel.replay import Inputs, Unrecorded, plain_detaches
from metaxl_evo.bilevel.samples import shapes_of
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.noise import Perturbations

logger = logging.getLogger(__name__)

TOGETHER = 2**23  # numbers of the copies that one pass of a cut's suffix evaluates
WHOLE_TOGETHER = 2**25  # of whole passes, on a GPU
WHOLE_TOGETHER_ON_CPU = 2**20  # more than a cache holds are slower than one copy after the other

Found = tuple[Tensor, Tree]  # losses (k,) and gradients to lam (k, *shape) of some copies


class FullPasses:
    """Whole forwards of the copies, each of which yields its loss and its lambda-gradient; the K gradients are kept.

    As many copies as make `WHOLE_TOGETHER` numbers are evaluated in one pass, where torch can vectorise the loss and
    that gives what single passes give, which is tried with two copies once a run.

    Args:
        share_randomness, share_meta_inputs: as of `EvoGrad`.
    """

    def __init__(
        self,
        passes: PassContext,
        step: InnerStep,
        noise: Perturbations,
        *,
        share_randomness: bool,
        share_meta_inputs: bool,
    ) -> None:
        self.passes, self.noise, self.share_randomness = passes, noise, share_randomness
        self.w, self.lam, self.batch = tree.detach(step.w), step.lam, step.batch
        at = step.w, step.lam, step.batch
        found = gate.perturbed(passes, *at, self._all, noise.like) if share_meta_inputs else self._all(Inputs.LIVE)
        self.losses = passes.all_reduce_one(torch.cat([losses for losses, _ in found]).double())
        self.gradients = [gradients for _, gradients in found]

    def pull_back(self, coefficients: Tensor) -> Tree:
        """sum_k a_k d_lam l_k; takes the gradients over."""
        total = {}
        weights = {dtype: coefficients.to(dtype) for dtype in {leaf.dtype for leaf in self.gradients[0].values()}}
        for name, leaf in self.lam.items():
            held = [gradients.pop(name) for gradients in self.gradients]
            gradients = held[0] if len(held) == 1 else torch.cat(held)
            flat = gradients.reshape(len(gradients), leaf.numel())
            # in place, which an autocast around the meta step leaves alone
            total[name] = flat.new_empty(leaf.numel()).addmv_(flat.T, weights[flat.dtype], beta=0).view_as(leaf)
        return total

    def _all(self, inputs: Inputs) -> list[Found]:
        size, copies = self._together(), range(self.noise.copies)
        groups = [copies[first : first + size] for first in copies[::size]]
        return [found for group in groups for found in self._evaluated(group, inputs)]

    def _together(self) -> int:
        """How many copies one pass evaluates: of two that do not fit, one."""
        facts, parts = self.passes.problem.facts, self.passes.parts(self.batch)
        on_cpu = next(iter(self.lam.values())).device.type == "cpu"
        limit = WHOLE_TOGETHER_ON_CPU if on_cpu else WHOLE_TOGETHER
        each = tree.size(self.noise.like) + tree.size(self.lam)
        if facts.batched_whole is False or not parts or 2 * each > limit or self.passes.problem.weights.sharded:
            return 1  # a module holds shards of one point
        each += max(self._made(index, part) for index, part in parts)
        return max(1, limit // each)

    def _made(self, index: int, part: Any) -> int:
        """How many numbers a forward makes: by the shapes of the part alone, so that resumed runs group alike."""
        made, shapes = self.passes.problem.facts.made, shapes_of(part)
        if shapes not in made:
            with self.passes.scope(index), torch.no_grad(), Made() as counter:
                self.passes.problem.inner_loss(self.w, tree.detach(self.lam), part)
            made[shapes] = counter.numbers
        return made[shapes]

    def _evaluated(self, copies: range, inputs: Inputs) -> list[Found]:
        facts = self.passes.problem.facts
        if len(copies) > 1 and facts.batched_whole is not False:
            try:
                if facts.batched_whole or self._agree(copies[:2], inputs):
                    return [self._at_once(self.passes, copies, inputs)]
            except Unrecorded:
                raise
            except Exception as error:  # of any kind: what is wrong with the loss itself is raised again below
                say_one_by_one(error)
                facts.batched_whole = False
        return [self._alone(self.passes, k, inputs) for k in copies]

    def _agree(self, copies: range, inputs: Inputs) -> bool:
        """Whether some copies have the same losses and gradients in one pass; noted where there are gradients."""
        facts, passes = self.passes.problem.facts, replace(self.passes, precision="float32", counts=Counts())
        losses, gradients = self._at_once(passes, copies, inputs)
        alone = [self._alone(passes, k, inputs) for k in copies]
        same = agree(losses, torch.cat([loss for loss, _ in alone]))
        for name, found in gradients.items():
            same = same and agree(found, torch.cat([gradient[name] for _, gradient in alone]))
        if not same:
            logger.info("the copies are evaluated one by one: in one pass they give other numbers")
        if not same or tree.norm(gradients):
            facts.batched_whole = same
        return same

    def _alone(self, passes: PassContext, k: int, inputs: Inputs) -> Found:
        stream = 0 if self.share_randomness else k + 1
        loss, _, gradient = passes.inner_grad(
            self.noise.perturbed(self.w, k), self.lam, self.batch, wrt_lam=self.lam, inputs=inputs, stream=stream
        )
        return loss.unsqueeze(0), tree.tree_map(lambda leaf: leaf.unsqueeze(0), gradient)

    def _at_once(self, passes: PassContext, copies: range, inputs: Inputs) -> Found:
        points, size = self.noise.points(self.w, copies), len(copies)
        lam = {name: leaf.detach().expand(size, *leaf.shape).requires_grad_() for name, leaf in self.lam.items()}
        losses, total = list[Tensor](), dict[str, Tensor]()
        for index, part in passes.parts(self.batch):
            with passes.scope(index, inputs=inputs):
                found = self._vectorised(points, lam, part)
                passes.counts.forwards += size
                losses.append(found.detach())
                if not found.requires_grad:
                    continue
                slopes = torch.autograd.grad(found.sum(), list(lam.values()), materialize_grads=True)
                passes.counts.backwards += size
            gradients = dict(zip(lam, slopes, strict=True))
            total = tree.add(gradients, total)
        return torch.stack(losses).sum(0), total or tree.zeros_like(tree.detach(lam))

    def _vectorised(self, points: Tree, lam: Tree, part: Any) -> Tensor:
        """The losses of one part, (k,); copies that do not share random numbers are refused where any are drawn."""

        def loss(w: Tree, lam: Tree) -> Tensor:
            return self.passes.problem.inner_loss({**self.w, **w}, lam, part)

        with plain_detaches():
            return vectorised(loss, points, lam, randomness="same" if self.share_randomness else "error")


class SharedPass:
    """One pass of what no copy perturbs; the copies are evaluations of the suffix, one backward reaches lam.

    As many copies as fit `TOGETHER` are evaluated in one pass. One graph at a time: that of a single part waits for
    the cotangent (with all losses, where one pass made them), those of several are made anew.
    """

    def __init__(self, passes: PassContext, step: InnerStep, noise: Perturbations, cut: Cut) -> None:
        self.passes, self.step, self.noise, self.cut = passes, step, noise, cut
        self.lam, self.w = tree.leaves(step.lam, step.lam), tree.detach(step.w)
        parts = passes.parts(step.batch)
        self.below = [passes.prefix(step.w, index, part) for index, part in parts]
        self.hidden: list[Tensor] = []
        self.graph: Tensor | None = None
        losses = torch.zeros(noise.copies, dtype=torch.float64, device=next(iter(step.lam.values())).device)
        for index, part in parts:
            with passes.scope(index):
                hidden = self._hidden(index, part)
                together = self._together(hidden)
                with torch.set_grad_enabled(len(parts) == len(together) == 1):
                    found = torch.cat([self._losses(copies, hidden, index, part) for copies in together])
            self.graph = found if found.requires_grad else None
            losses += found.detach()
            self.hidden.append(hidden if len(parts) == 1 else hidden.detach())
        self.losses = passes.all_reduce_one(losses)

    def pull_back(self, coefficients: Tensor) -> Tree:
        """Accumulate sum_k a_k d l_k / d hidden, then one backward to lam, a part at a time."""
        total = tree.zeros_like(self.lam)
        for index, part in self.passes.parts(self.step.batch):
            with self.passes.scope(index):
                if self.graph is not None:
                    return self._to_lam(self.graph, coefficients.to(self.graph.dtype))
                leaf = self.hidden[index].detach().requires_grad_()
                cotangent = torch.zeros_like(leaf)
                for copies in self._together(leaf):
                    losses = self._losses(copies, leaf, index, part)
                    weights = coefficients[copies.start : copies.stop].to(losses.dtype)
                    cotangent += torch.autograd.grad(losses, leaf, weights)[0]
                self.passes.reseed(index)
                hidden = self.hidden[index] if len(self.hidden) == 1 else self._hidden(index, part)
                if hidden.requires_grad:
                    total = tree.add(total, self._to_lam(hidden, cotangent))
        return total

    def _to_lam(self, output: Tensor, cotangent: Tensor) -> Tree:
        self.passes.counts.backwards += 1
        found = torch.autograd.grad(
            output, list(self.lam.values()), cotangent, allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.lam, found, strict=True))

    def _hidden(self, index: int, part: Any) -> Tensor:
        below = self.below[index]
        if below is None:
            self.passes.counts.forwards += 1
        else:
            self.passes.counts.suffixes += 1
        return self.cut.hidden(self.w, self.lam, below, part)

    def _together(self, hidden: Tensor) -> list[range]:
        """The copies that are evaluated in one pass, each for as large as its weights and the hidden states."""
        batched, each = self.passes.problem.facts.batched, hidden.numel() + tree.size(self.noise.like)
        size = max(1, TOGETHER // max(1, each)) if batched is not False else 1
        copies = range(self.noise.copies)
        return [copies[first : first + size] for first in range(0, len(copies), size)]

    def _losses(self, copies: range, hidden: Tensor, index: int, part: Any) -> Tensor:
        """The losses of some copies, (copies,)."""
        self.passes.counts.suffixes += len(copies)
        return at_once(
            lambda leaves, hidden: self.cut.loss({**self.w, **leaves}, hidden, part),
            self.noise.points(self.w, copies),
            hidden,
            partial(self.passes.reseed, index),
            self.passes.problem.facts,
        )
