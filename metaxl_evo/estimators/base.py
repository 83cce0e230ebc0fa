"""The estimator protocol: a frozen dataclass that is its own configuration and says what it needs by properties."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import Counts, PassContext
from metaxl_evo.bilevel.problem import NO_DIRECT_TERM, BilevelProblem, InnerStep, Response
from metaxl_evo.bilevel.tree import Tree

Exactness = Literal["always", "at optimum", "in expectation", "never"]


@dataclass(frozen=True)
class Estimator(ABC):
    """How the hypergradient is estimated; its fields are its hyperparameters.

    State is explicit, so that resume is saving it: `init` makes it, `observe` returns the next one after every inner
    step, `respond` reads it. The properties tell the rest of the code what an *instance* needs; nobody asks for its
    name.
    """

    @property
    def second_order(self) -> bool:
        """Whether a loss is differentiated twice (by double backward or forward over reverse)."""
        return False

    @property
    def needs_forward_ad(self) -> bool:
        """Whether the losses must support forward-mode differentiation."""
        return False

    @property
    def online(self) -> bool:
        """Whether it may answer at every inner step, and not only at the end of an episode."""
        return True

    @property
    def differentiates_value(self) -> bool:
        """Whether `Response.vjp` is the derivative of `Response.value`."""
        return True

    @property
    @abstractmethod
    def exact(self) -> Exactness:
        """When the estimate is the derivative of the outer loss through the inner step."""

    @property
    def evaluated_at(self) -> Literal["previous", "current"]:
        """After a step: whether the point before it must be kept, or everything is judged at the weights now."""
        return "current"

    @property
    def needs_update_rule(self) -> bool:
        """Whether it differentiates the inner optimiser's own step."""
        return False

    @property
    def tunes_optimizer(self) -> bool:
        """Whether lam may hold the optimiser's own numbers (learning rate, momentum, weight decay)."""
        return False

    @property
    def requires_direct_term(self) -> bool:
        """Whether the estimate is zero unless the outer loss itself reads lam."""
        return False

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise, which a caller may inject."""
        return False

    @property
    def max_meta_size(self) -> int | None:
        """The largest number of meta parameters it is meant for."""
        return None

    @property
    @abstractmethod
    def citation(self) -> str:
        """Where the method comes from."""

    @abstractmethod
    def cost(self, *, step_made: bool) -> Counts:
        """The passes of one hypergradient on one part of a batch without stop-gradients, the outer pass included."""

    def init(self, problem: BilevelProblem, w: Tree, lam: Tree) -> Any:
        """The state at the start of an episode (most one-step methods have none)."""
        return None

    def observe(self, passes: PassContext, step: InnerStep, state: Any) -> Any:
        """The state after an inner step."""
        return state

    @abstractmethod
    def respond(self, passes: PassContext, step: InnerStep, state: Any, diagnostics: dict[str, float]) -> Response:
        """Where the weights go and how a cotangent pulls back; numbers for the log go into `diagnostics`."""

    def check(self, problem: BilevelProblem, w: Tree, lam: Tree) -> None:
        """Refuse a problem that the method cannot serve.

        Raises:
            ValueError: with the reason and the way out.
        """
        name = type(self).__name__
        tuned = problem.update.tunes
        if tuned - lam.keys():
            raise ValueError(f"the update rule reads {sorted(tuned - lam.keys())}, which lam lacks: {sorted(lam)}")
        if tuned and not self.tunes_optimizer:
            raise ValueError(
                f"{name} differentiates the inner loss, which does not contain the optimiser's own {sorted(tuned)}: "
                "its estimate would be zero; use one_step for these"
            )
        if (self.second_order or self.needs_forward_ad) and not problem.second_order:
            raise ValueError(
                f"{name} differentiates the inner loss twice, and this problem allows it once (attention kernel, "
                "activation checkpointing or torch.compile): use one_step with engine finite_difference, or evograd"
            )
        if self.requires_direct_term and problem.direct_term is False:
            raise ValueError(NO_DIRECT_TERM)
        if self.max_meta_size is not None and tree.size(lam) > self.max_meta_size:
            raise ValueError(
                f"{name} is meant for at most {self.max_meta_size} meta parameters, here are {tree.size(lam)}"
            )
