"""The runs of a study on a Ray cluster: each is a remote task, and one that is lost with its node is made again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import create_connection, gethostname
from typing import Any

from metaxl_evo.experiments.engines import LOG, TURN, Ended, RunProcess, keep_all, when_told
from metaxl_evo.experiments.folders import RESULTS
from metaxl_evo.messages import one_line

try:
    import ray
except ImportError as missing:
    raise ValueError("engine ray needs Ray: pip install 'metaxl_evo[ray]'") from missing

PATIENCE = 10.0  # seconds
SHARED = "output_dir must be on a filesystem that all nodes see, under the same path"


@dataclass(frozen=True)
class RayEngine:
    """Remote tasks of the Ray cluster at RAY_ADDRESS, or of the one that runs here; without one, Ray starts it here.

    The study's folder must be on a filesystem that all nodes see, and the working folder and what is installed the
    same on all; of the environment, PYTHONPATH goes along. Each run has a GPU to itself where the cluster has any. One
    whose worker or node is lost is made again where there is room, from its last checkpoint on. How often Ray repeats
    a run that needs more memory than there is, its own `RAY_task_oom_retries` says.

    Args:
        jobs: runs at a time (default: as many as there is room for).
        threads: of each, and the cores that it takes of its node (default: one).
        retries: how often a run is made again whose worker or node was lost.

    Raises:
        ValueError: where no cluster can be joined, or none of its nodes has room for a run.
    """

    jobs: int | None = None
    threads: int | None = None
    retries: int = 3

    def __call__(self, plan: Path, folders: Mapping[int, Path]) -> Generator[Ended | None]:
        waiting = list(folders)
        running: dict[ray.ObjectRef[Ended], int] = {}
        with _cluster(), ExitStack() as at_the_end:
            at_the_end.callback(_cancel, running)
            at_the_end.enter_context(when_told(lambda: _keep(running)))
            make = _make.options(max_retries=self.retries, **_room(self.threads or 1))
            while waiting or running:
                while waiting and len(running) < (self.jobs or len(folders)):
                    number = waiting.pop(0)
                    log = folders[number].absolute() / LOG
                    running[make.remote(plan.absolute(), number, log, self.threads or 1, Path.cwd())] = number
                over, _ = ray.wait(list(running), timeout=TURN)
                for task in over:
                    number = running.pop(task)
                    yield _ended(task, number, folders[number])
                if not over:
                    yield None


@contextmanager
def _cluster() -> Iterator[None]:
    """Joined for a while, unless this process is in one already."""
    if ray.is_initialized():
        yield
        return
    try:
        _call(os.environ.get("RAY_ADDRESS", ""))
        _join()
    except Exception as error:  # of many kinds
        raise ValueError(f"engine ray: no cluster can be joined ({one_line(error)}): see RAY_ADDRESS") from error
    try:
        yield
    finally:
        ray.shutdown()


def _join() -> None:
    """As `ray.init`, which takes SIGTERM for itself, where that is allowed."""
    before = signal.getsignal(signal.SIGTERM)
    ray.init()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _call(address: str) -> None:
    """Where nobody answers, Ray itself would try for twenty minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()


def _keep(tasks: Collection[ray.ObjectRef[Ended]]) -> None:
    """Wait until all have kept their step; Ctrl-C cuts it short."""
    for task in tasks:
        ray.cancel(task)
    if tasks:
        ray.wait(list(tasks), num_returns=len(tasks))


def _cancel(tasks: Collection[ray.ObjectRef[Ended]]) -> None:
    """Those that are not over: of one that has just ended, Ray may end this process (its pull request 54785)."""
    _, left = ray.wait(list(tasks), num_returns=len(tasks), timeout=0) if tasks else ([], [])
    for task in left:
        ray.cancel(task, force=True)


def _room(threads: int) -> dict[str, Any]:
    """What Ray is to keep free for a run, and set for it, as options of a remote task."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int("GPU" in ray.cluster_resources())
    cores = max(int(node.get("CPU", 0)) for node in nodes if node.get("GPU", 0) >= gpus)
    if threads > cores:  # the task would wait for ever
        raise ValueError(f"threads: a run needs {threads} cores of a node, and the largest has {cores}: give fewer")
    environment = {name: os.environ[name] for name in ["PYTHONPATH"] if name in os.environ}
    return {"num_cpus": threads, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}


@ray.remote
def _make(plan: Path, number: int, log: Path, threads: int, cwd: Path) -> Ended:
    """Make a run in a process of its own, as elsewhere: Ray uses its worker again, and that must stay clean."""
    if not plan.exists():
        return Ended(number, f"{gethostname()} does not see {plan}: {SHARED}")
    process = RunProcess(plan, number, log, {"OMP_NUM_THREADS": str(threads)}, cwd)
    try:
        return process.ended()
    except KeyboardInterrupt:  # cancelled
        keep_all([process])
        raise
    finally:
        process.end()


def _ended(task: ray.ObjectRef[Ended], number: int, folder: Path) -> Ended:
    """How a task that is over ended, and whether what it left behind is to be seen here."""
    try:
        ended: Ended = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        return Ended(number, one_line(error.cause))
    except ray.exceptions.RayError as error:
        return Ended(number, one_line(error))
    # A network filesystem may remember that a file was missing, but not for a folder that is listed.
    if ended.error is None and RESULTS not in os.listdir(folder):
        return Ended(number, f"{folder / RESULTS} is not to be seen here: {SHARED}")
    return ended
