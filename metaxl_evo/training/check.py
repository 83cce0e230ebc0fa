"""`--check` of any task: a few steps of the real configuration in a scratch folder, and findings instead of a run."""

from __future__ import annotations

import copy
import logging
import math
import statistics
import tempfile
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
LITTLE = 0.01  # a meta network that moves less than this over a run stays, for all that a score can tell, at its start
AGREEMENT = 0.99  # the least cosine to the exact one-step hypergradient of an estimator that calls itself that
KNOWN = ("meta_loss", "meta_learning_rate")  # logged whether a step is diagnosed or not

Build = Callable[[MetaTrainingArguments], MetaTrainer]
Findings = dict[str, Any]


def check_training(build: Build, args: MetaTrainingArguments) -> tuple[Findings, MetaTrainer]:
    """Run a few steps at the full learning rates; returns the findings, and the trainer that made the steps.

    The findings' `problems` and `warnings` are lists of lines; the verdict is OK where there are no problems. What the
    trainer logs of its meta steps, diagnosed by turns, is among the findings under the same names.

    Args:
        build: makes a trainer; it is given `args` but for what a check leaves out.

    Raises:
        ValueError: for what a run would refuse as well.
    """
    found: Findings = {"problems": [], "warnings": []}
    with tempfile.TemporaryDirectory() as scratch:
        settings = _scratch_arguments(args, scratch)
        try:
            run = _FewSteps(build, settings)
        except ValueError as reason:  # diagnostics may ask for more than the estimator does
            settings.meta_diagnostics_every = 0
            run = _FewSteps(build, settings)
            found["exact_hypergradient"] = f"not possible here ({reason})"
        found |= _facts(run.trainer, args)
        if run.failure is not None:
            found["problems"].append(f"a step fails: {run.failure}")
            return found, run.trainer
        _judge_losses(run, found)
        _judge_movement(run, found)
        if run.trainer.estimator is not None:
            _judge_hypergradients(run, run.trainer.estimator, found)
        found["seconds_per_step"] = run.seconds_per_step
        if run.trainer.estimator is not None:
            settings = _scratch_arguments(args, scratch, estimator=False)
            found["times_the_plain_step"] = run.seconds_per_step / _FewSteps(build, settings).seconds_per_step
    return found, run.trainer


def report(found: Findings) -> str:
    """The findings line by line; the last is the verdict, OK or a problem."""
    lines = [f"{key}: {_readable(value)}" for key, value in found.items() if key not in ("problems", "warnings")]
    lines += [f"WARNING: {warning}" for warning in found["warnings"]]
    return "\n".join([*lines, *([f"PROBLEM: {problem}" for problem in found["problems"]] or ["OK"])])


class _FewSteps(TrainerCallback):
    """A short training, and what was seen of it.

    Attributes:
        trainer: after its training.
        start: both levels' parameters before.
        failure: what stopped it early, in one line.
        meta_steps: how many hypergradients moved the meta parameters.
        reached: the meta parameters of which some hypergradient was not zero.
    """

    def __init__(self, build: Build, args: MetaTrainingArguments):
        set_seed(args.seed)
        self.trainer = build(args)
        self.trainer.add_callback(self)
        self.trainer.remove_callback(PrinterCallback)
        model = self.trainer.model
        self.start = tree.clone(model.base_parameters()), tree.clone(model.meta_parameters())
        self.failure: str | None = None
        self.meta_steps, self.reached = 0, set[str]()
        self._logs: list[dict[str, float]] = []
        self._seconds: list[float] = []
        self._begun = 0.0
        try:
            self.trainer.train()
        except RuntimeError as error:
            logger.warning("a step fails", exc_info=True)
            self.failure = f"{type(error).__name__}: {first_line(error)}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.meta_optimizer is not None:
            self.trainer.meta_optimizer.register_step_pre_hook(self._note_hypergradient)

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
        estimator, diagnostics, last = self.trainer.estimator, self.trainer.diagnostics, len(self._seconds)
        ends = range(last - (_cycles(estimator) * CYCLE - 2) * self.period, last + 1, self.period)
        timed = [end for end in ends if diagnostics is None or not diagnostics.is_due(end - 1)]
        return statistics.median(statistics.fmean(self._seconds[end - self.period : end]) for end in timed)


def _period(args: MetaTrainingArguments, estimator: Estimator | None) -> int:
    if estimator is None or args.episode_length is None or estimator.online:
        return args.meta_every
    return args.episode_length


