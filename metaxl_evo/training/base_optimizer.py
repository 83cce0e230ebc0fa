"""The base optimiser as the meta level sees it: the rule of its steps with its state, and the gradients of a step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.torch_optimizers import from_optimizer, optimizer_rule
from metaxl_evo.bilevel.update import SGD, UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState, map_trees
from metaxl_evo.estimators import Estimator, takes_any_optimizer
from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.tuned import tuned_rule


class BaseOptimizer:
    """The optimiser of the base parameters of a task.

    Args:
        optimizer: torch's, or accelerate's wrapper of it.
        model: the task.
        args: with the clipping, and the episodes after which the optimiser's state is fresh.
    """

    def __init__(self, optimizer: Any, model: BilevelModule, args: MetaTrainingArguments):
        self.torch_optimizer = unwrapped(optimizer)
        self._model, self._args = model, args

    def steps_before(self, number: int) -> int:
        """How many steps were made since its state was fresh, when base step `number` (from 0) is to come."""
        length = self._args.episode_length
        return number if length is None or self._args.episode_reset == "continue" else number % length

    def stands_still(self) -> bool:
        """Whether all learning rates are zero."""
        return all(group["lr"] == 0 for group in self.torch_optimizer.param_groups)

    def reads_who_was_new(self) -> bool:
        """Whether a step depends on which parameters had no state before it, as with dampening."""
        return any(group.get("dampening") for group in self.torch_optimizer.param_groups)

    def update_rule(
        self, estimator: Estimator, steps: int, rows: tree.Tree | None = None
    ) -> tuple[UpdateRule, UpdateState]:
        """The inner update as it is made now, after so many steps; a placeholder where the estimator does without.

        Args:
            rows: of some embeddings the rows that the state is restricted to.

        Raises:
            ValueError: for an optimiser that cannot be modelled, with the estimators that take any.
        """
        if not estimator.needs_update_rule:
            return SGD(0.0), {"step": 0, "momentum_buffer": {}}
        try:
            optimizer_rule(self.torch_optimizer)
        except ValueError as reason:
            others = ", ".join(takes_any_optimizer())
            raise ValueError(f"{reason}, or an estimator that takes any optimizer: {others}") from None
        names = {parameter: name for name, parameter in self._model.base_parameters().items()}
        limit = self._args.max_grad_norm or None
        rule, state = from_optimizer(self.torch_optimizer, names, max_grad_norm=limit, steps=steps)
        rule = replace(rule, max_grad_value=self._args.max_grad_value)
        return tuned_rule(rule, self._model), map_trees(lambda held: gathered(held, rows), state)

    def step_embeddings(self, rows: tree.Tree) -> dict[str, Tensor | None]:
        """Step the embeddings alone, if that makes no difference; returns the touched rows of their gradients.

        They are most of the gradient and empty but for these rows: what is kept of the weights goes into their place,
        so that a meta step needs no more memory than the base step. Others than torch's own optimisers may count their
        steps, and hooks would see two: there the gradient waits, whole, until the step is made.
        """
        if not rows or not may_step_in_two(self.torch_optimizer):
            return {}
        parameters = self._model.base_parameters()
        waiting = {name: p.grad for name, p in parameters.items() if name not in rows}
        for name in waiting:
            parameters[name].grad = None
        self.torch_optimizer.step()
        taken = {}
        for name, numbers in rows.items():
            gradient, parameters[name].grad = parameters[name].grad, None
            taken[name] = None if gradient is None else gradient[numbers]
            del gradient
        for name, gradient in waiting.items():
            parameters[name].grad = gradient
        return taken

    def take_gradients(
        self, rows: tree.Tree, stepped: dict[str, Tensor | None], norm: float, *, wanted: bool
    ) -> tree.Tree:
        """The base gradients as they were before clipping, where there are any; `.grad` is empty afterwards.

        An entry that `max_grad_value` has bounded is somewhere beyond the bound: the step, which bounds it again, and
        its derivative are the same wherever. Nothing is made of them, and none returned, where they are not `wanted`.

        Args:
            rows: of some embeddings the rows that are wanted.
            stepped: what `step_embeddings` returned.
            norm: of all gradients together, before clipping.
        """
        limit = self._args.max_grad_norm or math.inf
        clipped, taken = norm + 1e-6 > limit, {}
        for name, parameter in self._model.base_parameters().items():
            gradient, parameter.grad = parameter.grad, None
            if not wanted:
                continue
            if name in rows:
                gradient = stepped.pop(name, None) if gradient is None else gradient[rows[name]]
            if gradient is not None:  # without one the optimiser has passed the parameter over
                taken[name] = gradient
        if clipped and taken:
            torch._foreach_mul_(list(taken.values()), (norm + 1e-6) / limit)
        bound = self._args.max_grad_value
        if bound is not None:
            for gradient in taken.values():
                gradient.mul_(1 + (gradient.abs() >= bound * (1 - 1e-6)))
        return taken


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser behind accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def gathered(leaves: tree.Tree, rows: tree.Tree | None) -> tree.Tree:
    """The leaves outside any graph, of some only the given rows; the others share their storage."""
    rows = rows or {}
    return {name: leaf.detach()[rows[name]] if name in rows else leaf.detach() for name, leaf in leaves.items()}


def may_step_in_two(optimizer: torch.optim.Optimizer) -> bool:
    """Whether two calls of `step`, each on the gradients of some parameters, are one call on all, for all who look."""
    hooks = (
        *(optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks),
        *(torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks),
    )
    return type(optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) and not any(hooks)
