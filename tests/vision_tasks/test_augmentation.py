"""Augmentation: a function of image and generator, of known extremes, in range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Generator, Tensor
from torch.nn import functional as F

from vision_tasks.augmentation import (
    EvaluationTransform,
    PadCropFlip,
    TrainTransform,
    centre_crop,
    colour_jitter,
    flip,
    grey,
    pad_crop,
    pad_crop_flip,
    random_resized_crop,
    resize,
    to_channels,
    to_float,
)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def pixels(height: int = 20, width: int = 24, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height: int = 20, width: int = 24, channels: int = 3) -> Tensor:
    return to_float(pixels(height, width, channels))


TRANSFORMS: dict[str, Callable[[Any, Generator], Tensor]] = {
    "train": TrainTransform(16),
    "train grey": TrainTransform(16, channels=1, scale=(0.5, 1.0), flips=False),
    "evaluation": EvaluationTransform(16),
    "cifar": PadCropFlip(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_functions_of_image_and_generator(name: str) -> None:
    transform, before = TRANSFORMS[name], torch.random.get_rng_state()
    first, again = (transform(pixels(), seeded(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.dtype == torch.float32
    assert 0 <= first.min() < first.max() <= 1
    others = [transform(pixels(), seeded(seed)) for seed in range(5)]
    assert any(not torch.equal(first, other) for other in others) == (name != "evaluation")


@pytest.mark.parametrize("name", ["train", "evaluation"])
@pytest.mark.parametrize("shape", [(105, 105, 1), (5, 40, 3), (40, 5, 3), (16, 16, 3)])
def test_every_shape_leaves_as_a_square(name: str, shape: tuple[int, int, int]) -> None:
    for seed in range(4):
        assert TRANSFORMS[name](pixels(*shape), seeded(seed)).shape == (3, 16, 16)


def test_to_float_takes_bytes_apart() -> None:
    image = np.array([[[0, 51, 255]], [[255, 102, 0]]], dtype=np.uint8)  # (2, 1, 3)
    torch.testing.assert_close(to_float(image)[:, :, 0], torch.tensor([[0.0, 1.0], [0.2, 0.4], [1.0, 0.0]]))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_images_are_refused_in_one_line(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="an image must be uint8 of shape") as caught:
        to_float(image)
    assert "\n" not in str(caught.value)


def test_pad_crop_is_a_window_of_the_padded_image() -> None:
    image = photo(9, 11)
    padded = F.pad(image[None], (4, 4, 4, 4), mode="reflect")[0]
    windows = [padded[:, y : y + 9, x : x + 11] for y in range(9) for x in range(9)]
    met = set()
    for seed in range(400):
        crop = pad_crop(image, seeded(seed))
        met |= {index for index, window in enumerate(windows) if torch.equal(crop, window)}
    assert len(met) == 81


def test_pad_crop_flip_flips_half_of_them_and_serves_bytes() -> None:
    image = torch.arange(8 * 8, dtype=torch.uint8).view(1, 8, 8)
    flipped = [bool(pad_crop_flip(image, seeded(seed), pad=0)[0, 0, 0] == 7) for seed in range(200)]
    assert 70 < sum(flipped) < 130
    assert pad_crop_flip(image, seeded()).dtype == torch.uint8
    with pytest.raises(ValueError, match="cannot be padded by 8"):
        pad_crop_flip(image, seeded(), pad=8)


def test_flip_mirrors_left_and_right() -> None:
    image = photo()
    met = [flip(image, seeded(seed)) for seed in range(20)]
    assert {torch.equal(one, image) for one in met} == {True, False}
    assert all(torch.equal(one, image) or torch.equal(one, image.flip(2)) for one in met)


def test_random_resized_crop_of_everything_is_a_resize() -> None:
    image = photo(20, 20)
    whole = random_resized_crop(image, seeded(), 8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.equal(whole, resize(image, 8, 8))


def test_random_resized_crop_keeps_its_share_of_the_area() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 1, 100), torch.linspace(0, 1, 100), indexing="ij")
    shares, aspects = [], []
    for seed in range(100):
        crop = random_resized_crop(torch.stack([y, x]), seeded(seed), 50, scale=(0.1, 0.5))
        height, width = (float(c.max() - c.min()) * 100 for c in crop)
        shares.append(height * width / 1e4)
        aspects.append(width / height)
    assert 0.08 < min(shares) < 0.15
    assert 0.4 < max(shares) < 0.52
    assert 0.7 < min(aspects) < 0.85
    assert 1.15 < max(aspects) < 1.42


def test_a_crop_that_never_fits_is_the_largest_one_of_the_centre() -> None:
    image = photo(4, 40)
    crop = random_resized_crop(image, seeded(), 4, scale=(1.0, 1.0))
    assert torch.equal(crop, resize(image[:, :, 17:22], 4, 4))  # 4 high, 4 * 4/3 wide


def test_jitter_is_that_of_pil() -> None:
    generator = seeded(5)
    brightness, contrast, colour = 0.6 + 0.8 * torch.rand(3, generator=seeded(5), dtype=torch.float64)
    image = Image.fromarray(pixels())
    for enhance, factor in (
        (ImageEnhance.Brightness, brightness),
        (ImageEnhance.Contrast, contrast),
        (ImageEnhance.Color, colour),
    ):
        image = enhance(image).enhance(float(factor))
    expected = to_float(np.array(image))
    torch.testing.assert_close(colour_jitter(photo(), generator), expected, atol=3 / 255, rtol=0)  # PIL rounds thrice


def test_channels_and_grey() -> None:
    image = photo()
    expected = to_float(np.array(Image.fromarray(pixels()).convert("L"))[..., None])
    torch.testing.assert_close(grey(image), expected, atol=1 / 255, rtol=0)
    assert torch.equal(to_channels(image, 1), grey(image))
    assert torch.equal(to_channels(image, 3), image)
    assert torch.equal(to_channels(grey(image), 3), grey(image).repeat(3, 1, 1))


def test_evaluation_keeps_the_middle() -> None:
    image = photo(257, 300)
    squashed = resize(image, 257, 257)  # both sides, as published
    assert torch.equal(centre_crop(image, 224), squashed[:, 16:240, 16:240])
