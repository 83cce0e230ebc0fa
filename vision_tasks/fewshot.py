"""Cross-domain few-shot learning: an episodic classifier as base, a feature-wise transformation as meta network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from metaxl_evo.bilevel.problem import BilevelProblem
from metaxl_evo.messages import unknown
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from vision_tasks.feature_transform import SUBFOLDER, FeatureTransform, transformed_norms
from vision_tasks.heads import HEADS

BACKBONES = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}  # blocks of each stage
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

METHODS = ("learned", "fixed", "none")


class FewShotConfig(PreTrainedConfig):
    """Sizes of a FewShotModel.

    Args:
        num_channels: of the images.
        embedding_size: width of the stem.
        hidden_sizes, depths: width and number of blocks of each stage.
        head: one of HEADS.
        aux_classes: of the auxiliary classifier; 0 leaves it out.
        image_mean, image_std: one number a channel; the model takes images in [0, 1] and standardises them.
        encoder: the configuration of a pretrained encoder, which gives maps of the last of `hidden_sizes`; None for
            one of the sizes above.
    """

    model_type = "metaxl_few_shot"

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = BACKBONES["resnet10"]
    head: str = "relation"
    aux_classes: int = 0
    image_mean: list[float] | tuple[float, ...] = IMAGENET_MEAN
    image_std: list[float] | tuple[float, ...] = IMAGENET_STD
    encoder: dict[str, Any] | None = None

    @property
    def encoder_config(self) -> PreTrainedConfig:
        """Of the encoder: the pretrained one's, or ResNet with basic blocks."""
        if self.encoder is not None:
            return AutoConfig.for_model(**self.encoder)
        return ResNetConfig(
            num_channels=self.num_channels,
            embedding_size=self.embedding_size,
            hidden_sizes=list(self.hidden_sizes),
            depths=list(self.depths),
            layer_type="basic",
        )


def backbone_config(backbone: str, *, width: int = 64, **fields: Any) -> FewShotConfig:
    """The sizes of a ResNet of BACKBONES; `width` 64 is the papers', less makes it thin.

    Raises:
        ValueError: for an unknown backbone.
    """
    if backbone not in BACKBONES:
        raise ValueError(unknown("backbone", backbone, BACKBONES))
    sizes = [width * 2**stage for stage in range(len(BACKBONES[backbone]))]
    return FewShotConfig(embedding_size=width, hidden_sizes=sizes, depths=list(BACKBONES[backbone]), **fields)


