"""Data hyper-cleaning: one learned weight a training image, and clean images that judge the weights.

The labels are spoilt here, so that it is known which weights should have fallen.

Source: Generalized Greedy Gradient-Based Hyperparameter Optimization, ICLR 2025 submission 6297.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.network_files import load_network, save_network
from vision_tasks.classification import ImageTask
from vision_tasks.images import ImageRows, ImageSet
from vision_tasks.noisy_labels import found_in

SUBFOLDER = "image_weights"
MODEL_TYPE = "metaxl_image_weights"


class ImageWeights(nn.Module):
    """The weight of training image i is sigmoid(logits[i]).

    Args:
        images: their number.
        logit: where all begin; 0 is a weight of one half.
    """

    def __init__(self, images: int, logit: float = 0.0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((images,), logit))

    def forward(self, rows: Tensor) -> Tensor:
        """Numbers of training images (B,) -> their weights (B,)."""
        return self.logits[rows].sigmoid()


class CleanedClassifier(ImageTask):
    """inner loss = mean of sigmoid(lam_i) cost_i, not divided by the weights; outer loss = that of clean images.

    A batch of training images has `rows` (B,) besides, the numbers by which the weights know them.

    Args:
        weighted: False trains on the plain mean (the baseline).
    """

    def __init__(self, base: nn.Module, meta: ImageWeights, *, weighted: bool = True) -> None:
        super().__init__(base, meta)
        self.meta: ImageWeights = meta
        self.weighted = weighted

    def inner_loss(self, batch: Batch) -> Tensor:
        costs = self.costs(batch["images"], batch["labels"])  # (B,)
        return self.meta(batch["rows"]) * costs if self.weighted else costs

    def save_meta(self, folder: str | Path) -> None:
        save_network(Path(folder) / SUBFOLDER, MODEL_TYPE, {"images": len(self.meta.logits)}, self.meta)

    def load_meta(self, folder: str | Path) -> None:
        saved, own = load_network(Path(folder) / SUBFOLDER, MODEL_TYPE, ImageWeights).logits, self.meta.logits
        if saved.shape != own.shape:
            raise ValueError(
                f"{folder} has weights of {len(saved)} images, here are {len(own)}: set train_size to {len(saved)}"
            )
        self.meta.load_state_dict({"logits": saved})


class NumberedRows(ImageRows):
    """ImageRows with the number of each row, by which its weight is found.

    Raises:
        ValueError: for ids that are not one an image: nobody could tell whose weight it is.
    """

    def __init__(self, images: ImageSet) -> None:
        super().__init__(images)
        ids = pd.Index(images.ids)
        if len(ids) != len(images):
            raise ValueError(f"{images.where}: {len(images)} images and {len(ids)} ids: one an image")
        if ids.hasnans or ids.has_duplicates:
            which = ids.isna() | ids.duplicated()
            raise ValueError(
                f"{images.where}: {which.sum()} ids are missing or there twice ({images.named(which)}): a weight is "
                "of one image, name each once"
            )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**super().__getitem__(index), "rows": torch.tensor(index)}


@dataclass(frozen=True, eq=False)
class CleaningData:
    """Training images some of whose labels are flipped, clean ones that judge, and others that test.

    Args:
        true_labels: (N,) of `train`.
        known: whether they are: where nothing was flipped here, the labels are those of the source, right or not.
    """

    train: ImageSet
    true_labels: np.ndarray
    validation: ImageSet
    test: ImageSet
    known: bool = True

    @property
    def flipped(self) -> np.ndarray:
        """(N,) which train labels are wrong."""
        return self.train.labels != self.true_labels


def flip(labels: np.ndarray, rate: float, classes: int, generator: np.random.Generator) -> np.ndarray:
    """Each label with probability `rate` becomes another class, all others alike; (N,).

    Raises:
        ValueError: for a rate outside [0, 1), or a single class.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"flip_rate must be at least 0 and below 1, not {rate}")
    if classes < 2:
        raise ValueError("a label is flipped to another class, and there is only one: give images of two or more")
    others = generator.integers(1, classes, len(labels))
    return np.where(generator.random(len(labels)) < rate, (labels + others) % classes, labels)


def make_cleaning(
    images: ImageSet,
    judges: ImageSet,
    *,
    rate: float,
    train_size: int,
    validation_size: int | None = None,
    test_size: int | None = None,
    seed: int,
) -> CleaningData:
    """Draw all three sets; no image is in two of them.

    Args:
        images: the training part: of it are those that train, and of what is left over those that test.
        judges: the test part, of which those are that judge.
        rate: of `flip`.
        validation_size, test_size: None takes all there are.
        seed: of the draws.

    Raises:
        ValueError: for more images than there are, or a class without one.
    """
    generator = np.random.default_rng(seed)
    judges, images = (one.take(generator.permutation(len(one))) for one in (judges, images))
    validation = _first("validation_size", validation_size, judges).require_classes()
    pool = images.take(~found_in(images, validation))
    if train_size >= len(pool):
        raise ValueError(f"train_size {train_size} leaves none of the {len(pool)} images of {pool.where} to test on")
    clean, left = pool.take(slice(train_size)).require_classes(), pool.take(slice(train_size, None))
    test = _first("test_size", test_size, left.take(~found_in(left, clean))).require_classes()
    made = flip(clean.labels, rate, len(images.names), generator)
    return CleaningData(replace(clean, labels=made), clean.labels, validation, test, known=rate > 0)


def _first(name: str, size: int | None, images: ImageSet) -> ImageSet:
    if size is not None and size > len(images):
        raise ValueError(f"{name} is {size}, and {images.where} has {len(images)} images for it: lower {name}")
    return images.take(slice(size))


def weights_table(weights: np.ndarray, data: CleaningData) -> pd.DataFrame:
    """A row a training image, the smallest weight first: id, weight, label; true_label and flipped where known."""
    names = np.array(data.train.names)
    columns = {"id": data.train.ids, "weight": weights, "label": names[data.train.labels]}
    if data.known:
        columns |= {"true_label": names[data.true_labels], "flipped": data.flipped}
    return pd.DataFrame(columns).sort_values("weight", kind="stable")


def found_flips(weights: np.ndarray, flipped: np.ndarray) -> dict[str, float | None]:
    """How well small weights tell flipped labels; None where there are none, or nothing else.

    `auc`: the share of pairs of a flipped and a right label of which the flipped weighs less, ties a half;
    `precision`: of the smallest weights, as many as are flipped, the share that are.
    """
    wrong, right = int(flipped.sum()), int((~flipped).sum())
    if not wrong or not right:
        return {"auc": None, "precision": None}
    ranks = pd.Series(-weights).rank().to_numpy()  # 1 is the largest weight
    above = ranks[flipped].sum() - wrong * (wrong + 1) / 2
    smallest = np.argsort(weights, kind="stable")[:wrong]
    return {"auc": float(above / (wrong * right)), "precision": float(flipped[smallest].mean())}
