"""The check of any task: a few steps of the real configuration in a scratch folder, and findings instead of a run."""

from __future__ import annotations

import copy
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.randomness import devices_of
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import SGD
from metaxl_evo.estimators import Estimator
from metaxl_evo.messages import first_line
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.history import MOVED, VALUE
from metaxl_evo.training.isolation import Snapshot, kept_random_state
from metaxl_evo.training.meta_rows import tell_epoch
from metaxl_evo.training.trainer import MetaTrainer

logger = logging.getLogger(__name__)

CYCLE = 3  # meta steps, of which the last is diagnosed, the others are timed (but for the very first)
CYCLES = 3  # and one only of an estimator that answers once an episode
GROWN = 5  # an inner loss that is so many times its first one, in all of the last steps, diverges
FAR = 3  # so many times its size a meta network does not go in a step, nor its entries so far
LITTLE = 0.01  # a meta network that moves less than this over a run stays, for all that a score can tell, at its start
AGREEMENT = 0.99  # the least cosine to the exact one-step hypergradient of an estimator that calls itself that
ROUGH = 0.9  # the same of one that is exact in expectation
UNSOLVED = 0.9  # what a solve leaves of the right-hand side, and is not a solution
OF_A_SIZE = 2  # the largest factor between two hypergradients of one size
SGD_LIKE = (torch.optim.SGD, torch.optim.ASGD)  # whose steps are as long as the gradient
KNOWN = ("meta_loss", "meta_learning_rate", MOVED)  # logged whether a step is diagnosed or not, or found otherwise
ROWS = 8  # of a batch that is compared with its halves
SAME = 1e-4  # the largest relative difference of the two that rounding makes

Build = Callable[[MetaTrainingArguments], "MetaTrainer"]
Findings = dict[str, Any]


@dataclass
class CheckReport:
    """What a check found; printed, it is a line each, the last of them the verdict: OK (with warnings), or a problem.

    Attributes:
        findings: by name, plain values.
        problems: what a run would suffer from, a line each.
        warnings: what may be as wanted.
    """

    findings: Findings = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{key}: {_readable(value)}" for key, value in self.findings.items()]
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        count = len(self.warnings)
        verdict = f"OK, with {count} warning{'s' * (count > 1)}" if count else "OK"
        return "\n".join([*lines, *([f"PROBLEM: {problem}" for problem in self.problems] or [verdict])])

    def as_dict(self) -> dict[str, Any]:
        """Findings, `problems` and `warnings` in one."""
        return {**self.findings, "problems": self.problems, "warnings": self.warnings}


def check_trainer(trainer: MetaTrainer) -> CheckReport:
    """Run a few steps of `trainer` at the full learning rates, and take them back: nothing of it is changed.

    Another trainer makes the steps, with its model, data sets, collator and optimiser, without its callbacks,
    evaluation, files and uploads. The model is restored bit by bit, generators that its modules hold with it.

    Raises:
        ValueError: for what a run would refuse as well.
    """
    model = trainer.model
    before, given = Snapshot(model), trainer.given_optimizer

    def build(args: MetaTrainingArguments) -> MetaTrainer:
        before.restore()
        optimizer = None if given is None else copy.deepcopy(given, {id(p): p for p in model.parameters()})
        other: MetaTrainer = object.__new__(type(trainer))
        MetaTrainer.__init__(
            other,
            model,
            args,
            meta_dataset=trainer.meta_dataset,
            train_dataset=trainer.train_dataset,
            data_collator=trainer.data_collator,
            processing_class=trainer.processing_class,
            optimizers=(optimizer, None),
            optimizer_cls_and_kwargs=trainer.optimizer_cls_and_kwargs,
        )
        vars(other).update({key: value for key, value in vars(trainer).items() if key not in vars(other)})
        return other

    with kept_random_state():
        try:
            return check_training(build, trainer.args)[0]
        finally:
            before.restore()


def check_training(build: Build, args: MetaTrainingArguments) -> tuple[CheckReport, MetaTrainer]:
    """Run a few steps at the full learning rates; returns what was found, and the trainer that made the steps.

    What the trainer logs of its meta steps, diagnosed by turns, is among the findings under the same names.

    Args:
        build: makes a trainer; it is given `args` but for what a check leaves out.

    Raises:
        ValueError: for what a run would refuse as well.
    """
    report = CheckReport()
    found = report.findings
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
            report.problems.append(f"a step fails: {run.failure}")
            return report, run.trainer
        _judge_losses(run, report)
        _judge_movement(run, report)
        if run.trainer.estimator is not None:
            _judge_hypergradients(run, run.trainer.estimator, report)
        _judge_batches(run.trainer, report)
        found["seconds_per_step"] = run.seconds_per_step
        if run.trainer.estimator is not None:
            settings = _scratch_arguments(args, scratch, estimator=False)
            found["times_the_plain_step"] = run.seconds_per_step / _FewSteps(build, settings).seconds_per_step
    return report, run.trainer


