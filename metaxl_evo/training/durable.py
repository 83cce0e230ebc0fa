"""Files that stand whole or not at all, also after a power cut or on a full disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DRAFTS = "_draft"  # which an upload leaves out


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A draft to be written beside a file, whose place it takes once it is on the disk; where that fails, it goes."""
    draft = draft_of(file)
    try:
        yield draft
        sync(draft)
        draft.replace(file)
    except Exception:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync(file.parent)


def draft_of(file: Path) -> Path:
    """Where `whole` writes first; of a process that was killed in it, the draft stays."""
    return file.with_name(f"{file.name}.tmp")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder for files that take their places in `folder` together, at the end; where that fails, they go.

    What a process left of one that was killed in it goes as well.
    """
    drafts = folder / DRAFTS
    shutil.rmtree(drafts, ignore_errors=True)
    try:
        drafts.mkdir(parents=True)
        yield drafts
        files = sorted(path for path in drafts.rglob("*") if path.is_file())
        for file in files:
            sync(file)
        places = [folder / file.relative_to(drafts) for file in files]
        for file, place in zip(files, places, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        for parent in dict.fromkeys([*(place.parent for place in places), folder]):
            sync(parent)
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def sync(path: Path) -> None:
    """What stands in a file, or which names stand in a folder, is on the disk when this returns."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
