"""A run's folder through all that may happen to it: killed or out of room at any file operation, resumed, edited.

A run's files are those of a run that nobody disturbed, or not there yet; the user's are as they were.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from metaxl_evo.experiments.folders import OUTSIDE, RESULTS
from metaxl_evo.experiments.progress import PROGRESS
from metaxl_evo.experiments.run_folder import HOLDER, LOCK, MARK, State, signs_in, state_of
from metaxl_evo.training.checkpoint import require_whole
from metaxl_evo.training.durable import DRAFTS
from metaxl_evo.training.history import HISTORY
from tests.experiments.faults import Ended, Fault, LineTask, Nursery

PASSING = (LOCK, HOLDER, PROGRESS)  # that a killed process leaves
VOLATILE = (RESULTS, "training_args.bin", MARK)  # with times and places
PLACES = (*OUTSIDE, "data")  # settings that may differ between two runs of equal results
OF_THE_USER = ("notes.txt", "below/notes.txt")
LIKE_OURS = (
    *(RESULTS, "config.json", "README.md", "meta/model.safetensors", "checkpoint-9/weights"),
    *(MARK, HOLDER, "_draft/a"),
)
OWN = LineTask.own_files
EARLY, ANYWHERE = st.integers(1, 60), st.integers(1, 170)
FAULTS = st.none() | st.builds(Fault, st.just("kill"), EARLY | ANYWHERE) | st.builds(Fault, st.just("full"), ANYWHERE)
Made = tuple[float, float]  # learning rate, slope of the data


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in PASSING)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def left_by(folder: Path) -> dict[str, Any]:
    """What a run leaves, as far as it is the same wherever and however it is made: names, bytes, results."""
    found: dict[str, Any] = {name: held for name, held in contents(folder).items() if "meta_history." not in name}
    for name in found:
        if name in VOLATILE or name.startswith("checkpoint"):
            found[name] = "there"
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    del results["run"]["train_seconds"]
    results["settings"] = {key: held for key, held in results["settings"].items() if key not in PLACES}
    card = [line for line in found["README.md"].decode().splitlines() if "resume_from_checkpoint" not in line]
    return found | {RESULTS: results, "README.md": card}


def assert_tidy(folder: Path) -> None:
    """Nothing is half there: no drafts, no unsealed checkpoint, no lock."""
    names = [path.name for path in folder.rglob("*")]
    assert not [name for name in names if name.endswith(".tmp") or (name.startswith("_") and name != MARK)]
    for checkpoint in folder.glob("checkpoint-?"):
        require_whole(checkpoint)


def unlike(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


class Runs:
    """Runs that nobody disturbed, by what they are made of."""

    def __init__(self, root: Path):
        self.root, self._left = root, dict[Made, dict[str, Any]]()
        self.nursery = Nursery(root / "first", self.data(1.0))

    def data(self, slope: float) -> Path:
        file = self.root / str(slope) / "data.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(str(slope), encoding="utf-8")
        return file

    def left(self, made_of: Made) -> dict[str, Any]:
        if made_of not in self._left:
            rate, slope = made_of
            folder = self.root / f"{rate} {slope}" / "run"
            assert self.nursery.run(folder, self.data(slope), rate, resume=False) is not None
            self._left[made_of] = left_by(folder)
        return self._left[made_of]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("undisturbed"))
    yield made
    made.nursery.close()


# Every file operation


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", ["kill", "full"])
def test_a_fault_at_every_file_operation(runs: Runs, tmp_path: Path, kind: str) -> None:
    """Of a run, from its first look at the folder to its results; it is resumed to the undisturbed bytes."""
    data, expected = runs.data(1.0), runs.left((0.1, 1.0))
    forked = runs.nursery.run
    whole = forked(tmp_path / "whole", data, resume=False)
    assert whole is not None
    ends = Counter[str]()
    for at in range(1, len(whole.operations) + 1):
        folder = tmp_path / str(at) / "run"
        ended = forked(folder, data, resume=False, fault=Fault(kind, at))
        assert (ended is None) == (kind == "kill")
        if ended is not None:
            assert bool(ended.error) != (folder / RESULTS).exists()
            if folder.exists():
                assert_tidy(folder)
        if (folder / RESULTS).exists():
            assert unlike(left_by(folder), expected) == []
        finished, begun = (folder / RESULTS).exists(), (folder / MARK).exists()
        ends["finished" if finished else "begun" if begun else "not begun"] += 1
        resumed = forked(folder, data, resume=True)
        assert resumed is not None
        assert resumed.error == ""
        assert unlike(left_by(folder), expected) == []
        if not finished:  # else a lock that nobody holds may stay
            assert_tidy(folder)
        shutil.rmtree(folder)
    print(f"\n{kind} at {len(whole.operations)} operations {dict(Counter(whole.operations))}: {dict(ends)}")
    assert min(ends.values()) >= 3
    assert len(ends) == 3


# Random lives


class Life(RuleBasedStateMachine):
    """A folder in which runs are made, cut off and resumed while a user edits data and leaves files."""

    runs: Runs
    events: Counter[str]

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(dir=self.runs.root))
        self.folder, self.data = self.root / "run", self.root / "data.json"
        self.slope = 1.0
        self.data.write_text("1.0", encoding="utf-8")
        self.made_of: Made | None = None
        self.mine: dict[str, bytes] = {}

    @rule(slope=st.sampled_from([1.0, 1.0, 2.0]))
    def edit(self, slope: float) -> None:
        self.events["edited"] += 1
        self.slope = slope
        self.data.write_text(str(slope), encoding="utf-8")

    @rule(name=st.sampled_from([*OF_THE_USER, *LIKE_OURS]))
    def leave_a_file(self, name: str) -> None:
        """Where a run was begun, the names of its files are its own."""
        file = self.folder / name
        self.events["file left"] += 1
        if file.exists() or (name in LIKE_OURS and state_of(self.folder, OWN) is not State.EMPTY):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"mine")
        self.mine[name] = b"mine"

    @precondition(lambda self: self.mine)
    @rule()
    def take_files_away(self) -> None:
        self.events["files taken away"] += 1
        for name in self.mine:
            (self.folder / name).unlink()
        self.mine.clear()
        for folder in ("below", "checkpoint-9", "_draft"):
            if (self.folder / folder).exists():
                (self.folder / folder).rmdir()

    @rule(resume=st.booleans())
    def run_beside_another(self, resume: bool) -> None:
        before = contents(self.folder)
        self.folder.mkdir(exist_ok=True)
        with FileLock(self.folder / LOCK):
            ended = self._run(0.1, resume, None)
        assert ended is not None
        assert ended.error or RESULTS in before
        assert contents(self.folder) == before
        self.events["held"] += 1

    @rule(fault=FAULTS)
    def start(self, fault: Fault | None) -> None:
        self._make(0.1, False, fault)

    @rule(rate=st.sampled_from([0.1, 0.1, 0.1, 0.2]), fault=FAULTS)
    def resume(self, rate: float, fault: Fault | None) -> None:
        self._make(rate, True, fault)

    @precondition(lambda self: (self.folder / MARK).exists() and not (self.folder / RESULTS).exists())
    @rule(fault=FAULTS)
    def go_on(self, fault: Fault | None) -> None:
        self._make(self.made_of[0] if self.made_of else 0.1, True, fault)

    def _make(self, rate: float, resume: bool, fault: Fault | None) -> None:
        state, signs, before = state_of(self.folder, OWN), signs_in(self.folder, OWN), contents(self.folder)
        other = self.made_of != (rate, self.slope)
        held = {*signs} - {HISTORY, "meta_history.png", DRAFTS}  # of which nothing is lost
        refused = state is State.FOREIGN or bool(signs and not resume) or bool(held and other)
        ended = self._run(rate, resume, fault)
        if before.get(MARK) != contents(self.folder).get(MARK):
            self.made_of = (rate, self.slope)
        if refused or state is State.FINISHED:
            assert contents(self.folder) == before
        if ended is None:
            self.events["killed"] += 1
            return
        if self.folder.exists() and not refused and state is not State.FINISHED:
            assert_tidy(self.folder)
        if fault is None:
            assert bool(ended.error) == bool(refused), ended.error
        kept = refused or state is State.FINISHED  # which needs room as well, for the lock
        assert kept or bool(ended.error) != (self.folder / RESULTS).exists()
        self.events["refused" if refused else "out of room" if ended.error else "finished"] += 1

    def _run(self, rate: float, resume: bool, fault: Fault | None) -> Ended | None:
        return self.runs.nursery.run(self.folder, self.data, rate, resume=resume, fault=fault)

    @invariant()
    def nothing_of_the_user_changes(self) -> None:
        for name, held in self.mine.items():
            assert (self.folder / name).read_bytes() == held

    @invariant()
    def what_is_finished_is_whole(self) -> None:
        if RESULTS in self.mine or not (self.folder / RESULTS).exists():
            return
        assert self.made_of is not None
        found = {name: held for name, held in left_by(self.folder).items() if name not in self.mine}
        assert unlike(found, self.runs.left(self.made_of)) == []

    def teardown(self) -> None:
        shutil.rmtree(self.root)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("lives", [9, pytest.param(130, marks=pytest.mark.slow)])
def test_random_lives_of_a_folder(runs: Runs, lives: int) -> None:
    """Nine known ones in `make test`; in `make test-all` others each time, of at least 2,000 events."""
    made = Counter[str]()
    machine = type("Life", (Life,), {"runs": runs, "events": made})
    known = settings(
        max_examples=lives,
        stateful_step_count=20 if lives > 100 else 8,
        phases=[Phase.generate],
        derandomize=lives < 100,
    )
    run_state_machine_as_test(machine, settings=settings(known, deadline=None, database=None))
    print(f"\n{made.total()} events: {dict(made)}")
    assert made.total() >= (2000 if lives > 100 else 40)
    if lives > 100:
        assert min(made[event] for event in ("killed", "out of room", "refused", "finished", "held")) >= 20
