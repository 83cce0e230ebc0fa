"""Episodes: the run cut into stretches of base steps, over which an estimator remembers and after which it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators import Estimator
from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.training.arguments import LEARNED_START, MetaTrainingArguments


class Episodes:
    """An estimator's memory over the base steps of a run.

    Without a length the whole run is one episode. `restart` puts the base weights back to the run's start after each
    episode; `reptile` moves the start towards where the episode went, start += rate * (w - start), and goes on from
    there (HyperDistill, Lee et al. 2022, Alg. 3); `fomaml` moves it by the outer gradient there, start -= rate * g
    (Finn et al. 2017); `learned` begins at what the model computes of the meta parameters (`first_weights`: MAML). All
    give the base optimiser a fresh state. Of several tasks the start is one, moved by the mean
    over them. Evaluation and checkpoints after an episode's last step see the weights that it reached.
    """

    def __init__(self, estimator: Estimator, args: MetaTrainingArguments):
        _refuse(estimator, args)
        self.estimator = estimator
        self.length, self.reset, self.rate = args.episode_length, args.episode_reset, args.episode_reptile_rate
        self.every, self.last, self.name = args.meta_every, args.meta_last, args.estimator
        self.state: Any = None
        self._is_open = False
        self._learned: Any = None
        self._start: Tree | None = None
        self._moved = False  # whether the start is already that of the next episode
        self._trained: frozenset[str] | None = None  # the base parameters at the start of the episode

    @property
    def remembers(self) -> bool:
        """Whether the estimator observes every step."""
        return self.estimator.remembers != "nothing"

    @property
    def suspended(self) -> bool:
        """Whether the meta parameters stand still in this episode."""
        return self._is_open and self.estimator.suspended(self.state)

    def ends(self, step: int) -> bool:
        """Whether base step number `step` (from 0) is an episode's last."""
        return self.length is not None and (step + 1) % self.length == 0

    def answers(self, step: int) -> bool:
        """Whether there is a meta step with this base step: every `meta_every`-th, or at the end of an episode."""
        if self.suspended or self._is_early(step):
            return False
        return (step + 1) % self.every == 0 if self.estimator.online else self.ends(step)

    def begin_step(
        self,
        number: int,
        model: BilevelModule,
        optimizer: torch.optim.Optimizer,
        problem: Callable[[], BilevelProblem],
    ) -> None:
        """Before a base step: where an episode begins, reset the base and make the estimator's state for `problem`."""
        weights = model.base_parameters()
        begins = self.length is not None and number % self.length == 0
        if self.reset == LEARNED_START and begins:
            self._start = tree.clone(model.first_weights() or {})
            self._back_to_start(self._start, model, optimizer)
        elif self.reset != "continue":
            if self._start is None:
                self._start = tree.clone(weights)
            elif begins and number:
                self._back_to_start(self._start, model, optimizer)
        if begins:
            self._is_open = False
        if self.remembers and not self._is_open:
            self._trained, self._is_open = frozenset(weights), True
            self.state = self.estimator.init(problem(), weights, model.meta_parameters(), self._learned)
            if self.length is None and self.suspended:
                raise ValueError(
                    f"{self.estimator} fits in an episode of its own, while the meta parameters stand still: set "
                    "episode_length, the number of base steps in one, or an estimator setting that needs no fit"
                )

    def restart_from(self, weights: Tree) -> None:
        """Have the episodes to come, with `restart`, begin at these weights and no longer at the run's first."""
        self._start = tree.clone(weights)

    def observe(self, passes: PassContext, step: InnerStep) -> None:
        """Behind a base step: remember it.

        Raises:
            ValueError: where a weight was a constant at one step of an episode, and is none at another.
        """
        if self.remembers:
            self._refuse_other_parameters(frozenset(step.current))
            self.state = self.estimator.observe(passes, step, self.state)

    def move_start(self, number: int, model: BilevelModule, outer_gradient: Callable[[], Tree]) -> None:
        """Behind all of a base step: where an episode ends, find where the next one begins, and tell the model."""
        if self._start is None or not self.ends(number):
            return
        if self.reset == LEARNED_START:
            self._start = tree.clone(model.first_weights() or {})
        elif self.reset == "fomaml":
            self._step_from(self._start, model.pooled(outer_gradient()), self.rate * model.tasks)
        elif self.reset == "reptile":
            self._step_towards(self._start, model)
        self._moved = True
        model.begin_from(self._start)

    def end_step(self, number: int, passes: PassContext, step: InnerStep) -> None:
        """Behind a base step and its meta step: where an episode ends, keep what the next one may know."""
        if self.ends(number):
            self._learned = self.estimator.end_episode(passes, step, self.state)
            self.state, self._is_open = None, False

    def _is_early(self, step: int) -> bool:
        """Whether it lies before the last steps of an episode, which alone have meta steps."""
        return self.length is not None and self.last is not None and step % self.length < self.length - self.last

    def _refuse_other_parameters(self, now: frozenset[str]) -> None:
        if self._trained is None or self._trained == now or self.estimator.remembers == "meta":
            return
        raise ValueError(
            f"{min(self._trained ^ now)!r} was frozen, or set free, within an episode, whose weights the estimator "
            f"{self.name!r} remembers: do it between episodes (episode_length), or use one_step or greedy"
        )

    def state_dict(self) -> dict[str, Any]:
        """What resume needs; a trajectory is not saved, so that a run cut off within one begins a new episode."""
        keeps = self._is_open and self.estimator.remembers != "trajectory"
        held = {"learned": self._learned, "start": self._start, "moved": self._moved}
        return {"open": keeps, "state": self.state if keeps else None, **held}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._is_open, self.state, self._learned, self._start = (
            saved[key] for key in ("open", "state", "learned", "start")
        )
        self._moved = saved.get("moved", False)  # checkpoints of earlier versions moved it later

    def share(self) -> Any:
        """What of the state a checkpoint has to hold for each process by itself; None where it is nothing."""
        held = self.state_dict()["state"]
        return None if held is None else self.estimator.share(held)

    def load_share(self, share: Any) -> None:
        """Put this process's own share into the state that was loaded."""
        self.state = self.estimator.with_share(self.state, share)

    def to(self, device: torch.device) -> None:
        """Move what was loaded to the device of the weights."""
        self.state, self._learned, self._start = (
            send_to_device(held, device) for held in (self.state, self._learned, self._start)
        )

    @torch.no_grad()
    def _back_to_start(self, start: Tree, model: BilevelModule, optimizer: torch.optim.Optimizer) -> None:
        if self.reset == "reptile" and not self._moved:
            self._step_towards(start, model)
        for name, weight in model.base_parameters().items():
            weight.copy_(start[name])
        self._moved = False
        optimizer.state.clear()

    @torch.no_grad()
    def _step_towards(self, start: Tree, model: BilevelModule) -> None:
        for name, reached in model.pooled(model.base_parameters()).items():
            start[name].lerp_(reached, self.rate)

    @staticmethod
    def _step_from(start: Tree, gradient: Tree, rate: float) -> None:
        for name, leaf in gradient.items():
            start[name].sub_(leaf, alpha=rate)


