"""Wrong labels: the matrices, what is drawn of them, and clean images that stay apart."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.vision_tasks.small import random_images
from vision_tasks.images import ImageSet
from vision_tasks.noisy_labels import NOISES, NoisyLabels, corrupted, long_tailed, make_noisy, noise_matrix

SETTINGS: dict[str, Any] = {"kind": "flip2", "rate": 0.4, "meta_size": 20, "seed": 0}


def matrix(kind: str, rate: float, classes: int = 10, seed: int = 0) -> np.ndarray:
    return noise_matrix(kind, rate, classes, np.random.default_rng(seed))


# The matrices


@pytest.mark.parametrize("classes", [3, 10, 100])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.99])
@pytest.mark.parametrize("kind", NOISES)
def test_rows_are_distributions(kind: str, rate: float, classes: int) -> None:
    found = matrix(kind, rate, classes)
    assert found.shape == (classes, classes)
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    if rate == 0:
        assert np.array_equal(found, np.eye(classes))


@pytest.mark.parametrize(("kind", "others"), [("flip", 1), ("flip2", 2)])
def test_flips_go_to_so_many_other_classes(kind: str, others: int) -> None:
    found = matrix(kind, 0.4)
    np.testing.assert_allclose(found.diagonal(), 0.6)
    wrong = found - np.diag(found.diagonal())
    assert ((wrong > 0).sum(1) == others).all()
    np.testing.assert_allclose(wrong[wrong > 0], 0.4 / others)
    assert not np.array_equal(found > 0, matrix(kind, 0.4, seed=1) > 0)
    assert np.array_equal(found, matrix(kind, 0.4))
    reached = sum(matrix(kind, 0.4, 5, seed) for seed in range(200)) - 200 * 0.6 * np.eye(5)
    np.testing.assert_allclose(reached[~np.eye(5, dtype=bool)], 200 * 0.4 / 4, rtol=0.5)  # any class but the own


def test_uniform_noise_may_draw_the_true_class() -> None:
    found = matrix("unif", 0.4)
    np.testing.assert_allclose(found.diagonal(), 0.6 + 0.04)
    np.testing.assert_allclose(found[~np.eye(10, dtype=bool)], 0.04)


@pytest.mark.parametrize(
    ("kind", "rate", "classes", "message"),
    [
        ("flop", 0.2, 10, "unknown noise 'flop': did you mean 'flip'"),
        ("unif", 1.0, 10, "noise_rate must be at least 0 and below 1, not 1.0"),
        ("flip", -0.1, 10, "noise_rate must be at least 0"),
        ("flip2", float("nan"), 10, "noise_rate must be at least 0 and below 1, not nan"),
        ("unif", float("inf"), 10, "noise_rate must be"),
        ("flip", 0.2, 1, "noise flip needs more than 1 classes, here are 1: use unif"),
        ("flip2", 0.2, 2, "noise flip2 needs more than 2 classes, here are 2"),
    ],
)
def test_what_has_no_matrix(kind: str, rate: float, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matrix(kind, rate, classes)


# The draws


@pytest.mark.parametrize("rate", [0.2, 0.4])
@pytest.mark.parametrize("kind", NOISES)
def test_the_share_that_is_wrong(kind: str, rate: float) -> None:
    """Within bounds that a fair draw leaves once in 100,000 times; uniform noise is p (n - 1) / n wrong."""
    labels = np.arange(20_000) % 10
    found = corrupted(labels, matrix(kind, rate), np.random.default_rng(5))
    share = rate * 0.9 if kind == "unif" else rate
    low, high = stats.binom.interval(1 - 1e-5, len(labels), share)
    assert low <= (found != labels).sum() <= high
    assert found.dtype == np.int64
    assert set(found) == set(range(10))
    expected = matrix(kind, rate)
    counts = np.zeros((10, 10))
    np.add.at(counts, (labels, found), 1)
    assert not counts[expected == 0].any()
    low, high = stats.binom.interval(1 - 1e-7, 2000, expected)
    assert ((low <= counts) & (counts <= high)).all()


def test_without_noise_nothing_changes() -> None:
    labels = np.arange(1000) % 10
    assert np.array_equal(corrupted(labels, matrix("flip", 0.0), np.random.default_rng(0)), labels)


@pytest.mark.parametrize("kind", NOISES)
def test_without_noise_its_kind_does_not_matter(kind: str) -> None:
    assert np.array_equal(matrix(kind, 0.0, 2), np.eye(2))


# The split


def contents(images: ImageSet) -> set[bytes]:
    return {image.tobytes() for image in images.images}


def made(images: ImageSet | None = None, **settings: Any) -> NoisyLabels:
    return make_noisy(random_images(400, classes=10) if images is None else images, **SETTINGS | settings)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_judges_are_clean_balanced_and_apart(seed: int) -> None:
    """The published code had almost all of them among the noisy ones, for any seed but 1."""
    images, found = random_images(400, classes=10), made(seed=seed)
    truth = {image.tobytes(): label for image, label in zip(images.images, images.labels, strict=True)}
    assert (len(found.meta), len(found.train), found.left_out) == (20, 380, 0)
    assert found.meta.counts().tolist() == [2] * 10
    assert contents(found.meta) & contents(found.train) == set()
    assert contents(found.meta) | contents(found.train) == truth.keys()
    for part, labels in ((found.meta, found.meta.labels), (found.train, found.true_labels)):
        assert [truth[image.tobytes()] for image in part.images] == labels.tolist()
    assert np.array_equal(found.wrong, found.train.labels != found.true_labels)
    low, high = stats.binom.interval(1 - 1e-6, 380, 0.4)
    assert low <= found.wrong.sum() <= high


def test_another_seed_differs_in_the_split_the_wrong_classes_and_the_draws() -> None:
    first, again, other = made(), made(), made(seed=1)
    assert np.array_equal(first.train.labels, again.train.labels)
    assert np.array_equal(first.meta.images, again.meta.images)
    assert contents(first.meta) != contents(other.meta)

    def classes(found: NoisyLabels) -> set[tuple[int, int]]:
        return set(zip(found.true_labels.tolist(), found.train.labels.tolist(), strict=True))

    assert classes(first) != classes(other)
    of_both = contents(first.train) & contents(other.train)
    places = [
        {image.tobytes(): bool(wrong) for image, wrong in zip(one.train.images, one.wrong, strict=True)}
        for one in (first, other)
    ]
    assert [places[0][key] for key in of_both] != [places[1][key] for key in of_both]


def test_no_global_random_state_is_read_or_moved() -> None:
    before = np.random.get_state()  # noqa: NPY002
    first = made()
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    np.random.seed(9)  # noqa: NPY002
    try:
        assert np.array_equal(made().train.labels, first.train.labels)
    finally:
        np.random.set_state(before)  # noqa: NPY002


def test_train_size_keeps_the_first_and_not_the_judges() -> None:
    whole, few = made(), made(train_size=100)
    assert np.array_equal(few.train.images, whole.train.images[:100])
    assert np.array_equal(few.true_labels, whole.true_labels[:100])
    assert len(few.train.labels) == 100
    assert np.array_equal(few.meta.images, whole.meta.images)
    assert len(made(train_size=1000).train) == 380


def test_images_that_are_there_twice_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    images = random_images(100, classes=10)
    twice = ImageSet(images.images[[*range(100), *range(100)]], np.tile(images.labels, 2), images.names, "the album")
    with caplog.at_level(logging.WARNING, logger="vision_tasks"):
        found = made(twice, meta_size=50)
    assert contents(found.meta) & contents(found.train) == set()
    both = 50 - len(contents(found.meta))  # the judges themselves may be the two of a pair
    assert found.left_out == 50 - 2 * both > 0
    assert len(found.train) == 150 - found.left_out
    assert f"the album: {found.left_out} train images equal a meta image and are left out" in caplog.text
    blank = ImageSet(np.zeros((40, 4, 4, 1), np.uint8), np.arange(40) % 10, images.names, "blanks")
    with pytest.raises(ValueError, match="blanks: every image equals one of the meta set: none is left to train on"):
        made(blank)


def test_a_clean_set_of_the_users_own() -> None:
    images, own = random_images(400, classes=10), random_images(30, seed=8, classes=10)
    found = made(images, meta=own, meta_size=7)
    assert found.meta is own
    assert np.array_equal(found.train.images, images.images)
    assert np.array_equal(found.true_labels, images.labels)
    overlapping = random_images(30, seed=8, classes=10)
    overlapping.images[[3, 4]] = images.images[[7, 9]]
    with pytest.raises(ValueError, match=r"overlaps the training set: 2 train images are in the images: .* \(7, 9\)$"):
        made(images, meta=overlapping)
    with pytest.raises(ValueError, match="the meta set must be of the same kind"):
        made(images, meta=random_images(30, classes=10, side=4))
    with pytest.raises(ValueError, match="class 'j' has 0 images and needs 1"):
        made(images, meta=random_images(30, seed=8, classes=9))
    turned = replace(own, labels=9 - own.labels, names=own.names[::-1])
    assert np.array_equal(made(images, meta=turned).meta.labels, own.labels)
    with pytest.raises(ValueError, match="class 'd' has 0 images and needs 1"):
        made(images, meta=own.take([0, 1, 2]))


def test_validation_images_are_clean_balanced_and_apart() -> None:
    """Whatever else is drawn is drawn as without them."""
    images, without, found = random_images(400, classes=10), made(), made(validation_size=30)
    truth = {image.tobytes(): label for image, label in zip(images.images, images.labels, strict=True)}
    held = found.validation
    assert held is not None
    assert held.counts().tolist() == [3] * 10
    assert [truth[image.tobytes()] for image in held.images] == held.labels.tolist()
    assert np.array_equal(found.meta.images, without.meta.images)
    assert contents(held) | contents(found.train) == contents(without.train)
    assert len(contents(found.train)) == 350
    own = made(images, meta=random_images(30, seed=8, classes=10), validation_size=10)
    assert own.validation is not None
    assert (len(own.train), len(own.meta), len(own.validation)) == (400, 20, 10)
    assert contents(own.meta) | contents(own.validation) == contents(random_images(30, seed=8, classes=10))


def test_a_validation_set_of_the_users_own() -> None:
    images, own = random_images(400, classes=10), random_images(30, seed=8, classes=10)
    found = made(images, validation=own)
    assert found.validation is own
    assert len(found.train) == 380
    for other, twins in (("training", {"validation": images.take([7, 9, *range(20, 40)])}),
                         ("meta", {"validation": own, "meta": own})):  # fmt: skip
        with pytest.raises(ValueError, match=f"the validation set overlaps the {other} set: .* images are in"):
            made(images, **twins)
    with pytest.raises(ValueError, match="validation_size must be a multiple of the 10 classes, not 15"):
        made(images, validation_size=15)


def test_a_long_tail() -> None:
    """The sizes of CIFAR-10-LT at a factor of 100, which many papers print."""
    labels = np.arange(50_000) % 10
    images = ImageSet(np.zeros((50_000, 1, 1, 1), np.uint8), labels, tuple("abcdefghij"))
    found = long_tailed(images, 100.0, np.random.default_rng(0))
    assert found.counts().tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert len(np.unique(found.ids)) == len(found)
    other = long_tailed(images, 100.0, np.random.default_rng(1))
    assert not np.array_equal(found.ids[-60:], other.ids[-60:])
    assert len(long_tailed(images, 1.0, np.random.default_rng(0))) == 50_000
    few = random_images(400, classes=10)
    assert made(few, rate=0.0, imbalance_factor=19.0).train.counts().tolist()[::9] == [38, 2]
    with pytest.raises(ValueError, match=r"imbalance_factor 100\.0 leaves no image of class 'j': lower it"):
        made(few, imbalance_factor=100.0)
    with pytest.raises(ValueError, match=r"at least 1, not 0\.5"):
        made(few, imbalance_factor=0.5)


def test_noise_of_the_users_own_with_true_labels_beside_it() -> None:
    """The judges get the true labels, and what is trained on stays as it came."""
    images = random_images(400, classes=10)
    own = replace(images, labels=np.roll(images.labels, 1), true_labels=images.labels)
    found = made(own, rate=0.0)
    assert np.array_equal(found.train.labels, own.labels[found.train.ids])
    assert np.array_equal(found.true_labels, images.labels[found.train.ids])
    assert np.array_equal(found.meta.labels, images.labels[found.meta.ids])
    assert found.wrong.all()
    with pytest.raises(ValueError, match="its labels are noisy, true ones are beside them: set noise_rate to 0"):
        made(own)


@pytest.mark.parametrize(
    ("count", "size", "message"),
    [
        (400, 15, "meta_size must be a multiple of the 10 classes, not 15: so it balances"),
        (400, 0, "meta_size must be a multiple of the 10 classes, not 0"),
        (400, 400, "class 'a' has 40 images and needs 41"),
        (395, 390, "class 'f' has 39 images and needs 40"),
    ],
)
def test_sizes_that_cannot_be_balanced(count: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(random_images(count, classes=10), meta_size=size)


def test_a_class_that_train_size_cuts_off_is_missing() -> None:
    images = random_images(40)
    order = np.argsort(images.labels, kind="stable")  # sorted by class, as some files are
    with pytest.raises(ValueError, match=r"class '[a-d]' has 0 images and needs 1: add some, or ask for fewer"):
        make_noisy(images.take(order), kind="unif", rate=0.1, meta_size=len(images.names), train_size=12, seed=0)