class FewShotModel(PreTrainedModel):
    """A ResNet encoder, a metric head that compares queries with a few support images, an auxiliary classifier.

    An episode is a batch of its own: its images pass the encoder together, as batch norm's statistics and the head's
    are of one episode. Images are floats in [0, 1].

    Raises:
        ValueError: for an unknown head, or normalisation constants that are not one a channel.
    """

    config: FewShotConfig
    config_class = FewShotConfig
    base_model_prefix = "few_shot"
    main_input_name = "query"

    def __init__(self, config: FewShotConfig):
        super().__init__(config)
        if config.head not in HEADS:
            raise ValueError(unknown("head", config.head, HEADS))
        _check_constants(config)
        width = config.hidden_sizes[-1]
        self.encoder: PreTrainedModel = AutoModel.from_config(config.encoder_config)
        self.head = HEADS[config.head](width)
        self.aux_head = _classifier(width, config.aux_classes) if config.aux_classes else None
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Of the heads; the encoder has its own, the same for convolutions and batch norms."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # N(0, sqrt(2 / (k k out)))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):  # torch's own
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)
        else:
            super()._init_weights(module)

    def encode(self, images: Tensor) -> Tensor:
        """Feature maps (N, C, H', W') of images (N, channels, H, W)."""
        mean, std = (images.new_tensor(c)[:, None, None] for c in (self.config.image_mean, self.config.image_std))
        return self.encoder((images - mean) / std).last_hidden_state

    def scores(self, support: Tensor, query: Tensor) -> Tensor:
        """Scores (way * queries, way) of one episode: (way, shot, ch, H, W), (way, queries, ch, H, W)."""
        way, shot = support.shape[:2]
        images = torch.cat([support.flatten(0, 1), query.flatten(0, 1)])
        maps = self.encode(images)
        return self.head(maps[: way * shot].unflatten(0, (way, shot)), maps[way * shot :])

    def classify(self, images: Tensor) -> Tensor:
        """The auxiliary classifier's logits (N, classes) of images (N, channels, H, W)."""
        if self.aux_head is None:
            raise ValueError("the model has no auxiliary classifier: set aux_classes")
        return self.aux_head(self.encode(images).mean((-2, -1)))

    def forward(
        self, support: Tensor, query: Tensor, labels: Tensor | None = None, **unused: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Scores (E, way * queries, way) of the episodes, and their mean loss where `labels` are given.

        Args:
            support: (E, way, shot, channels, H, W).
            query: (E, way, queries, channels, H, W).
            labels: (E, way * queries).
            unused: what else a batch holds.
        """
        scores = torch.stack([self.scores(*episode) for episode in zip(support, query, strict=True)])
        loss = None
        if labels is not None:
            loss = torch.stack([self.head.loss(*one) for one in zip(scores, labels, strict=True)]).mean()
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=scores)


def _classifier(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


def _check_constants(config: FewShotConfig) -> None:
    for name, values in (("image_mean", config.image_mean), ("image_std", config.image_std)):
        if len(values) != config.num_channels:
            raise ValueError(
                f"{name} has {len(values)} numbers for images of {config.num_channels} channels: give one a channel"
            )
    if min(config.image_std) <= 0:
        raise ValueError(f"image_std must be positive, got {list(config.image_std)}")


def pretrained_few_shot(encoder: PreTrainedModel, **fields: Any) -> FewShotModel:
    """A few-shot model on a pretrained encoder of images, whose features are maps (N, C, H, W).

    Args:
        fields: of FewShotConfig.

    Raises:
        ValueError: for an encoder that the feature-wise transform does not know.
    """
    transformed_norms(encoder)
    images = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        width = encoder.eval()(images).last_hidden_state.shape[1]
    model = FewShotModel(FewShotConfig(hidden_sizes=[width], encoder=encoder.config.to_dict(), **fields))
    model.encoder.load_state_dict(encoder.state_dict())
    return model


class CrossDomainFewShot(BilevelModule):
    """Few-shot learning that is to carry over to unseen domains.

    inner loss = mean over the episodes of a *pseudo-seen* domain, with the feature-wise transform drawing, plus the
    weighted mean cross-entropy of the auxiliary images, with the model in evaluation mode and no transform;
    outer loss = mean over the episodes of a *pseudo-unseen* domain, in evaluation mode (the running statistics of
    batch norm), without the transform.

    Batches are collated episodes (`vision_tasks.fewshot_episodes`): `support` (E, way, shot, ch, H, W), `query`
    (E, way, queries, ch, H, W), `labels` (E, way * queries), `noise_seed` (E,) and, where there is an auxiliary
    classifier, `aux_images` (E, A, ch, H, W), `aux_labels` (E, A), `aux_weight` (E,).

    Args:
        base: the episodic classifier.
        meta: its feature-wise transform; its hooks are attached to the encoder here.
        method: `learned`, `fixed` (the transform acts, its numbers stay at their start) or `none` (it never acts).

    Raises:
        ValueError: for an unknown method.

    The auxiliary images see running statistics that each micro-batch moves: with several of them, or on several
    processes, a meta pass sees those at the end of the step, which the losses of EvoGrad's copies feel slightly.

    Source: Tseng et al., ICLR 2020; Bohdal et al., EvoGrad, NeurIPS 2021, section 4.3. In the published code the
    copies' losses leave the auxiliary loss out; here they are the inner loss as it is trained.
    """

    base: FewShotModel

    def __init__(self, base: FewShotModel, meta: FeatureTransform, *, method: str = "learned"):
        super().__init__(base, meta)
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))
        self.meta: FeatureTransform = meta
        self.method = method
        meta.attach(base.encoder)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {
            "episodes": len(batch["labels"]),
            "aux_images": batch["aux_labels"].numel() if "aux_labels" in batch else 0,
        }

    def inner_loss(self, batch: Batch) -> dict[str, Tensor]:
        losses = {"episodes": self._episode_losses(batch, batch["noise_seed"].tolist())}
        if "aux_labels" in batch:
            # Behind the episodes: the backward of a pass in evaluation mode reads the running statistics, which a
            # training pass moves in place.
            losses["aux_images"] = self._aux_losses(batch)
        return losses

    def outer_loss(self, batch: Batch) -> dict[str, Tensor]:
        with evaluating(self.base):
            return {"episodes": self._episode_losses(batch)}

    def reads_lam(self, batch: Batch) -> Batch:
        return {key: value for key, value in batch.items() if not key.startswith("aux_")}

    def problem(self, *args: Any, **kwargs: Any) -> BilevelProblem:
        if self.method != "learned":
            raise ValueError(f"method {self.method!r} does not learn its transform: set estimator: none")
        return super().problem(*args, **kwargs)

    def save_meta(self, folder: str | Path) -> None:
        self.meta.save_pretrained(Path(folder) / SUBFOLDER)

    def load_meta(self, folder: str | Path) -> None:
        self.meta.load_state_dict(FeatureTransform.from_pretrained(folder).state_dict())

    def _episode_losses(self, batch: Batch, seeds: Sequence[int] | None = None) -> Tensor:
        """(E,), one by one, as batch norm's statistics are of one episode; with `seeds` the transform acts."""
        losses = []
        for index, labels in enumerate(batch["labels"]):
            with nullcontext() if seeds is None or self.method == "none" else self.meta.active(seeds[index]):
                scores = self.base.scores(batch["support"][index], batch["query"][index])
            losses.append(self.base.head.loss(scores, labels))
        return torch.stack(losses)

    def _aux_losses(self, batch: Batch) -> Tensor:
        """(E, A)."""
        with evaluating(self.base):
            logits = self.base.classify(batch["aux_images"].flatten(0, 1))  # (E * A, classes)
        losses = F.cross_entropy(logits, batch["aux_labels"].flatten(), reduction="none")
        return losses.view_as(batch["aux_labels"]) * batch["aux_weight"].to(losses)[:, None]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode in every part of `module`; each has its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
