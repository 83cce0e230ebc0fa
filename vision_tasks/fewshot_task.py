"""The few-shot experiment: a feature-wise transform learned for unseen domains, beside a fixed one and none at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import IMAGE_PROCESSOR_NAME

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.experiments.fingerprint import fingerprints
from metaxl_evo.experiments.folders import hub_id
from metaxl_evo.experiments.scores import Rate
from metaxl_evo.experiments.statistics import interval
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.figures import figure
from metaxl_evo.training.trainer import MetaTrainer
from vision_tasks import fewshot, pretrained
from vision_tasks.augmentation import EvaluationTransform, TrainTransform
from vision_tasks.classification import accuracy
from vision_tasks.domains import located_domains, name_of, read_domain
from vision_tasks.feature_transform import SHARPNESS, SUBFOLDER, FeatureTransform
from vision_tasks.fewshot import CrossDomainFewShot, FewShotModel
from vision_tasks.fewshot_arguments import EpisodicTrainingArguments, FewShotArguments
from vision_tasks.fewshot_episodes import Auxiliary, Domain, Episodes, EpisodeSize
from vision_tasks.pretrained import Preparation, PreparedTransform, load_preparation
from vision_tasks.pretraining import ClassifierRows, EncoderPretraining, load_encoder
from vision_tasks.task import VisionTask

SIZES_PICTURE = "feature_transform.png"
QUARTILES = ("min", "q1", "median", "q3", "max")


@dataclass(frozen=True, eq=False)
class FewShotData:
    """The domains of a run; `aux` is one of `seen`."""

    seen: list[Domain]
    unseen: Domain
    aux: Domain | None
    preparation: Preparation | None = None


class FewShotTask(VisionTask[FewShotArguments, FewShotData]):
    """Features that carry over to unseen domains (Tseng et al., ICLR 2020; Bohdal et al., 2021, section 4.3)."""

    settings = FewShotArguments
    title = "Cross-domain few-shot classification"
    sources = (
        "Tseng et al., Cross-Domain Few-Shot Classification via Learned Feature-Wise Transformation, ICLR 2020",
        "Bohdal et al., EvoGrad, NeurIPS 2021, section 4.3",
    )
    usage = (
        "import torch\n\n"
        "from vision_tasks.feature_transform import FeatureTransform\n"
        "from vision_tasks.fewshot import FewShotModel\n\n"
        'model = FewShotModel.from_pretrained(".").eval()  # this folder, or its path\n'
        "channels = model.config.num_channels\n"
        "support = torch.rand(1, 5, 2, channels, 84, 84)  # (episodes, way, shot, C, H, W), pixels in [0, 1]\n"
        "query = torch.rand(1, 5, 3, channels, 84, 84)  # (episodes, way, queries, C, H, W)\n"
        "scores = model(support, query).logits  # (episodes, way * queries, way)\n"
        'transform = FeatureTransform.from_pretrained(".")'
    )
    own_files = (SUBFOLDER, SIZES_PICTURE, IMAGE_PROCESSOR_NAME)
    units: ClassVar = {"accuracy": "%", "interval": "%"}
    shown_only = ("interval",)
    training = EpisodicTrainingArguments
    chooses = True  # on val classes of the seen domains

    def __init__(self) -> None:
        self._held: dict[str, Domain] = {}  # read once for all runs of a command
        self._marks = cache(fingerprints)

    def learns(self, settings: FewShotArguments) -> bool:
        return settings.method == "learned"

    def refuse(self, settings: FewShotArguments, args: MetaTrainingArguments) -> None:
        super().refuse(settings, args)
        if args.do_predict:
            raise ValueError(
                "do_predict: an episode's classes are its own, there are no predictions of images: leave it out"
            )

    def card_metadata(self, settings: FewShotArguments) -> dict[str, Any]:
        model = settings.model_name_or_path
        return super().card_metadata(settings) | {"finetuned_from": None if model is None else hub_id(model)}

    def load(self, settings: FewShotArguments, args: MetaTrainingArguments) -> FewShotData:
        prepare = None if settings.model_name_or_path is None else load_preparation(settings.model_name_or_path)
        *seen, unseen = (self._read(text) for text in located(settings))
        named = [name_of(text) for text in settings.domains]
        aux = None if settings.aux_domain is None else seen[named.index(settings.aux_domain)]
        return FewShotData(seen, unseen, aux, prepare)

    def fingerprints(self, data: FewShotData) -> dict[str, str]:
        """As ever, but that each image is decoded once for all runs of a command."""
        found = {domain.name: self._marks(domain) for domain in (*data.seen, data.unseen)}
        return {f"{name}.{part}": mark for name, marks in found.items() for part, mark in marks.items()}

    def build_trainer(self, settings: FewShotArguments, args: MetaTrainingArguments, data: FewShotData) -> MetaTrainer:
        if data.preparation is not None:
            settings = settings.fitted(data.preparation)
        evaluation(settings, args, data, "novel")  # complains before the first step
        aux = None if data.aux is None else Auxiliary(data.aux, epochs_of(settings, args), settings.aux_images)
        module, transform = make_module(settings, aux), train_transform(settings)
        train: Any
        meta: Episodes | None = None
        if isinstance(module, EncoderPretraining):
            assert aux is not None
            train = ClassifierRows(aux, transform, args.seed)
            _refuse_single_images(args, len(train))
        else:
            made: dict[str, Any] = {
                "size": EpisodeSize(settings.n_way, settings.n_shot, settings.n_query),
                "length": settings.episodes_per_epoch,
                "seed": args.seed,
                "transform": transform,
            }
            role = "seen" if self.learns(settings) else settings.baseline_episodes
            train = Episodes(data.seen, role, aux=aux, **made)
            if self.learns(settings):
                meta = Episodes(data.seen, "unseen", partner=train, **made)
        return MetaTrainer(
            module,
            args,
            train_dataset=train,
            meta_dataset=meta,
            eval_dataset=None
            if args.eval_strategy == IntervalStrategy.NO
            else evaluation(settings, args, data, "val"),
            data_collator=default_collate,
            processing_class=None if data.preparation is None else data.preparation.processor,
            compute_metrics=accuracy,
        )

    def score(self, trainer: MetaTrainer, settings: FewShotArguments, data: FewShotData) -> dict[str, float]:
        found = trainer.predict(cast(Any, evaluation(settings, trainer.args, data, "novel")))
        scores: Any = found.predictions  # (episodes, way * queries, way)
        rates = (scores.argmax(-1) == found.label_ids).mean(1)
        mean, low, high = interval(rates.tolist())
        return {
            "accuracy": Rate.of(rates, np.ones_like(rates), mean),
            "interval": (high - low) / 2,
            "low": low,
            "high": high,
        }

    def describe(
        self, trainer: MetaTrainer, settings: FewShotArguments, data: FewShotData, start: Tree
    ) -> dict[str, Any]:
        module = cast(CrossDomainFewShot, trainer.model)
        found: dict[str, Any] = {
            "seen_domains": [domain.name for domain in data.seen],
            "unseen_domain": data.unseen.name,
        }
        if self.learns(settings):
            log = trainer.state.log_history
            fresh = FeatureTransform(module.meta.channels, gamma=settings.ft_gamma, beta=settings.ft_beta)
            moved = tree.norm(tree.add(tree.detach(module.meta_parameters()), start, -1.0))
            found |= {
                "meta_loss": [[row["step"], row["meta_loss"]] for row in log if "meta_loss" in row],
                "ft_relative_change": moved / (tree.norm(start) or 1.0),
                "feature_transform": {"before": sizes_of(fresh), "after": sizes_of(module.meta)},
            }
        return found

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        if "feature_transform" in results["run"]:
            plot_sizes(results["run"]["feature_transform"], folder / SIZES_PICTURE)

    def _read(self, text: str) -> Domain:
        if text not in self._held:
            self._held[text] = read_domain(text)
        return self._held[text]


def located(settings: FewShotArguments) -> list[str]:
    """The texts of the seen domains and, last, the unseen one, as `read_domain` takes them.

    Raises:
        ValueError: for a path that there is not, or more domains than can be generated.
    """
    return located_domains(settings.data, [*settings.domains, settings.unseen_domain])


def train_transform(settings: FewShotArguments) -> TrainTransform:
    """What training makes of an image."""
    low, high = settings.crop_scale
    return TrainTransform(settings.image_size, settings.channels, (low, high), settings.jitter, settings.flips)


def evaluation(settings: FewShotArguments, args: MetaTrainingArguments, data: FewShotData, split: str) -> Episodes:
    """Episodes that are the same for all methods of a seed: `novel` of the unseen domain, `val` of all seen ones."""
    novel, size = split == "novel", (settings.image_size, settings.channels)
    return Episodes(
        [data.unseen] if novel else data.seen,
        "test" if novel else "all",
        EpisodeSize(settings.n_way, settings.n_shot, settings.test_n_query),
        length=settings.test_episodes if novel else settings.val_episodes,
        seed=args.seed,
        transform=EvaluationTransform(*size) if data.preparation is None else PreparedTransform(data.preparation),
        split=split,
    )


def make_module(settings: FewShotArguments, aux: Auxiliary | None) -> CrossDomainFewShot:
    """The model, its encoder pre-trained where that is asked for, with its transform."""
    pretrains = settings.method == "pretrain"
    fields: dict[str, Any] = {
        "num_channels": settings.channels,
        "head": "prototype"
        if pretrains
        else settings.head,  # without parameters: tests tell what the encoder is worth
        "aux_classes": 0 if aux is None else aux.classes,
        **settings.normalisation,
    }
    if settings.model_name_or_path is None:
        base = FewShotModel(fewshot.backbone_config(settings.backbone, width=settings.width, **fields))
    else:
        base = fewshot.pretrained_few_shot(pretrained.load_encoder(settings.model_name_or_path), **fields)
    if settings.encoder is not None:
        load_encoder(base.encoder, settings.encoder)
    if pretrains:
        return EncoderPretraining(base)
    start: dict[str, Any] = {"gamma": settings.ft_gamma, "beta": settings.ft_beta, "noise": settings.ft_noise}
    return CrossDomainFewShot(base, FeatureTransform.for_encoder(base.encoder, **start), method=settings.method)


def _refuse_single_images(args: MetaTrainingArguments, images: int) -> None:
    """Batch norm has no statistics of one image, which may be left over at the end of an epoch."""
    size = args.per_device_train_batch_size
    if size == 1 or (images % size == 1 and not args.dataloader_drop_last):
        raise ValueError(
            f"method pretrain: per_device_train_batch_size {size} makes a batch of one image out of {images}: set "
            "another, such as 16"
        )


def epochs_of(settings: FewShotArguments, args: MetaTrainingArguments) -> int:
    """The epochs of a whole run, over which the auxiliary loss's weight falls."""
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    batches = math.ceil(settings.episodes_per_epoch / (args.per_device_train_batch_size * args.world_size))
    return math.ceil(args.max_steps / math.ceil(batches / args.gradient_accumulation_steps))


