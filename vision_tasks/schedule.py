"""An image classifier whose optimiser follows a schedule, and the rows of trainings that each have their own split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.schedule import Schedule
from vision_tasks.augmentation import Transform
from vision_tasks.classification import ImageTask
from vision_tasks.images import ImageRows, ImageSet


class ScheduledClassifier(ImageTask):
    """Both losses are the mean cross-entropy; the meta parameters are numbers of the optimiser.

    A batch that judges has their numbers, `judge` (B,), among these images.

    Args:
        images: of which some judge.
        steps: of a training.
        ranges: kind -> the least and the largest value.
    """

    def __init__(
        self,
        base: nn.Module,
        meta: Schedule,
        images: ImageSet,
        *,
        steps: int,
        ranges: Mapping[str, tuple[float, float]],
    ) -> None:
        super().__init__(base, meta)
        self.meta: Schedule = meta
        self.images = images
        self.tuned_optimizer, self.tuned_ranges = meta.over(steps), ranges

    def inner_loss(self, batch: Batch) -> Tensor:
        return self.costs(batch["images"], batch["labels"])

    def outer_loss(self, batch: Batch) -> Tensor:
        taken = self.images.take(batch["judge"].cpu().numpy())
        pixels = torch.from_numpy(taken.images).to(self.image_mean).movedim(3, 1) / 255  # (B, C, H, W)
        return self.costs(pixels, torch.from_numpy(taken.labels).to(pixels.device))

    def save_meta(self, folder: str | Path) -> None:
        self.meta.save(folder)

    def load_meta(self, folder: str | Path) -> None:
        self.meta.load(folder)


@dataclass(frozen=True, eq=False)
class Splits:
    """Training images of which another part judges each training.

    Args:
        images: all of them.
        judging: how many judge.
        seed: of the splits and of the order.
    """

    images: ImageSet
    judging: int
    seed: int

    @lru_cache(maxsize=2)  # noqa: B019 (as long as the run)
    def of(self, training: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the images that train in this training, and of those that judge it."""
        order = np.random.default_rng([self.seed, 0, training]).permutation(len(self.images))
        return order[self.judging :], order[: self.judging]

    @lru_cache(maxsize=2)  # noqa: B019
    def shuffled(self, training: int, epoch: int) -> np.ndarray:
        """Those that train, in the order of an epoch of this training."""
        train, _ = self.of(training)
        return np.random.default_rng([self.seed, 1, training, epoch]).permutation(train)


class TrainingRows(ImageRows):
    """All rows of a training in their order: epochs of whole batches, each shuffled; an epoch of the trainer is one.

    Row i of training k is a function of (seed, k, i) alone.

    Args:
        splits: of the images.
        steps: of a training.
        batch: rows a step.

    Raises:
        ValueError: for fewer images than a batch has.
    """

    def __init__(self, splits: Splits, steps: int, batch: int, transform: Transform | None = None) -> None:
        super().__init__(splits.images, transform, splits.seed)
        self.splits, self.rows = splits, steps * batch
        self.whole = (len(splits.images) - splits.judging) // batch * batch
        if not self.whole:
            raise ValueError(
                f"{len(splits.images) - splits.judging} images train, fewer than the {batch} of a batch: lower "
                "per_device_train_batch_size or validation_share"
            )

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, self.whole)
        return self.row(int(self.splits.shuffled(self.epoch, epoch)[place]), index)


class JudgingRows:
    """The numbers of the images that judge the training which is being made: few meta steps read them.

    Args:
        training: the rows of the trainings, which know the number of the one that is made.
    """

    def __init__(self, training: TrainingRows) -> None:
        self.training = training

    def __len__(self) -> int:
        return self.training.splits.judging

    def __getitem__(self, index: int) -> dict[str, int]:
        _, judges = self.training.splits.of(self.training.epoch)
        return {"judge": int(judges[index])}
