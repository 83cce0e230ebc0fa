"""The way to passes at perturbed weights: the value test comes first, and what has to stand still is recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.replay import Inputs, Unrecorded
from metaxl_evo.bilevel.samples import alone, first_part, untested
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.value_test import Trial, trials
from metaxl_evo.messages import first_line

logger = logging.getLogger(__name__)
Found = TypeVar("Found")


def perturbed(
    passes: PassContext,
    w: Tree,
    lam: Tree,
    batch: Any,
    run: Callable[[Inputs], Found],
    names: Iterable[str] | None = None,
) -> Found:
    """`run`, given the mode of its passes at weights near `w`, where only `names` (default: all) are moved."""
    try:
        return run(record(passes, w, lam, batch, names))
    except Unrecorded:  # these are the first rows for which the loss calls stop_gradient
        return run(record(passes, w, lam, batch, names))


def record(passes: PassContext, w: Tree, lam: Tree, batch: Any, names: Iterable[str] | None = None) -> Inputs:
    """Make sure that the stop-gradient inputs at `w` are on tape; returns the mode for perturbed passes.

    Raises:
        ValueError: where a perturbed pass would not be what autograd differentiates (`require`).
    """
    problem, facts = passes.problem, passes.problem.facts
    require(passes, w, lam, batch, frozenset(w if names is None else names))
    if problem.stop_gradients is False:
        return Inputs.LIVE
    calls = problem.stop_gradients or facts.stop_gradients or facts.replay_detach
    if not passes.has_recorded(batch) and (calls or problem.weights.sharded):  # where all have to do the same
        passes.inner_value(w, lam, batch, inputs=Inputs.RECORD)
    return Inputs.REPLAY


def require(passes: PassContext, w: Tree, lam: Tree, batch: Any, names: frozenset[str]) -> None:
    """See to it, once a run and kind of batch, that the inner loss can be judged at weights perturbed along `names`.

    Plain detaches are replayed from here on where the test passes only then. A process without rows does not know, and
    tests when it has some.

    Raises:
        ValueError: where it cannot, naming the line that is to blame and what to do.
    """
    problem, known = passes.problem, passes.problem.facts.trusted
    if problem.straight_through:
        return
    for kind, part, size in untested(passes, batch, known, names):
        evaluate(passes, w, lam, batch)
        passed: Trial | None = None
        for trial in trials(passes, w, lam, part, size, names):
            if passed is not None and trial.dtype is None:
                break  # what computes worse than the last cannot show more
            verdict = trial.attempt()
            if verdict:
                raise ValueError(verdict)
            passed = passed if verdict is None else trial
            if passed is not None and passed.showed:
                break
        if passed is not None:
            known.note(kind, names, passed.showed)
        elif trial.error is not None:
            logger.warning(
                "whether passes at perturbed weights are right cannot be tested for this loss (%s)",
                first_line(trial.error),
            )
            known.note(kind, names, True)


def evaluate(passes: PassContext, w: Tree, lam: Tree, batch: Any) -> None:
    """Evaluate the inner loss of one part, once a run: its own errors are not to be taken for those of a test."""
    facts, found = passes.problem.facts, first_part(passes, batch)
    if found is not None and not facts.evaluated:
        replace(alone(passes), precision=passes.precision).inner_value(w, lam, found[0])
        facts.evaluated = True