def _refuse(estimator: Estimator, args: MetaTrainingArguments) -> None:
    """Refuse arguments under which the estimator could not answer, or could not be resumed."""
    offline, length = f"estimator {args.estimator!r} answers at the end of an episode", args.episode_length
    if not estimator.online:
        if length is None:
            raise ValueError(f"{offline}: set episode_length, the number of base steps in one")
        if args.meta_order != "after_step":
            raise ValueError(f"{offline}, when the step has been made: set meta_order: after_step")
        if args.meta_every != 1:
            raise ValueError(f"{offline}: leave meta_every at 1, episode_length says how often")
    if args.meta_last is not None and not (length is not None and args.meta_last <= length):
        raise ValueError(
            f"meta_last: {args.meta_last} are the last base steps of an episode, and episode_length is {length}: set "
            "episode_length to as many or more, or leave meta_last out"
        )
    if estimator.remembers == "trajectory" and length is None and args.save_strategy != SaveStrategy.NO:
        raise ValueError(
            f"estimator {args.estimator!r} keeps the last steps of the run, which no checkpoint holds: set "
            "episode_length, the number of base steps in one, or save_strategy: no"
        )
    if args.episode_reset != "continue" and length is None:
        raise ValueError(f"episode_reset: {args.episode_reset} needs episode_length, the number of base steps in one")
    if estimator.remembers == "trajectory" and length is not None and args.save_strategy != SaveStrategy.NO:
        by_steps = args.save_strategy == IntervalStrategy.STEPS and args.save_steps >= 1
        if not by_steps or args.save_steps % length:
            raise ValueError(
                f"estimator {args.estimator!r} keeps the steps of an episode, which no checkpoint holds: set "
                f"save_strategy: steps and save_steps to a multiple of episode_length ({length}), or save_strategy: no"
            )
