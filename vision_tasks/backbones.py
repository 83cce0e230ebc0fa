"""Small image classifiers that transformers does not have, as its own kind of models: saved and loaded like any.

`convnet` has LeNet as its default; `resnet32` is the ResNet for 32 x 32 pixels, with a stem of 3 x 3 and shortcuts
without parameters, which the ResNet of transformers (made for 224 x 224) cannot express; `wrn_16_1` and `wrn_10_1` are
wide ResNets, which normalise before each convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from vision_tasks.image_processor import SmallImageProcessor


class _ImageConfig(PreTrainedConfig):
    """What every classifier here says of its images: their size, channels, and how pixels in [0, 1] are normalised."""

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


class _Classifier(PreTrainedModel):
    """The forward of every classifier here; a subclass makes logits of normalised pixels."""

    main_input_name = "pixel_values"

    def logits(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        raise NotImplementedError

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits (B, classes) of normalised images (B, C, H, W), and the mean cross-entropy where labels are given."""
        logits = self.logits(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    def post_init(self) -> None:
        """Layers are initialised where they are made, but for those of a model that is made to be loaded."""
        if self.device.type != "meta":
            for module in self.modules():
                setattr(module, "_is_hf_initialized", True)  # noqa: B010 (it is no attribute that Module knows)
        super().post_init()

    def _init_weights(self, module: Any) -> None:
        """Of a layer that the loaded files lack: a head for another number of classes."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class ConvNetConfig(_ImageConfig):
    """A plain convolutional net: convolution, ReLU and max pooling by 2 for each of `channels`, then perceptrons.

    With `norm` each channel of each image is normalised before its ReLU (instance norm), so that rows stay apart.
    The defaults are LeNet for 28 x 28 grey images (LeCun et al., 1998, with ReLU and max pooling).
    """

    model_type = "metaxl_convnet"

    def __init__(
        self,
        channels: Sequence[int] = (6, 16),
        kernel_size: int = 5,
        padding: Sequence[int] = (2, 0),
        hidden: Sequence[int] = (120, 84),
        norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.norm = norm
        self.channels, self.kernel_size, self.padding, self.hidden = (
            list(channels),
            kernel_size,
            list(padding),
            list(hidden),
        )


class ConvNetForImageClassification(_Classifier):
    """Convolutions in `features`, perceptrons in `classifier`."""

    config_class = ConvNetConfig

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        width, side = config.num_channels, config.image_size
        for channels, padding in zip(config.channels, config.padding, strict=True):
            norm = [nn.GroupNorm(channels, channels)] if config.norm else []
            convolution = nn.Conv2d(width, channels, config.kernel_size, padding=padding)
            layers += [convolution, *norm, nn.ReLU(), nn.MaxPool2d(2)]
            width, side = channels, (side + 2 * padding - config.kernel_size + 1) // 2
        if side < 1:
            raise ValueError(f"images of {config.image_size} pixels are too small for {len(config.channels)} layers")
        self.features = nn.Sequential(*layers)
        sizes = [width * side * side, *config.hidden]
        dense = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.classifier = nn.Sequential(*dense, nn.Linear(sizes[-1], int(config.num_labels or 0)))
        self.post_init()

    def logits(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(pixel_values).flatten(1))
        return logits


class CifarResNetConfig(_ImageConfig):
    """ResNet-(6 blocks + 2) for small images; `width` multiplies the channels 16, 32, 64 of its three stages."""

    model_type = "metaxl_cifar_resnet"

    def __init__(self, width: int = 1, blocks: int = 5, image_size: int = 32, **kwargs: Any) -> None:
        super().__init__(image_size=image_size, **kwargs)
        self.width, self.blocks = width, blocks


class CifarResNetForImageClassification(_Classifier):
    """He et al., CVPR 2016, section 4.2: 5 blocks a stage are ResNet-32; Kaiming-normal, option A shortcuts."""

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        width = 16 * config.width
        self.stem = nn.Sequential(_convolution(config.num_channels, width), nn.BatchNorm2d(width), nn.ReLU())
        blocks = []
        for stage in range(3):
            for block in range(config.blocks):
                channels, stride = 16 * config.width * 2**stage, 2 if stage and not block else 1
                blocks.append(_Block(width, channels, stride))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width, int(config.num_labels or 0))
        nn.init.kaiming_normal_(self.classifier.weight)
        self.post_init()

    def logits(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(pixel_values)).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Two convolutions around a shortcut; where the shape changes it takes every second pixel and pads with zeros."""

    def __init__(self, width: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = _convolution(width, channels, stride), nn.BatchNorm2d(channels)
        self.second, self.second_norm = _convolution(channels, channels), nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - width) // 2  # channels on either side

    def forward(self, x: Tensor) -> Tensor:
        shortcut = (
            x if self.padding == 0 else F.pad(x[:, :, :: self.stride, :: self.stride], 4 * [0] + 2 * [self.padding])
        )
        inner = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(inner)) + shortcut)


