"""Wrong labels as the Meta-Weight-Net experiments make them, and the clean images that judge.

All is drawn from one generator a repetition, and the true labels stay known: what share is wrong, and how wrong and
right examples are weighted, is measured and not assumed.

Source: Shu et al., Meta-Weight-Net, NeurIPS 2019, section 4.2.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from metaxl_evo.messages import unknown
from vision_tasks.images import ImageSet

logger = logging.getLogger(__name__)

NOISES = ("unif", "flip", "flip2")


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """Train images some of whose labels are wrong, with the true ones beside them, and clean images apart from them.

    Args:
        train: with the labels that are trained on.
        true_labels: (N,) of `train`.
        meta: clean, and balanced where it was split off; no image of it is in `train`.
        left_out: train images that equal a meta image and were left out.
        known: whether the true labels are; those of a noisy set that came without them are taken for right.
    """

    train: ImageSet
    true_labels: np.ndarray
    meta: ImageSet
    left_out: int = 0
    known: bool = True

    @property
    def wrong(self) -> np.ndarray:
        """(N,) which train labels are wrong."""
        return self.train.labels != self.true_labels


def noise_matrix(kind: str, rate: float, classes: int, generator: np.random.Generator) -> np.ndarray:
    """(classes, classes): row c is what the label of an image of class c becomes, with what probability.

    `unif`: with probability `rate` drawn from all classes, the true one among them, so that rate (n - 1) / n are
    wrong. `flip`: one other class for each class takes `rate`. `flip2`: two other classes take half of it each.

    Raises:
        ValueError: for an unknown kind, a rate outside [0, 1), or too few classes.
    """
    if kind not in NOISES:
        raise ValueError(unknown("noise", kind, NOISES))
    if not 0 <= rate < 1:
        raise ValueError(f"noise_rate must be at least 0 and below 1, not {rate}")
    others = {"unif": 0, "flip": 1, "flip2": 2}[kind]
    if rate == 0 and classes <= others:
        return np.eye(classes)
    if classes <= others:
        raise ValueError(f"noise {kind} needs more than {others} classes, here are {classes}: use unif")
    if kind == "unif":
        return np.full((classes, classes), rate / classes) + (1 - rate) * np.eye(classes)
    matrix = (1 - rate) * np.eye(classes)
    for true in range(classes):
        wrong = generator.choice(np.delete(np.arange(classes), true), size=others, replace=False)
        matrix[true, wrong] = rate / others
    return matrix


def corrupted(labels: np.ndarray, matrix: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A label for each, drawn from the matrix's row of its true class; (N,) int64."""
    thresholds = matrix.cumsum(1)[labels]  # (N, classes)
    drawn = generator.random((len(labels), 1)) * thresholds[:, -1:]  # the sum of a row is 1 but for rounding
    return (drawn >= thresholds).sum(1).astype(np.int64)


def make_noisy(
    images: ImageSet,
    *,
    kind: str,
    rate: float,
    meta_size: int,
    seed: int,
    train_size: int | None = None,
    meta: ImageSet | None = None,
) -> NoisyLabels:
    """Take a clean balanced meta set out of `images` and spoil the labels of the others.

    Where `images` have true labels beside their own, these are the spoilt ones, and the meta set gets the true ones.

    Args:
        kind, rate: of `noise_matrix`.
        meta_size: images of the meta set, a multiple of the number of classes.
        train_size: images to keep beside it at most, the first ones.
        seed: of the split, the wrong classes and the draws: another repetition differs in all three.
        meta: a clean set of the user's own in place of one taken out.

    Raises:
        ValueError: for a class with too few images, a size that cannot be balanced, or a meta set whose images are
            trained on.
    """
    if images.true_labels is not None and rate:
        raise ValueError(f"{images.where}: its labels are noisy, true ones are beside them: set noise_rate to 0")
    known = rate > 0 or images.true_labels is not None or meta is None
    generator = np.random.default_rng(seed)
    matrix = noise_matrix(kind, rate, len(images.names), generator)
    left_out = 0
    if meta is None:
        clean = images.clean()
        chosen = _balanced(clean, meta_size, generator)
        rest = np.setdiff1d(np.arange(len(images)), chosen)
        meta, train = clean.take(chosen), images.take(rest)
        twins = found_in(train, meta)
        left_out = int(twins.sum())
        if left_out:  # the data set holds an image twice
            logger.warning("%s: %d train images equal a meta image and are left out", images.where, left_out)
            if twins.all():
                raise ValueError(f"{images.where}: every image equals one of the meta set: none is left to train on")
            train = train.take(~twins)
    else:
        _require_alike(meta, images)
        meta = meta.numbered_as(images)
        train, twins = images, found_in(images, meta)
        if twins.any():
            raise ValueError(
                f"the meta set overlaps the training set: {twins.sum()} train images are in {meta.where}: take them "
                f"out of one of them ({images.named(twins)})"
            )
    if train_size is not None:
        train = train.take(np.arange(min(train_size, len(train)))).require_classes()
    labels = corrupted(train.labels, matrix, generator)
    made = replace(train, labels=labels)
    return NoisyLabels(made, train.clean().labels, meta.require_classes(), left_out, known)


def _balanced(images: ImageSet, size: int, generator: np.random.Generator) -> np.ndarray:
    """(size,) sorted numbers of images, equally many of each class."""
    each, rest = divmod(size, len(images.names))
    if rest or each < 1:
        raise ValueError(
            f"meta_size must be a multiple of the {len(images.names)} classes, not {size}: so it balances"
        )
    images.require_classes(each + 1)
    members = [np.flatnonzero(images.labels == label) for label in range(len(images.names))]
    return np.sort(np.concatenate([generator.choice(one, each, replace=False) for one in members]))


def found_in(images: ImageSet, others: ImageSet) -> np.ndarray:
    """(N,) which images have all their pixels alike with one of the others."""
    known = {image.tobytes() for image in others.images}
    return np.array([image.tobytes() in known for image in images.images])


def _require_alike(meta: ImageSet, images: ImageSet) -> None:
    if meta.images.shape[1:] != images.images.shape[1:]:
        raise ValueError(
            f"{meta.where} has images of {meta.images.shape[1:]} pixels, {images.where} of "
            f"{images.images.shape[1:]}: the meta set must be of the same kind"
        )
