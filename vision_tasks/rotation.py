"""The rotation transformer: one learned angle turns the training images as the images are turned that judge."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.network_files import load_network, save_network
from vision_tasks.classification import ImageTask
from vision_tasks.images import ImageSet

SUBFOLDER = "rotation"
MODEL_TYPE = "metaxl_rotation"


class Rotation(nn.Module):
    """Rotates images about their middle by one learned angle in radians, counter-clockwise.

    `torch.nn.functional.grid_sample` gives the same values, but its backward has no forward-mode derivative, which the
    engine `jvp` needs: so the four neighbours of each point are gathered and weighted here.

    Source: Bohdal et al., EvoGrad, NeurIPS 2021, section 4.2.
    """

    def __init__(self, degrees: float = 0.0) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.tensor(math.radians(degrees)))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), bilinear; outside of the image is 0, the background of pixels in [0, 1]."""
        height, width = images.shape[2:]
        y, x = torch.meshgrid(*(torch.arange(n).to(images) - (n - 1) / 2 for n in (height, width)), indexing="ij")
        cos, sin = torch.cos(self.angle), torch.sin(self.angle)
        column, row = cos * x - sin * y + (width - 1) / 2, sin * x + cos * y + (height - 1) / 2  # (H, W)
        left, top = column.detach().floor(), row.detach().floor()
        turned = torch.zeros_like(images)
        for i, of_row in ((top, top + 1 - row), (top + 1, row - top)):
            for j, of_column in ((left, left + 1 - column), (left + 1, column - left)):
                inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
                pixels = images[:, :, i.clamp(0, height - 1).long(), j.clamp(0, width - 1).long()]
                turned = turned + pixels * (of_row * of_column * inside)
        return turned

    @property
    def degrees(self) -> float:
        """The angle."""
        return math.degrees(float(self.angle.detach()))


class RotatedClassifier(ImageTask):
    """inner loss = mean cross-entropy of rotated images; they are rotated before they are normalised.

    Outer loss = that of images as they are. Rotated after normalisation, the corners would be filled with a grey that
    no judging image has.

    Args:
        rotated: False trains on upright images (the baseline).
    """

    def __init__(self, base: nn.Module, meta: Rotation, *, rotated: bool = True) -> None:
        super().__init__(base, meta)
        self.meta: Rotation = meta
        self.rotated = rotated

    def inner_loss(self, batch: Batch) -> Tensor:
        images = self.meta(batch["images"]) if self.rotated else batch["images"]
        return self.costs(images, batch["labels"])

    def save_meta(self, folder: str | Path) -> None:
        save_network(Path(folder) / SUBFOLDER, MODEL_TYPE, {"degrees": self.meta.degrees}, self.meta)

    def load_meta(self, folder: str | Path) -> None:
        self.meta.load_state_dict(load_network(Path(folder) / SUBFOLDER, MODEL_TYPE, Rotation).state_dict())


def rotated(images: ImageSet, degrees: float) -> ImageSet:
    """The images turned counter-clockwise by PIL (nearest pixel, black outside), as a camera held askew sees them."""
    turned = [np.asarray(Image.fromarray(image.squeeze()).rotate(degrees)) for image in images.images]
    return replace(images, images=np.stack(turned).reshape(images.images.shape))
