"""A long run holds no more memory than a short one, with its logs, evaluations and checkpoints.

280 meta steps here; `METAXL_SOAK_STEPS=10000` makes it the soak, of all the cases.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from metaxl_evo.benchmark.memory import live_tensors
from tests.training.tiny import logged, random_rows, tiny_trainer

STEPS, EARLY = int(os.environ.get("METAXL_SOAK_STEPS", "280")), 100
EPISODE = 9
EVERY = 100 * EPISODE  # so that every reading is at the same step of an episode, in its middle
GROWTH = 0.02

CASES: dict[str, dict[str, Any]] = {
    "evograd": {"estimator": "evograd", "estimator_kwargs": {"sigma": 0.05, "copies": 2}},
    "one_step jvp": {"estimator": "one_step", "estimator_kwargs": {"engine": "jvp"}},
    "one_step finite_difference": {"estimator": "one_step", "estimator_kwargs": {"engine": "finite_difference"}},
    "greedy": {"estimator": "greedy", "episode_length": EPISODE, "episode_reset": "restart"},
    "unroll": {"estimator": "unroll", "estimator_kwargs": {"horizon": 3}, "episode_length": EPISODE},
}
SHORT = ("evograd",)


class Meter(TrainerCallback):
    """Bytes held by live tensors and by the process, by the step after which they were read."""

    def __init__(self) -> None:
        self.tensors: dict[int, int] = {}
        self.resident: dict[int, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % EVERY == EARLY or step == STEPS:
            self.tensors[step], self.resident[step] = bytes_of_tensors(), resident_set()
            print(f"\n{args.output_dir} step {step}: {self.tensors[step]} {self.resident[step]} bytes", flush=True)


def bytes_of_tensors() -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live_tensors()}
    return sum(storages.values())


def resident_set() -> int:
    """What the process really holds: garbage collected, and what the allocator merely keeps for later given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soaked(folder: Path, **fields: Any) -> Meter:
    meter = Meter()
    trainer = tiny_trainer(
        folder,
        trainer={"callbacks": [meter], "eval_dataset": random_rows(4, seed=3, language=None)},
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
    assert len(logged(trainer, "eval_loss")) == STEPS // 40
    assert len(list(folder.glob("checkpoint-*"))) == 2
    return meter


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc_trim and Linux's /proc")
@pytest.mark.timeout(0 if STEPS > 1000 else 300)
@pytest.mark.parametrize("case", CASES if STEPS > 1000 else SHORT)
def test_memory_stays_flat(case: str, tmp_path: Path) -> None:
    assert STEPS % EPISODE == EARLY % EPISODE
    meter = soaked(tmp_path, **CASES[case])
    for held in (meter.tensors, meter.resident):
        assert len(held) >= 2
        assert max(held.values()) <= (1 + GROWTH) * held[EARLY]
