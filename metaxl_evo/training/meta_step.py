"""The meta level's part of one optimizer step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from accelerate.utils import gather, pad_across_processes
from torch import Tensor

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, StepMade
from metaxl_evo.bilevel.update import SGD, UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState, map_trees
from metaxl_evo.estimators import Estimator
from metaxl_evo.models.parameters import places_of, swapped
from metaxl_evo.training.base_optimizer import BaseOptimizer, gathered
from metaxl_evo.training.meta_level import MetaLevel
from metaxl_evo.training.meta_rows import Window


class MetaStep:
    """What the meta level does around one optimizer step; made before its first forward, and dropped behind it.

    Args:
        level: whose step it is.
        base: the optimiser that will make the base step.
        window: the batches of the step.
        number: of the base step, from 0.

    Attributes:
        micro_batch: the number, from 0, of the one whose forward is running.
        grad_norm: of the base gradients before clipping; None until they are clipped.
    """

    def __init__(self, level: MetaLevel, base: BaseOptimizer, window: Window, number: int):
        self.level, self.base, self.window, self.number = level, base, window, number
        self.micro_batch = 0
        self.grad_norm: Tensor | float | None = None
        self._rows: tree.Tree | None = None
        self._recorded: PassContext | None = None  # where the base step's own forward serves the meta passes
        self._lam: tree.Tree | None = None  # stands in lam's place, where the base step's own backward is to reach it
        self._before: InnerStep | None = None  # the step, as far as it is kept until it is made
        self._stepped: dict[str, Tensor | None] = {}  # gradients of embeddings that were stepped ahead of the rest

    def begin(self) -> None:
        """Before the base step: begin an episode where one is due, look ahead where the order says so."""
        level = self.level
        level.episodes.begin_step(self.number, level.model, self.base.torch_optimizer, self._problem)
        if not level.losses_are_known:
            at = self.weights(), level.model.meta_parameters(), self.window.train
            level.look_at_losses(level.passes(level.problem(SGD(0.0), self.touched_rows()), self.number), *at)
        if level.args.meta_order == "lookahead" and self._is_answered():
            self._look_ahead()
        if self._is_followed() and level.forward_obstacle is None:
            self._recorded = level.passes(level.problem(SGD(0.0)), self.number)
            if level.estimator.needs_lam_grad:
                lam = level.model.meta_parameters()
                self._lam = tree.leaves(lam, lam)

    def recording(self) -> AbstractContextManager[None]:
        """Around the base step's forward of a micro-batch: what the meta passes can take over of it is kept."""
        return nullcontext() if self._recorded is None else self._recorded.recording(self.micro_batch)

    def reaching_lam(self) -> AbstractContextManager[None]:
        """Around the forward and backward of a micro-batch: what the latter leaves at lam is collected.

        In leaves that stand in for the meta parameters, whose own `.grad` nobody writes, and which neither DDP nor the
        base optimiser knows.
        """
        return nullcontext() if self._lam is None else swapped(places_of(self.level.model.meta), self._lam)

    def before_update(self) -> None:
        """Behind the backward: keep the weights, and the optimiser's state, that are needed from before the step."""
        level = self.level
        if not self._is_followed():
            return
        state = None
        if level.estimator.needs_state_before or level.model.tuned_optimizer or self.base.reads_who_was_new():
            state = map_trees(tree.clone, self._update_rule(level.estimator)[1])
        w = self.weights()
        if any(one.evaluated_at == "previous" for one in level.estimators_at(self.number)):
            self._stepped = self.base.step_embeddings(self.touched_rows())
            w |= tree.clone({name: leaf for name, leaf in w.items() if name not in self.touched_rows()})
        self._before = self._inner_step(w, state)

    def after_update(self) -> None:
        """Behind the base step: observe it, and take its hypergradient where one is due."""
        if self._before is not None:
            self._follow(self._before)
        self.level.episodes.move_start(self.number, self.level.model, self._outer_gradient)

    def touched_rows(self) -> tree.Tree:
        """The embedding rows that the window reads, on any process; none where whole weights outlive the step.

        Its first call gathers them from all processes.
        """
        if self._rows is None:
            self._rows = {}
            if self.level.estimator.remembers in ("nothing", "meta"):
                touched = self.level.model.touched_rows([*self.window.train, *self.window.meta])
                alone = self.level.args.world_size == 1
                self._rows = {name: rows if alone else _on_all_processes(rows) for name, rows in touched.items()}
        return self._rows

    def weights(self) -> tree.Tree:
        """The base weights now, of the embeddings the touched rows."""
        return gathered(self.level.model.base_parameters(), self.touched_rows())

    def _is_answered(self) -> bool:
        """Whether there is a meta step with this base step; at a learning rate of zero only an episode's end has."""
        level = self.level
        if not level.episodes.answers(self.number):
            return False
        return not level.estimator.online or bool(level.model.tuned_optimizer) or not self.base.stands_still()

    def _is_followed(self) -> bool:
        """Whether something is to be done once this base step is made."""
        level = self.level
        return level.episodes.remembers or (level.args.meta_order == "after_step" and self._is_answered())

    def _follow(self, before: InnerStep) -> None:
        level = self.level
        rule, made = self._made()
        recorded = self._recorded
        self._before = self._recorded = None
        step = replace(before, w=made.w) if level.estimator.evaluated_at == "current" else before
        if level.estimator.needs_update_rule:
            step = replace(step, made=made)
        problem = level.problem(rule, self.touched_rows())
        passes = level.passes(problem, self.number) if recorded is None else replace(recorded, problem=problem)
        level.episodes.observe(passes, step)
        if level.args.meta_order == "after_step" and self._is_answered():
            level.move(passes, step, replace(before, made=made), self.number)
        level.episodes.end_step(self.number, passes, step)

    def _look_ahead(self) -> None:
        level = self.level
        rule, state = self._update_rule(level.estimators_at(self.number)[-1])
        step = self._inner_step(self.weights(), state)
        level.move(level.passes(level.problem(rule, self.touched_rows()), self.number), step, step, self.number)

    def _outer_gradient(self) -> tree.Tree:
        """Of the outer loss with respect to the weights now, whole, at the meta parameters now."""
        level, w = self.level, gathered(self.level.model.base_parameters(), None)
        passes = level.passes(level.problem(SGD(0.0)), self.number)
        _, found, _, _ = passes.outer_grad(w, level.model.meta_parameters(), self.window.meta, wrt_w=w, wrt_lam=())
        return passes.all_reduce(found)

    def _made(self) -> tuple[UpdateRule, StepMade]:
        """The rule of the step that was made, and the step; nobody else holds its gradient, so it can be freed."""
        estimator = self.level.estimators_at(self.number)[-1]
        rule, state = self._update_rule(estimator, made=True)
        now, wanted = self.weights(), estimator.needs_update_rule
        norm = float(self.grad_norm) if wanted and self.grad_norm is not None else None
        taken = self.base.take_gradients(self.touched_rows(), self._stepped, norm or 0.0, wanted=wanted)
        self._stepped = {}
        return rule, StepMade(now, taken, state, self._lam_grad(), norm)

    def _lam_grad(self) -> tree.Tree | None:
        """This process's share of what the step's backward left at lam; None where its forward is of no use."""
        lam, self._lam = self._lam, None
        if lam is None or self._recorded is None or not self._recorded.has_recorded(self.window.train):
            return None
        left = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in lam.items()}
        return tree.scale(tree.dense(left), 1 / self.level.args.world_size)  # the loss was multiplied by it, for DDP

    def _update_rule(self, estimator: Estimator, *, made: bool = False) -> tuple[UpdateRule, UpdateState]:
        return self.base.update_rule(estimator, self.base.steps_before(self.number) + made, self.touched_rows())

    def _problem(self) -> BilevelProblem:
        """On whole weights, as an episode begins with them."""
        rule, _ = self.base.update_rule(self.level.estimator, self.base.steps_before(self.number))
        return self.level.problem(rule)

    def _inner_step(self, w: tree.Tree, state: UpdateState | None) -> InnerStep:
        lam = self.level.model.meta_parameters()
        return InnerStep(w, lam, self.window.train, state, None, self.window.meta)


def _on_all_processes(rows: Tensor) -> Tensor:
    """The sorted row numbers that any process has; they are padded to one length by row 0, which all have."""
    return gather(pad_across_processes(rows, pad_index=0)).unique()
