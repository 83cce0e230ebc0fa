"""What stands still in passes at perturbed weights: inputs that are recorded once and replayed.

`stop_gradient` says so by name. A plain `Tensor.detach` means the same, and is replayed likewise where the value test
(`bilevel.value_test`) has found that it has to be, and that it works.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor

IDLE = 20  # batches of a kind that show nothing, after which the rest are taken for such, too


@dataclass
class Tested:
    """On which kinds of batches something was found to be right, and for which names of its arguments.

    A batch that shows nothing (no labelled token, no row that reads lam) says nothing about the next of its kind.
    """

    names: dict[Hashable, frozenset[Hashable]] = field(default_factory=dict)
    idle: Counter[Hashable] = field(default_factory=Counter)

    def covers(self, kind: Hashable, names: frozenset[Hashable]) -> bool:
        return names <= self.names.get(kind, frozenset())

    def note(self, kind: Hashable, names: frozenset[Hashable], showed: bool) -> None:
        """Take a test that was passed on a batch of this kind into account."""
        self.idle[kind] += not showed
        if showed or self.idle[kind] >= IDLE:
            self.names[kind] = self.names.get(kind, frozenset()) | names


def kind_of(part: Any) -> Hashable:
    """What tells batches apart by which a loss may take another way: their keys."""
    kind: Any = frozenset(part) if isinstance(part, Mapping) else type(part)
    return cast(Hashable, kind)


@dataclass
class Facts:
    """What is found out about the inner loss of a problem on the way, once a run.

    Args:
        loss: the function that they are about; a problem with another one starts anew.
        evaluated: it gave a number once, so that what fails later is not the loss itself.
        stop_gradients: a pass has called `stop_gradient`.
        replay_detach: plain `Tensor.detach` is replayed too.
        trusted: the base parameters along which the value test passed.
        engine: the one that `auto` takes.
        twice: double backward works.
        batched: a cut's suffix can be evaluated at several weights in one pass, with the same numbers (None: not known
            yet).
        batched_whole: so can the whole loss.
        made: how many numbers one evaluation makes, by the shapes of its batch.
        forward_ad: the arguments by whose gradient forward mode was seen to agree with double backward.
    """

    loss: Any = None
    evaluated: bool = False
    stop_gradients: bool = False
    replay_detach: bool = False
    trusted: Tested = field(default_factory=Tested)
    engine: str | None = None
    twice: bool = False
    batched: bool | None = None
    batched_whole: bool | None = None
    made: dict[Hashable, int] = field(default_factory=dict)
    forward_ad: Tested = field(default_factory=Tested)


class Inputs(Enum):
    """What `stop_gradient` does in a pass."""

    LIVE = "live"
    RECORD = "record"
    REPLAY = "replay"


@dataclass
class Tape:
    """What a pass over one part recorded: the inputs of `stop_gradient` by their place, and what it gave to `keep`."""

    recorded: bool = False
    detaches: bool = False  # with those of plain detaches
    inputs: dict[Hashable, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None


@dataclass
class _Pass:
    """The running pass: its recording tape and the managers that end with it."""

    inputs: Inputs
    tape: Tape
    facts: Facts
    stack: ExitStack
    calls: Iterator[int] = field(default_factory=count)
    detaches: Iterator[int] = field(default_factory=count)


_DETACH = Tensor.detach  # that of torch, whatever stands in its place during a pass
_CURRENT = "metaxl_evo_pass"  # of the thread; autograd hands it on to those in which a device's backward runs


class Unrecorded(RuntimeError):
    """A perturbed pass asks for an input that no pass has recorded."""


@contextmanager
def running(inputs: Inputs, tape: Tape, facts: Facts, stack: ExitStack) -> Iterator[None]:
    """Make a pass the current one, for what its backward computes again as well."""
    before = _current_pass()
    torch._C._stash_obj_in_tls(_CURRENT, _Pass(inputs, tape, facts, stack))
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(_CURRENT, before)


def _current_pass() -> _Pass | None:
    return torch._C._get_obj_in_tls(_CURRENT) if torch._C._is_key_in_tls(_CURRENT) else None


def stop_gradient(x: Tensor, key: Hashable | None = None) -> Tensor:
    """`x.detach()`, except that a perturbed pass returns the value recorded at the unperturbed weights.

    A meta network that reads a detached activation has a mixed partial which only sees its parameters at that very
    activation. Finite differences and EvoGrad would see the activation move with the weights; replaying the recorded
    one makes them estimate the same quantity as exact differentiation does.

    Args:
        x: the activation.
        key: the place of the call in the loss, one call a key and pass. Without keys the calls are told apart by their
            order, which activation checkpointing upsets: inside a function that the backward computes again a key is
            needed.

    Raises:
        RuntimeError: where a pass brings another value for a key that it recorded, or asks for what was not recorded.
    """
    current = _current_pass()
    if current is None:
        return _detached(x)
    current.facts.stop_gradients = True
    return _still(current, x, ("call", next(current.calls)) if key is None else ("key", key))


def _detached(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():  # a mode would look the method up by its name
        return _DETACH(x)


def _still(current: _Pass, x: Tensor, place: tuple[str, Hashable]) -> Tensor:
    """`x` outside the graph; recorded, or as it was recorded."""
    inputs, (kind, key) = current.tape.inputs, place
    if current.inputs is Inputs.LIVE:
        return _detached(x)
    if current.inputs is Inputs.RECORD:
        if place not in inputs:
            inputs[place] = _detached(x).clone()
        elif not _identical(inputs[place], x):
            raise RuntimeError(
                f"stop_gradient was given two different values with key {key!r} in one pass: "
                "give each call in the loss a key of its own"
            )
        return _detached(x)
    if place not in inputs:
        raise (RuntimeError if current.tape.recorded else Unrecorded)(
            f"a perturbed pass calls {'detach' if kind == 'detach' else 'stop_gradient'} more often than the recorded "
            f"one{f', with key {key!r}' if kind == 'key' else ''}: the loss must make the same calls each time, "
            "with a key where activation checkpointing repeats them"
        )
    return inputs[place]


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; a NaN is one of them."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@contextmanager
def plain_detaches() -> Iterator[None]:
    """Around the loss of a task, and nothing else: replay its plain detaches where this run does so.

    The method itself is exchanged, since a `TorchFunctionMode` does not see into functions that torch overrides as a
    whole (`gumbel_softmax`). What runs elsewhere, another thread or the backward of another pass, is left alone.
    """
    current = _current_pass()
    if current is None or current.inputs is Inputs.LIVE or not current.facts.replay_detach:
        yield
        return

    def detach(x: Tensor) -> Tensor:
        return _still(current, x, ("detach", next(current.detaches))) if _current_pass() is current else _detached(x)

    before = Tensor.detach, torch.detach
    Tensor.detach = torch.detach = detach  # type: ignore
    try:
        yield
    finally:
        Tensor.detach, torch.detach = before


def keep(x: Tensor) -> None:
    """Offer the hidden states that a cut's prefix would compute; a recording pass keeps them."""
    current = _current_pass()
    if current is not None and current.inputs is Inputs.RECORD:
        current.tape.kept = _detached(x)


@contextmanager
def for_this_pass(manager: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter `manager` until the current pass ends, its backward included; outside any pass, for the `with` block."""
    current = _current_pass()
    if current is None:
        with manager:
            yield
    else:
        current.stack.enter_context(manager)
        yield
