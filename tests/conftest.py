"""Fixtures that several test packages use."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: two contended threads are many times slower than one
os.fsync = lambda fd: None  # every checkpoint waits for the disk, which matters after a power cut only
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background, and of all that tests start there
    signal.signal(signal.SIGINT, signal.default_int_handler)
REPOSITORY = Path(__file__).resolve().parents[1]


known_modules = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """What was imported is not looked at again: accelerate collects garbage at the start of every training."""
    freeze_imports()


def pytest_collection_finish() -> None:
    freeze_imports()


def freeze_imports() -> None:
    """Much is imported on first use, when all tests are collected (torch's compiler, by a first derivative)."""
    global known_modules
    if len(sys.modules) > known_modules:
        known_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models, `METAXL_SHARED` or `../shared`; without it, CI fails and others skip."""
    folder = Path(os.environ.get("METAXL_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        message = f"needs the shared real data: {folder} is absent (set METAXL_SHARED)"
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
