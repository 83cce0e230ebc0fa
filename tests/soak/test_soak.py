"""A long run, and a long study, hold no more than short ones: memory, open files, temporary files.

280 meta steps here; `METAXL_SOAK_STEPS=10000` makes it the soak, of all the cases. `METAXL_SOAK_RUNS=200` makes the
study a long one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import TrainerCallback

from metaxl_evo.benchmark.memory import live_tensors
from metaxl_evo.experiments.study import Study
from metaxl_evo.training.trainer import MetaTrainer
from tests.experiments.own_task import write_own_task
from tests.training.tiny import logged, random_rows, tiny_trainer
from tests.vision_tasks.test_fewshot_task import trainer_of
from vision_tasks.fewshot_task import FewShotTask

STEPS, EARLY = int(os.environ.get("METAXL_SOAK_STEPS", "280")), 100
EPISODE = 9
EVERY = 100 * EPISODE  # so that every reading is at the same step of an episode, in its middle
RUNS, WARM = int(os.environ.get("METAXL_SOAK_RUNS", "20")), 5  # the first ones import and fill caches
GROWTH = 0.02
STUDY_GROWTH = 0.05  # of resident memory, which a run's pictures and tables move

CASES: dict[str, dict[str, Any]] = {
    "evograd": {"estimator": "evograd", "estimator_kwargs": {"sigma": 0.05, "copies": 2}},
    "one_step jvp": {"estimator": "one_step", "estimator_kwargs": {"engine": "jvp"}},
    "one_step finite_difference": {"estimator": "one_step", "estimator_kwargs": {"engine": "finite_difference"}},
    "greedy": {"estimator": "greedy", "episode_length": EPISODE, "episode_reset": "restart"},
    "unroll": {"estimator": "unroll", "estimator_kwargs": {"horizon": 3}, "episode_length": EPISODE},
}
FEWSHOT: dict[str, Any] = {"estimator": "evograd", "estimator_kwargs": {"sigma": 0.01}}
SHORT = ("evograd",)


class Held(NamedTuple):
    """Bytes of live tensors and of the process, its open files, and its temporary ones."""

    tensors: int
    resident: int
    files: int
    temporary: int

    @classmethod
    def now(cls) -> Held:
        resident = resident_set()  # collects garbage, with what it holds
        temporary = sum(1 for _ in Path(tempfile.gettempdir()).rglob("*"))
        return cls(bytes_of_tensors(), resident, len(os.listdir("/proc/self/fd")), temporary)


class Meter(TrainerCallback):
    """What is held, by the step after which it was read."""

    def __init__(self) -> None:
        self.held: dict[int, Held] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % EVERY == EARLY or step == STEPS:
            self.held[step] = Held.now()
            print(f"\n{args.output_dir} step {step}: {self.held[step]}", flush=True)


def bytes_of_tensors() -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live_tensors()}
    return sum(storages.values())


def resident_set() -> int:
    """What the process really holds: garbage collected, and what the allocator merely keeps for later given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def tagger(folder: Path, meter: Meter, **fields: Any) -> MetaTrainer:
    further = {"callbacks": [meter], "eval_dataset": random_rows(4, seed=3, language=None)}
    return tiny_trainer(folder, trainer=further, **fields)


def fewshot(folder: Path, meter: Meter, **fields: Any) -> MetaTrainer:
    trainer = trainer_of(FewShotTask(), folder, **fields)
    trainer.add_callback(meter)
    return trainer


def soaked(folder: Path, make: Callable[..., MetaTrainer], **fields: Any) -> Meter:
    meter = Meter()
    trainer = make(
        folder,
        meter,
        max_steps=STEPS,
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=40,
        save_strategy="steps",
        save_steps=5 * EPISODE,
        save_total_limit=2,
        **fields,
    )
    trainer.train()
    assert len(logged(trainer, "meta_loss")) == len(logged(trainer, "loss")) == STEPS // 20
    assert len([row for row in trainer.state.log_history if "eval_runtime" in row]) == STEPS // 40
    assert len(list(folder.glob("checkpoint-*"))) == 2
    return meter


def assert_flat(held: dict[int, Held], growth: float = GROWTH) -> None:
    """Against the first reading; of files there may be none more."""
    assert len(held) >= 2
    first = next(iter(held.values()))
    for name in ("tensors", "resident"):
        assert max(getattr(one, name) for one in held.values()) <= (1 + growth) * getattr(first, name), name
    for name in ("files", "temporary"):
        assert max(getattr(one, name) for one in held.values()) <= getattr(first, name), name


needs_linux = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc_trim and Linux's /proc"
)


@needs_linux
@pytest.mark.timeout(0 if STEPS > 1000 else 300)
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES if STEPS > 1000 else SHORT)
def test_memory_stays_flat(case: str, tmp_path: Path) -> None:
    assert STEPS % EPISODE == EARLY % EPISODE
    assert_flat(soaked(tmp_path, tagger, **CASES[case]).held)


@needs_linux
@pytest.mark.slow
@pytest.mark.timeout(0 if STEPS > 1000 else 300)
def test_few_shot_episodes_stay_flat(tmp_path: Path) -> None:
    assert_flat(soaked(tmp_path, fewshot, **FEWSHOT).held)


@needs_linux
@pytest.mark.slow
@pytest.mark.timeout(0 if RUNS > 20 else 300)
def test_a_long_study_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runs one after the other in this process, checkpoints, cards and pictures with them."""
    write_own_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    seeds = ",".join(map(str, range((RUNS + 3) // 4)))  # two methods on two cases each
    settings = {"seeds": seeds, "max_steps": "2", "save_strategy": "steps", "save_steps": "1", "disable_tqdm": "true"}
    options = [token for key, value in settings.items() for token in (f"--{key}", value)]
    study = Study(["--config", "trust.yaml", "--output_dir", "out", *options])
    held = dict[int, Held]()
    for number in range(len(study.runs)):
        study.make(number)
        if number >= WARM and (number - WARM) % 5 == 0:
            held[number] = Held.now()
            print(f"\nrun {number}: {held[number]}", flush=True)
    assert len(list(Path("out").rglob("results.json"))) == len(study.runs) >= RUNS
    assert_flat(held, STUDY_GROWTH)
