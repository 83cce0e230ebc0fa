"""The vision tasks as problems, on generated images."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.problems import MeasuredTrainer, measured_trainer, step_arguments
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.training.arguments import MetaTrainingArguments
from vision_tasks.augmentation import EvaluationTransform
from vision_tasks.classification import make_classifier
from vision_tasks.domains import SYNTHETIC, read_domain
from vision_tasks.feature_transform import FeatureTransform
from vision_tasks.fewshot import CrossDomainFewShot, FewShotModel, backbone_config
from vision_tasks.fewshot_episodes import Episodes, EpisodeSize
from vision_tasks.images import ImageRows, ImageSet, drawn
from vision_tasks.noisy_labels import NoisyLabels, make_noisy
from vision_tasks.rotation import RotatedClassifier, Rotation, rotated
from vision_tasks.symbols import LOOKS
from vision_tasks.weight_net import WeightedClassifier

CLASSES = 10
EPOCH = CLASSES  # steps' worth of images, so that there are equally many of each class
NOISE: dict[str, Any] = {"kind": "flip2", "rate": 0.4}
DEGREES = 30.0


def weight_net(settings: BenchmarkArguments, width: int | None, hidden: int) -> MeasuredTrainer:
    """An image classifier on noisy labels, its losses weighted by a net that clean images judge."""
    torch.manual_seed(settings.seed)
    args = _arguments(settings)
    noisy = noisy_images(settings, EPOCH * args.per_device_train_batch_size, EPOCH * args.per_device_meta_batch_size)
    module = weighted_classifier(settings, noisy.train, width, hidden)
    train, meta = ImageRows(noisy.train), ImageRows(noisy.meta)
    return measured_trainer(module, partial(setattr, module, "weighted"), args, held(train), held(meta))


def rotation(settings: BenchmarkArguments, width: int | None) -> MeasuredTrainer:
    """An image classifier on upright images, turned by an angle that askew ones judge."""
    torch.manual_seed(settings.seed)
    args = _arguments(settings)
    upright = EPOCH * args.per_device_train_batch_size
    images = generated(settings, upright + EPOCH * args.per_device_meta_batch_size)
    train, meta = images.take(np.arange(upright)), images.take(np.arange(upright, len(images)))
    module = RotatedClassifier(_classifier(settings, train, width), Rotation())
    rows = held(ImageRows(train)), held(ImageRows(rotated(meta, DEGREES)))
    return measured_trainer(module, partial(setattr, module, "rotated"), args, *rows)


def fewshot(settings: BenchmarkArguments, width: int | None) -> MeasuredTrainer:
    """An episodic classifier with a feature-wise transform that episodes of another domain judge."""
    torch.manual_seed(settings.seed)
    args = _arguments(settings)
    base = FewShotModel(backbone_config(settings.backbone, **({} if width is None else {"width": width})))
    module = CrossDomainFewShot(base, FeatureTransform.for_encoder(base.encoder))
    domains = [read_domain(f"{SYNTHETIC}{look}") for look in list(LOOKS)[:2]]
    transform = EvaluationTransform(settings.image_size)
    sizes = {"seen": args.per_device_train_batch_size, "unseen": args.per_device_meta_batch_size}
    train, meta = (
        held(Episodes(domains, role, EpisodeSize(), length=EPOCH * size, seed=settings.seed, transform=transform))
        for role, size in sizes.items()
    )

    def switch(on: bool) -> None:
        module.method = "learned" if on else "none"

    return measured_trainer(module, switch, args, train, meta)


def weighted_classifier(
    settings: BenchmarkArguments, images: ImageSet, width: int | None, hidden: int
) -> WeightedClassifier:
    """Meta-Weight-Net for such images."""
    return WeightedClassifier(_classifier(settings, images, width), WeightNet(hidden), normalisation="sum")


def noisy_images(settings: BenchmarkArguments, train: int, meta: int) -> NoisyLabels:
    """So many images with wrong labels among theirs, and clean ones; both multiples of CLASSES."""
    images = generated(settings, train + meta)
    return make_noisy(images, **NOISE, meta_size=meta, train_size=train, seed=settings.seed)


def generated(settings: BenchmarkArguments, number: int) -> ImageSet:
    """Drawn images, equally many of each class; `number` is a multiple of CLASSES."""
    images = drawn(number // CLASSES, classes=CLASSES, side=settings.image_size, seed=settings.seed)
    return replace(images, images=images.images.repeat(settings.image_channels, axis=3))


def held(rows: Any) -> list[dict[str, Any]]:
    """All rows, made once, in arrays: as tensors they would count as memory, made anew they would take time."""
    return [{key: value.numpy() for key, value in rows[number].items()} for number in range(len(rows))]


def _classifier(settings: BenchmarkArguments, images: ImageSet, width: int | None) -> Any:
    """The backbone for these images."""
    return make_classifier(settings.backbone, images, width=width, blocks=settings.blocks)


def _arguments(settings: BenchmarkArguments) -> MetaTrainingArguments:
    """No row of the meta set trains."""
    return step_arguments(settings, meta_portion=1.0)
