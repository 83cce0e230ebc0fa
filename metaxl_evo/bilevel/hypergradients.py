"""The one formula that makes a hypergradient of an estimator's response, for one step and for an episode."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from metaxl_evo.bilevel import gate, tree
from metaxl_evo.bilevel.initial import initial_of
from metaxl_evo.bilevel.passes import Counts, PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, Response, StepMade
from metaxl_evo.bilevel.products import gradient_and_product
from metaxl_evo.bilevel.randomness import devices_of, kept, mix_seed
from metaxl_evo.bilevel.replay import Inputs
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update_state import UpdateState

logger = logging.getLogger(__name__)


class HypergradientEstimator(Protocol):
    """What this floor needs of an estimator (the family itself lives in `metaxl_evo.estimators`)."""

    @property
    def stochastic(self) -> bool: ...

    @property
    def needs_state_before(self) -> bool: ...

    @property
    def requires_direct_term(self) -> bool: ...

    @property
    def needs_lam_grad(self) -> bool: ...

    @property
    def reuses_graph(self) -> bool: ...

    def check(self, problem: BilevelProblem, w: Tree, lam: Tree) -> None: ...

    def prepare(self, passes: PassContext, w: Tree, lam: Tree, batch: Any) -> None: ...

    def init(self, problem: BilevelProblem, w: Tree, lam: Tree, previous: Any = None) -> Any: ...

    def observe(self, passes: PassContext, step: InnerStep, state: Any) -> Any: ...

    def suspended(self, state: Any) -> bool: ...

    def end_episode(self, passes: PassContext, step: InnerStep, state: Any) -> Any: ...

    def respond(self, passes: PassContext, step: InnerStep, state: Any, diagnostics: dict[str, float]) -> Response: ...


@dataclass(frozen=True)
class Hypergradient:
    """An estimate of d outer_loss / d lam.

    Args:
        grads: like lam, at true scale.
        outer_loss: the outer loss where it was judged, a 0-d tensor.
        diagnostics: the estimator's own numbers (effective sample size, perturbation length, ...); of `estimate` some
            are still 0-d tensors, so that the host need not wait for each.
        counts: the passes that it took.
        w: the base weights at the end, where an episode was run.
    """

    grads: Tree
    outer_loss: Tensor
    diagnostics: dict[str, Any] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    w: Tree | None = None


def hypergradient(
    problem: BilevelProblem,
    estimator: HypergradientEstimator,
    w: Tree,
    lam: Tree,
    train_batch: Any,
    val_batch: Any,
    *,
    state: Any = None,
    generator: torch.Generator | None = None,
    noise: Sequence[Tree] | None = None,
    update_state: UpdateState | None = None,
    made: StepMade | None = None,
    precision: str = "float32",
) -> Hypergradient:
    """Estimate the hypergradient of one inner step.

    Args:
        w, lam: base and meta parameters before the step, dicts of tensors; left as they are, like the global random
            state. Where w is an entry of lam or was computed from some, that is differentiated too, or refused.
        train_batch, val_batch: the batches of the inner and the outer loss.
        state: the estimator's state, which has observed the step where `made` is given (default: a fresh one, which
            observes it now).
        generator: where the randomness of this estimate is drawn from (default: the same on every call).
        noise: perturbations to use in place of drawn ones, a sequence of trees at true scale (EvoGrad).
        update_state: the inner optimiser's state before the step (default: that before a first step).
        made: the step, where it was made already; the estimate is then of that very step.
        precision: of the passes (`metaxl_evo.bilevel.precision`).

    Raises:
        ValueError: where the estimator cannot serve this problem, with the reason.
    """
    problem, w, lam = _bound(problem, w, lam)
    if problem.initial is not None and (state is not None or made is not None):
        raise ValueError(
            f"w[{problem.initial.first!r}] is a meta parameter or computed from one, in the middle of an episode, "
            "whose first weights alone may be: give a detached clone, or let run_episode make the steps"
        )
    estimator.check(problem, w, lam)
    if noise is not None and not estimator.stochastic:
        raise ValueError(f"{type(estimator).__name__} draws no noise: leave `noise` out")
    if made is not None:
        if update_state is None and (problem.update.may_read_lam or estimator.needs_state_before):
            if made.update_state["step"] > 1:
                raise ValueError("a step that was made needs `update_state`, the optimiser's state before it")
            update_state = problem.update.init(w)
        to_lam = None if made.lam_grad is None else tree.detach(made.lam_grad)
        made = StepMade(tree.detach(made.w), tree.detach(made.grad), made.update_state, to_lam)
    seed, devices = _draw_seed(generator), devices_of(w, lam)
    passes = PassContext(problem, seed=seed, noise=noise, devices=devices, precision=precision)
    estimator.prepare(passes, w, lam, train_batch)
    step = InnerStep(w, lam, train_batch, update_state, made, val_batch)
    if state is None:
        state = estimator.init(problem, w, lam)
        if made is not None:
            state = estimator.observe(passes, step, state)
    return _said_if_zero(passes, step, estimate(passes, estimator, step, state))


def estimate(passes: PassContext, estimator: HypergradientEstimator, step: InnerStep, state: Any) -> Hypergradient:
    """The one formula: direct term + pulled-back cotangent + offset.

    For callers that run the inner steps themselves, with passes that may have recorded the step's own forward. The
    gradient of a step that was made may be taken over (`step.lent()` keeps it), to free its memory early.
    """
    lam, diagnostics = step.lam, dict[str, Any]()
    with kept():
        response = estimator.respond(passes, step, state, diagnostics)
        wrt = tuple(step.w) if response.wrt is None else tuple(response.wrt)
        outer_loss, cotangent, direct, reads_lam = passes.outer_grad(
            response.value, lam, step.val_batch, wrt_w=wrt, wrt_lam=lam
        )
        grads = passes.all_reduce(tree.add(direct, response.vjp(cotangent)))
    if estimator.requires_direct_term and not reads_lam and tree.norm(grads) == 0:  # rows elsewhere may read it
        raise ValueError(NO_DIRECT_TERM)
    outer_loss = passes.all_reduce_one(outer_loss)
    if response.offset is not None:
        grads = tree.add(grads, response.offset)
    return Hypergradient(grads, outer_loss, diagnostics, passes.counts)


NO_DIRECT_TERM = (
    "first_order keeps only the direct term, and this outer loss does not read the meta parameters, so every "
    "hypergradient would be zero: choose an estimator that differentiates the inner step (one_step, evograd)"
)


def run_episode(
    problem: BilevelProblem,
    estimator: HypergradientEstimator,
    w0: Tree,
    lam: Tree,
    train_batches: Sequence[Any],
    val_batch: Any,
    *,
    generator: torch.Generator | None = None,
    update_state: UpdateState | None = None,
) -> Hypergradient:
    """Run the inner steps from `w0` with lam held fixed and estimate the hypergradient at the end, without a Trainer.

    Where leaves of `w0` are entries of lam, or were computed from entries that require a gradient, the initialisation
    is learned (MAML): the derivative through `w0` is part of the hypergradient. `unroll` and `forward_mode` can do it.
    An estimator that asks for an episode of its own first (HyperDistill's fit) gets one over the same batches. The
    result's `w` holds the weights after the last step; its counts are of the estimator's work alone, over all steps.

    Args:
        update_state: the inner optimiser's state before the first step (default: fresh).

    Raises:
        ValueError: for an empty sequence of batches, or where the estimator cannot serve this problem.
    """
    if len(train_batches) == 0:
        raise ValueError("run_episode needs at least one train batch")
    problem, w0, lam = _bound(problem, w0, lam)
    estimator.check(problem, w0, lam)
    seed, devices, counts = _draw_seed(generator), devices_of(w0, lam), Counts()
    first = PassContext(problem, seed=seed, devices=devices)
    gate.evaluate(first, w0, lam, train_batches[0])
    estimator.prepare(first, w0, lam, train_batches[0])

    def run(state: Any) -> tuple[PassContext, InnerStep, Any]:
        w, before = w0, problem.update.init(w0) if update_state is None else update_state
        for index, batch in enumerate(train_batches):
            passes = PassContext(problem, seed=mix_seed(seed, index), devices=devices)  # one randomness a step
            step = InnerStep(w, lam, batch, before, val_batch=val_batch)
            graph = estimator.reuses_graph and index == len(train_batches) - 1  # an earlier one may go unused
            step = look_ahead(passes, step, lam_grad=estimator.needs_lam_grad, graph=graph)
            assert step.made is not None
            passes.counts = counts  # the step itself is not the estimator's work
            state = estimator.observe(passes, step, state)
            w, before = step.current, step.made.update_state
        return passes, step, state

    passes, step, state = run(estimator.init(problem, w0, lam))
    if estimator.suspended(state):
        learned = estimator.end_episode(passes, step, state)
        passes, step, state = run(estimator.init(problem, w0, lam, previous=learned))
    result = _said_if_zero(passes, step, estimate(passes, estimator, step, state))
    return Hypergradient(result.grads, result.outer_loss, result.diagnostics, counts, step.current)


def look_ahead(passes: PassContext, step: InnerStep, *, lam_grad: bool = False, graph: bool = False) -> InnerStep:
    """The step with what the optimiser makes of it; its pass records the stop-gradient inputs on the way.

    Args:
        lam_grad: whether the step made is to hold what its backward leaves at lam.
        graph: whether it is to hold the graph of its gradient (`StepMade.product`). Where the batch is several parts,
            or not all of it reads lam, it holds none: a product takes the graph of fewer rows, one part at a time.
    """
    rule = passes.problem.update
    inputs = Inputs.LIVE if passes.problem.stop_gradients is False else Inputs.RECORD
    at, part = (step.w, step.lam), passes.only_part(step.batch) if graph else None
    to_lam, product = None, None
    if part is not None:
        grad, product = gradient_and_product(passes, *at, *part)
        grad = passes.whole_step_grad(grad, step.w)
    else:
        grad, to_lam = passes.step_grad(*at, step.batch, wrt_lam=step.lam if lam_grad else (), inputs=inputs)
    before = step.update_state if step.update_state is not None else rule.init(step.w)
    with torch.no_grad():
        after, after_state = rule(step.w, before, grad, tree.detach(step.lam))
    made = StepMade(after, grad, after_state, to_lam if lam_grad else None, product=product)
    return replace(step, update_state=before, made=made)


def _draw_seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return torch.initial_seed()
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def look_at(result: Hypergradient) -> tuple[float, float]:
    """The norm and the outer loss of an estimate, whose diagnostics are numbers from then on: asked for at once."""
    waiting = {name: found for name, found in result.diagnostics.items() if isinstance(found, Tensor)}
    norms = tree.norms(result.grads)
    found = tree.numbers([*norms, result.outer_loss.double(), *map(Tensor.double, waiting.values())])
    result.diagnostics.update(zip(waiting, found[len(norms) + 1 :], strict=True))
    return math.hypot(*found[: len(norms)]), found[len(norms)]


def _said_if_zero(passes: PassContext, step: InnerStep, result: Hypergradient) -> Hypergradient:
    look_at(result)
    deaf = [name for name, leaf in result.grads.items() if not leaf.any()]
    if len(deaf) == len(result.grads):
        logger.warning("%s", why_zero(passes, step))
    elif deaf and passes.problem.update.has_tensors:  # a lam of new tensors, which the rule's are no entries of
        logger.warning(
            "the hypergradient of lam[%r] is exactly zero, and the update rule holds a tensor that is no entry of "
            "this lam and so a constant: if that entry is meant give its name, as in SGD(lr='name')",
            deaf[0],
        )
    return result


def why_zero(passes: PassContext, step: InnerStep) -> str:
    """Which level a hypergradient of exactly zero comes from, in one line; at the price of a pass of each loss."""
    passes = replace(passes.elsewhere(), counts=Counts())
    _, to_w, _, _ = passes.outer_grad(step.current, step.lam, step.val_batch, wrt_w=step.w, wrt_lam=())
    _, _, to_lam = passes.inner_grad(step.w, step.lam, step.batch, wrt_lam=step.lam)
    reason = "the inner loss reads lam and the outer loss the weights, but the step between them carries nothing over"
    if tree.norm(passes.all_reduce(to_lam)) == 0 and not passes.problem.update.reads(step.w, step.lam):
        reason = "the inner loss does not depend on lam, nor are first weights computed from what requires a gradient"
    if tree.norm(passes.all_reduce(to_w)) == 0:
        reason = "the outer loss does not depend on the base weights"
    return f"the hypergradient is exactly zero: {reason}"


def _bound(problem: BilevelProblem, w: Any, lam: Any) -> tuple[BilevelProblem, Tree, Tree]:
    """The problem with what the caller's own tensors tell (which of them are entries of lam), and they outside of any
    graph."""
    _refuse("w", w)
    _refuse("lam", lam)
    problem = replace(problem, update=problem.update.bound(lam), initial=initial_of(w, lam) or problem.initial)
    return problem, tree.detach(w), tree.detach(lam)


def _refuse(what: str, given: Any) -> None:
    """Refuse what is no dict of parameters.

    Raises:
        ValueError: with the way out.
    """
    if isinstance(given, torch.nn.Module):
        raise ValueError(f"{what} is a {type(given).__name__}: give its parameters, dict(module.named_parameters())")
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{what} is a {type(given).__name__}, and has to be a dict of tensors by name: {{'name': tensor}}, of a "
            "module dict(module.named_parameters())"
        )
    if not given:
        raise ValueError(f"{what} is empty: there is nothing to differentiate")
    for name, leaf in given.items():
        if isinstance(leaf, (Mapping, torch.nn.Module)):
            raise ValueError(
                f"{what}[{name!r}] is a {type(leaf).__name__}: give one flat dict, {{'{name}.key': tensor}}, "
                "of a module dict(module.named_parameters())"
            )
        if not isinstance(leaf, Tensor) or not isinstance(name, str):
            kind = f"{type(name).__name__} -> {type(leaf).__name__}"
            raise ValueError(
                f"{what}[{name!r}] is {kind}: give tensors by name, such as {{'name': torch.tensor(0.1)}}"
            )
        if not leaf.is_floating_point():
            raise ValueError(f"{what}[{name!r}] has dtype {leaf.dtype}: parameters must be floating point")
