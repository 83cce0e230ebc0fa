"""A short training for a check: a few steps at the full learning rates, and what was seen of them."""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators import Estimator
from metaxl_evo.messages import first_line
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer

logger = logging.getLogger(__name__)

CYCLE = 3  # meta steps, of which the last is diagnosed, the others are timed (but for the very first)
CYCLES = 3  # and one only of an estimator that answers once an episode

Build = Callable[[MetaTrainingArguments], MetaTrainer]


class FewSteps(TrainerCallback):
    """A short training, and what was seen of it.

    Attributes:
        trainer: after its training.
        start: both levels' parameters before.
        failure: what stopped it early, in one line.
        meta_steps: how many hypergradients moved the meta parameters.
        reached: the meta parameters of which some hypergradient was not zero.
        lengths, farthest: of each meta step, its norm, and how far it moved an entry at most.
    """

    def __init__(self, build: Build, args: MetaTrainingArguments):
        set_seed(args.seed)
        self.trainer = build(args)
        self.trainer.add_callback(self)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.stoppable = False  # there is nothing to keep
        model = self.trainer.model
        self.start = tree.clone(model.base_parameters()), tree.clone(model.meta_parameters())
        self.failure: str | None = None
        self.meta_steps, self.reached = 0, set[str]()
        self.lengths, self.farthest = list[float](), list[float]()
        self._lam: Tree = {}
        self._logs: list[dict[str, float]] = []
        self._seconds: list[float] = []
        self._begun = 0.0
        try:
            self.trainer.train()
        except ValueError:
            raise  # a refusal, which says it better
        except Exception as error:
            logger.warning("a step fails", exc_info=True)
            self.failure = f"{type(error).__name__}: {first_line(error)}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.meta_optimizer is not None:
            self.trainer.meta_optimizer.register_step_pre_hook(self._note_hypergradient)
            self.trainer.meta_optimizer.register_step_post_hook(self._note_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds.append(time.perf_counter() - self._begun)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._logs.append(dict(logs))

    def _note_hypergradient(self, *hooked: Any) -> None:
        self.meta_steps += 1
        parameters = self.trainer.model.meta_parameters()
        self.reached |= {name for name, p in parameters.items() if p.grad is not None and bool(p.grad.any())}
        self._lam = tree.clone(parameters)

    def _note_step(self, *hooked: Any) -> None:
        moved = tree.add(tree.detach(self.trainer.model.meta_parameters()), self._lam, -1.0)
        self.lengths.append(tree.norm(moved))
        self.farthest.append(largest(moved))

    @property
    def period(self) -> int:
        """Base steps from one meta step to the next."""
        return _period(self.trainer.args, self.trainer.estimator)

    def series(self, key: str) -> list[float]:
        """What was logged under a name."""
        return [logs[key] for logs in self._logs if key in logs]

    @property
    def names(self) -> list[str]:
        """What was logged of the meta steps."""
        return sorted({key for logs in self._logs for key in logs if key.startswith("meta_")})

    @property
    def seconds_per_step(self) -> float:
        """The median over the periods of their mean step, without the first one and those that are diagnosed."""
        level, last = self.trainer.meta_level, len(self._seconds)
        estimator, diagnostics = (None, None) if level is None else (level.estimator, level.diagnostics)
        ends = range(last - (_cycles(estimator) * CYCLE - 2) * self.period, last + 1, self.period)
        timed = [end for end in ends if diagnostics is None or not diagnostics.is_due(end - 1)]
        return statistics.median(statistics.fmean(self._seconds[end - self.period : end]) for end in timed)


def _period(args: MetaTrainingArguments, estimator: Estimator | None) -> int:
    if estimator is None or args.episode_length is None or estimator.online:
        return args.meta_every
    return args.episode_length


def _cycles(estimator: Estimator | None) -> int:
    return CYCLES if estimator is None or estimator.online else 1


def scratch_arguments(args: MetaTrainingArguments, folder: str, *, estimator: bool = True) -> MetaTrainingArguments:
    """The user's arguments for a few steps at the full learning rates, without files, evaluation or uploads."""
    args = copy.copy(args)
    if not estimator:
        args.estimator, args.estimator_kwargs = NO_ESTIMATOR, None
    args.output_dir, args.push_to_hub, args.report_to = folder, False, []
    args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    args.save_strategy, args.resume_from_checkpoint = SaveStrategy.NO, None
    args.logging_steps, args.logging_strategy = 1, IntervalStrategy.STEPS
    args.lr_scheduler_type = args.meta_lr_scheduler_type = SchedulerType.CONSTANT  # which has no warm-up either
    args.lr_milestones, args.meta_history = None, False
    args.disable_tqdm = True
    used = args.make_estimator()
    period = _period(args, used)
    args.meta_diagnostics_every = CYCLE * period
    args.max_steps = CYCLE * period * _cycles(used)
    if used is not None and used.online and used.remembers == "trajectory":
        # The first episode may be one in which lam stands still.
        args.max_steps += math.ceil((args.episode_length or 0) / period) * period
    args.max_skipped_meta_steps = args.max_steps + 1
    return args


def largest(held: Tree) -> float:
    """The largest absolute value of an entry."""
    return max(float(leaf.detach().abs().max()) for leaf in held.values() if leaf.numel())
