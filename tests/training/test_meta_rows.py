"""The stream of meta rows: whole passes, an order of its own, exact shares however it is cut, one number as state."""

from __future__ import annotations

import pytest
import torch

from metaxl_evo.training.meta_rows import DrawnByEpoch, MetaRows

Draw = tuple[list[int], list[int]]


def rows(count: int, batch_size: int, *, portion: float = 0.5, seed: int = 0, **share: int) -> MetaRows:
    return MetaRows(list(range(count)), batch_size, portion=portion, seed=seed, **share)


def draws(stream: MetaRows, count: int) -> list[Draw]:
    return [stream.draw()[0] for _ in range(count)]


def row_numbers(stream: MetaRows, count: int, micro_batches: int = 1) -> list[tuple[list[int], list[int]]]:
    """The two parts of each draw, all micro-batches together."""
    found = [stream.draw(micro_batches) for _ in range(count)]
    return [([x for train, _ in draw for x in train], [x for _, meta in draw for x in meta]) for draw in found]


@pytest.mark.parametrize("portion", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("count", "batch_size", "per_pass"), [(12, 4, 3), (14, 4, 4), (5, 12, 1)])
def test_each_pass_covers_every_row_once(count: int, batch_size: int, per_pass: int, portion: float) -> None:
    stream = rows(count, batch_size, portion=portion)
    orders = []
    for _ in range(3):
        seen = [row for train, meta in draws(stream, per_pass) for row in train + meta]
        assert sorted(seen) == list(range(count))
        orders.append(tuple(seen))
    assert len(set(orders)) == 3


def test_a_row_is_train_in_one_pass_and_meta_in_another() -> None:
    stream = rows(12, 4)
    judged = [frozenset(row for _, meta in draws(stream, 3) for row in meta) for _ in range(4)]
    assert len(set(judged)) > 1


def test_the_order_is_seeded_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first = draws(rows(12, 4, seed=5), 9)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert draws(rows(12, 4, seed=5), 9) == first
    assert draws(rows(12, 4, seed=6), 9) != first


@pytest.mark.parametrize(("drawn", "gone_by"), [(0, 0), (2, 8), (3, 12), (4, 14), (7, 26)])
def test_the_number_of_rows_that_went_by_is_the_whole_state(drawn: int, gone_by: int) -> None:
    whole = draws(rows(14, 4), 10)
    before = rows(14, 4)
    draws(before, drawn)
    state = before.state_dict()
    assert state == {"drawn": gone_by}
    after = rows(14, 4)
    after.load_state_dict(state)
    assert draws(after, 10 - drawn) == whole[drawn:]


@pytest.mark.parametrize(
    ("portion", "batch_size", "train", "meta"),
    [
        (0.5, 12, 6, 6),
        (0.5, 5, 2, 3),
        (0.25, 8, 6, 2),
        (0.0, 4, 4, 0),
        (1.0, 4, 0, 4),
        (0.01, 4, 3, 1),  # at least one row for either part
        (0.99, 4, 1, 3),
    ],
)
def test_sizes_of_the_two_parts(portion: float, batch_size: int, train: int, meta: int) -> None:
    found = draws(rows(4 * batch_size, batch_size, portion=portion), 4)
    assert [(len(a), len(b)) for a, b in found] == [(train, meta)] * 4


def test_a_last_draw_that_could_not_be_split_is_left_out() -> None:
    def sizes(count: int, draws_of_a_pass: int, portion: float = 0.5) -> list[int]:
        stream = rows(count, 4, portion=portion)
        found = [len(train) + len(meta) for train, meta in draws(stream, draws_of_a_pass)]
        assert stream.drawn == count
        return found

    assert sizes(9, 2) == [4, 4]  # one row is left
    assert sizes(10, 3) == [4, 4, 2]
    assert sizes(9, 3, portion=1.0) == [4, 4, 1]
    train, meta = draws(rows(10, 4), 3)[2]
    assert (len(train), len(meta)) == (1, 1)


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 2), (1, 3), (2, 1), (3, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("portion", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("count", [31, 24, 14])
def test_a_draw_is_the_same_however_it_is_cut_up(
    count: int, portion: float, processes: int, micro_batches: int
) -> None:
    whole = row_numbers(rows(count, 12, portion=portion), 7)
    shares = [
        row_numbers(
            rows(count, 12 // micro_batches, portion=portion, rank=rank, world_size=processes), 7, micro_batches
        )
        for rank in range(processes)
    ]
    for draw, *parts in zip(whole, *shares, strict=True):
        for part in (0, 1):
            assert sorted(row for share in parts for row in share[part]) == sorted(draw[part])
            sizes = [len(share[part]) for share in parts]
            assert max(sizes) - min(sizes) <= micro_batches


def test_every_process_has_its_first_rows_before_any_has_its_second() -> None:
    for batch_size, expected in ((3, [[1, 1], [1, 0]]), (2, [[1, 0], [1, 0]])):
        shares = [rows(6, batch_size, rank=rank, world_size=2).draw(2) for rank in range(2)]
        assert [[len(train) for train, _ in share] for share in shares] == expected


@pytest.mark.parametrize(
    ("count", "batch_size", "portion", "what"),
    [
        (1, 4, 0.5, r"the target \(meta\) data set has 1 rows, .* a step needs 2"),
        (0, 4, 1.0, r"data set has 0 rows, .* a step needs 1"),
        (8, 1, 0.5, r"a draw of meta rows has 1 rows, .* a step needs 2"),
    ],
)
def test_too_few_rows_are_refused(count: int, batch_size: int, portion: float, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        rows(count, batch_size, portion=portion)


@pytest.mark.parametrize(("count", "batch_size", "portion"), [(2, 2, 0.5), (1, 1, 1.0), (1, 1, 0.0)])
def test_the_smallest_data_sets_that_work(count: int, batch_size: int, portion: float) -> None:
    for train, meta in draws(rows(count, batch_size, portion=portion), 3):
        assert len(train) == (portion < 1)
        assert len(meta) == (portion > 0)


class Passes:
    """Rows that say in which pass they were read."""

    def __init__(self, count: int):
        self.count, self.epoch = count, -1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.epoch, index

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("drawn", [0, 1, 3, 4, 8])
@pytest.mark.parametrize("portion", [0.0, 0.5, 1.0])
def test_rows_that_are_drawn_anew_are_those_of_their_pass(portion: float, drawn: int) -> None:
    """Three draws a pass, the last a short one; from anywhere on."""
    settings = {"portion": portion, "seed": 0}
    before, after = MetaRows(Passes(10), 4, **settings), MetaRows(Passes(10), 4, **settings)
    for _ in range(drawn):
        before.draw()
    after.load_state_dict(before.state_dict())
    for number in range(drawn, 10):
        ((train, meta),) = after.draw()
        assert {epoch for epoch, _ in train + meta} == {number // 3}
        assert before.draw() == [(train, meta)]


def test_a_data_set_that_others_read_too_is_told_before_each_draw() -> None:
    dataset = Passes(10)
    stream = MetaRows(dataset, 4, portion=1.0, seed=0)
    stream.draw()
    dataset.set_epoch(7)
    ((_, meta),) = stream.draw()
    assert {epoch for epoch, _ in meta} == {0}


def test_what_is_drawn_by_epoch() -> None:
    assert isinstance(Passes(1), DrawnByEpoch)
    assert not isinstance([1, 2], DrawnByEpoch)
