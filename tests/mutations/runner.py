"""Makes the mutations one at a time, each in a copy of the repository, and runs the tests that are to notice it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest

from tests.mutations import MUTATIONS, Mutation, place_of

REPOSITORY = Path(__file__).resolve().parents[2]
PROCESSES = 2
VERDICTS = {0: "SURVIVED", 1: "killed"}  # by pytest's exit status; any other one is of tests that could not be run
RAN = 100  # is added to it, so that a process that died on its way is no failed test
FORKSERVER = multiprocessing.get_context("forkserver")  # importing the libraries takes longer than most of the tests
FORKSERVER.set_forkserver_preload(["pytest", "torch", "transformers.trainer", "peft", "evaluate", "scipy.stats"])


def main(names: Sequence[str]) -> int:
    """Judge the mutations of these names, or all; the number of those that are not killed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("METAXL_SHARED", str(REPOSITORY.parent / "shared"))
    unknown = set(names) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        sys.exit(f"no mutation is called {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    with tempfile.TemporaryDirectory() as scratch:
        copies = [_copy(Path(scratch) / str(number)) for number in range(PROCESSES)]
        _require_passing(copies, chosen)
        trees: Queue[Path] = Queue()  # those that no test runs in
        for tree in copies:
            trees.put(tree)
        with ThreadPoolExecutor(PROCESSES) as pool:
            verdicts = list(pool.map(lambda mutation: _judged(mutation, trees), chosen))
    print(f"{verdicts.count('killed')} of {len(verdicts)} mutations were killed")
    return len(verdicts) - verdicts.count("killed")


def _copy(tree: Path) -> Path:
    """The files of the working tree, but for those that git ignores."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=REPOSITORY, text=True).split("\0"):
        if name and (REPOSITORY / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, tree / name)
    return tree


def _require_passing(trees: Sequence[Path], mutations: Sequence[Mutation]) -> None:
    """End here where the tests fail as things are, and nothing can be said of mutations."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    shares = [tests[number :: len(trees)] for number in range(len(trees))]
    with ThreadPoolExecutor(len(trees)) as pool:
        for status, output in pool.map(_run, trees, filter(None, shares)):
            if status:
                sys.exit(f"{output}\nthe tests do not pass as things are")


def _judged(mutation: Mutation, trees: Queue[Path]) -> str:
    tree, begun = trees.get(), time.monotonic()
    try:
        with _made(mutation, tree):
            status, output = _run(tree, mutation.tests)
        verdict = VERDICTS.get(status, f"BROKEN\n{output}")
    except LookupError as error:
        verdict = f"STALE: {error}"
    finally:
        trees.put(tree)
    print(f"{mutation.name} ({mutation.room}, {time.monotonic() - begun:.0f} s): {verdict}", flush=True)
    return verdict


@contextmanager
def _made(mutation: Mutation, tree: Path) -> Iterator[None]:
    file = place_of(mutation, tree)
    text, times = file.read_text(encoding="utf-8"), file.stat()
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(text, encoding="utf-8")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # what was compiled of it is right again


def _run(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status and output up to the first failure, of these tests; of whole files not of slow ones."""
    with tempfile.NamedTemporaryFile(mode="r", encoding="utf-8") as output:
        process = FORKSERVER.Process(target=_pytest, args=(tree, tests, output.name))
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode - RAN, output.read()


def _pytest(tree: Path, tests: Sequence[str], output: str) -> None:
    """In a process of its own, in which nothing of the library is imported yet."""
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(REPOSITORY)))]
    os.environ["PYTHONPATH"] = str(tree)
    named, status = [test for test in tests if "::" in test], 0  # slow or not
    files = [test for test in tests if "::" not in test]
    for chosen, options in ((named, []), (files, ["-m", "not slow"])):
        if chosen and not status:
            paths = [f"tests/{test}" for test in chosen]
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *options, *paths]))
    sys.exit(RAN + status)
