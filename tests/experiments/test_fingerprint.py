"""What counts of the data of a run: their rows and their order; what cannot be read has no fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from metaxl_evo.experiments.fingerprint import fingerprints


@dataclass
class Parts:
    train: Any
    sources: dict[str, Any] = field(default_factory=dict)


class Rows:
    """Items by number; `item` says what stands there."""

    def __init__(self, item: Callable[[int], Any]):
        self._item = item

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return self._item(index)


def stream() -> Iterator[int]:
    yield 1


ROWS = {"tokens": [["a", "b"], ["c"]], "tag": [0, 1]}
PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
CHANGED: dict[str, tuple[Any, Any]] = {
    "a row": (Dataset.from_dict(ROWS), Dataset.from_dict(ROWS | {"tag": [0, 2]})),
    "their order": (Dataset.from_dict(ROWS), Dataset.from_dict(ROWS).select([1, 0])),
    "a word cut elsewhere": (["ab", "c"], ["a", "bc"]),
    "a pixel": (PIXELS, np.where(PIXELS == 7, 8, PIXELS)),
    "a shape": (PIXELS, PIXELS.reshape(2, 4, 3)),
    "a kind of number": (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
    "a row of one's own": (Rows(lambda index: index), Rows(lambda index: index + (index == 2))),
    "a name of a set": ({"a", "b"}, {"a", "c"}),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_counts(change: str) -> None:
    before, after = (fingerprints(Parts(train=one)) for one in CHANGED[change])
    assert before.keys() == after.keys() == {"train"}
    assert before != after


def test_where_rows_come_from_does_not_count(tmp_path: Path) -> None:
    held = Dataset.from_dict(ROWS)
    held.to_parquet(tmp_path / "rows.parquet")
    again = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert fingerprints((held,)) == fingerprints((again,))
    strided = np.asfortranarray(PIXELS)
    assert fingerprints((PIXELS,)) == fingerprints((strided,))


def test_parts_have_names_and_random_numbers_stay() -> None:
    """An item may be augmented where it is read."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    found = fingerprints(Parts(Rows(lambda index: torch.rand(1)), {"en": [1], "qu": [2]}))
    assert list(found) == ["train", "sources.en", "sources.qu"]
    assert torch.equal(torch.rand(1), expected)


CYCLE: list[Any] = []
CYCLE.append(CYCLE)
UNREADABLE: dict[str, Any] = {
    "a stream": stream(),
    "a function": stream,
    "a cycle": CYCLE,
    "rows by name": Rows(lambda index: {}["absent"]),
    "a row that is broken": Rows(lambda index: 1 / (2 - index)),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_has_none_and_the_rest_has(kind: str) -> None:
    assert list(fingerprints({"train": UNREADABLE[kind], "test": [1]})) == ["test"]
