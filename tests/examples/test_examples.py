"""Each script of `examples/` runs as it is, in seconds, and what it prints shows that it has learned."""

from __future__ import annotations

import csv
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.printed import printed

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
LINES = 40  # of a script, at most
ADAPTS = ["maml_regression", "meta_sgd_regression"]
LEARNS = ["learn_schedule", "mix_domains", "own_loop", "weight_noisy_text"]
WATCHED = "watch_a_run"
HORIZONS = "short_horizons"
NUMBER = re.compile(r"\d+\.\d+")

Example = Callable[..., list[str]]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """The lines that an example prints, started in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda name, *options: printed(
        ROOT / f"examples/{name}.py", *options, monkeypatch=monkeypatch, capsys=capsys
    )


def numbers(line: str) -> list[float]:
    return [float(one) for one in NUMBER.findall(line)]


def test_the_examples_are_found_and_short() -> None:
    assert [script.stem for script in SCRIPTS] == sorted([*ADAPTS, *LEARNS, HORIZONS, WATCHED])
    for script in SCRIPTS:
        assert len(script.read_text("utf-8").splitlines()) <= LINES, script.name


@pytest.mark.parametrize("name", ADAPTS)
def test_adaptation_is_learned(name: str, example: Example) -> None:
    losses = [numbers(line) for line in example(name)]
    assert len(losses) == 3
    (_, first), (before, after) = losses[0], losses[-1]
    assert after < before / 2
    assert after < first / 2


@pytest.mark.slow
def test_a_schedule_is_learned(example: Example) -> None:
    rates, losses = example("learn_schedule")[-2:]
    assert len(numbers(rates)) == 5
    assert min(numbers(rates)) > 0.02  # where all began
    first, last = numbers(losses)
    assert last < first / 2


@pytest.mark.parametrize("options", [[], ["--lora"]])
def test_the_domain_that_judges_has_the_largest_weight(options: list[str], example: Example) -> None:
    weights = numbers(example("mix_domains", *options)[-1])
    assert weights[0] > 1 > max(weights[1:])


def test_noisy_levels_lose_their_weight(tmp_path: Path) -> None:
    """By a command of its own, as a user starts it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/own_loop.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    first, last, weights = map(numbers, done.stdout.splitlines())
    assert last[-1] < first[-1] / 10
    assert sum(weights[:2]) > 2 * sum(weights[-2:])


@pytest.mark.slow
def test_confused_annotators_are_not_trusted(example: Example) -> None:
    lines = example("weight_noisy_text")
    plain, weighted = (numbers(line)[0] for line in lines if line.startswith(("none", "one_step")))
    assert weighted > plain + 0.1
    trust = numbers(lines[-1])
    assert min(trust[:3]) > 0.8 > 0.3 > max(trust[3:])


def slopes(estimator: str, horizon: int, lam: np.ndarray) -> tuple[float, np.ndarray]:
    """Loss and hypergradient of an episode of w <- w - 0.1 G (w - lam) from (2, 2), in closed form."""
    shrinks = 1 - 0.1 * np.array([1, 0.5])
    at = lam + (2 - lam) * shrinks ** np.arange(horizon + 1)[:, None]  # (T + 1, 2)
    slope = 2 * at + 10 * np.sin(2 * at)
    loss = float((at[-1] ** 2 + 10 * np.sin(at[-1]) ** 2).sum())
    if estimator == "unroll":
        return loss, (1 - shrinks**horizon) * slope[-1]
    decay = {"one_step": 0.0, "greedy": 0.9}[estimator]
    return loss, (1 - shrinks) * (decay ** np.arange(horizon)[::-1, None] * slope[1:]).sum(0)


def test_short_horizons_are_those_of_the_closed_form(example: Example) -> None:
    """Each of the ten hypergradients moves where the next episode ends."""
    lines = example(HORIZONS, "curves.png")
    assert Path("curves.png").stat().st_size > 1000
    assert len(lines) == 9
    for line in lines:
        horizon, name = int(line.split(",")[0][4:]), line.split(", ")[1].split(":")[0]
        lam, losses = np.ones(2), []
        for _ in range(10):
            loss, hypergradient = slopes(name, horizon, lam)
            losses.append(loss)
            lam = lam - 0.1 * hypergradient
        assert numbers(line) == [round(losses[0], 4), round(losses[-1], 4)], line


def in_tensorboard(name: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = Path(f"runs/{WATCHED}/runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return [event.value for event in events.Scalars(f"train/{name}")]


def in_trackio(name: str) -> list[float]:
    with closing(sqlite3.connect("trackio/metaxl_evo.db")) as base:
        rows = [json.loads(row) for (row,) in base.execute("SELECT metrics FROM metrics ORDER BY step")]
    return [row[f"train/{name}"] for row in rows if f"train/{name}" in row]


@pytest.mark.parametrize("read", [in_tensorboard, in_trackio])
def test_a_tracker_holds_what_the_history_holds(
    read: Callable[[str], list[float]], example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = read.__name__.removeprefix("in_")
    monkeypatch.setenv("TRACKIO_DIR", "trackio")  # which an import reads
    pytest.importorskip(tracker)
    assert tracker in example(WATCHED, tracker)[-1]
    with Path(f"runs/{WATCHED}/meta_history.csv").open(encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    assert len(history) == 6
    for name in ("meta_loss", "meta_moved"):
        assert read(name) == pytest.approx([float(row[name]) for row in history], rel=1e-6)