class _FewSteps(TrainerCallback):
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
        self.farthest.append(_largest(moved))

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


def _judge_losses(run: _FewSteps, report: CheckReport) -> None:
    found = report.findings
    for name, key in (("inner_loss", "loss"), ("meta_loss", "meta_loss")):
        values = run.series(key)
        if not all(map(math.isfinite, values)):
            report.problems.append(f"{name} is not finite: lower learning_rate")
        found[name] = values[-CYCLE * CYCLES :]


def _judge_movement(run: _FewSteps, report: CheckReport) -> None:
    """How far both levels went, and how far lam will go: steps that cancel like a random walk, and that add up."""
    model, found = run.trainer.model, report.findings
    found["base_moved"] = _moved(model.base_parameters(), run.start[0])
    if not found["base_moved"] > 0:
        report.problems.append("the base model did not move: raise learning_rate")
    too_far = _too_far(run)
    if report.ok:
        advice = "lower learning_rate" + (" and meta_learning_rate" if too_far else "")
        _judge_growth(run.series("loss"), report, advice)
    if run.meta_steps == 0:
        return
    step = _moved(model.meta_parameters(), run.start[1]) / run.meta_steps
    planned = found["planned_steps"] / run.period
    least = step * math.sqrt(planned)
    found |= {"meta_moved_a_step": step, "meta_moves_at_least": least, "meta_moves_at_most": step * planned}
    if too_far is not None:
        report.warnings.append(too_far)
    elif not step > 0:
        if run.reached:  # else it is no matter of the rate
            report.problems.append("the meta network did not move: raise meta_learning_rate")
    elif least < LITTLE:
        report.warnings.append(
            f"over the run the meta network would move by about {least:.2%} of its size (unless all its steps point "
            "one way): it may stay at its start; raise meta_learning_rate, and compare with a run that freezes it"
        )


def _judge_growth(losses: list[float], report: CheckReport, advice: str) -> None:
    """Whether the inner loss grows beyond what differs from batch to batch."""
    moved, (*_, last), late = report.findings["base_moved"], losses, losses[-CYCLE:]
    typical = statistics.median(late) if moved > 1 else min(late)
    if 0 < GROWN * losses[0] < typical:
        report.problems.append(
            f"the inner loss went from {losses[0]:.3g} to {last:.3g} in {len(losses)} steps, it diverges: {advice}"
        )
    elif moved > 1 and typical > losses[0]:
        report.warnings.append(
            f"in {len(losses)} steps the base model moved by {moved:.3g} times its size, and the inner loss did not "
            f"fall: {advice}"
        )


def _too_far(run: _FewSteps) -> str | None:
    """Advice where the meta steps are large beside what they move, or where that starts at zero, beside 1."""
    if not run.lengths:
        return None
    start = run.start[1]
    length, farthest, size = statistics.median(run.lengths), statistics.median(run.farthest), tree.norm(start)
    if length <= FAR * (size or math.inf) and farthest <= FAR * max(1.0, _largest(start)):
        return None
    relative = f" ({length / size:.3g} times its size)" if size else ""
    return f"a meta step moves entries of the meta network by up to {farthest:.3g}{relative}: lower meta_learning_rate"


def _judge_hypergradients(run: _FewSteps, estimator: Estimator, report: CheckReport) -> None:
    found, problems, skipped = report.findings, report.problems, run.trainer.skipped_meta_steps
    names = [name for name in run.names if name not in KNOWN and not name.startswith(VALUE)]
    further = estimator.remembers != "nothing" or estimator.exact == "at optimum"  # which is no error
    for name in names:
        named = name.removesuffix("exact") + "one_step" if further and name.endswith("_exact") else name
        found[named] = statistics.median(run.series(name))
    if skipped:
        asked = skipped + run.meta_steps
        problems.append(f"{skipped} of {asked} hypergradients were not finite: see the losses, lower learning_rate")
    elif run.meta_steps == 0:
        problems.append(f"no meta step was made in {run.trainer.state.global_step} base steps")
    unused = [name for name in run.start[1] if name not in run.reached]
    unsolved = _unsolved(found)
    if unsolved is not None:
        (report.warnings if run.reached else problems).append(unsolved)
    if run.meta_steps and not run.reached and unsolved is None:
        problems.append("the hypergradient is zero: the meta network does not reach the meta loss")
    elif run.reached and unused:
        report.warnings.append(f"the hypergradient of {', '.join(unused)} was zero in every step: they learn nothing")
    cosine = found.get("meta_cosine_to_exact", 1.0)
    if estimator.exact == "always" and estimator.remembers == "nothing" and not cosine > AGREEMENT:
        problems.append(
            f"{estimator} has a cosine of {cosine:.4f} to the exact hypergradient: set engine: double_backward"
        )
    if estimator.exact == "in expectation" and cosine < ROUGH:
        report.warnings.append(
            f"{run.trainer.args.estimator} has a cosine of {cosine:.2f} to the exact hypergradient: raise copies, as "
            "long as that helps (it does not see how Adam scales the steps, nor what is outside of its parameters)"
        )
    if estimator.exact != "always" and estimator.remembers == "nothing" and unsolved is None:
        factor = found.get("meta_norm_by_one_step" if further else "meta_norm_by_exact", 1.0)
        _judge_size(factor, run.trainer.meta_optimizer, report)
    level = run.trainer.meta_level
    if level is not None and level.diagnostics is not None:
        report.warnings += level.diagnostics.warned.values()


