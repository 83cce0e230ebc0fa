"""The verdicts of a check: what the few steps show, as findings, warnings and problems."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.randomness import devices_of
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import SGD
from metaxl_evo.estimators import Estimator
from metaxl_evo.messages import first_line
from metaxl_evo.training.check_report import CheckReport, Findings
from metaxl_evo.training.few_steps import CYCLE, CYCLES, FewSteps, largest
from metaxl_evo.training.history import MOVED, VALUE
from metaxl_evo.training.meta_rows import tell_epoch
from metaxl_evo.training.trainer import MetaTrainer

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


def judge(run: FewSteps, report: CheckReport) -> None:
    """Add to the report what the steps show, and what batches of their trainer's rows show."""
    _judge_losses(run, report)
    _judge_movement(run, report)
    if run.trainer.estimator is not None:
        _judge_hypergradients(run, run.trainer.estimator, report)
    _judge_batches(run.trainer, report)


def _judge_losses(run: FewSteps, report: CheckReport) -> None:
    found = report.findings
    for name, key in (("inner_loss", "loss"), ("meta_loss", "meta_loss")):
        values = run.series(key)
        if not all(map(math.isfinite, values)):
            report.problems.append(f"{name} is not finite: lower learning_rate")
        found[name] = values[-CYCLE * CYCLES :]


def _judge_movement(run: FewSteps, report: CheckReport) -> None:
    """How far both levels went, and how far lam will go: steps that cancel like a random walk, and that add up."""
    model, found = run.trainer.model, report.findings
    found["base_moved"] = moved_by(model.base_parameters(), run.start[0])
    if not found["base_moved"] > 0:
        report.problems.append("the base model did not move: raise learning_rate")
    too_far = _too_far(run)
    if report.ok:
        advice = "lower learning_rate" + (" and meta_learning_rate" if too_far else "")
        _judge_growth(run.series("loss"), report, advice)
    if run.meta_steps == 0:
        return
    step = moved_by(model.meta_parameters(), run.start[1]) / run.meta_steps
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


def _too_far(run: FewSteps) -> str | None:
    """Advice where the meta steps are large beside what they move, or where that starts at zero, beside 1."""
    if not run.lengths:
        return None
    start = run.start[1]
    length, farthest, size = statistics.median(run.lengths), statistics.median(run.farthest), tree.norm(start)
    if length <= FAR * (size or math.inf) and farthest <= FAR * max(1.0, largest(start)):
        return None
    relative = f" ({length / size:.3g} times its size)" if size else ""
    return f"a meta step moves entries of the meta network by up to {farthest:.3g}{relative}: lower meta_learning_rate"


def _judge_hypergradients(run: FewSteps, estimator: Estimator, report: CheckReport) -> None:
    found = report.findings
    further = estimator.remembers != "nothing" or estimator.exact == "at optimum"  # which is no error
    for name in run.names:
        if name not in KNOWN and not name.startswith(VALUE):
            named = name.removesuffix("exact") + "one_step" if further and name.endswith("_exact") else name
            found[named] = statistics.median(run.series(name))
    _judge_count(run, report)
    unsolved = _unsolved(found)
    if unsolved is not None:
        (report.warnings if run.reached else report.problems).append(unsolved)
    _judge_reach(run, unsolved is not None, report)
    _judge_direction(run, estimator, report)
    if estimator.exact != "always" and estimator.remembers == "nothing" and unsolved is None:
        factor = found.get("meta_norm_by_one_step" if further else "meta_norm_by_exact", 1.0)
        _judge_size(factor, run.trainer.meta_optimizer, report)
    level = run.trainer.meta_level
    if level is not None and level.diagnostics is not None:
        report.warnings += level.diagnostics.warned.values()


def _judge_count(run: FewSteps, report: CheckReport) -> None:
    skipped = run.trainer.skipped_meta_steps
    if skipped:
        report.problems.append(
            f"{skipped} of {skipped + run.meta_steps} hypergradients were not finite: see the losses, lower "
            "learning_rate"
        )
    elif run.meta_steps == 0:
        report.problems.append(f"no meta step was made in {run.trainer.state.global_step} base steps")


def _judge_reach(run: FewSteps, unsolved: bool, report: CheckReport) -> None:
    """Whether every meta parameter had a hypergradient; a solve that failed says more where none had."""
    unused = [name for name in run.start[1] if name not in run.reached]
    if run.meta_steps and not run.reached and not unsolved:
        report.problems.append("the hypergradient is zero: the meta network does not reach the meta loss")
    elif run.reached and unused:
        report.warnings.append(f"the hypergradient of {', '.join(unused)} was zero in every step: they learn nothing")


def _judge_direction(run: FewSteps, estimator: Estimator, report: CheckReport) -> None:
    cosine = report.findings.get("meta_cosine_to_exact", 1.0)
    if estimator.exact == "always" and estimator.remembers == "nothing" and not cosine > AGREEMENT:
        report.problems.append(
            f"{estimator} has a cosine of {cosine:.4f} to the exact hypergradient: set engine: double_backward"
        )
    if estimator.exact == "in expectation" and cosine < ROUGH:
        report.warnings.append(
            f"{run.trainer.args.estimator} has a cosine of {cosine:.2f} to the exact hypergradient: raise copies, as "
            "long as that helps (it does not see how Adam scales the steps, nor what is outside of its parameters)"
        )


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
    problem = trainer.model.problem(SGD(0.0))
    w, lam = tree.detach(trainer.model.base_parameters()), tree.detach(trainer.model.meta_parameters())

    def loss_by(of: Callable[[PassContext], Callable[..., Any]]) -> Callable[..., float]:
        def loss(*parts: Any) -> float:
            passes = PassContext(problem, seed=trainer.args.seed, devices=devices_of(w, lam))
            return float(of(passes)(w, lam, list(parts), wrt_w=(), wrt_lam=())[0])

        return loss

    judges = None if trainer.estimator is None else trainer.meta_dataset
    _judge_halves("inner_loss", trainer, trainer.train_dataset, loss_by(lambda passes: passes.inner_grad), report)
    _judge_halves("outer_loss", trainer, judges, loss_by(lambda passes: passes.outer_grad), report)


def _judge_halves(
    name: str, trainer: MetaTrainer, dataset: Any, loss: Callable[..., float], report: CheckReport
) -> None:
    rows = _first_rows(dataset)
    if not rows:
        return
    try:
        whole, first, second = (trainer.collated(part) for part in (rows, rows[::2], rows[1::2]))
        once, twice, halved = loss(whole), loss(whole), loss(first, second)
    except Exception as error:  # a batch of this size may not be one of the task's
        report.findings[f"{name}_of_halves"] = f"not compared ({first_line(error)})"
        return
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


def moved_by(now: Tree, start: Tree) -> float:
    """|now - start| / |start|; where the start is zero, |now|."""
    return tree.norm(tree.add(now, start, -1.0)) / (tree.norm(start) or 1.0)
