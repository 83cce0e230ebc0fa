"""Runs in processes of their own: the same numbers, one that dies, and a study that is killed again and again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import pytest

from metaxl_evo.cli import main
from metaxl_evo.experiments import engines
from metaxl_evo.training.preemption import Interrupted
from tests.experiments.own_task import ROOT, write_own_task

FIELDS = ["--max_steps", "4", "--logging_steps", "2", "--task", "trust.py:Unwell", "--threads", "1"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_own_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def options(out: str, *further: str) -> list[str]:
    return ["study", "trust.yaml", "--output_dir", out, *FIELDS, *further]


def scores(out: str) -> dict[str, Any]:
    tests: dict[str, Any] = json.loads(Path(out, "results.json").read_text(encoding="utf-8"))["test"]
    return tests


def finished(out: str) -> int:
    """How many runs of this study are."""
    return len(list(Path(out).glob("*/*/*/results.json")))


def processes_of(out: str) -> list[psutil.Process]:
    """Those that make runs of this study."""
    found = []
    for one in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(one.info["cmdline"] or ())
        if str(Path(out) / "plan.json") in line and one.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(one)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_make_the_same_numbers_and_one_that_dies_harms_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = {"dies": {"method": "dies"}, "one_step": {"estimator": "one_step"}}
    given = ["--cases.two", "null", "--seeds", "0", "--runs"]
    assert main(options("local", "--jobs", "2", *given, json.dumps({"baseline": None, **runs}))) == 1
    assert "dies, one, seed 0: ended by signal 9 (see local/dies/one/0/_run.log)" in capsys.readouterr().out
    main(options("inline", "--engine", "inline", *given, json.dumps({"baseline": None, "one_step": runs["one_step"]})))
    assert scores("local") == scores("inline")
    assert not processes_of("local")


@pytest.mark.parametrize(("named", "expected"), [(None, {"0", "1"}), ("4,7", {"4", "7"})])
def test_gpus_and_cores_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, expected: set[str]
) -> None:
    """A run a GPU at a time: each process writes which it sees, and whether it met another one there."""
    see = """if True:
        import os, sys, time
        gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        os.mkdir("gpu" + gpu)  # fails where another one is there
        time.sleep(0.3)
        os.rmdir("gpu" + gpu)
        print(gpu, os.environ["OMP_NUM_THREADS"])
        open(sys.argv[1] + "/results.json", "w").close()"""
    command = [sys.executable, "-c", see]
    monkeypatch.setattr(engines, "command", lambda plan, number: [*command, str(plan.parent / str(number))])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    folders = {number: tmp_path / str(number) for number in range(5)}
    ended = [one for one in engines.LocalEngine()(tmp_path / "plan.json", folders) if one is not None]
    assert sorted(one.number for one in ended) == [0, 1, 2, 3, 4]
    assert all(one.error is None for one in ended)
    seen = [(folder / engines.LOG).read_text(encoding="utf-8").split() for folder in folders.values()]
    assert {gpu for gpu, _ in seen} == expected
    assert {threads for _, threads in seen} == {"4"}


def test_why_a_process_ended(tmp_path: Path) -> None:
    log = tmp_path / "_run.log"
    log.write_text("a step\nerror: the data are gone\n", encoding="utf-8")
    assert engines.why(1, log) == f"the data are gone (see {log})"
    assert engines.why(-11, log) == f"ended by signal 11 (see {log})"
    log.write_text("", encoding="utf-8")
    assert engines.why(3, log) == f"exit code 3 (see {log})"


def test_a_process_that_made_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends well, and its folder stays empty."""
    monkeypatch.setattr(engines, "command", lambda *of: [sys.executable, "-c", ""])
    process = engines.RunProcess(tmp_path / "plan.json", 3, tmp_path / "_run.log", {})
    assert process.ended() == engines.Ended(3, "left no results.json: was the plan replaced meanwhile?")


