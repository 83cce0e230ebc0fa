"""Many runs of scripts side by side, each a process of its own, as the commands behind the results pages need them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm


def find(data: Path, *places: str) -> Path:
    """The first of the places that exists below `data`.

    Raises:
        ValueError: where none does.
    """
    for place in places:
        if (data / place).exists():
            return data / place
    raise ValueError(f"{data} has no {' or '.join(places)}: give --data (DATA=...) the folder that holds it")


def run_script(script: Path, options: Sequence[str], log: Path) -> None:
    """Run a script on one thread to its end; what it says goes into `log`.

    Raises:
        ValueError: where it fails, with the place of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(
            [sys.executable, str(script), *options],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).returncode
    if code:
        raise ValueError(f"{script.name} failed: see {log}")


def run_scripts(commands: Mapping[Path, tuple[Path, Sequence[str]]], jobs: int) -> None:
    """Run all commands (log -> script and options), so many at a time.

    Raises:
        ValueError: where one fails, once the others are done.
    """
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda log: run_script(*commands[log], log), commands)
        list(tqdm(done, total=len(commands), desc="runs"))
