"""An image classifier whose optimiser follows a schedule, and the rows of trainings that each have their own split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from metaxl_evo.experiments.schedule_rows import Splits
from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.schedule import Schedule
from metaxl_evo.models.scheduled import Scheduled
from vision_tasks.augmentation import Transform
from vision_tasks.classification import ImageTask
from vision_tasks.images import ImageRows, ImageSet


class ScheduledClassifier(Scheduled, ImageTask):
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
        self.images = images
        self.follow(steps, ranges)

    def inner_loss(self, batch: Batch) -> Tensor:
        return self.costs(batch["images"], batch["labels"])

    def outer_loss(self, batch: Batch) -> Tensor:
        taken = self.images.take(batch["judge"].cpu().numpy())
        pixels = torch.from_numpy(taken.images).to(self.image_mean).movedim(3, 1) / 255  # (B, C, H, W)
        return self.costs(pixels, torch.from_numpy(taken.labels).to(pixels.device))


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
        super().__init__(cast(ImageSet, splits.rows), transform, splits.seed)
        self.splits, self.rows, self.whole = splits, steps * batch, splits.whole(batch)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row(self.splits.number(self.epoch, index, self.whole), index)