class WideResNetConfig(_ImageConfig):
    """WRN-depth-width, depth 6 n + 4: n blocks in each of three stages of 16, 32 and 64 channels times `width`."""

    model_type = "metaxl_wide_resnet"

    def __init__(self, depth: int = 16, width: int = 1, image_size: int = 32, **kwargs: Any) -> None:
        super().__init__(image_size=image_size, **kwargs)
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 10, 16, 22, ... (6 n + 4), not {depth}")
        self.depth, self.width = depth, width


class WideResNetForImageClassification(_Classifier):
    """Zagoruyko and Komodakis, BMVC 2016, without dropout; Xavier-normal weights, as FDS trains them."""

    config_class = WideResNetConfig

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__(config)
        width = 16
        self.stem = nn.Conv2d(config.num_channels, width, 3, padding=1, bias=False)
        blocks = []
        for stage in range(3):
            for block in range((config.depth - 4) // 6):
                channels, stride = 16 * config.width * 2**stage, 2 if stage and not block else 1
                blocks.append(_WideBlock(width, channels, stride))
                width = channels
        self.blocks, self.norm = nn.Sequential(*blocks), nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, int(config.num_labels or 0))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)
        self.post_init()

    def logits(self, pixel_values: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.blocks(self.stem(pixel_values))))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


class _WideBlock(nn.Module):
    """Two convolutions, each of a normalised ReLU; where the shape changes the shortcut is a 1 x 1 convolution."""

    def __init__(self, width: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.BatchNorm2d(width), nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(width, channels, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = width == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(width, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.first_norm(x))
        inner: Tensor = self.second(torch.relu(self.second_norm(self.first(active))))
        return inner + (x if self.shortcut is None else self.shortcut(active))


def _convolution(width: int, channels: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(width, channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    return layer


for _config, _model in (
    (ConvNetConfig, ConvNetForImageClassification),
    (CifarResNetConfig, CifarResNetForImageClassification),
    (WideResNetConfig, WideResNetForImageClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageClassification.register(_config, _model)
    AutoImageProcessor.register(_config, image_processor_classes={"pil": SmallImageProcessor})

SMALL: dict[str, Any] = {"channels": [16, 32], "kernel_size": 3, "padding": [1, 1], "hidden": [128]}
EIGHT: dict[str, Any] = {"channels": 3 * [8], "kernel_size": 3, "padding": 3 * [1], "hidden": [], "norm": True}
BACKBONES: dict[str, Callable[..., PreTrainedModel]] = {
    "lenet": lambda **fields: ConvNetForImageClassification(ConvNetConfig(**fields)),
    "convnet": lambda **fields: ConvNetForImageClassification(ConvNetConfig(**SMALL | fields)),
    "resnet32": lambda **fields: CifarResNetForImageClassification(CifarResNetConfig(**fields)),
    "convnet_8": lambda **fields: ConvNetForImageClassification(ConvNetConfig(**EIGHT | fields)),
    "wrn_16_1": lambda **fields: WideResNetForImageClassification(WideResNetConfig(**fields)),
    "wrn_10_1": lambda **fields: WideResNetForImageClassification(WideResNetConfig(**{"depth": 10} | fields)),
}
