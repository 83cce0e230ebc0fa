"""Signals to stop: a training ends behind its step, with a checkpoint; whatever else runs ends at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

from metaxl_evo.messages import first_line

logger = logging.getLogger(__name__)

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # of schedulers, of a terminal, of SLURM's --signal
SIGNALS = [one for one in signal.Signals if one.name in NAMES]  # of those that the system has
TWICE = 1.0  # seconds within which a launcher passes on what the terminal has sent to all
GO_ON = "go on with resume_from_checkpoint: latest"


class Interrupted(SystemExit, KeyboardInterrupt):
    """Told to stop. Code may catch it as a KeyboardInterrupt; uncaught, the process ends with `code`.

    Args:
        text: one line, how to go on in it. A SystemExit beside whose code it stands would not print it: `say` does.
        code: 75, which asks to be started again, or another.
    """

    def __init__(self, text: str, code: int = TRY_AGAIN):
        super().__init__(code)
        self._text, self._said = text, False

    def __str__(self) -> str:
        return self._text

    def say(self, aloud: bool = True) -> Self:
        """Print the line, once; not `aloud`, let nobody print it."""
        if aloud and not self._said:
            logger.warning("%s", self._text)
        self._said = True
        return self


class Handler:
    """Acts on the first signal; a second Ctrl-C raises KeyboardInterrupt, other repetitions say nothing new."""

    def __init__(self, act: Callable[[signal.Signals], None]):
        self._act, self._process = act, os.getpid()
        self._first: float | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a fork, which has nothing to keep
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self._first is None:
            self._first = time.monotonic()
            self._act(signal.Signals(number))
        elif number == signal.SIGINT and time.monotonic() > self._first + TWICE:
            raise KeyboardInterrupt


@contextmanager
def on_signal(act: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Inside, the first signal calls `act`; afterwards the handlers are those of before.

    Handlers that somebody else has set stay, signals that are ignored too. Nothing in other threads than the main one,
    which alone can handle signals.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {one: held for one in SIGNALS if _is_free(held := signal.getsignal(one))}
    handler = Handler(act)
    try:
        for one in before:
            signal.signal(one, handler)
        yield
    finally:
        for one, held in before.items():
            signal.signal(one, held)


def _is_free(held: Any) -> bool:
    return held in (signal.SIG_DFL, signal.default_int_handler) or isinstance(held, Handler)


def stop_at_once(number: signal.Signals) -> None:
    """Raises Interrupted, with a line that says how to go on."""
    raise Interrupted(f"stopped by {number.name}: start it again; a training may {GO_ON}")


class Preemption:
    """Whether this process was told to stop, in one training that looks for it between steps.

    Attributes:
        told: the first signal that came.
    """

    def __init__(self) -> None:
        self.told: signal.Signals | None = None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Around a training. A signal behind its last step is passed on to the handler of before.

        Raises:
            Interrupted: in place of an error, once a signal has come: it may have ended what the training needs.
        """
        try:
            with on_signal(self._note):
                yield
        except Exception as error:
            if self.told is None:
                raise
            text = f"stopped by {self.told.name} within a step, which keeps nothing ({first_line(error)}): {GO_ON}"
            raise Interrupted(text).say() from error
        if self.told is not None:
            signal.raise_signal(self.told)

    def _note(self, number: signal.Signals) -> None:
        self.told = number
        if number == signal.SIGINT:  # somebody waits at the terminal; a handler must not print as others do
            os.write(2, b"\nthe step comes to its end, and is kept; Ctrl-C again ends it at once\n")


def shield_workers(loader: Any) -> None:
    """Have the workers of a data loader outlive a signal that is sent to all processes of a run.

    Without them the step could not be ended.
    """
    loader = getattr(loader, "base_dataloader", loader)  # of accelerate's
    loader.worker_init_fn = partial(_shielded, loader.worker_init_fn)


def _shielded(init: Callable[[int], None] | None, worker: int) -> None:
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _once)
    if init is not None:
        init(worker)


def _once(number: int, frame: Any) -> None:
    """Of SIGTERM the first is ignored alone: a loader that ends sends two to a worker that hangs."""
    signal.signal(number, signal.SIG_DFL)
