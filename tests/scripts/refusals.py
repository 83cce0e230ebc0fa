"""What the tests of bad input share: the places that a case may use, and how a refusal is recognised."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.scripts.runs import write_data

Settings = dict[str, Any]
SECONDS = 10


class Place(NamedTuple):
    """What a case may use: a folder to prepare things in, good data, a model without and one with a head."""

    folder: Path
    data: Path
    model: Path
    trained: Path


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Of every file and folder below: when it was changed, and its bytes."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def changed(place: Place, file: str, content: str | bytes) -> Path:
    """A copy of the data with another content of one file."""
    root = write_data(place.folder / "data")
    (root / file).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def assert_refused(main: Callable[[Sequence[str]], Any], given: Sequence[str], message: str, kept: Path) -> None:
    """`main` ends with one line that matches and an exit code that is not 0, soon, and `kept` stays as it was."""
    before = contents(kept)
    begun = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        main(given)
    assert time.monotonic() - begun < SECONDS
    assert_is_one_line(caught.value.code, message)
    assert contents(kept) == before


def assert_is_one_line(text: object, message: str) -> None:
    assert isinstance(text, str)  # which Python prints, and exits with 1
    assert text.startswith("error: ")
    assert text.isprintable()
    assert len(text) <= 600
    assert re.search(message, text), text


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1, which the libraries read when they are imported."""
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)


def config_of(text: str) -> Callable[[Path], Settings]:
    """Writes a config into a folder."""

    def write(folder: Path) -> Settings:
        (folder / "run.yaml").write_text(text, encoding="utf-8")
        return {"config": folder / "run.yaml"}

    return write


def yaml_of(settings: Mapping[str, Any]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in settings.items())
