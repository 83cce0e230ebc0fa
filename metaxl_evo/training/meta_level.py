"""The second level of a MetaTrainer: who estimates the hypergradient, when, and what it moves."""

from __future__ import annotations

import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import get_scheduler

from metaxl_evo.bilevel import gate, tree
from metaxl_evo.bilevel.hypergradients import Hypergradient, estimate, look_at, why_zero
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.precision import computes_in_float32
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.bilevel.randomness import devices_of, mix_seed
from metaxl_evo.bilevel.replay import Facts
from metaxl_evo.bilevel.update import SGD, UpdateRule
from metaxl_evo.estimators import Estimator
from metaxl_evo.estimators.local import EngineEstimator
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.models.remembered import remembered
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.base_optimizer import BaseOptimizer
from metaxl_evo.training.diagnostics import Diagnostics
from metaxl_evo.training.episodes import Episodes
from metaxl_evo.training.history import logged_lam
from metaxl_evo.training.optimizers import with_rates
from metaxl_evo.training.tuned import keep_in_range
from metaxl_evo.training.values import mapping_of

logger = logging.getLogger(__name__)

_SILENCE = 10  # hypergradients of exactly zero at the start of a run: more than batches that do not read lam


class MetaLevel:
    """The meta level of one training.

    Args:
        model: the task.
        args: both levels' arguments.
        estimator: of the hypergradient.
        act: is given each finite hypergradient, to `apply` it.

    Attributes:
        optimizer, scheduler: of the meta parameters, from `make_optimizer` and `make_scheduler` on.
        learning_rate: of the last meta step.
        facts: what was found out about the losses.
        losses_are_known: whether they were looked at in this training.
        skipped: meta steps that were not made because the hypergradient was not finite.
    """

    def __init__(
        self,
        model: BilevelModule,
        args: MetaTrainingArguments,
        estimator: Estimator,
        act: Callable[[Hypergradient], None],
    ):
        self.model, self.args, self._act = model, args, act
        self.estimator, self.episodes = estimator, Episodes(estimator, args)
        every = args.meta_diagnostics_every
        if every and model.first_weights() is not None:
            logger.warning("a learned start has no one-step hypergradient: meta_diagnostics_every compares nothing")
            every = 0
        self.diagnostics = Diagnostics(estimator, every) if every else None
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self.learning_rate: Any = args.meta_learning_rate
        self.skipped, self._skipped_in_a_row = 0, 0
        self._silent: int | None = 0  # meta steps since the start that were all exactly zero; None after another
        self.facts, self.losses_are_known = Facts(), False
        self._start = tree.clone(model.meta_parameters())  # of the run, also after resume
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def use(self, estimator: Estimator, args: MetaTrainingArguments, base: BaseOptimizer) -> None:
        """Go on with another estimator and its arguments from the next step on; lam and its optimiser stay.

        So do the diagnostics, and what is known of the losses: the estimator is not asked to `prepare`.

        Raises:
            ValueError: where it cannot serve the task, the base optimiser or the arguments.
        """
        rule, _ = base.update_rule(estimator, 0)
        estimator.check(self.problem(rule), self.model.base_parameters(), self.model.meta_parameters())
        self.estimator, self.args = estimator, args
        self._refuse_out_of_reach()
        self.forget()

    def forget(self) -> None:
        """Drop what the estimator remembers; with the next step an episode begins."""
        self.episodes = Episodes(self.estimator, self.args)

    # ---- the optimiser of the meta parameters

    def make_optimizer(self, base: BaseOptimizer) -> None:
        """The meta optimiser, beside the base optimiser that was made.

        Raises:
            ValueError: where the estimator, or the diagnostics, cannot work with the base optimiser or step.
        """
        lam = self.model.meta_parameters()
        self._refuse_out_of_reach()
        if isinstance(self.estimator, EngineEstimator) and self.estimator.engine == "auto":
            self._say_what_auto_is()
        if self.estimator.needs_update_rule:
            problem = self.problem(base.update_rule(self.estimator, 0)[0])
            self.estimator.check(problem, self.model.base_parameters(), lam)
        elif self.diagnostics is not None:
            try:
                base.update_rule(self.diagnostics.exact, 0)
            except ValueError as error:
                raise ValueError(f"{error}, or leave meta_diagnostics_every at 0") from None
        rates = mapping_of("meta_learning_rates", self.args.meta_learning_rates)
        self.optimizer = self.args.make_meta_optimizer(with_rates(lam, rates))

    def make_scheduler(self, base_steps: int) -> None:
        """The schedule of the meta learning rate, in base steps."""
        warmup = self.args.meta_warmup_steps
        self.scheduler = get_scheduler(
            self.args.meta_lr_scheduler_type,
            optimizer=self._optimizer,
            num_warmup_steps=int(warmup if warmup >= 1 else math.ceil(warmup * base_steps)),
            num_training_steps=base_steps,
        )

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise RuntimeError("the meta optimiser is made with the base optimiser (create_optimizer)")
        return self.optimizer

    def _say_what_auto_is(self) -> None:
        if not self.problem(SGD(0.0)).second_order:
            reason = self.model.second_order_obstacle or "torch_compile"
            logger.warning("engine auto takes finite differences here (%s)", reason)

    # ---- a base step

    @property
    def forward_obstacle(self) -> str | None:
        """Why the base step's own forward does not compute what the meta passes would; None where it does."""
        args = self.args
        alike = args.meta_precision == "tf32" or (
            args.meta_precision == "float32" and computes_in_float32(args.device.type)
        )
        if self.model.has_dropout:
            return "draws dropout masks of its own (set the base's rates to 0)"
        if AcceleratorState().mixed_precision != "no" or not alike:
            return "computes in another precision than the meta passes (leave bf16 and meta_precision out)"
        if args.torch_compile:
            return "is compiled (leave torch_compile out)"
        if self.estimator.evaluated_at != "previous":
            return "is at other weights"
        return None

    def _refuse_out_of_reach(self) -> None:
        """Refuse an estimator that needs the base step to be what the meta passes compute, where it is not."""
        if self.estimator.repeats_steps and self.forward_obstacle is not None:
            raise ValueError(
                f"recompute: true makes base steps again, and the base step {self.forward_obstacle}: or leave "
                "recompute out, which keeps the weights of all steps"
            )
        if not self.estimator.needs_lam_grad or self.args.meta_order != "after_step":
            return
        if self.forward_obstacle is not None:
            raise ValueError(
                "differences: one_sided takes half of each difference from the base step's own backward, and that "
                f"step {self.forward_obstacle}: or set meta_order: lookahead, or leave differences at central"
            )

    def end_step(self) -> None:
        """Behind a base step: the meta learning rate of the next one."""
        if self.scheduler is not None:
            self.learning_rate = self.scheduler.get_last_lr()[0]  # of this step, for the log
            with warnings.catch_warnings():
                # torch warns where the first meta steps are skipped, at a zero learning rate
                warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
                self.scheduler.step()

    def estimators_at(self, number: int) -> list[Estimator]:
        """Those that a base step serves; the last of them needs the update rule if any does."""
        diagnostics = self._diagnostics_at(number)
        return [self.estimator] if diagnostics is None else [self.estimator, diagnostics.exact]

    def look_at_losses(self, passes: PassContext, w: tree.Tree, lam: tree.Tree, batches: list[Batch]) -> None:
        """At the first step of a training: find out about the losses what the estimator has to know.

        Raises:
            ValueError: for losses that it cannot serve.
        """
        self.losses_are_known = True
        gate.evaluate(passes, w, lam, batches)
        self.estimator.prepare(passes, w, lam, batches)

    def problem(self, rule: UpdateRule, rows: tree.Tree | None = None) -> BilevelProblem:
        """The task under an update rule, as this run has it; of some embeddings the given rows."""
        return problem_of(self.model, self.args, rule, rows, self.facts)

    def passes(self, problem: BilevelProblem, number: int) -> PassContext:
        """Passes over its losses, with the randomness of base step `number`."""
        devices = devices_of(self.model.base_parameters(), self.model.meta_parameters())
        seed, precision = step_seed(self.args, number), self.args.meta_precision
        return PassContext(problem, seed=seed, devices=devices, precision=precision)

    # ---- a meta step

    def move(self, passes: PassContext, step: InnerStep, from_start: InnerStep, number: int) -> None:
        """Estimate at `step`, and have lam moved; `from_start` is the same step as the exact estimator has to see it.

        Raises:
            ValueError: where all hypergradients of a run so far were exactly zero.
            FloatingPointError: where too many in a row were not finite.
        """
        diagnostics = self._diagnostics_at(number)
        exact = None if diagnostics is None else diagnostics.take_exact(passes, from_start)
        result = estimate(passes, self.estimator, step, self.episodes.state)
        norm, loss = _norm_and_loss(result)
        if diagnostics is not None and exact is not None:
            diagnostics.compare(result, exact, was_zero=self._silent is not None)
        if self._silent is not None:
            self._watch_silence(self._silent, norm, passes, step, number)
        if math.isfinite(norm) and math.isfinite(loss):
            self._skipped_in_a_row = 0
            self._act(result)
        else:
            self._skip(result, number)

    def apply(self, result: Hypergradient, number: int) -> None:
        """Move lam by a hypergradient at base step `number`, clipped and kept in its range."""
        diagnostics = self._diagnostics_at(number)
        (norm, loss), limit = _norm_and_loss(result), self.args.meta_max_grad_norm
        factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        lam = self.model.meta_parameters()
        clipped = tree.scale({name: result.grads[name].to(parameter.dtype) for name, parameter in lam.items()}, factor)
        for name, parameter in lam.items():
            parameter.grad = clipped[name]
        with nullcontext() if diagnostics is None else diagnostics.watching(self._optimizer, lam):
            self._optimizer.step()
        keep_in_range(self.model)
        for parameter in lam.values():
            parameter.grad = None
        found = {"meta_loss": loss, "meta_grad_norm": norm, **result.diagnostics}
        for key, value in found.items():
            self._metrics[key if key.startswith("meta_") else f"meta_{key}"].append(value)

    def _diagnostics_at(self, number: int) -> Diagnostics | None:
        """The diagnostics, where they look at the meta step that this base step may have."""
        return self.diagnostics if self.diagnostics is not None and self.diagnostics.is_due(number) else None

    def _watch_silence(self, silent: int, norm: float, passes: PassContext, step: InnerStep, number: int) -> None:
        """Warn where the first hypergradient is exactly zero; end the run where the first ten are.

        One alone may be right: a batch need not read lam.
        """
        if norm != 0:
            self._silent = None
            return
        self._silent = silent + 1
        if self._silent == 1:
            logger.warning("step %d: %s", number, _why_zero(passes, step))
        if self._silent >= _SILENCE:
            raise ValueError(f"all of the first {_SILENCE} meta steps: {_why_zero(passes, step)}")

    def _skip(self, result: Hypergradient, number: int) -> None:
        """Count a non-finite hypergradient; stop the run after too many in a row."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        logger.warning("step %d: the hypergradient is not finite, no meta update", number)
        if self._skipped_in_a_row >= self.args.max_skipped_meta_steps:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} hypergradients in a row were not finite (outer loss "
                f"{float(result.outer_loss):.3g}): "
                "lower learning_rate or meta_learning_rate, set meta_max_grad_norm, or raise max_skipped_meta_steps"
            )

    # ---- logs and checkpoints

    def logs(self) -> dict[str, Any]:
        """The means since the last time, the learning rate, and lam; the next means start anew."""
        means = {key: sum(values) / len(values) for key, values in self._metrics.items()}
        self._metrics.clear()
        lam = logged_lam(self.model.meta_parameters(), self._start)
        skipped = {"skipped_meta_steps": self.skipped} if self.skipped else {}
        return {**means, "meta_learning_rate": self.learning_rate, **lam, **skipped}

    def state_dict(self) -> dict[str, Any]:
        """What resume needs, but for each process's share of the episode (`episodes.share`)."""
        states = {name: holder.state_dict() for name, holder in self._stateful().items()}
        return {**states, "skipped": [self.skipped, self._skipped_in_a_row], "start": self._start}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name, holder in self._stateful().items():
            holder.load_state_dict(saved[name])
        self.skipped, self._skipped_in_a_row = saved["skipped"]
        self._silent = None  # the start is behind it
        start = saved.get("start", {})  # checkpoints of earlier versions have none
        self._start |= {name: leaf.to(self.args.device) for name, leaf in start.items()}

    def _stateful(self) -> dict[str, Any]:
        held = {"optimizer": self.optimizer, "scheduler": self.scheduler, "episodes": self.episodes}
        return {name: holder for name, holder in held.items() if holder is not None}


