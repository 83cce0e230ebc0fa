"""The settings of the few-shot experiment."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vision_tasks import fewshot
from vision_tasks.arguments import VisionArguments, VisionTrainingArguments
from vision_tasks.domains import SYNTHETIC as GENERATED
from vision_tasks.domains import name_of, parse_source
from vision_tasks.feature_transform import NOISES
from vision_tasks.fewshot import BACKBONES, IMAGENET_MEAN, IMAGENET_STD
from vision_tasks.heads import HEADS
from vision_tasks.images import SYNTHETIC
from vision_tasks.pretrained import Preparation
from vision_tasks.symbols import LOOKS

METHODS = (*fewshot.METHODS, "pretrain")
BASELINE_EPISODES = ("all", "seen")
SIDE = 224
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # ImageNet's in grey
SYNTHETIC_DOMAINS = [f"{GENERATED}{look}" for look in LOOKS]


@dataclass
class EpisodicTrainingArguments(VisionTrainingArguments):
    """VisionTrainingArguments whose batches are of episodes, each a batch of images in itself."""

    per_device_train_batch_size: int = field(default=1, metadata={"help": "Episodes a step (pretrain: images)."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Episodes that are tested at once."})
    per_device_meta_batch_size: int = field(
        default=1, metadata={"help": "Episodes of the pseudo-unseen domain per micro-batch and device."}
    )


@dataclass
class FewShotArguments(VisionArguments):
    """Settings of the few-shot experiment.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    data: str = field(
        default=SYNTHETIC,
        metadata={
            "help": "The folder from which relative paths of domains start (`.` also where all are of the Hub), or "
            "`synthetic`: as many generated domains take the place of those that are named."
        },
    )
    method: str = field(
        default="learned",
        metadata={
            "help": "The feature-wise transform is learned, or fixed, or there is none; pretrain: the encoder learns "
            "to classify the images of aux_domain, for other runs to start from."
        },
    )
    domains: list[str] = field(
        default_factory=lambda: SYNTHETIC_DOMAINS[:3],
        metadata={
            "help": "Seen domains: .npz files, Omniglot's zip files, image folders or Hub ids, with ?options "
            "(vision_tasks/domains.py); options with commas in them need a JSON list."
        },
    )
    unseen_domain: str = field(
        default=SYNTHETIC_DOMAINS[3], metadata={"help": "The domain that is tested, on its novel classes."}
    )
    backbone: str = field(default="resnet10", metadata={"help": f"One of {', '.join(BACKBONES)}."})
    width: int = field(default=64, metadata={"help": "Channels of the backbone's stem and first stage."})
    head: str = field(default="relation", metadata={"help": f"One of {', '.join(HEADS)}."})
    n_way: int = field(default=5, metadata={"help": "Classes of an episode."})
    n_shot: int = field(default=5, metadata={"help": "Support images of each."})
    n_query: int = field(default=16, metadata={"help": "Queries of each in training."})
    test_n_query: int = field(default=15, metadata={"help": "Queries of each in tests."})
    test_episodes: int = field(default=1000, metadata={"help": "Of a test; the same for all runs of a seed."})
    val_episodes: int = field(
        default=100, metadata={"help": "Of an evaluation (eval_strategy), on the val classes of the seen domains."}
    )
    episodes_per_epoch: int = field(default=100, metadata={"help": "A pair of domains is drawn for each epoch."})
    baseline_episodes: str = field(
        default="all",
        metadata={
            "help": "What fixed and none train on: all, every seen domain in equal parts (as published), or seen, the "
            "very episodes of the pseudo-seen domains that learned trains on."
        },
    )
    aux_domain: str | None = field(
        default=None,
        metadata={"help": "The one of the seen domains whose base classes an auxiliary classifier learns, by name."},
    )
    aux_images: int = field(default=16, metadata={"help": "Images of the auxiliary classifier an episode."})
    encoder: str | None = field(
        default=None, metadata={"help": "The output folder of a run (method: pretrain) whose encoder is the start."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a ResNet of transformers or timm, in place of backbone and width; its image "
            "processor gives the size and the constants of the images."
        },
    )
    ft_noise: str = field(default="per_batch", metadata={"help": f"One of {', '.join(NOISES)}."})
    ft_gamma: float = field(default=0.3, metadata={"help": "Where the transform's scales start."})
    ft_beta: float = field(default=0.5, metadata={"help": "Where the transform's shifts start."})
    image_size: int = field(default=SIDE, metadata={"help": "Pixels of a side."})
    channels: int = field(default=3, metadata={"help": "1: images are turned grey; 3: grey ones are repeated."})
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Of pixels in [0, 1], a channel each (default: ImageNet's)."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "Their standard deviation."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={"help": "Least and largest share of an image that a random crop keeps in training."},
    )
    jitter: float = field(default=0.4, metadata={"help": "Of brightness, contrast and colour in training."})
    flips: bool = field(
        default=True, metadata={"help": "Mirror images in training (not for digits and letters: --no_flips)."}
    )

    def __post_init__(self) -> None:
        for name, valid in (
            ("method", METHODS),
            ("backbone", BACKBONES),
            ("head", HEADS),
            ("baseline_episodes", BASELINE_EPISODES),
            ("ft_noise", NOISES),
        ):
            self.require_known(name, getattr(self, name), valid)
        for name in ("width", "n_shot", "n_query", "test_n_query", "val_episodes", "episodes_per_epoch", "aux_images"):
            self.require_count(name, getattr(self, name))
        self.require_count("image_size", self.image_size)
        self.require_count("n_way", self.n_way, least=2)
        self.require_count("test_episodes", self.test_episodes, least=2)  # one has no interval
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, not {self.channels!r}")
        for name in ("ft_gamma", "ft_beta"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, not {getattr(self, name)}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be between 0 and 1, not {self.jitter}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two increasing numbers above 0 and at most 1, not {self.crop_scale}")
        self._check_domains()

    def _check_domains(self) -> None:
        if not self.domains:
            raise ValueError("domains are empty: name those that are seen in training")
        seen, unseen = [name_of(text) for text in self.domains], name_of(self.unseen_domain)
        for name, text in zip(seen, self.domains, strict=True):
            if name == unseen or _overlap(text, self.unseen_domain):
                raise ValueError(
                    f"unseen_domain {self.unseen_domain} is among the domains, as {text}: leave it out of them"
                )
        if self.aux_domain is not None:
            self.require_known("aux_domain", self.aux_domain, seen)
        elif self.method == "pretrain":
            raise ValueError(f"method pretrain learns the classes of aux_domain: set it to one of {', '.join(seen)}")

    def fitted(self, preparation: Preparation) -> FewShotArguments:
        """With the size and the constants of a pretrained encoder's images.

        Raises:
            ValueError: where the settings have others of their own.
        """
        height, width, _ = preparation.shape
        given = {name: getattr(self, name) for name in ("image_mean", "image_std") if getattr(self, name) is not None}
        given |= {"channels": self.channels} if self.channels != 3 else {}
        given |= {"image_size": self.image_size} if self.image_size not in (SIDE, height) else {}
        if given:
            name = next(iter(given))
            raise ValueError(f"{name} is what the model of model_name_or_path says: leave it out, or set it to null")
        if height != width:
            raise ValueError(f"model_name_or_path: its images are {height} x {width} pixels, and episodes are square")
        mean, std = preparation.image_mean, preparation.image_std
        return replace(self, image_size=height, image_mean=mean, image_std=std)

    @property
    def normalisation(self) -> dict[str, Any]:
        """The model's constants of pixels in [0, 1]."""
        mean, std = (GREY_MEAN, GREY_STD) if self.channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
        return {"image_mean": list(self.image_mean or mean), "image_std": list(self.image_std or std)}


def _overlap(one: str, other: str) -> bool:
    """Whether two texts name images of one source, of the same alphabets where these are told apart."""
    (source, options), (other_source, others) = parse_source(one), parse_source(other)
    here, there = (Path(os.path.normpath(one)) for one in (source, other_source))
    if here != there and here not in there.parents and there not in here.parents:
        return False
    if options.alphabets is None or others.alphabets is None:
        return True
    return not set(options.alphabets.split(",")).isdisjoint(others.alphabets.split(","))
