"""How a script begins and ends: no bars in a log file; where its input is bad, or it is told to stop, one line."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Sequence
from typing import TypeVar

from metaxl_evo.messages import one_line
from metaxl_evo.training.logs import hide_unwatched_bars
from metaxl_evo.training.preemption import Interrupted, on_signal, stop_at_once

Result = TypeVar("Result")
CUT_OFF = 128 + signal.SIGINT  # as shells have it


class SettingsError(SystemExit, ValueError):
    """Bad input. Code may catch it as a ValueError; uncaught, it ends a script with its one line, no traceback."""


def ends_with_one_line(main: Callable[[Sequence[str] | None], Result]) -> Callable[..., Result]:
    """Decorates the `main` of a script: bad input ends it with one line, whether it is run or called; signals too."""

    @functools.wraps(main)
    def ended(argv: Sequence[str] | None = None) -> Result:
        hide_unwatched_bars()
        try:
            with on_signal(stop_at_once):
                return main(argv)
        except Interrupted as stop:
            stop.say()
            raise
        except KeyboardInterrupt as stop:
            raise Interrupted("stopped at once: what was complete is kept", CUT_OFF).say() from stop
        except (ValueError, OSError, FloatingPointError) as error:
            raise SettingsError(f"error: {one_line(error)}") from error

    return ended
