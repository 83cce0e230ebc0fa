"""The wheel: what it holds, and that it works from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel(tmp_path: Path) -> None:
    tree, wheels, site = tmp_path / "tree", tmp_path / "wheels", tmp_path / "site"
    run("git", "clone", "-q", str(ROOT), str(tree), cwd=tmp_path)
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "-q", "--no-deps", "-w", str(wheels), str(tree), cwd=tmp_path)
    (wheel,) = wheels.glob("*.whl")
    with ZipFile(wheel) as packed:
        held = set(packed.namelist())
        metadata = packed.read(next(name for name in held if name.endswith("/METADATA"))).decode()
    configs = {f"metaxl_evo/{path.relative_to(tree)}" for path in (tree / "configs").rglob("*.yaml")}
    assert configs == {name for name in held if name.startswith("metaxl_evo/configs/")}
    assert len(configs) > 30
    assert {"metaxl_evo/py.typed", "vision_tasks/py.typed", "metaxl_evo/experiments/report.html.jinja"} <= held
    assert not [name for name in held if name.startswith(("tests/", "scripts/", "docs/"))]
    assert (tree / "README.md").read_text(encoding="utf-8").strip() in metadata
    run(*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    elsewhere = {"PYTHONPATH": str(site)}
    command = (sys.executable, "-m", "metaxl_evo")
    assert "ner/metaxl_one_step " in run(*command, "configs", cwd=tmp_path, **elsewhere)
    options = ("--config", "quickstart", "--target_languages", "beru", "--train_size", "24", "--eval_size", "8")
    assert run(*command, "check", "ner", *options, cwd=tmp_path, **elsewhere).splitlines()[-1] == "OK"