def _cycles(estimator: Estimator | None) -> int:
    return CYCLES if estimator is None or estimator.online else 1


def _scratch_arguments(args: MetaTrainingArguments, folder: str, *, estimator: bool = True) -> MetaTrainingArguments:
    """The user's arguments for a few steps at the full learning rates, without files, evaluation or uploads."""
    args = copy.copy(args)
    if not estimator:
        args.estimator, args.estimator_kwargs = NO_ESTIMATOR, None
    args.output_dir, args.push_to_hub, args.report_to = folder, False, []
    args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    args.save_strategy, args.resume_from_checkpoint = SaveStrategy.NO, None
    args.logging_steps, args.logging_strategy = 1, IntervalStrategy.STEPS
    args.lr_scheduler_type = args.meta_lr_scheduler_type = SchedulerType.CONSTANT  # which has no warm-up either
    args.lr_milestones = None
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


def _facts(trainer: MetaTrainer, args: MetaTrainingArguments) -> Findings:
    model, planned = trainer.model, args.max_steps
    if planned <= 0:
        batches = len(trainer.get_train_dataloader())
        planned = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
    return {
        "base_parameters": tree.size(model.base_parameters()),
        "meta_parameters": tree.size(model.meta_parameters()),
        "planned_steps": planned,
        "estimator": str(trainer.estimator or NO_ESTIMATOR),
        "attention_kernel": model.attention_kernel or "none",
        "second_derivatives": model.second_order_obstacle or "possible",
    }


def _judge_losses(run: _FewSteps, found: Findings) -> None:
    for name, key in (("inner_loss", "loss"), ("meta_loss", "meta_loss")):
        values = run.series(key)
        if not all(map(math.isfinite, values)):
            found["problems"].append(f"{name} is not finite: lower learning_rate")
        found[name] = values[-CYCLE * CYCLES :]


def _judge_movement(run: _FewSteps, found: Findings) -> None:
    """How far both levels went, and how far lam will go: steps that cancel like a random walk, and that add up."""
    model = run.trainer.model
    found["base_moved"] = _moved(model.base_parameters(), run.start[0])
    if not found["base_moved"] > 0:
        found["problems"].append("the base model did not move: raise learning_rate")
    if run.meta_steps == 0:
        return
    step = _moved(model.meta_parameters(), run.start[1]) / run.meta_steps
    planned = found["planned_steps"] / run.period
    least = step * math.sqrt(planned)
    found |= {"meta_moved_a_step": step, "meta_moves_at_least": least, "meta_moves_at_most": step * planned}
    if not step > 0:
        found["problems"].append("the meta network did not move: raise meta_learning_rate")
    elif least < LITTLE:
        found["warnings"].append(
            f"over the run the meta network would move by about {least:.2%} of its size (unless all its steps point "
            "one way): it may stay at its start; raise meta_learning_rate, and compare with a run that freezes it"
        )


def _judge_hypergradients(run: _FewSteps, estimator: Estimator, found: Findings) -> None:
    problems, skipped = found["problems"], run.trainer.skipped_meta_steps
    found |= {name: statistics.median(run.series(name)) for name in run.names if name not in KNOWN}
    if skipped:
        asked = skipped + run.meta_steps
        problems.append(f"{skipped} of {asked} hypergradients were not finite: see the losses, lower learning_rate")
    elif run.meta_steps == 0:
        problems.append(f"no meta step was made in {run.trainer.state.global_step} base steps")
    unused = [name for name in run.start[1] if name not in run.reached]
    if run.meta_steps and not run.reached:
        problems.append("the hypergradient is zero: the meta network does not reach the meta loss")
    elif run.meta_steps and unused:
        found["warnings"].append(
            f"the hypergradient of {', '.join(unused)} was zero in every step: they learn nothing"
        )
    cosine = found.get("meta_cosine_to_exact", 1.0)
    if estimator.exact == "always" and estimator.remembers == "nothing" and not cosine > AGREEMENT:
        problems.append(
            f"{estimator} has a cosine of {cosine:.4f} to the exact hypergradient: set engine: double_backward"
        )
    if run.trainer.diagnostics is not None:
        found["warnings"] += run.trainer.diagnostics.warned.values()


def _moved(now: Tree, start: Tree) -> float:
    """|now - start| / |start|; where the start is zero, |now|."""
    return tree.norm(tree.add(now, start, -1.0)) / (tree.norm(start) or 1.0)


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_readable, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