def problem_of(
    model: BilevelModule, args: MetaTrainingArguments, rule: UpdateRule, rows: tree.Tree | None, facts: Facts
) -> BilevelProblem:
    """A task under an update rule, as a run with these arguments has it."""
    problem = model.problem(rule, dropout=args.meta_dropout, rows=rows)
    processes = Processes(args.process_index, args.world_size)
    second_order = problem.second_order and not args.torch_compile
    examples = model.examples(processes)
    return replace(problem, second_order=second_order, processes=processes, examples=examples, facts=facts)


def step_seed(args: MetaTrainingArguments, number: int) -> int:
    """Of a meta step's randomness: it depends on the seed and the number of the step alone."""
    return mix_seed(meta_seed(args), 1, number)


def meta_seed(args: MetaTrainingArguments) -> int:
    """The seed of the meta level."""
    return args.seed if args.meta_seed is None else args.meta_seed


def _norm_and_loss(result: Hypergradient) -> tuple[float, float]:
    return remembered("norm and loss", lambda: look_at(result), *result.grads.values(), result.outer_loss)


def _why_zero(passes: PassContext, step: InnerStep) -> str:
    """As `why_zero`, in the words of a task, which has no first weights to learn."""
    text = why_zero(passes, step).replace(", nor are first weights computed from what requires a gradient", "")
    return (
        text.replace("lam", "the meta parameters")
        .replace("inner loss", "inner_loss")
        .replace("outer loss", "outer_loss")
    )
