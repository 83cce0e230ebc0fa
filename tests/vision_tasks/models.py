"""Tiny image classifiers of transformers in folders, as the Hub has large ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

VIT: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
RESNET: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "bottleneck"}
SQUARE = {"height": 16, "width": 16}


def write_classifier(folder: Path, kind: str, classes: int = 5, **fields: Any) -> Path:
    """Random weights and an image processor: `resnet`, `vit` or `dinov2`, 16 x 16 pixels; or `timm`, 32 x 32."""
    torch.manual_seed(0)
    if kind == "timm":
        pixels = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "crop_pct": 0.9}
        config = TimmWrapperConfig(architecture="resnet10t", num_labels=classes, pretrained_cfg=pixels, **fields)
        TimmWrapperForImageClassification(config).save_pretrained(folder)  # with its processor
        return folder
    processor: Any
    if kind == "resnet":
        model = ResNetForImageClassification(ResNetConfig(**RESNET | {"num_labels": classes} | fields))
        processor = ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=0.8, image_mean=[0.5, 0.4, 0.3])
    elif kind == "vit":
        sizes = VIT | {"intermediate_size": 8, "num_labels": classes}
        model = ViTForImageClassification(ViTConfig(**sizes | fields))
        processor = ViTImageProcessor(size=SQUARE)
    else:
        model = Dinov2ForImageClassification(Dinov2Config(**VIT | {"num_labels": classes} | fields))
        processor = BitImageProcessor(size={"shortest_edge": 20}, crop_size=SQUARE)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