def sizes_of(transform: FeatureTransform) -> dict[str, dict[str, dict[str, float]]]:
    """Sizes of the noise, softplus of gamma and of beta: layer -> gamma or beta -> mean and quartiles of channels."""
    return {
        name: {kind: _quartiles(getattr(layer, kind).detach()) for kind in ("gamma", "beta")}
        for name, layer in transform.layers.items()
    }


def _quartiles(values: Tensor) -> dict[str, float]:
    sizes = F.softplus(values.double().cpu(), beta=SHARPNESS)
    found = sizes.quantile(torch.linspace(0, 1, len(QUARTILES)).double()).tolist()
    return {"mean": sizes.mean().item(), **dict(zip(QUARTILES, found, strict=True))}


def plot_sizes(found: Mapping[str, Any], file: Path) -> None:
    """The channels of every layer as a box, from the least to the largest, with a dashed line where all of them were.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    before, after = found["before"], found["after"]
    with figure(file, 2, (10, 4)) as axes:
        for axis, kind, colour in zip(axes, ("gamma", "beta"), ("C0", "C1"), strict=True):
            boxes = [
                {"label": name.replace("_", "\n"), "whislo": row[kind]["min"], "whishi": row[kind]["max"]}
                | {"q1": row[kind]["q1"], "med": row[kind]["median"], "q3": row[kind]["q3"], "fliers": []}
                for name, row in after.items()
            ]
            box = {"facecolor": colour, "alpha": 0.5}
            axis.bxp(boxes, patch_artist=True, boxprops=box, medianprops={"color": "k"})
            start = next(iter(before.values()))[kind]["mean"]
            axis.axhline(start, color="0.3", linestyle="--", linewidth=1, label=f"start, {start:.2f}")
            axis.set(title=f"softplus({kind}): size of the random {'scale' if kind == 'gamma' else 'shift'}")
            axis.tick_params(axis="x", labelsize=7)
            axis.legend(fontsize="small")
        axes[0].set_ylabel("channels of a layer: quartiles and range")
