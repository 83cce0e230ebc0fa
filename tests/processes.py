"""Several real processes of one gloo group, started from a server that has imported what they need."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.training.tiny", "tests.training.test_episodes", "peft"])


def on_processes(count: int, worker: Callable[..., Any], *args: Any, timeout: float = 280) -> list[Any]:
    """What `worker(*args)` returns on each of `count` processes, by rank; a failure on one fails the test.

    The worker is a function of a module, and finds RANK, WORLD_SIZE and the like as under torchrun.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        files = [Path(folder) / f"{rank}.pt" for rank in range(count)]
        processes = [
            FORKSERVER.Process(target=_run, args=(rank, count, port, file, worker, args))
            for rank, file in enumerate(files)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        while any(p.is_alive() for p in processes) and time.monotonic() < end:
            if any(p.exitcode for p in processes):
                break  # the others wait for it in vain
            time.sleep(0.05)
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
        for process in processes:
            process.join()
        found = [torch.load(file, weights_only=False) if file.exists() else {} for file in files]
    errors = [f"process {rank}: {one['error']}" for rank, one in enumerate(found) if "error" in one]
    assert not errors, "\n".join(errors)
    assert not late, f"{len(late)} of {count} processes did not end in {timeout} s"
    return [one["result"] for one in found]


def _run(rank: int, count: int, port: int, file: Path, worker: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()  # what the server has imported
    torch.set_num_threads(1)
    join(rank, count, port)
    try:
        found = {"result": worker(*args)}
    except BaseException:
        torch.save({"error": traceback.format_exc()}, file)
        raise SystemExit(1) from None
    torch.save(found, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def join(rank: int, count: int, port: int) -> None:
    """What torchrun tells a process of its group."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