KEEPS = """if True:
    import signal, sys, time
    signal.signal(signal.SIGINT, lambda *of: sys.exit("the terminal's reaches it"))
    signal.signal(signal.SIGTERM, lambda *of: sys.exit(open("kept", "w").close()) if sys.argv[1] == "keeps" else None)
    open("up", "w").close()
    while True: time.sleep(0.05)"""


def end_by(error: BaseException, events: Generator[engines.Ended | None], again: bool = False) -> None:
    """Once the process is up; `again`: with Ctrl-C a little later."""
    with engines.at_work(events):
        while not Path("up").exists():
            next(events)
        if again:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        raise error


def test_processes_are_told_to_keep_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the signal comes; told again, the engine waits no longer, and for no other reason at all."""
    ends: list[int | None] = []
    end = engines.RunProcess.end
    monkeypatch.setattr(engines.RunProcess, "end", lambda one: (end(one), ends.append(one.code)))
    told = Interrupted("told")
    for how, error in (("keeps", Interrupted), ("hangs", KeyboardInterrupt), ("hangs", ZeroDivisionError)):
        monkeypatch.setattr(engines, "command", lambda *of, how=how: [sys.executable, "-c", KEEPS, how])
        events = engines.LocalEngine(threads=1)(tmp_path / "plan.json", {0: tmp_path})
        with pytest.raises(error):
            end_by(error() if error is ZeroDivisionError else told, events, again=error is KeyboardInterrupt)
        Path("up").unlink()
    assert ends == [0, -signal.SIGKILL, -signal.SIGKILL]
    assert Path("kept").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_that_is_told_to_stop_keeps_the_steps_of_its_runs() -> None:
    """One in the middle, without checkpoints of its own, one to come; the terminal's Ctrl-C is for all processes."""
    few = ["--cases.two", "null", "--seeds", "0", "--runs", '{"baseline": null, "one_step": {}}', "--max_steps", "200"]
    command = [sys.executable, "-m", "metaxl_evo", *options("stopped", "--jobs", "1", *few)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as study:
        while study.poll() is None and not list(Path("stopped").rglob("_progress")):
            time.sleep(0.1)
        os.killpg(study.pid, signal.SIGINT)
        _, said = study.communicate(timeout=60)
    assert study.returncode == 75
    assert said.splitlines()[-1].startswith("stopped by SIGINT: start it again")
    assert "Traceback" not in said
    assert not processes_of("stopped")
    (kept,), (log,) = (list(Path("stopped").rglob(name)) for name in ("checkpoint-*/manifest.json", "_run.log"))
    last = log.read_text(encoding="utf-8").splitlines()[-1]
    assert last.startswith("stopped by SIGTERM after step")
    assert str(kept.parent) in last
    assert finished("stopped") == 0
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    main(options("whole", "--engine", "inline", "--disable_tqdm", "true", *few))
    assert scores("stopped") == scores("whole")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_study_of_twelve_runs_killed_five_times_ends_with_the_same_numbers() -> None:
    """Its processes end with it, so that none writes beside the next ones."""
    longer = ["--max_steps", "60", "--save_strategy", "steps", "--save_steps", "10"]
    main(options("whole", "--engine", "inline", "--disable_tqdm", "true", *longer))
    command = [sys.executable, "-m", "metaxl_evo", *options("killed", "--jobs", "2", *longer)]
    times = random.Random(0)
    for kills in range(5):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as study:
            while study.poll() is None and not (processes_of("killed") and finished("killed") >= 2 * kills):
                time.sleep(0.1)
            time.sleep(times.uniform(0, 3))
            assert study.poll() is None
            os.kill(study.pid, signal.SIGKILL)
        until = time.monotonic() + 30
        while processes_of("killed") and time.monotonic() < until:
            time.sleep(0.1)
        assert not processes_of("killed")
    assert 8 <= finished("killed") < 12
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert scores("killed") == scores("whole")
    assert finished("killed") == 12
