"""Scripts run side by side: their threads, their logs, and what is said of one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaxl_evo.training.reproduction import find, run_scripts


def script(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_scripts_run_on_one_thread_each_and_leave_a_log(tmp_path: Path) -> None:
    says = script(tmp_path, "says.py", "import os, sys\nprint(os.environ['OMP_NUM_THREADS'], *sys.argv[1:])\n")
    logs = {tmp_path / f"logs/{name}.log": (says, ["--name", name]) for name in "ab"}
    run_scripts(logs, jobs=2)
    assert [log.read_text(encoding="utf-8") for log in logs] == ["1 --name a\n", "1 --name b\n"]


def test_a_script_that_fails_is_named_when_the_others_are_done(tmp_path: Path) -> None:
    fails = script(tmp_path, "fails.py", "import sys\nprint('why', file=sys.stderr)\nsys.exit(3)\n")
    ends = script(tmp_path, "ends.py", "import sys\nopen(sys.argv[1], 'w').close()\n")
    logs = {tmp_path / "a.log": (fails, []), tmp_path / "b.log": (ends, [str(tmp_path / "done")])}
    with pytest.raises(ValueError, match=r"^fails.py failed: see .*a.log$"):
        run_scripts(logs, jobs=1)
    assert (tmp_path / "a.log").read_text(encoding="utf-8") == "why\n"
    assert (tmp_path / "done").exists()


def test_places_are_looked_for_in_order(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert find(tmp_path, "data/images", "images") == tmp_path / "images"
    with pytest.raises(ValueError, match=r"has no a or b: give --data \(DATA=...\) the folder that holds it$"):
        find(tmp_path, "a", "b")
