"""The warm-up of few-shot learning: an encoder trained as a plain classifier, for few-shot training to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.messages import one_line
from metaxl_evo.models.bilevel_module import Batch
from vision_tasks.augmentation import Transform
from vision_tasks.feature_transform import FeatureTransform
from vision_tasks.fewshot import CrossDomainFewShot, FewShotModel
from vision_tasks.fewshot_episodes import Auxiliary


class EncoderPretraining(CrossDomainFewShot):
    """The encoder and its auxiliary classifier alone: inner loss = mean cross-entropy of `images` with `labels`.

    A base with the prototype head is a few-shot classifier as it is; one with parameters in its head is not trained.
    """

    def __init__(self, base: FewShotModel):
        super().__init__(base, FeatureTransform.for_encoder(base.encoder), method="none")
        base.head.requires_grad_(False)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"images": len(batch["labels"])}

    def inner_loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"images": F.cross_entropy(self.base.classify(batch["images"]), batch["labels"], reduction="none")}


class ClassifierRows(Dataset[dict[str, Tensor]]):
    """Rows `{"images": (C, H, W), "labels": ()}` of the images of an Auxiliary, transformed anew in each epoch."""

    def __init__(self, aux: Auxiliary, transform: Transform, seed: int):
        self.aux, self.transform, self.seed, self.epoch = aux, transform, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of this epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.aux.pool)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.aux.pool[index].tolist()
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch, index))
        return {"images": self.transform(self.aux.domain.images[image], generator), "labels": torch.tensor(label)}


def load_encoder(encoder: PreTrainedModel, folder: str) -> None:
    """Give `encoder` the weights of that of a saved few-shot model.

    Raises:
        ValueError: for a folder without one, or with one of other sizes.
    """
    if not Path(folder).expanduser().is_dir():
        raise ValueError(f"encoder: {folder} is not a folder: give the output folder of a few-shot run")
    try:
        loaded: Any = FewShotModel.from_pretrained(Path(folder).expanduser(), output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"encoder: {folder} holds no few-shot model ({one_line(error)})") from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:  # of another kind of model, which transformers fills up
        raise ValueError(f"encoder: {folder} holds no few-shot model: give the output folder of a few-shot run")
    held, wanted = model.encoder, encoder.config
    for name in (
        "model_type",
        "num_channels",
        "embedding_size",
        "hidden_sizes",
        "depths",
        "layer_type",
        "architecture",
    ):
        own, other = getattr(held.config, name, None), getattr(wanted, name, None)
        if own != other:
            raise ValueError(
                f"encoder: {folder} has {name} {own}, the model {other}: give backbone, width, channels and "
                "model_name_or_path of that run"
            )
    encoder.load_state_dict(held.state_dict())
