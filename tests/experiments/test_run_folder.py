"""The life of a run's folder: what its files make of it, what may be done in it, and who makes it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from metaxl_evo.experiments.folders import RESULTS, write_results
from metaxl_evo.experiments.run_folder import (
    HOLDER,
    LOCK,
    MARK,
    OWN_FILES,
    PASSING,
    Mark,
    State,
    alone,
    note_published,
    refuse_above,
    refuse_inputs,
    refuse_other,
    refuse_run,
    state_of,
)
from metaxl_evo.training.checkpoint import seal
from metaxl_evo.training.history import HISTORY

SETTINGS, DATA = {"learning_rate": 0.1, "max_steps": 3}, {"train": "0a"}
ANOTHER = r"holds another run \({}\): choose another output_dir, or set resume_from_checkpoint: latest"
FOREIGN = "holds {}, and no run to resume: choose another output_dir"
SEVERAL = r"holds several runs \({}\): choose another output_dir for a single one"


def touch(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine", encoding="utf-8")


def begun(folder: Path) -> None:
    Mark(SETTINGS, DATA).write(folder)


def with_checkpoint(folder: Path) -> None:
    """As an earlier version left it, which wrote no mark."""
    (folder / "checkpoint-4").mkdir(parents=True)
    seal(folder / "checkpoint-4", {}, 1)


def finished(folder: Path) -> None:
    """Of an earlier version."""
    touch(folder, "config.json", "model.safetensors")
    write_results(folder, {"test": {}, "settings": SETTINGS, "run": {}})


def published(folder: Path) -> None:
    finished(folder)
    note_published(folder, "me/tagger")


def above_several(folder: Path) -> None:
    begun(folder / "evo/one/3")
    write_results(folder, {"test": {}, "settings": {}, "run": {}})
    touch(folder, "report.md")


def foreign(*files: str) -> Callable[[Path], None]:
    return lambda folder: touch(folder, *files)


SIGNS = {name: name for name in (*OWN_FILES, *PASSING, "own.json", MARK, "below/config.json")}
SIGNS |= {f"{name}/weights": name for name in ("checkpoint-7", "checkpoint-²")}
LIVES: dict[str, tuple[Callable[[Path], None], State, str | None, str | None]] = {  # with its refusals: start, resume
    "nothing": (lambda folder: None, State.EMPTY, None, None),
    "other names": (foreign("notes.txt", "a/b/results.json"), State.EMPTY, None, None),
    "begun": (begun, State.INTERRUPTED, None, None),
    "checkpoint": (with_checkpoint, State.INTERRUPTED, ANOTHER.format("checkpoint-4"), None),
    "finished": (finished, State.FINISHED, ANOTHER.format(RESULTS), None),
    "published": (published, State.PUBLISHED, ANOTHER.format(RESULTS), None),
    "several": (above_several, State.FINISHED, *[SEVERAL.format("evo/one/3")] * 2),
    **{name: (foreign(name), State.FOREIGN, *[FOREIGN.format(sign)] * 2) for name, sign in SIGNS.items()},
}


@pytest.mark.parametrize("life", LIVES)
def test_what_a_folder_is_and_what_may_be_done_in_it(tmp_path: Path, life: str) -> None:
    make, state, start, resume = LIVES[life]
    make(folder := tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert state_of(folder, ["own.json"]) is state
    for resuming, message in ((False, start), (True, resume)):
        if message is None:
            refuse_run(folder, resuming, ["own.json"])
        else:
            with pytest.raises(ValueError, match=rf"run {message}"):
                refuse_run(folder, resuming, ["own.json"])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_lives_are_these() -> None:
    assert len(LIVES) == 7 + len(OWN_FILES) + len(PASSING) + 5
    assert {state for _, state, *_ in LIVES.values()} == {*State} - {State.RUNNING}


ABOVE: dict[str, tuple[Callable[[Path], None], str | None, str | None]] = {
    "nothing": (foreign("notes.txt"), None, None),
    "several": (above_several, ANOTHER.format(RESULTS), None),
    "cut off": (lambda folder: begun(folder / "evo/3"), None, None),
    "cut off in its report": (
        lambda folder: (begun(folder / "evo/3"), touch(folder, "report.md"))[0],
        ANOTHER.format("report.md"),
        None,
    ),
    "single": (finished, *["holds a single run: choose another output_dir for several"] * 2),
    "single, begun": (begun, *["holds a single run: choose another output_dir for several"] * 2),
    "results": (foreign(RESULTS), *[FOREIGN.format(RESULTS)] * 2),
    "report": (foreign("report.md"), *[FOREIGN.format("report.md")] * 2),
    "below": (foreign("below/config.json"), FOREIGN.format("below/config.json"), None),
}


@pytest.mark.parametrize("life", ABOVE)
def test_what_may_be_done_above_several_runs(tmp_path: Path, life: str) -> None:
    make, start, resume = ABOVE[life]
    make(folder := tmp_path / "run")
    for resuming, message in ((False, start), (True, resume)):
        if message is None:
            refuse_above(folder, resuming, ["report.md"])
        else:
            with pytest.raises(ValueError, match=rf"run {message}"):
                refuse_above(folder, resuming, ["report.md"])


@pytest.mark.parametrize("resuming", [False, True])
def test_what_can_be_no_folder_is_refused(tmp_path: Path, resuming: bool) -> None:
    touch(tmp_path, "file")
    for refuse in (refuse_run, refuse_above):
        with pytest.raises(ValueError, match="file is a file: choose another output_dir"):
            refuse(tmp_path / "file", resuming)
        with pytest.raises(ValueError, match=r"output_dir cannot be made \(.*too long.*\): choose another"):
            refuse(tmp_path / ("a" * 300), resuming)


def test_what_is_read_from_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    refuse_inputs(Path("absent"), {"data": "absent"})
    refuse_inputs(Path("model"), {"data": "models", "encoder": None})
    for text in ("model", str(tmp_path / "model"), "./model/"):
        with pytest.raises(
            ValueError, match=r"^output_dir is data \(.*model/?\), which would be overwritten: choose an"
        ):
            refuse_inputs(Path("model"), {"data": text})


def test_what_was_begun_goes_on_with_its_own_settings_and_data(tmp_path: Path) -> None:
    begun(tmp_path)
    touch(tmp_path, HISTORY)
    refuse_other(tmp_path, {"learning_rate": 0.2}, {"train": "0b"})  # there is nothing to lose
    touch(tmp_path, "model.safetensors")
    refuse_other(tmp_path, SETTINGS | {"max_steps": 9, "output_dir": "moved"}, DATA)
    with pytest.raises(ValueError, match="was made with another learning_rate: give the settings of that run"):
        refuse_other(tmp_path, {"learning_rate": 0.2}, DATA)
    with pytest.raises(ValueError, match="was made with another train data: give the data of that run"):
        refuse_other(tmp_path, SETTINGS, {"train": "0b"})


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"settings": 1, "data": {}}', "[" * 200_000])
def test_what_is_no_mark(tmp_path: Path, text: str) -> None:
    (tmp_path / MARK).write_text(text, encoding="utf-8")
    assert Mark.read(tmp_path) is None
    assert state_of(tmp_path) is State.FOREIGN


HOLDING = """
import os, signal, sys
from pathlib import Path
from metaxl_evo.experiments.run_folder import alone

