"""Each script of `examples/` runs as it is, in seconds, and what it prints shows that it has learned."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
LINES = 40  # of a script, at most
ADAPTS = ["maml_regression", "meta_sgd_regression"]


def printed(script: Path, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_are_found_and_short() -> None:
    assert [script.stem for script in SCRIPTS] == ADAPTS
    for script in SCRIPTS:
        assert len(script.read_text("utf-8").splitlines()) <= LINES, script.name


@pytest.mark.parametrize("name", ADAPTS)
def test_adaptation_is_learned(name: str, tmp_path: Path) -> None:
    lines = printed(ROOT / f"examples/{name}.py", tmp_path).splitlines()
    losses = [tuple(map(float, re.findall(r"\d+\.\d+", line))) for line in lines]
    assert len(losses) == 3
    (_, first), (before, after) = losses[0], losses[-1]
    assert after < before / 2
    assert after < first / 2
