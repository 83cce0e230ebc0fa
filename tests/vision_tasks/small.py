"""Small images, classifiers and settings that the tests of the image classification tasks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.training.arguments import MetaTrainingArguments
from tests.training.tiny import tiny_arguments
from vision_tasks.backbones import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    ConvNetConfig,
    ConvNetForImageClassification,
)
from vision_tasks.images import ImageSet
from vision_tasks.weight_net import WeightedClassifier

CLASSES, SIDE = 4, 8
PERTURBED = r"^(encoder|head)\."  # the parameters that EvoGrad perturbs in few-shot learning, as published
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "per_device_meta_batch_size": 8,
    "per_device_eval_batch_size": 20,
    "optimizer_class": "SGD",
    "optimizer_kwargs": {"momentum": 0.9},
    "learning_rate": 0.05,
    "meta_order": "lookahead",
}


def arguments(folder: Path, **fields: Any) -> MetaTrainingArguments:
    """Of three steps whose judging rows do not train."""
    estimate = {"estimator": "one_step", "estimator_kwargs": {"engine": "double_backward"}}
    return tiny_arguments(folder, **estimate | {"meta_portion": 1.0} | fields)


def random_images(
    count: int, *, seed: int = 0, classes: int = CLASSES, side: int = SIDE, channels: int = 1
) -> ImageSet:
    """Random pixels, classes by turns."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    return ImageSet(pixels, np.arange(count) % classes, tuple("abcdefghij"[:classes]))


def pack(file: Path, **arrays: Any) -> Path:
    """An .npz file of random images, 40 and 20 of 10 classes; arrays that are None are left out."""
    parts = {"train": random_images(40, seed=1, classes=10), "test": random_images(20, seed=2, classes=10)}
    held: dict[str, Any] = {f"x_{part}": images.images[..., 0] for part, images in parts.items()}
    held |= {f"y_{part}": images.labels for part, images in parts.items()}
    np.savez(file, **{key: value for key, value in (held | arrays).items() if value is not None})
    return file


def batch_of(count: int, seed: int, *, side: int = SIDE, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Images in [0, 1] and their classes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.rand(count, 1, side, side, generator=generator, dtype=dtype),
        "labels": torch.randint(CLASSES, (count,), generator=generator),
    }


def small_convnet(seed: int = 0, **fields: Any) -> ConvNetForImageClassification:
    torch.manual_seed(seed)
    sizes = {"channels": [3, 4], "kernel_size": 3, "padding": [1, 1], "hidden": [6]}
    config = ConvNetConfig(image_size=SIDE, image_mean=[0.375], image_std=[0.25], num_labels=CLASSES, **sizes | fields)
    return ConvNetForImageClassification(config)


def small_resnet(seed: int = 0) -> CifarResNetForImageClassification:
    """Of the real widths, with one block a stage."""
    torch.manual_seed(seed)
    config = CifarResNetConfig(
        blocks=1, image_size=SIDE, num_channels=1, image_mean=[0.375], image_std=[0.25], num_labels=CLASSES
    )
    return CifarResNetForImageClassification(config)


def small_module(
    base: str = "convnet", *, hidden: int = 5, dtype: torch.dtype = torch.float64, **settings: Any
) -> WeightedClassifier:
    """A weighted classifier whose weights differ much from one example to another."""
    made: Any = small_convnet() if base == "convnet" else small_resnet()
    net = WeightNet(hidden)
    kinks = torch.linspace(3, 0.3, hidden)  # the losses at which the hidden units turn on or off
    slopes = torch.linspace(-1, 2, hidden)
    with torch.no_grad():
        if base == "convnet":
            made.classifier[-1].weight *= 10
        net.hidden.weight[:, 0], net.hidden.bias[:] = slopes, -slopes * kinks
        net.out.weight[0] = torch.linspace(1, -1, hidden)
    return WeightedClassifier(made, net, **{"normalisation": "sum"} | settings).to(dtype)


def flat(grads: dict[str, Tensor]) -> Tensor:
    """The leaves in one vector, by their names."""
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|found - expected| / |expected|."""
    assert found.keys() == expected.keys()
    assert flat(expected).norm() > 0
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())
