"""Meta rows of a stream: in its order, pass after pass, the same however they are cut up, resumed by their number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from metaxl_evo.training.meta_rows import MetaRows, StreamedMetaRows, make_meta_rows
from tests.training.tiny import final_state, meta_weights, random_rows, same, tiny_tagger, tiny_trainer


class Numbers(IterableDataset):
    """0, 1, 2, ...; with the pass, where it is asked for."""

    def __init__(self, count: int):
        self.count, self.epochs = count, list[int]()

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def stream(count: int, batch_size: int, **settings: Any) -> StreamedMetaRows:
    return StreamedMetaRows(Numbers(count), batch_size, **{"portion": 1.0, **settings})


def drawn(rows: StreamedMetaRows, count: int, micro_batches: int = 1) -> list[list[int]]:
    return [[x for train, meta in rows.draw(micro_batches) for x in train + meta] for _ in range(count)]


@pytest.mark.parametrize(
    ("count", "portion", "expected"),
    [
        (8, 1.0, [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]),
        (6, 1.0, [[0, 1, 2, 3], [4, 5], [0, 1, 2, 3], [4, 5]]),
        (5, 0.5, [[0, 1, 2, 3], [0, 1, 2, 3]]),  # one row is left, which could not be split
        (2, 0.5, [[0, 1], [0, 1]]),
    ],
)
def test_passes_in_the_order_of_the_stream(count: int, portion: float, expected: list[list[int]]) -> None:
    rows = stream(count, 4, portion=portion)
    assert drawn(rows, len(expected)) == expected
    starts = [first for first in expected if first[0] == 0]
    assert rows.dataset.epochs == list(range(len(starts)))


@pytest.mark.parametrize("portion", [0.0, 0.3, 0.5, 1.0])
def test_the_two_parts_are_those_of_a_map_style_data_set(portion: float) -> None:
    sizes = [
        [(len(train), len(meta)) for train, meta in rows.draw()]
        for rows in (stream(24, 6, portion=portion), MetaRows(range(24), 6, portion=portion, seed=0))
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("before", range(9))
def test_it_goes_on_from_any_draw(before: int) -> None:
    whole = drawn(stream(10, 4), 12)
    first = stream(10, 4)
    drawn(first, before)
    after = stream(10, 4)
    after.load_state_dict(first.state_dict())
    assert drawn(after, 12 - before) == whole[before:]


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 2), (2, 1), (3, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("portion", [0.4, 1.0])
def test_a_draw_is_the_same_however_it_is_cut_up(portion: float, processes: int, micro_batches: int) -> None:
    settings: dict[str, Any] = {"portion": portion, "world_size": processes}
    whole = drawn(stream(31, 12, portion=portion), 7)
    shares = [
        drawn(stream(31, 12 // micro_batches, rank=rank, **settings), 7, micro_batches) for rank in range(processes)
    ]
    for draw, *parts in zip(whole, *shares, strict=True):
        assert sorted(row for share in parts for row in share) == draw


class Once(IterableDataset):
    def __init__(self, rows: Any):
        self.rows = iter(rows)

    def __iter__(self) -> Any:
        return self.rows


@pytest.mark.parametrize(
    ("dataset", "draws", "what"),
    [
        (Numbers(0), 1, r"pass 0 of the streamed meta_dataset has 0 rows, too few"),
        (Numbers(1), 1, r"pass 0 of the streamed meta_dataset has 1 rows, .* needs 2"),
        (
            Once(range(8)),
            3,
            r"pass 1 of the streamed meta_dataset has 0 rows.*every iteration of it has to start anew",
        ),
        ((x for x in range(8)), 0, r"is a generator, whose rows have no numbers: give a list"),
        (type("Endless", (), {"__getitem__": lambda self, i: i})(), 0, r"is a Endless without __len__"),
    ],
)
def test_streams_that_cannot_serve(dataset: Any, draws: int, what: str) -> None:
    def read() -> None:
        rows = make_meta_rows(dataset, 4, portion=0.5, seed=0)
        for _ in range(draws):
            rows.draw()

    with pytest.raises(ValueError, match=what) as error:
        read()
    assert "\n" not in str(error.value)


# In a training


class Rows(IterableDataset):
    def __init__(self, rows: datasets.Dataset):
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


@pytest.mark.parametrize("kind", [Rows, datasets.Dataset.to_iterable_dataset])
def test_a_streamed_training_is_one_over_the_rows_and_goes_on(tmp_path: Path, kind: Any) -> None:
    """Seven rows in draws of four: every other one is of three."""
    rows = random_rows(7, seed=2)

    def run(folder: str, resume: str | None = None, **fields: Any) -> Any:
        made = tiny_trainer(
            tmp_path / folder, tagger=tiny_tagger(), meta=kind(rows), save_strategy="steps", save_steps=3, **fields
        )
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run("whole", max_steps=6)
    assert whole.meta_rows.state_dict() == {"pass": 2, "drawn": 7}
    parted = run("parted", str(tmp_path / "whole/checkpoint-3"), max_steps=6)
    assert same(final_state(parted), final_state(whole))
    assert any(not torch.equal(x, y) for x, y in zip(meta_weights(whole).values(), start(), strict=True))


def start() -> list[torch.Tensor]:
    return [p.detach() for p in tiny_tagger().meta.parameters()]


def test_an_empty_stream_is_refused_before_a_step(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, meta=Rows(random_rows(4, seed=2).select([])))
    with pytest.raises(ValueError, match="pass 0 of the streamed meta_dataset has 0 rows"):
        trainer.train()
    assert trainer.state.global_step == 0
