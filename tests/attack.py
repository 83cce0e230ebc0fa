"""Code in a pickle, as a file of weights or states may hold it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Attack:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def in_zip(file: Path, mark: Path) -> None:
    """As torch writes."""
    torch.save({"state": Attack(mark)}, file)


def bare(file: Path, mark: Path) -> None:
    """As torch wrote before 1.6."""
    file.write_bytes(pickle.dumps({"state": Attack(mark)}))


WRAPS = (in_zip, bare)
