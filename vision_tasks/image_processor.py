"""The image processor of the small classifiers: what the training made of an image, for `pipeline` to make again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from vision_tasks.augmentation import to_float
from vision_tasks.images import block_means


class SmallImageProcessor(BaseImageProcessor):
    """Images of any kind as the small classifiers take them, (B, C, H, W).

    A side that is a multiple of `image_size` is averaged down to it, as the setting of that name does; images of
    other sizes are resized (bilinear, antialiased).

    Args:
        image_size: the pixels of a side.
        num_channels: 1 turns images grey; 3 repeats grey ones.
        image_mean, image_std: of pixels in [0, 1], one number a channel.
    """

    def __init__(
        self,
        image_size: int = 28,
        num_channels: int = 1,
        image_mean: Sequence[float] = (0.5,),
        image_std: Sequence[float] = (0.5,),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size, self.num_channels = image_size, num_channels
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """Normalised pixels of an image or of several."""
        pixels = [self._normalised(to_pil_image(image)) for image in cast(list[Any], make_flat_list_of_images(images))]
        return BatchFeature({"pixel_values": [one.numpy() for one in pixels]}, tensor_type=return_tensors)

    def _normalised(self, image: Image.Image) -> Tensor:
        side, shape = self.image_size, (self.image_size, self.image_size, self.num_channels)
        image = image.convert("L" if self.num_channels == 1 else "RGB")
        if image.width % side == image.height % side == 0:
            pixels = block_means(np.array(image).reshape(1, image.height, image.width, self.num_channels), side)
        else:
            pixels = np.array(image.resize((side, side), Image.Resampling.BILINEAR))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.image_mean, self.image_std))
        return (to_float(pixels.reshape(shape)) - mean) / std
