"""kill -9 at random moments of a run: what is resumed ends with the weights of a run that nobody disturbed."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metaxl_evo.training.checkpoint import MANIFEST
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import FORKSERVER, free_port, on_processes
from tests.training import killed
from tests.training.tiny import base_weights, different, final_state, meta_weights, same

AIMS = ("step", "save", "evaluation")


class Child:
    """A run in processes of its own, forked from one that has imported everything; the first tells where it is."""

    def __init__(self, folder: Path, count: int = 1):
        self.phase = FORKSERVER.RawValue("b", 0)
        self.ear, mouth = FORKSERVER.Pipe(duplex=False)
        port = free_port()
        given = [(str(folder), self.phase, mouth, rank, count, port) for rank in range(count)]
        self.processes = [FORKSERVER.Process(target=killed.train, args=one) for one in given]
        for process in self.processes:
            process.start()
        mouth.close()

    def told(self) -> Iterator[tuple[str, float]]:
        """The phases and when they were entered, until the end or for a minute."""
        while self.ear.poll(60):
            yield (phase := self.ear.recv()), time.perf_counter()
            if phase == "end":
                return

    def wait_for(self, phase: str, times: int) -> None:
        """Until the run enters the phase for so many times; none: until its first step."""
        for told, _ in self.told():
            times -= told == phase
            if times <= 0:
                return

    def kill(self) -> str | None:
        """The phase in which it died; None where it had come to its end."""
        for process in self.processes:
            process.kill()
        self.join()
        died = self.processes[0].exitcode == -signal.SIGKILL
        return killed.PHASES[self.phase.value] if died else None

    def join(self) -> None:
        for process in self.processes:
            process.join()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[MetaTrainer, dict[str, list[float]]]:
    """A run's end, and how long each of its phases takes in a child."""
    trainer = killed.trainer_of(str(tmp_path_factory.mktemp("undisturbed")))
    trainer.train()
    child = Child(tmp_path_factory.mktemp("timed"))
    told = [*child.told()]
    child.join()
    assert Counter(phase for phase, _ in told) == {"step": 12, "save": 6, "evaluation": 4, "between": 10, "end": 1}
    lengths = defaultdict(list)
    for (phase, begun), (_, ended) in itertools.pairwise(told):
        lengths[phase].append(ended - begun)
    return trainer, {**lengths, "any time": [told[-1][1] - told[0][1]]}


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kills", "each"), [(4, 1), pytest.param(20, 3, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    undisturbed: tuple[MetaTrainer, dict[str, list[float]]], tmp_path: Path, kills: int, each: int
) -> None:
    """Some kills fall at any time, some somewhere within a phase, `each` at least; every run is brought to its end."""
    (whole, lengths), generator = undisturbed, random.Random(time.time_ns())
    expected, died, resumed_from, cut_off = final_state(whole), Counter[str](), Counter[int](), 0
    for number in range(3 * kills):
        if died.total() >= kills and min(died[phase] for phase in AIMS) >= each:
            break
        folder = tmp_path / str(number)
        child = Child(folder)
        if number % 4 == 0:
            child.wait_for(aim := "any time", 0)
        else:
            aim = min(AIMS, key=lambda phase: died[phase])
            child.wait_for(aim, generator.randint(1, len(lengths[aim])))
        time.sleep(generator.random() * sorted(lengths[aim])[len(lengths[aim]) // 2])
        phase = child.kill()
        if phase is None:
            continue
        died[phase] += 1
        complete, incomplete = complete_in(folder)
        cut_off += incomplete
        trainer = killed.trainer_of(str(folder))
        trainer.train("latest")
        assert trainer._initial_global_step == max(complete, default=0)
        resumed_from[trainer._initial_global_step] += 1
        assert different(base_weights(trainer), base_weights(whole)) == []
        assert different(meta_weights(trainer), meta_weights(whole)) == []
        unlike = [key for key, value in final_state(trainer).items() if not same(value, expected[key])]
        assert unlike == ["random"] * (trainer._initial_global_step == 12)  # not asked for where no step is left
    print(f"\nkilled: {dict(died)}, {cut_off} times within a checkpoint; resumed from {dict(resumed_from)}")
    assert died.total() >= kills
    assert min(died[phase] for phase in AIMS) >= each, died
    assert cut_off >= each
    assert len(resumed_from) >= each, resumed_from


def complete_in(folder: Path) -> tuple[list[int], int]:
    """The steps of the complete checkpoints, and how many are not."""
    checkpoints = [(int(path.name.split("-")[1]), path) for path in folder.glob("checkpoint-*")]
    complete = sorted(step for step, path in checkpoints if (path / MANIFEST).exists())
    return complete, len(checkpoints) - len(complete)


def resumed(folder: str) -> tuple[int, dict[str, Any]]:
    """From which step a run went on, and how it ended."""
    trainer = killed.trainer_of(folder)
    trainer.train("latest")
    return trainer._initial_global_step, final_state(trainer)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_two_processes_killed_within_a_save_go_on_as_if_nothing_had_been(
    undisturbed: tuple[MetaTrainer, dict[str, list[float]]], tmp_path: Path
) -> None:
    """Four times; one rank may have written what the other has not."""
    lengths, generator, fell = undisturbed[1]["save"], random.Random(time.time_ns()), Counter[str]()
    whole = [state for _, state in on_processes(2, resumed, str(tmp_path / "whole"))]
    for number in range(24):
        folder = tmp_path / str(number)
        child = Child(folder, 2)
        child.wait_for("save", generator.randint(1, 6))
        time.sleep(generator.random() * 2 * max(lengths))
        if child.kill() != "save":
            continue
        complete, cut_off = complete_in(folder)
        fell["before its manifest" if cut_off else "behind it"] += 1
        for (step, state), expected in zip(on_processes(2, resumed, str(folder)), whole, strict=True):
            assert step == max(complete, default=0)
            unlike = [key for key, value in state.items() if not same(value, expected[key])]
            assert unlike == ["random"] * (step == 12)  # not asked for where no step is left
        if fell["before its manifest"] >= 3 and fell.total() >= 4:
            break
    print(f"\nkilled within a save of two processes: {dict(fell)}")
    assert fell["before its manifest"] >= 3
    assert fell.total() >= 4
