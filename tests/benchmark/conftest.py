"""What the tests of the benchmark share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer makes its output folder, also where nothing is written into it."""
    monkeypatch.chdir(tmp_path)