def _judge_size(factor: float, optimizer: Any, report: CheckReport) -> None:
    if isinstance(optimizer, SGD_LIKE) and not 1 / OF_A_SIZE < factor < OF_A_SIZE:
        report.warnings.append(
            f"the estimate is {factor:.3g} times as long as the exact one-step hypergradient, and "
            f"{type(optimizer).__name__} steps as far as it is long: divide meta_learning_rate by that, or set "
            "meta_optim to AdamW"
        )


def _unsolved(found: Findings) -> str | None:
    """What to do where a linear system was not solved."""
    residual, negative = (found.get(f"meta_{name}", 0.0) for name in ("solver_residual", "negative_curvature"))
    if residual < UNSOLVED and not negative:
        return None
    met = ", and the Hessian has negative curvature" if negative else ""
    return (
        f"the solve for the inverse Hessian does not converge (it leaves {residual:.3g}{met}): raise damping, "
        "lower step, or take more terms or iterations (docs/estimators.md)"
    )


def _judge_batches(trainer: MetaTrainer, report: CheckReport) -> None:
    """Whether a batch has the loss of its halves, and a pass the numbers that it had the time before."""
    problem, context = trainer.model.problem(SGD(0.0)), trainer.args
    w, lam = tree.detach(trainer.model.base_parameters()), tree.detach(trainer.model.meta_parameters())
    devices = devices_of(w, lam)

    def loss(of: Callable[..., Any], *parts: Any) -> float:
        passes = PassContext(problem, seed=context.seed, devices=devices)
        return float(of(passes)(w, lam, list(parts), wrt_w=(), wrt_lam=())[0])

    losses: dict[str, tuple[Any, Callable[..., Any]]] = {
        "inner_loss": (trainer.train_dataset, lambda passes: passes.inner_grad),
        "outer_loss": (None if trainer.estimator is None else trainer.meta_dataset, lambda passes: passes.outer_grad),
    }
    for name, (dataset, of) in losses.items():
        rows = _first_rows(dataset)
        if not rows:
            continue
        try:
            whole, first, second = (trainer.collated(part) for part in (rows, rows[::2], rows[1::2]))
            once, twice, halved = loss(of, whole), loss(of, whole), loss(of, first, second)
        except Exception as error:  # a batch of this size may not be one of the task's
            report.findings[f"{name}_of_halves"] = f"not compared ({first_line(error)})"
            continue
        if once != twice and not (math.isnan(once) and math.isnan(twice)):
            report.warnings.append(
                f"{name}: the same pass twice gives two numbers ({once:.6g} and {twice:.6g}): it draws from a random "
                "generator of its own, or counts its calls; meta passes then see other noise than the step that they "
                "differentiate (draw from torch, numpy or random)"
            )
        elif abs(halved - once) > SAME * max(abs(once), abs(halved)):
            report.warnings.append(
                f"{name}: a batch of {len(rows)} has another loss ({once:.6g}) than its halves ({halved:.6g}): the "
                "losses of items depend on each other (batch norm, contrastive losses, division by a sum over the "
                "batch), so 8 x 1 will not equal 4 x 2"
            )


def _first_rows(dataset: Any) -> list[Any]:
    """An even number of rows, none where there are not two."""
    if dataset is None:
        return []
    tell_epoch(dataset, 0)
    map_style = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
    rows = [dataset[index] for index in range(min(ROWS, len(dataset)))] if map_style else list(islice(dataset, ROWS))
    return rows[: len(rows) // 2 * 2]


def _moved(now: Tree, start: Tree) -> float:
    """|now - start| / |start|; where the start is zero, |now|."""
    return tree.norm(tree.add(now, start, -1.0)) / (tree.norm(start) or 1.0)


def _largest(held: Tree) -> float:
    return max(float(leaf.detach().abs().max()) for leaf in held.values() if leaf.numel())


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_readable, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