with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_process_holds_a_folder_as_long_as_it_lives(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holding:
        assert holding.stdout is not None
        assert holding.stdout.readline() == b"held\n"
        assert state_of(tmp_path) is State.RUNNING
        named = rf"process {holding.pid} on {socket.gethostname()} makes this run: wait for it, or end it$"
        with pytest.raises(ValueError, match=named), alone(tmp_path):
            raise AssertionError("two hold it")
        begun(tmp_path)
        touch(tmp_path, "model.safetensors")
        with pytest.raises(ValueError, match=named):  # and not that there is another run
            refuse_run(tmp_path, resuming=False)
        holding.kill()
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, HOLDER, MARK, "model.safetensors"}
    assert state_of(tmp_path) is State.INTERRUPTED
    with alone(tmp_path):
        assert (tmp_path / HOLDER).read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")
    assert {path.name for path in tmp_path.iterdir()} == {MARK, "model.safetensors"}


@pytest.mark.parametrize("name", PASSING)
def test_files_of_the_users_do_not_pass(tmp_path: Path, name: str) -> None:
    """Though they are called like those that are there while a run is made."""
    begun(tmp_path)
    (tmp_path / name).mkdir()
    for make in (lambda: None, lambda: ((tmp_path / name).rmdir(), touch(tmp_path, name))):
        make()
        with pytest.raises(ValueError, match=f"holds {name}, and no run to resume"), alone(tmp_path):
            raise AssertionError("it is made")
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


def test_a_link_to_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "link", tmp_path / "link/below"):
        with pytest.raises(ValueError, match=r"link is a link to .*gone, which is not there: choose"), alone(folder):
            raise AssertionError("it is made")


def test_a_mark_says_what_a_run_is_made_with(tmp_path: Path) -> None:
    begun(tmp_path)
    assert json.loads((tmp_path / MARK).read_text()) == {"settings": SETTINGS, "data": DATA, "published": None}
