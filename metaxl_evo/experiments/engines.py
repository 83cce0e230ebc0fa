"""Where the runs of a study are made: in this process, or each in one of its own on this machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from metaxl_evo.experiments.folders import RESULTS
from metaxl_evo.messages import one_line
from metaxl_evo.training.preemption import Interrupted

logger = logging.getLogger(__name__)

LOG = "_run.log"  # which an upload leaves out, for its paths
TURN = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class Ended:
    """A run that is over: its number in the plan, and why it failed (None: it did not)."""

    number: int
    error: str | None = None


class Engine(Protocol):
    """Makes runs of a plan; tells each that ends, a failed one too, and None where nothing ended for a while.

    Runs end with it; an Interrupted, raised or thrown into it, lets them keep their step before.

    Args:
        plan: the file `plan.json`.
        folders: number in the plan -> folder of the run, in the order in which they are to start.
    """

    def __call__(self, plan: Path, folders: Mapping[int, Path]) -> Generator[Ended | None]: ...


def command(plan: Path, number: int) -> list[str]:
    """The command that makes one run of a plan, as a process of its own."""
    return [sys.executable, "-m", "metaxl_evo", "run", str(plan), "--index", str(number)]


@dataclass(frozen=True)
class LocalEngine:
    """Processes on this machine, among which its threads and GPUs are divided.

    Args:
        jobs: processes at a time (default: one a GPU; without any, one).
        threads: of each (default: the cores divided by `jobs`).
    """

    jobs: int | None = None
    threads: int | None = None

    def __call__(self, plan: Path, folders: Mapping[int, Path]) -> Generator[Ended | None]:
        gpus = visible_gpus()
        jobs = self.jobs or max(1, len(gpus))
        threads = self.threads or max(1, (os.cpu_count() or 1) // jobs)
        waiting, free, running = list(folders), list(range(jobs)), dict[int, RunProcess]()
        with ExitStack() as at_the_end:
            at_the_end.callback(_end_all, running)
            at_the_end.enter_context(when_told(lambda: keep_all(running.values())))
            while waiting or running:
                while waiting and free:
                    number, place = waiting.pop(0), free.pop(0)
                    own = {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}
                    environment = {"OMP_NUM_THREADS": str(threads), **own}
                    running[place] = RunProcess(plan, number, folders[number] / LOG, environment)
                over = [place for place, one in running.items() if one.code is not None]
                for place in over:
                    yield running.pop(place).ended()
                    free.append(place)
                if not over:
                    time.sleep(TURN)
                    yield None


@contextmanager
def at_work(events: Generator[Ended | None]) -> Iterator[Generator[Ended | None]]:
    """An engine that ends with this, and is told of an Interrupted that comes between two of its turns."""
    with closing(events):
        try:
            yield events
        except Interrupted as told:
            events.throw(told)
            raise


@contextmanager
def when_told(keep: Callable[[], None]) -> Iterator[None]:
    """Calls `keep` where a signal to stop ends what is inside."""
    try:
        yield
    except Interrupted:
        keep()
        raise


def keep_all(running: Collection[RunProcess]) -> None:
    """Wait until all have kept their step; Ctrl-C cuts it short."""
    if running:
        logger.warning("%d runs end their step and keep it; Ctrl-C again ends them at once", len(running))
    for one in running:
        one.stop()
    for one in running:
        one.wait()


def _end_all(running: Mapping[int, RunProcess]) -> None:
    for one in running.values():
        one.end()


class RunProcess:
    """One run in a process that ends with this one: it reads its input, whose end it sees.

    What the terminal sends to all processes does not reach it: this one passes it on by `stop`.

    Args:
        environment: variables that it has beside those of this process.
        cwd: the folder that it works in (default: that of this process).
    """

    def __init__(self, plan: Path, number: int, log: Path, environment: Mapping[str, str], cwd: Path | None = None):
        self.number, self.log = number, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [*command(plan, number), "--with_parent", "true"],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **environment},
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def ended(self) -> Ended:
        """Waits until it is over."""
        if code := self.wait():
            return Ended(self.number, why(code, self.log))
        made = (self.log.parent / RESULTS).exists()
        return Ended(self.number, None if made else f"left no {RESULTS}: was the plan replaced meanwhile?")

    def wait(self) -> int:
        """Until it is over, by turns: not every interruption of this process wakes a wait; its exit code."""
        while (code := self.code) is None:
            time.sleep(TURN)
        return code

    def stop(self) -> None:
        """Have it end its step, keep it, and end."""
        self._process.terminate()

    def end(self) -> None:
        """Whatever it does."""
        self._process.kill()
        self._process.wait()


def why(code: int, log: Path) -> str:
    """Why a process ended with this code: the signal, or the last line that it said."""
    if code < 0:
        return f"ended by signal {-code} (see {log})"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit code {code}"]
    return f"{one_line(lines[-1]).removeprefix('error: ')} (see {log})"


def visible_gpus() -> list[str]:
    """The names by which processes of their own see the GPUs of this one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]
