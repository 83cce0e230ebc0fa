"""A script run as `python FILE OPTION...` runs it, in this process, which has imported the libraries already."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


def printed(
    script: Path, *options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The lines that it prints."""
    monkeypatch.setattr("sys.argv", [str(script), *options])
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out.splitlines()
