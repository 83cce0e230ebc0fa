"""The estimator protocol: a frozen dataclass that is its own configuration and states the facts that others need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.hypergradients import NO_DIRECT_TERM, look_ahead
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, Response
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import SGD

Exactness = Literal["always", "at optimum", "in expectation", "never"]
Memory = Literal["nothing", "meta", "base", "trajectory"]
State = Any  # a tree, a list or a TypedDict, each class's own, declared in its file; None for none


@dataclass(frozen=True)
class Estimator(ABC):
    """How the hypergradient is estimated; its fields are its hyperparameters.

    State is explicit, so that resume is saving it: `init` makes it at the start of an episode, `observe` returns the
    next one after every inner step, `respond` reads it, `end_episode` closes it. A state is a dict of tensors, numbers
    and such dicts or lists, and is never changed in place; trees in an `InnerStep` belong to the caller, so what is
    kept is cloned.

    The facts, first in the class, tell the rest of the code what an *instance* needs; nobody asks for its name. A
    subclass states one as a plain attribute (`exact = "never"`), or as a property where a field decides.
    """

    @property
    @abstractmethod
    def citation(self) -> str:
        """Where the method comes from."""

    @property
    @abstractmethod
    def exact(self) -> Exactness:
        """When the estimate is the derivative of the outer loss through the inner step."""

    @property
    def second_order(self) -> bool:
        """Whether a loss is differentiated twice (by double backward or forward over reverse)."""
        return False

    @property
    def online(self) -> bool:
        """Whether it may answer at every inner step, and not only at the end of an episode."""
        return True

    @property
    def evaluated_at(self) -> Literal["previous", "current"]:
        """After a step: whether the point before it must be kept, or everything is judged at the weights now."""
        return "current"

    @property
    def remembers(self) -> Memory:
        """What the state holds: nothing; trees like lam; like w; or the episode's steps (saved at its end only)."""
        return "nothing"

    @property
    def needs_state_before(self) -> bool:
        """Whether `observe` reads the inner optimiser's state before the step, and not only the one after it."""
        return False

    @property
    def needs_update_rule(self) -> bool:
        """Whether it differentiates the inner optimiser's own step."""
        return False

    @property
    def needs_lam_grad(self) -> bool:
        """Whether it reads what the backward of the inner step itself leaves at lam (`StepMade.lam_grad`)."""
        return False

    @property
    def repeats_steps(self) -> bool:
        """Whether it makes the inner steps again, which then have to be what the meta passes compute."""
        return False

    @property
    def reuses_graph(self) -> bool:
        """Whether its product can take the graph that the gradient of a step to come left (`StepMade.product`)."""
        return False

    @property
    def needs_sgd(self) -> bool:
        """Whether the inner optimiser that it models is SGD alone, with momentum and weight decay."""
        return False

    @property
    def learns_initial(self) -> bool:
        """Whether the first weights of an episode may be meta parameters, or computed from them."""
        return False

    @property
    def requires_direct_term(self) -> bool:
        """Whether the estimate is zero unless the outer loss itself reads lam."""
        return False

    @property
    def max_meta_size(self) -> int | None:
        """The largest number of meta parameters it is meant for."""
        return None

    @property
    def tunes_optimizer(self) -> bool:
        """Whether lam may hold the optimiser's own numbers (learning rate, momentum, weight decay)."""
        return False

    @property
    def takes_shards(self) -> bool:
        """Whether the base weights may be sharded: no double backward, and all processes make the same passes."""
        return False

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise, which a caller may inject."""
        return False

    def prepare(self, passes: PassContext, w: Tree, lam: Tree, batch: Any) -> None:  # noqa: B027 (most need nothing)
        """Find out, early in a run, what is to be known of the losses; it is kept in the problem's `facts`.

        Raises:
            ValueError: for losses that the method cannot serve.
        """

    def init(self, problem: BilevelProblem, w: Tree, lam: Tree, previous: Any = None) -> State:
        """The state at the start of an episode; `previous` is what `end_episode` returned for the one before."""
        return None

    def observe(self, passes: PassContext, step: InnerStep, state: State) -> State:
        """The state after an inner step that was made (`step.made`)."""
        return state

    def suspended(self, state: State) -> bool:
        """Whether lam stands still in this episode, which the estimator needs for itself."""
        return False

    def end_episode(self, passes: PassContext, step: InnerStep, state: State) -> Any:
        """What the next episode may know of this one; `step` is its last, `step.val_batch` judges."""
        return state

    def share(self, state: State) -> Any:
        """What of a state is of this process's own rows; None where all processes hold the same."""
        return None

    def with_share(self, state: State, share: Any) -> State:
        """The state of another process with this one's share."""
        return state

    @abstractmethod
    def respond(self, passes: PassContext, step: InnerStep, state: State, diagnostics: dict[str, float]) -> Response:
        """Where the weights go and how a cotangent pulls back; numbers for the log go into `diagnostics`.

        A step that was made has been observed; one that was not (order `lookahead`) is still to come.
        """

    def _look_ahead(self, passes: PassContext, step: InnerStep) -> InnerStep:
        """A step to come with what is made of it, and with what the estimator takes over of its pass."""
        return look_ahead(passes, step, lam_grad=self.needs_lam_grad, graph=self.reuses_graph)

    def advise(self, gradient: Tree, diagnostics: dict[str, float]) -> str | None:
        """What to change, where the numbers of an estimate show that the method has left its regime.

        Asked on diagnosed steps; `gradient` is the inner loss's at w, and numbers made of it join `diagnostics`.
        """
        return None

    def check(self, problem: BilevelProblem, w: Tree, lam: Tree) -> None:
        """Refuse a problem that the method cannot serve.

        Raises:
            ValueError: with the reason and the way out.
        """
        name = type(self).__name__
        rule = problem.update
        if rule.tunes - lam.keys():
            raise ValueError(
                f"the update rule reads {sorted(rule.tunes - lam.keys())}, which lam lacks: {sorted(lam)}"
            )
        rule.check(w, lam)
        if not self.tunes_optimizer and (tuned := rule.reads(w, lam)):
            raise ValueError(
                f"{name} differentiates the inner loss, which does not contain the optimiser's own {sorted(tuned)}: "
                "its estimate would be zero; use one_step for these"
            )
        if problem.initial is not None and not self.learns_initial:
            raise ValueError(
                f"{name} takes the first weights for constants, and w[{problem.initial.first!r}] is a meta parameter "
                "or computed from one: use run_episode with unroll (no horizon) or forward_mode (at most 64 numbers), "
                "or give a detached clone if a constant is meant"
            )
        if problem.weights.sharded and not self.takes_shards:
            raise ValueError(
                f"{name} does not work on base weights that are sharded (FSDP): use one_step or sama with engine "
                "finite_difference or jvp, or evograd on all weights, or DDP in the place of FSDP"
            )
        if self.second_order and not problem.second_order:
            raise ValueError(
                f"{name} differentiates the inner loss twice, and this problem allows it once (attention kernel, "
                "activation checkpointing or torch.compile): use one_step with engine finite_difference, or evograd"
            )
        if self.needs_sgd and type(problem.update) is not SGD:
            raise ValueError(
                f"{name} models SGD, with momentum and weight decay, and the inner optimiser is "
                f"{type(problem.update).__name__}: use SGD, or unroll, which differentiates any rule"
            )
        if self.requires_direct_term and problem.direct_term is False:
            raise ValueError(NO_DIRECT_TERM)
        if self.max_meta_size is not None and tree.size(lam) > self.max_meta_size:
            raise ValueError(
                f"{name} is meant for at most {self.max_meta_size} meta parameters, here are {tree.size(lam)}: use "
                "unroll, hyperdistill or one_step"
            )


@dataclass(frozen=True)
class EpisodeEstimator(Estimator):
    """An estimator that answers from what it observed: a step still to come is looked ahead at and observed first."""

    evaluated_at = "previous"
    needs_update_rule = True

    def respond(self, passes: PassContext, step: InnerStep, state: State, diagnostics: dict[str, float]) -> Response:
        if step.made is None:
            step = self._look_ahead(passes, step)
            state = self.observe(passes, step, state)
        return self._answer(passes, step, state, diagnostics)

    @abstractmethod
    def _answer(self, passes: PassContext, step: InnerStep, state: State, diagnostics: dict[str, float]) -> Response:
        """The response at a step that was made and observed."""
