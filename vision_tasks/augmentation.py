"""Augmentation as pure functions of an image and a generator, so that a row of data is a function of its seed.

Images come as uint8 in (H, W, C) and leave as float32 in (C, H, W), in [0, 1]; between `to_float` and the end all is
(C, H, W). Nothing here draws from the global random state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Transform = Callable[[Any, Generator], Tensor]  # (uint8 (H, W, C), generator) -> float (C, H, W)

GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's mode L
EVALUATION_MARGIN = 1.15  # the side before the centre crop over the side after it: 257 for 224


def to_float(image: Any) -> Tensor:
    """A uint8 image (H, W, C), an array or a tensor, as floats (C, H, W) in [0, 1].

    Raises:
        ValueError: for another dtype or shape.
    """
    pixels = torch.as_tensor(image)
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[2] not in (1, 3) or not pixels.numel():
        raise ValueError(
            f"an image must be uint8 of shape (height, width, 1 or 3), got {pixels.dtype} of {tuple(pixels.shape)}: "
            "convert it before"
        )
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def to_channels(image: Tensor, channels: int) -> Tensor:
    """A colour image as grey, a grey one in three equal channels, or as it is: (C, H, W) -> (channels, H, W)."""
    if len(image) == channels:
        return image
    return grey(image) if channels == 1 else image.expand(channels, -1, -1)


def grey(image: Tensor) -> Tensor:
    """The luma of a colour image, (3, H, W) -> (1, H, W); a grey image is its own."""
    if len(image) == 1:
        return image
    return torch.einsum("chw,c->hw", image, image.new_tensor(GREY)).unsqueeze(0)


def uniform(low: float, high: float, generator: Generator) -> float:
    """One number from [low, high)."""
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def flip(image: Tensor, generator: Generator) -> Tensor:
    """The image or its mirror image, left and right exchanged, with equal chances."""
    return image.flip(-1) if torch.rand((), generator=generator).item() < 0.5 else image


def pad_crop(image: Tensor, generator: Generator, pad: int = 4) -> Tensor:
    """A crop of the size of the image (C, H, W) out of it with `pad` reflected pixels around; of any dtype.

    Raises:
        ValueError: for an image no larger than the padding, which cannot be reflected.
    """
    if min(image.shape[1:]) <= pad:
        raise ValueError(f"an image of {tuple(image.shape[1:])} pixels cannot be padded by {pad} reflected ones")
    top, left = torch.randint(2 * pad + 1, (2,), generator=generator).tolist()
    rows, columns = (
        _reflected(torch.arange(size) + offset - pad, size)
        for size, offset in zip(image.shape[1:], (top, left), strict=True)
    )
    return image[:, rows][:, :, columns]


def pad_crop_flip(image: Tensor, generator: Generator, pad: int = 4) -> Tensor:
    """The CIFAR recipe: a random crop of the padded image, then a random flip; (C, H, W) of any dtype."""
    return flip(pad_crop(image, generator, pad), generator)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places outside of [0, size) mirrored at the border pixels, which are not repeated."""
    places = places.abs()
    return (size - 1) - ((size - 1) - places).abs()


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, antialiased where it shrinks: (C, H, W) -> (C, height, width)."""
    if image.shape[1:] == (height, width):
        return image
    sized = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True, align_corners=False)
    return sized[0].clamp(0, 1)


def random_resized_crop(
    image: Tensor,
    generator: Generator,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A crop of a random share of the area and a random aspect, resized to (C, size, size).

    Where ten draws do not fit into the image, the largest centred crop of an allowed aspect is taken.
    """
    height, width = image.shape[1:]
    low, high = torch.tensor(ratio, dtype=torch.float64).log().tolist()
    for _ in range(10):
        area = height * width * uniform(*scale, generator)
        aspect = torch.tensor(uniform(low, high, generator)).exp().item()
        h, w = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if 0 < h <= height and 0 < w <= width:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            return resize(image[:, top : top + h, left : left + w], size, size)
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return resize(_centre(image, h, w), size, size)


def colour_jitter(image: Tensor, generator: Generator, strength: float = 0.4) -> Tensor:
    """Brightness, contrast and colour, in this order, each times a factor from 1 +- strength; clipped to [0, 1].

    Each is a blend of the image with black, with its mean grey, and with itself in grey.
    """
    for reference in (torch.zeros_like, lambda x: grey(x).mean(), grey):
        factor = uniform(1 - strength, 1 + strength, generator)
        start = reference(image)
        image = (start + factor * (image - start)).clamp(0, 1)
    return image


def centre_crop(image: Tensor, size: int) -> Tensor:
    """Both sides to EVALUATION_MARGIN x size, whatever they were, then the middle, (C, size, size); as published."""
    side = int(size * EVALUATION_MARGIN)
    return _centre(resize(image, side, side), size, size)


def _centre(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class TrainTransform:
    """RandomResizedCrop, colour jitter and flip: what few-shot training sees.

    Args:
        size: of the square image that leaves.
        channels: 1 or 3.
        scale: the least and the largest share of the area that a crop keeps.
        jitter: strength of the colour jitter.
        flips: whether mirror images are as good (not for digits and letters).

    Source: Tseng et al., Cross-Domain Few-Shot Classification via Learned Feature-Wise Transformation, ICLR 2020.
    """

    size: int
    channels: int = 3
    scale: tuple[float, float] = (0.08, 1.0)
    jitter: float = 0.4
    flips: bool = True

    def __call__(self, image: Any, generator: Generator) -> Tensor:
        pixels = random_resized_crop(to_float(image), generator, self.size, self.scale)
        pixels = colour_jitter(pixels, generator, self.jitter)
        return to_channels(flip(pixels, generator) if self.flips else pixels, self.channels)


@dataclass(frozen=True)
class EvaluationTransform:
    """Resize and centre crop; draws nothing."""

    size: int
    channels: int = 3

    def __call__(self, image: Any, generator: Generator | None = None) -> Tensor:
        return to_channels(centre_crop(to_float(image), self.size), self.channels)


@dataclass(frozen=True)
class PadCropFlip:
    """The CIFAR recipe on a uint8 image."""

    pad: int = 4
    flips: bool = True

    def __call__(self, image: Any, generator: Generator) -> Tensor:
        return (pad_crop_flip if self.flips else pad_crop)(to_float(image), generator, self.pad)


AUGMENTATIONS: dict[str, Transform | None] = {"none": None, "pad_crop_flip": PadCropFlip()}
