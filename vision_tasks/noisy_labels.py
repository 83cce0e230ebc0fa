"""Wrong labels as the Meta-Weight-Net experiments make them, and the clean images that judge.

All is drawn from one generator a repetition, and the true labels stay known: what share is wrong, and how wrong and
right examples are weighted, is measured and not assumed.

Source: Shu et al., Meta-Weight-Net, NeurIPS 2019, section 4.2.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
        validation: clean images that choose a checkpoint, in neither `train` nor `meta`; None where there are none.
    """

    train: ImageSet
    true_labels: np.ndarray
    meta: ImageSet
    left_out: int = 0
    known: bool = True
    validation: ImageSet | None = None

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
    validation_size: int | None = None,
    validation: ImageSet | None = None,
    imbalance_factor: float | None = None,
) -> NoisyLabels:
    """Take a clean balanced meta set out of `images` and spoil the labels of the others.

    Where `images` have true labels beside their own, these are the spoilt ones, and the meta set gets the true ones.

    Args:
        kind, rate: of `noise_matrix`.
        meta_size: images of the meta set, a multiple of the number of classes.
        train_size: images to keep beside it at most, the first ones.
        seed: of the split, the wrong classes and the draws: another repetition differs in all three.
        meta: a clean set of the user's own in place of one taken out.
        validation_size: images taken out of the clean ones for validation, a multiple of the number of classes.
        validation: a clean validation set of the user's own.
        imbalance_factor: of `long_tailed`, for the train images.

    Raises:
        ValueError: for a class with too few images, a size that cannot be balanced, or a clean set whose images are
            trained on.
    """
    if images.true_labels is not None and rate:
        raise ValueError(f"{images.where}: its labels are noisy, true ones are beside them: set noise_rate to 0")
    known = rate > 0 or images.true_labels is not None or meta is None
    generator = np.random.default_rng(seed)
    matrix = noise_matrix(kind, rate, len(images.names), generator)
    train, meta, held, left_out = _clean_parts(images, meta, validation, meta_size, validation_size, generator, seed)
    if train_size is not None:
        train = train.take(np.arange(min(train_size, len(train)))).require_classes()
    if imbalance_factor is not None:
        train = long_tailed(train, imbalance_factor, np.random.default_rng([seed, 2]))
    made = replace(train, labels=corrupted(train.labels, matrix, generator))
    return NoisyLabels(made, train.clean().labels, meta, left_out, known, held)


def _clean_parts(
    images: ImageSet,
    meta: ImageSet | None,
    validation: ImageSet | None,
    meta_size: int,
    validation_size: int | None,
    generator: np.random.Generator,
    seed: int,
) -> tuple[ImageSet, ImageSet, ImageSet | None, int]:
    """Train, meta and validation images, the user's own sets or taken out of the clean ones; and how many are lost."""
    own = {"meta": meta, "validation": validation}
    given = {name: _as(one, images, name) for name, one in own.items() if one is not None}
    train, cut = images, []
    if "meta" in given:
        meta = given["meta"]
    else:
        meta, train = _taken(train, "meta_size", meta_size, generator)
        cut.append(meta)
    if validation_size is not None:
        draws = np.random.default_rng([seed, 1])  # of its own: the other draws are those of a run without
        if "meta" in given:
            validation, meta = _taken(meta, "validation_size", validation_size, draws)
        else:
            validation, train = _taken(train, "validation_size", validation_size, draws)
        validation = validation.take(~found_in(validation, meta))
        cut.append(validation)
    elif "validation" in given:
        validation = given["validation"]
    for name, clean in given.items():
        _refuse_overlap(name, clean, "training", train)
    if "validation" in given:
        _refuse_overlap("validation", given["validation"], "meta", meta)
    train, left_out = _apart(train, cut)
    return train, meta.require_classes(), None if validation is None else validation.require_classes(), left_out


def long_tailed(images: ImageSet, factor: float, generator: np.random.Generator) -> ImageSet:
    """Ever fewer images of each class: of class c of C, n factor^(-c / (C - 1)), n those of the smallest class.

    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019, section 5.1.

    Raises:
        ValueError: for a factor below 1, or one that leaves a class without images.
    """
    if not 1 <= factor < np.inf:
        raise ValueError(f"imbalance_factor is the largest class over the smallest, at least 1, not {factor}")
    labels, classes = images.clean().labels, len(images.names)
    largest = np.bincount(labels, minlength=classes).min()
    sizes = [int(largest * factor ** (-label / max(classes - 1, 1)) + 1e-9) for label in range(classes)]
    if min(sizes) < 1:
        raise ValueError(f"imbalance_factor {factor} leaves no image of class {images.names[-1]!r}: lower it")
    kept = [generator.choice(np.flatnonzero(labels == label), size, replace=False) for label, size in enumerate(sizes)]
    return images.take(np.sort(np.concatenate(kept)))


def _balanced(images: ImageSet, name: str, size: int, generator: np.random.Generator) -> np.ndarray:
    """(size,) sorted numbers of images, equally many of each class."""
    each, rest = divmod(size, len(images.names))
    if rest or each < 1:
        raise ValueError(f"{name} must be a multiple of the {len(images.names)} classes, not {size}: so it balances")
    images.require_classes(each + 1)
    members = [np.flatnonzero(images.labels == label) for label in range(len(images.names))]
    return np.sort(np.concatenate([generator.choice(one, each, replace=False) for one in members]))


def _taken(images: ImageSet, name: str, size: int, generator: np.random.Generator) -> tuple[ImageSet, ImageSet]:
    """So many clean images, equally many of each class, and the others as they are."""
    clean = images.clean()
    chosen = _balanced(clean, name, size, generator)
    return clean.take(chosen), images.take(np.setdiff1d(np.arange(len(images)), chosen))


def _as(clean: ImageSet, images: ImageSet, name: str) -> ImageSet:
    """A clean set of the user's own, its classes numbered as those of `images`."""
    if clean.images.shape[1:] != images.images.shape[1:]:
        raise ValueError(
            f"{clean.where} has images of {clean.images.shape[1:]} pixels, {images.where} of "
            f"{images.images.shape[1:]}: the {name} set must be of the same kind"
        )
    return clean.numbered_as(images)


def _refuse_overlap(name: str, clean: ImageSet, other: str, images: ImageSet) -> None:
    twins = found_in(images, clean)
    if twins.any():
        kind = other.removesuffix("ing")
        raise ValueError(
            f"the {name} set overlaps the {other} set: {twins.sum()} {kind} images are in {clean.where}: take them "
            f"out of one of them ({images.named(twins)})"
        )


def _apart(train: ImageSet, cut: Sequence[ImageSet]) -> tuple[ImageSet, int]:
    """The train images that equal none of the clean ones taken out of them, and how many do."""
    twins = np.zeros(len(train), bool)
    for clean in cut:
        twins |= found_in(train, clean)
    if not twins.any():
        return train, 0
    logger.warning("%s: %d train images equal a meta image and are left out", train.where, twins.sum())
    if twins.all():
        raise ValueError(f"{train.where}: every image equals one of the meta set: none is left to train on")
    return train.take(~twins), int(twins.sum())


def found_in(images: ImageSet, others: ImageSet) -> np.ndarray:
    """(N,) which images have all their pixels alike with one of the others."""
    known = {image.tobytes() for image in others.images}
    return np.array([image.tobytes() in known for image in images.images])
