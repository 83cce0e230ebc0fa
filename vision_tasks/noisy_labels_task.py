"""The noisy-labels experiment: Meta-Weight-Net beside the same training without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import default_collate

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.experiments.records import Record
from metaxl_evo.messages import unknown
from metaxl_evo.models.weighers import NORMALISATIONS
from metaxl_evo.models.weight_net import SUBFOLDER, WeightNet
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.training.watched import WatchingTrainer
from metaxl_evo.training.weight_watch import over_time
from vision_tasks.augmentation import AUGMENTATIONS
from vision_tasks.backbones import BACKBONES
from vision_tasks.classification import (
    ClassificationTask,
    ClassifierArguments,
    accuracy,
    make_base,
    scores_on,
    spreadsheet,
    tell_fewer,
)
from vision_tasks.image_parts import Layout
from vision_tasks.image_sources import load_images
from vision_tasks.images import ImageRows, ImageSet
from vision_tasks.noisy_labels import NOISES, NoisyLabels, found_in, make_noisy
from vision_tasks.noisy_labels_figures import plot_noise, plot_weight_curves, plot_weights
from vision_tasks.pretrained import Preparation
from vision_tasks.training_images import SHEET, TABLE, contact_sheet, judge, table_of
from vision_tasks.weight_net import WeightedClassifier

METHODS = ("meta_weight_net", "frozen_weight_net", "baseline")
WEIGHTS_PICTURE, NOISE_PICTURE = "weights.png", "noise.png"
SELECTION = ("loss", "accuracy")  # scores that choose a checkpoint
CURVE = torch.linspace(0, 8, 65)  # losses at which the learned weight is drawn


@dataclass
class NoisyLabelsArguments(ClassifierArguments):
    """Settings of the noisy-labels experiment.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    method: str = field(
        default="meta_weight_net",
        metadata={
            "help": "meta_weight_net: losses are weighted by a learned network; frozen_weight_net: by that of "
            "weight_net_name_or_path, the clean images train, too; baseline: plain training."
        },
    )
    backbone: str = field(default="resnet32", metadata={"help": f"One of {', '.join(BACKBONES)}."})
    width: int | None = field(
        default=None, metadata={"help": "Multiplies the channels of resnet32 (the paper's scaling study: 1 to 5)."}
    )
    weight_net_hidden: int = field(
        default=100,
        metadata={"help": "Hidden units of the weighting network, which has 3 times as many parameters + 1."},
    )
    weight_net_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of a run whose network weighs, with method frozen_weight_net."}
    )
    weight_normalisation: str = field(
        default="mean", metadata={"help": f"Weights of a micro-batch divided by their: {', '.join(NORMALISATIONS)}."}
    )
    noise: str = field(default="flip2", metadata={"help": f"One of {', '.join(NOISES)}."})
    noise_rate: float = field(
        default=0.4, metadata={"help": "Of the labels; `unif` leaves one in `classes` of them right."}
    )
    train_size: int | None = field(
        default=None, metadata={"help": "Images with noisy labels at most, the first ones (default: all)."}
    )
    meta_size: int = field(default=1000, metadata={"help": "Clean images that judge, equally many of each class."})
    meta_data: str | None = field(
        default=None,
        metadata={"help": "A source as for `data` whose part `train` is the clean set (default: split off)."},
    )
    validation_size: int | None = field(
        default=None,
        metadata={
            "help": "Clean images, equally many of each class, kept apart for evaluations: they may choose a "
            "checkpoint (load_best_model_at_end), as the meta set must not."
        },
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "The split or folder of such images (default: validation, val, valid or dev, if there)."},
    )
    imbalance_factor: float | None = field(
        default=None,
        metadata={
            "help": "Train on a long tail: the first class has so many times the images of the last (100, 10, ...)."
        },
    )
    true_label_column: str | None = field(
        default=None,
        metadata={"help": "Of a table, or NAME of an .npz file's NAME_train: right labels beside noisy ones."},
    )
    image_size: int | None = field(default=None, metadata={"help": "Average pixels down to this side."})
    augmentation: str = field(
        default="none", metadata={"help": f"One of {', '.join(AUGMENTATIONS)}; of train and meta."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("method", self.method, METHODS)
        if (self.method == "frozen_weight_net") != (self.weight_net_name_or_path is not None):
            raise ValueError("weight_net_name_or_path goes with method: frozen_weight_net: set both, or neither")
        self.require_known("weight_normalisation", self.weight_normalisation, NORMALISATIONS)
        self.require_known("noise", self.noise, NOISES)
        self.require_known("augmentation", self.augmentation, AUGMENTATIONS)
        for name in ("width", "train_size", "weight_net_hidden", "meta_size", "image_size", "validation_size"):
            self.require_count(name, getattr(self, name))
        self.require_left_to_the_model("width", "image_size")
        if self.width is not None and self.backbone != "resnet32":
            raise ValueError(f"width multiplies the channels of resnet32; {self.backbone} has none: leave it out")
        if not 0 <= self.noise_rate < 1:
            raise ValueError(f"noise_rate must be at least 0 and below 1, not {self.noise_rate}")

    def layout(self) -> Layout:
        layout = replace(super().layout(), true_label_column=self.true_label_column)
        return replace(layout, validation_split=self.validation_split)

    def meta_layout(self) -> Layout:
        """That of the clean set: its part `train`, read as a test is, by the right labels where it has both."""
        return Layout(self.image_column, self.label_column, self.true_label_column, test_split="train")


@dataclass(frozen=True, eq=False)
class NoisyLabelsData:
    """Noisy training images and clean ones that judge, and clean test images."""

    noisy: NoisyLabels
    test: ImageSet
    preparation: Preparation | None = None


class NoisyLabelsTask(ClassificationTask[NoisyLabelsArguments, NoisyLabelsData]):
    """Losses weighted by a network that clean images judge (Shu et al., NeurIPS 2019)."""

    settings = NoisyLabelsArguments
    title = "Learning with noisy labels"
    sources = ("Shu et al., Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting, NeurIPS 2019",)
    usage = (
        "\n\nfrom metaxl_evo.models.weight_net import WeightNet\n\n"
        'weigh = WeightNet.from_pretrained(".")  # losses (B,) -> weights (B,)'
    )
    own_files = (*ClassificationTask.own_files, SUBFOLDER, TABLE, SHEET, WEIGHTS_PICTURE, NOISE_PICTURE)
    chooses = True  # on a validation set; without one it is refused where the data are known

    inputs = (*ClassificationTask.inputs, "weight_net_name_or_path")

    def learns(self, settings: NoisyLabelsArguments) -> bool:
        return settings.method == "meta_weight_net"

    def refuse(self, settings: NoisyLabelsArguments, args: MetaTrainingArguments) -> None:
        super().refuse(settings, args)
        metric = (args.metric_for_best_model or SELECTION[0]).removeprefix("eval_")
        if metric not in SELECTION:
            raise ValueError(unknown("metric_for_best_model", metric, SELECTION))
        if args.metric_for_best_model is not None and args.greater_is_better == (metric == "loss"):
            raise ValueError(f"greater_is_better would choose the checkpoint with the worst {metric}: leave it out")

    def load(self, settings: NoisyLabelsArguments, args: MetaTrainingArguments) -> NoisyLabelsData:
        prepare, own = settings.preparation(), settings.meta_data
        parts = load_images(settings.data, settings.layout(), ("train", "validation", "test"), prepare)
        meta = None if own is None else load_images(own, settings.meta_layout(), ("test",), prepare)["test"]
        meta = None if meta is None else meta.pooled(settings.image_size)
        parts = {part: images.pooled(settings.image_size) for part, images in parts.items()}
        train, test, validation = parts["train"], parts["test"], parts.get("validation")
        if validation is not None and settings.validation_size is not None:
            raise ValueError(f"validation_size: {validation.where} is a validation set already: leave it out")
        noisy = make_noisy(
            train.require_classes(),
            kind=settings.noise,
            rate=settings.noise_rate,
            meta_size=settings.meta_size,
            train_size=settings.train_size,
            seed=args.seed,
            meta=meta,
            validation_size=settings.validation_size,
            validation=validation,
            imbalance_factor=settings.imbalance_factor,
        )
        tell_fewer("train_size", settings.train_size, len(noisy.train))
        for name, clean in (("meta", meta), ("validation", validation)):
            if clean is not None:
                _refuse_tested(name, clean, test)
        if args.load_best_model_at_end and noisy.validation is None:
            raise ValueError(
                "load_best_model_at_end needs a validation set, as neither the meta set nor the test set may choose: "
                "set validation_size to so many clean images, or give a split or folder `val`"
            )
        return NoisyLabelsData(noisy, test.require_classes(), prepare)

    def build_trainer(
        self, settings: NoisyLabelsArguments, args: MetaTrainingArguments, data: NoisyLabelsData
    ) -> MetaTrainer:
        train, augment = data.noisy.train, AUGMENTATIONS[settings.augmentation]
        base, processor = make_base(settings, train, data.preparation, width=settings.width)
        frozen, weighted = settings.weight_net_name_or_path, settings.method != "baseline"
        module = WeightedClassifier(
            base,
            WeightNet(settings.weight_net_hidden) if frozen is None else WeightNet.from_pretrained(frozen),
            weighted=weighted,
            normalisation=settings.weight_normalisation,
            told_apart=weighted and data.noisy.known,
        )
        wrong = data.noisy.wrong if module.watch.domains else None
        if frozen is not None:
            train = train.joined(data.noisy.meta)
            wrong = None if wrong is None else np.pad(wrong, (0, len(data.noisy.meta)))
        rows = ImageRows(train, augment, seed=2 * args.seed, wrong=wrong)
        rows[0]  # complains before the first step of images that are too small for the augmentation
        return WatchingTrainer(
            module,
            args,
            train_dataset=rows,
            meta_dataset=ImageRows(data.noisy.meta, augment, seed=2 * args.seed + 1)
            if self.learns(settings)
            else None,
            eval_dataset=ImageRows(data.test if data.noisy.validation is None else data.noisy.validation),
            data_collator=default_collate,
            processing_class=processor,
            compute_metrics=accuracy,
        )

    def score(self, trainer: MetaTrainer, settings: NoisyLabelsArguments, data: NoisyLabelsData) -> dict[str, Any]:
        return scores_on(trainer, data.test, data.noisy.true_labels)

    def dev_score(
        self, trainer: MetaTrainer, settings: NoisyLabelsArguments, data: NoisyLabelsData
    ) -> dict[str, Any] | None:
        return None if data.noisy.validation is None else scores_on(trainer, data.noisy.validation)

    def describe(
        self, trainer: MetaTrainer, settings: NoisyLabelsArguments, data: NoisyLabelsData, start: Tree
    ) -> dict[str, Any]:
        found: dict[str, Any] = {
            "train_images": len(data.noisy.train),
            "meta_images": len(data.noisy.meta),
            "left_out": data.noisy.left_out,
            "wrong_labels": float(data.noisy.wrong.mean()) if data.noisy.known else None,
        }
        if data.noisy.validation is not None:
            found["validation_images"] = len(data.noisy.validation)
        if settings.method != "baseline":
            size = trainer.args.per_device_eval_batch_size
            module = cast(WeightedClassifier, trainer.model)
            found["weights"] = weights_of(module, data.noisy, size)
            found["weights_over_time"] = over_time(trainer.state.log_history, module.watch.domains)
        return found

    def write_files(
        self, folder: Path, trainer: MetaTrainer, settings: NoisyLabelsArguments, data: NoisyLabelsData
    ) -> None:
        super().write_files(folder, trainer, settings, data)
        size = trainer.args.per_device_eval_batch_size
        table = table_of(cast(WeightedClassifier, trainer.model), data.noisy, size)
        spreadsheet(table).to_csv(folder / TABLE, index=False)
        contact_sheet(data.noisy.train, table, folder / SHEET)

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        if "weights" in results["run"]:
            plot_weights(results["run"]["weights"], results["run"].get("weights_over_time"), folder / WEIGHTS_PICTURE)

    def plot_study(self, folder: Path, records: Sequence[Record]) -> None:
        plot_noise(records, folder / NOISE_PICTURE)
        plot_weight_curves(records, folder / WEIGHTS_PICTURE)


def _refuse_tested(name: str, clean: ImageSet, test: ImageSet) -> None:
    """Refuse a clean set of the user's own that holds test images."""
    leaked = found_in(clean, test)
    if leaked.any():
        raise ValueError(
            f"the {name} set overlaps the test set: {leaked.sum()} of its images are in {test.where}: take them out "
            f"({clean.named(leaked)})"
        )


def weights_of(module: WeightedClassifier, noisy: NoisyLabels, batch_size: int = 500) -> dict[str, Any]:
    """What the trained network makes of right and wrong labels, and V over a range of losses; plain values.

    Weights are sigmoids as they come, of unaugmented images at the final weights in evaluation mode.
    """
    costs, _ = judge(module, noisy.train, batch_size)
    with torch.no_grad():
        weights = module.meta(costs).cpu().numpy()
        curve = module.meta(CURVE.to(costs)).cpu()
    wrong = noisy.wrong
    groups = {"right": ~wrong, "wrong": wrong} if noisy.known else {"all": np.ones_like(wrong)}
    means = {name: float(weights[which].mean()) for name, which in groups.items() if which.any()}
    bins = np.linspace(0, 1, 41)
    return {
        "mean": means,
        "ratio": means["right"] / means["wrong"] if len(means) == 2 and means["wrong"] else None,
        "histogram": {
            "bins": bins.tolist(),
            **{name: np.histogram(weights[which], bins)[0].tolist() for name, which in groups.items()},
        },
        "curve": {"loss": CURVE.tolist(), "weight": curve.tolist()},
    }
