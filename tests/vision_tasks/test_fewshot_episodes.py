"""Episodes: what a row is a function of, which domain it is of, what it holds, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.utils.data import default_collate

from vision_tasks.augmentation import EvaluationTransform, TrainTransform, to_float
from vision_tasks.fewshot_episodes import SPLITS, Auxiliary, Domain, Episodes, EpisodeSize, interleaved, whole

SIZE = EpisodeSize(way=3, shot=2, queries=4)


def domain(name: str, number: int = 0, *, classes: int = 16, images: int = 8, split: Any = interleaved) -> Domain:
    """Images whose pixels say (domain, class, image)."""
    pixels = np.zeros((classes * images, 4, 4, 3), np.uint8)
    pixels[..., 0] = number
    pixels[..., 1] = np.repeat(np.arange(classes), images)[:, None, None]
    pixels[..., 2] = np.tile(np.arange(images), classes)[:, None, None]
    labels = np.repeat(np.arange(classes, dtype=np.int64), images)
    return Domain(name, list(pixels), labels, tuple(f"c{k}" for k in range(classes)), split(classes))


def domains(count: int = 4, **fields: Any) -> list[Domain]:
    return [domain(f"d{k}", k, **fields) for k in range(count)]


def plain(image: Any, generator: Generator) -> Tensor:
    return to_float(image)


def episodes(role: str = "seen", held: list[Domain] | None = None, **fields: Any) -> Episodes:
    settings: dict[str, Any] = {"length": 12, "seed": 5, "transform": plain}
    return Episodes(domains() if held is None else held, role, SIZE, **settings | fields)


def read(row: dict[str, Tensor], key: str) -> Tensor:
    """(domain, class, image) of each image of a row, (way, images, 3)."""
    return (row[key][..., 0, 0] * 255).round().long()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Determinism ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["seen", "unseen", "all"])
def test_a_row_is_a_function_of_seed_epoch_and_number(role: str) -> None:
    held = domains()
    settings = {"transform": TrainTransform(8), "aux": Auxiliary(held[0], 10, 5)}
    first, second = episodes(role, held, **settings), episodes(role, held, **settings)
    state = torch.random.get_rng_state()
    first.set_epoch(3)
    rows = [first[index] for index in (0, 7, 7, 2)]
    for epoch in (1, 8, 3):  # whatever was read before
        second.set_epoch(epoch)
        other = second[7]
        assert same(other, rows[1]) == (epoch == 3)
    assert same(rows[1], rows[2])
    assert not same(rows[0], rows[1])
    assert not same(episodes(role, held, **settings | {"seed": 6})[0], episodes(role, held, **settings)[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_loader_workers_read_the_same_rows() -> None:
    data = episodes()
    data.set_epoch(2)
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=1)
    batches = list(loader)
    assert len(batches) == 3
    for start, batch in zip((0, 4, 8), batches, strict=True):
        assert same(batch, default_collate([data[index] for index in range(start, start + 4)]))


def test_every_episode_has_noise_of_its_own() -> None:
    seen, unseen = episodes("seen"), episodes("unseen")
    seeds = []
    for epoch in range(3):
        for data in (seen, unseen):
            data.set_epoch(epoch)
            seeds += [int(data[index]["noise_seed"]) for index in range(len(data))]
    assert len(set(seeds)) == 2 * 3 * 12
    assert seen[0]["noise_seed"].dtype == torch.int64


# Which domain --------------------------------------------------------------------------------------------------------


def test_the_two_domains_of_an_epoch_differ_and_change() -> None:
    seen, unseen = episodes("seen"), episodes("unseen")
    pairs = Counter[tuple[str, str]]()
    for epoch in range(120):
        seen.set_epoch(epoch)
        unseen.set_epoch(epoch)
        found = [{data.domain_of(index).name for index in range(len(data))} for data in (seen, unseen)]
        assert all(len(names) == 1 for names in found)
        pairs[found[0].pop(), found[1].pop()] += 1
    assert not any(first == second for first, second in pairs)
    assert len(pairs) == 12  # every ordered pair of four


def test_the_rows_are_of_the_domain_said() -> None:
    for role in ("seen", "unseen", "all"):
        data = episodes(role)
        for index in range(4):
            number = int(data.domain_of(index).name[1:])
            assert bool((read(data[index], "query")[..., 0] == number).all())


def test_the_baseline_meets_every_domain_as_often() -> None:
    data = episodes("all")
    orders = set()
    for epoch in range(4):
        data.set_epoch(epoch)
        order = tuple(data.domain_of(index).name for index in range(12))
        assert set(Counter(order).values()) == {3}
        orders.add(order)
    assert len(orders) == 4
    uneven = Counter(Episodes.domain_of(episodes("all", length=10), index).name for index in range(10))
    assert sorted(uneven.values()) == [2, 2, 3, 3]


def test_test_episodes_are_the_same_in_every_epoch() -> None:
    held = [domain("far", 9)]
    data = episodes("test", held, split="novel")
    rows = [data[index] for index in range(3)]
    data.set_epoch(4)
    assert all(same(data[index], row) for index, row in enumerate(rows))
    assert not same(rows[0], rows[1])
    longer = episodes("test", held, split="novel", length=30)
    assert same(longer[1], rows[1])


# What a row holds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_an_episode_has_distinct_classes_and_images_of_its_split(split: str) -> None:
    data = episodes("all", split=split)
    met = set()
    for index in range(len(data)):
        row = data[index]
        assert row["support"].shape == (3, 2, 3, 4, 4)
        assert row["query"].shape == (3, 4, 3, 4, 4)
        assert row["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        images = torch.cat([read(row, "support"), read(row, "query")], 1)  # (way, shot + queries, 3)
        classes = images[..., 1]
        assert bool((classes == classes[:, :1]).all())
        assert len(set(classes[:, 0].tolist())) == 3
        assert all(len(set(numbers)) == 6 for numbers in images[..., 2].tolist())
        met |= set(classes[:, 0].tolist())
    assert met == set(interleaved(16)[split])


def test_the_split_rule_is_the_benchmarks() -> None:
    for classes in (3, 10, 196, 200):
        splits = interleaved(classes)
        assert sorted(sum(splits.values(), ())) == list(range(classes))
        assert splits["base"] == tuple(range(0, classes, 2))
        assert all(index % 4 == 1 for index in splits["val"])
        assert all(index % 4 == 3 for index in splits["novel"])
    assert [len(interleaved(200)[split]) for split in SPLITS] == [100, 50, 50]
    assert whole(3) == {"base": (0, 1, 2), "val": (0, 1, 2), "novel": (0, 1, 2)}


def test_auxiliary_images_are_distinct_with_their_labels_and_weight() -> None:
    held = domains()
    aux = Auxiliary(held[1], total_epochs=40, images=20)
    assert aux.classes == 8
    data = episodes("seen", held, aux=aux)
    data.set_epoch(9)
    row = data[0]
    images = read({"aux": row["aux_images"]}, "aux")  # (20, 3)
    assert bool((images[:, 0] == 1).all())
    even = [2 * label for label in row["aux_labels"].tolist()]
    assert images[:, 1].tolist() == even  # the base classes
    assert len({tuple(image) for image in images.tolist()}) == 20
    assert row["aux_labels"].dtype == torch.int64
    assert row["aux_weight"].item() == pytest.approx(0.9**4)
    assert not torch.equal(data[1]["aux_images"], row["aux_images"])


def test_the_auxiliary_weight_falls_twenty_times() -> None:
    aux = Auxiliary(domain("d"), total_epochs=400)
    weights = [aux.weight(epoch) for epoch in range(400)]
    assert len(set(weights)) == 20
    assert weights[0] == 1
    assert weights[19:21] == [1, 0.9]
    assert weights[-1] == pytest.approx(0.9**19)


def test_images_pass_the_transform() -> None:
    row = episodes("seen", transform=EvaluationTransform(8, channels=1))[0]
    assert row["query"].shape == (3, 4, 1, 8, 8)


# What is refused -----------------------------------------------------------------------------------------------------


REFUSED: list[tuple[Any, str]] = [
    (lambda: episodes("sean"), "did you mean 'seen'"),
    (lambda: episodes("unseen", domains(1)), "give 2 seen domains or more, not 1"),
    (lambda: episodes("test"), "of one domain, not 4"),
    (lambda: episodes("all", []), "need a domain"),
    (lambda: episodes("all", [domain("a"), domain("a")]), "must differ in name"),
    (lambda: episodes(length=0), "at least one episode, got 0"),
    (lambda: episodes(split="train"), "has no train split: it has base, val, novel"),
    (lambda: episodes(held=domains(classes=4)), "domain d0 has 2 base classes, an episode needs 3"),
    (lambda: episodes(held=domains(images=5)), "class 'c0' has 5 images, an episode needs 2 + 4"),
    (lambda: EpisodeSize(way=1), "n_way of at least 2, got 1"),
    (lambda: EpisodeSize(shot=0), "n_shot of at least 1, got 0"),
    (lambda: EpisodeSize(queries=0), "n_queries of at least 1, got 0"),
    (lambda: Auxiliary(domain("a"), 10, 65), "from 1 to 64, the base images of a, got 65"),
    (lambda: Auxiliary(domain("a"), 0), "must be positive"),
    (lambda: made(labels=np.zeros(2, np.int64)), "3 images need as many int64 labels, got int64 of shape (2,)"),
    (lambda: made(labels=np.zeros(3)), "got float64"),
    (lambda: made(labels=np.array([0, 1, 2])), "labels go from 0 to 2, there are 2 classes"),
    (lambda: made(labels=np.array([0, -1, 0])), "labels go from -1"),
    (lambda: made(labels=np.zeros(3, np.int64)), "class 'b' of its val split has no images"),
    (lambda: made(splits={"train": (0,)}), "unknown split 'train'"),
    (lambda: made(images=[], labels=np.zeros(0, np.int64)), "domain d has no images"),
    (lambda: made(images=np.zeros((3, 4, 4, 3), np.float32)), "domain d: an image must be uint8"),
    (lambda: made(images=np.zeros((3, 3, 4, 4), np.uint8)), "domain d: an image must be uint8 of shape"),
]


def made(**fields: Any) -> Domain:
    settings: dict[str, Any] = {
        "images": np.zeros((3, 4, 4, 3), np.uint8),
        "labels": np.array([0, 1, 0]),
        "classes": ("a", "b"),
        "splits": interleaved(2),
    }
    return Domain("d", **settings | fields)


@pytest.mark.parametrize(("attempt", "part"), REFUSED, ids=[part for _, part in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(attempt: Any, part: str) -> None:
    with pytest.raises(ValueError) as caught:
        attempt()
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_end() -> None:
    with pytest.raises(IndexError):
        episodes()[12]
