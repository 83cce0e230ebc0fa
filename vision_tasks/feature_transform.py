"""Learned feature-wise transformation: the meta network of cross-domain few-shot learning, and its forward hooks.

Behind the last batch norm x of every residual block, and behind that of its 1x1 shortcut, a channel becomes

    (1 + n1 softplus(gamma)) x + n2 softplus(beta),    n1, n2 ~ N(0, 1), one draw a channel for batch and positions,

which varies the features as other domains would. The transform belongs to training alone: its hooks do nothing outside
of `FeatureTransform.active`.

Source: Tseng et al., Cross-Domain Few-Shot Classification via Learned Feature-Wise Transformation, ICLR 2020;
Bohdal et al., EvoGrad, NeurIPS 2021, section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import ResNetModel, TimmWrapperModel

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.messages import unknown
from metaxl_evo.models.hooks import HookedTransform
from metaxl_evo.models.network_files import CONFIG_FILE, load_network, save_network

SUBFOLDER = "feature_transform"
MODEL_TYPE = "metaxl_feature_transform"

NOISES = ("per_batch", "per_pass")
SHARPNESS = 100.0  # of the softplus; at 0.3 it is 0.3


def transformed_norms(encoder: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The batch norms of a ResNet that are transformed, by the names that the transform gives to them.

    Raises:
        ValueError: for another kind of encoder.
    """
    if isinstance(encoder, ResNetModel):
        stages: Any = [stage.layers for stage in encoder.encoder.stages]
    elif isinstance(encoder, TimmWrapperModel) and type(encoder.timm_model).__name__ == "ResNet":
        stages = [getattr(encoder.timm_model, f"layer{i}") for i in range(1, 5)]
    else:
        raise ValueError(
            "the feature-wise transform acts behind the batch norms of a ResNet's blocks (ResNetModel, or ResNet of "
            f"timm), and {type(encoder).__name__} has none: give such an encoder"
        )
    found: dict[str, nn.BatchNorm2d] = {}
    for i, blocks in enumerate(stages, start=1):
        for j, block in enumerate(blocks, start=1):
            found |= {f"stage{i}_block{j}{part}": norm for part, norm in _norms_of(block).items()}
    return found


def _norms_of(block: Any) -> dict[str, nn.BatchNorm2d]:
    """The last batch norm of a block, and that of its shortcut where it has one."""
    last, shortcut = None, None
    for name, module in block.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            if name.startswith(("shortcut", "downsample")):
                shortcut = module
            else:
                last = module
    return {key: norm for key, norm in (("", last), ("_shortcut", shortcut)) if norm is not None}


class ChannelAffine(nn.Module):
    """The transformation of one batch norm; `gamma` and `beta` (C,) are the sizes of its noise."""

    def __init__(self, channels: int, gamma: float, beta: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), gamma))
        self.beta = nn.Parameter(torch.full((channels,), beta))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """`x` (B, C, H, W) under `noise` (2, C)."""
        noise = noise.to(self.gamma)
        scale = 1 + noise[0] * F.softplus(self.gamma, beta=SHARPNESS)
        shift = noise[1] * F.softplus(self.beta, beta=SHARPNESS)
        return (scale[:, None, None] * x + shift[:, None, None]).to(x.dtype)


class FeatureTransform(HookedTransform):
    """One pair of (gamma, beta) for each transformed batch norm of an encoder.

    Meant to be used through `attach` and `active`:

        transform = FeatureTransform.for_encoder(encoder)
        transform.attach(encoder)
        with transform.active(seed):
            features = encoder(images)

    Args:
        channels: of each transformed batch norm, by name.
        gamma, beta: where all channels start.
        noise: `per_batch` draws from the seed given to `active` and the place of the layer, so that every pass over a
            batch (the base step, perturbed copies, both sides of a finite difference) sees the same noise;
            `per_pass` draws from the global random state, which the passes of one meta step share among them but not
            with the base step (EvoGrad's published code: with share_randomness False each copy draws its own).

    Raises:
        ValueError: for an unknown noise, or where no batch norm is transformed.
    """

    def __init__(
        self, channels: Mapping[str, int], *, gamma: float = 0.3, beta: float = 0.5, noise: str = "per_batch"
    ):
        super().__init__()
        if noise not in NOISES:
            raise ValueError(unknown("ft_noise", noise, NOISES))
        if not channels:
            raise ValueError("the feature-wise transform has no batch norm to act on: give the encoder a stage")
        self.channels = dict(channels)
        self.noise = noise
        self.layers = nn.ModuleDict({name: ChannelAffine(c, gamma, beta) for name, c in channels.items()})
        self._numbers = {name: number for number, name in enumerate(channels)}
        self._seed: int | None = None

    @classmethod
    def for_encoder(cls, encoder: nn.Module, **settings: Any) -> FeatureTransform:
        """A transform with the channels of `encoder`, not attached yet."""
        return cls({name: norm.num_features for name, norm in transformed_norms(encoder).items()}, **settings)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them, but for the start values."""
        return {"channels": self.channels, "noise": self.noise}

    def attach(self, encoder: nn.Module) -> list[RemovableHandle]:
        """Hook the batch norms of `encoder`; returns the handles, `detach` removes them as well.

        Raises:
            ValueError: for an encoder with other blocks or widths.
        """
        norms = transformed_norms(encoder)
        found = {name: norm.num_features for name, norm in norms.items()}
        if found != self.channels:
            differs = next(iter(dict(found.items() ^ self.channels.items())))
            raise ValueError(
                f"the feature-wise transform has {self.channels.get(differs)} channels at {differs}, the encoder "
                f"{found.get(differs)}: build it by FeatureTransform.for_encoder"
            )
        return self._hook(encoder, norms)

    @contextmanager
    def active(self, seed: int) -> Iterator[None]:
        """Transform in every encoder pass inside, the only switch; `seed` is of the noise, where it is per batch.

        The previous state, normally off, comes back on leaving, also by an exception.
        """
        previous, self._seed = self._seed, seed
        try:
            yield
        finally:
            self._seed = previous

    def apply_layer(self, output: Tensor, layer: str) -> Tensor | None:
        """The output (B, C, H, W) of the batch norm `layer` transformed; None while the transform is off."""
        if self._seed is None:
            return None
        return self.layers[layer](output, self._draw(layer, self._seed))

    def _draw(self, name: str, seed: int) -> Tensor:
        """The noise of one layer, (2, C); drawn on the CPU, so that it is the same on every device."""
        generator = None
        if self.noise == "per_batch":
            generator = torch.Generator().manual_seed(mix_seed(seed, self._numbers[name]))
        return torch.randn(2, self.channels[name], generator=generator, device="cpu", dtype=torch.float32)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made if need be."""
        save_network(folder, MODEL_TYPE, self.config, self)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FeatureTransform:
        """A saved transform, on the CPU; `folder` holds its files, or holds them in `feature_transform/`.

        Raises:
            ValueError: where nothing is found and where a file is unreadable.
        """
        root = Path(folder)
        place = root / SUBFOLDER if (root / SUBFOLDER / CONFIG_FILE).is_file() else root
        return load_network(place, MODEL_TYPE, cls)
