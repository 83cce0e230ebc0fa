"""The many-shot experiment: layers, warp layers or weights that are learned across image classification tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.experiments.meta_learning import MetaLearningArguments, MetaLearningTask, TaskSplits
from metaxl_evo.models.task_batch import MetaLearner
from metaxl_evo.training.arguments import MetaTrainingArguments
from vision_tasks.arguments import VisionArguments, VisionTrainingArguments
from vision_tasks.augmentation import PadCropFlip
from vision_tasks.domains import SYNTHETIC, located_domains, read_domain
from vision_tasks.many_shot import LEARNERS, make_learner
from vision_tasks.many_shot_rows import ManyShotSize, ManyShotTasks, make_pool, refuse_few_classes
from vision_tasks.symbols import LOOKS

_VALIDATION, _TEST = 1, 2  # what the seeds of tasks that do not train are kept apart by


@dataclass
class ManyShotArguments(MetaLearningArguments, VisionArguments):
    """Settings of the many-shot experiment.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    data: str = field(
        default=SYNTHETIC.removesuffix(":"),
        metadata={
            "help": "The folder from which relative paths of domains start (`.` also where all are of the Hub), or "
            "`synthetic`: as many generated domains take the place of those that are named."
        },
    )
    domains: list[str] = field(
        default_factory=lambda: [f"{SYNTHETIC}{look}" for look in LOOKS][:2],
        metadata={
            "help": "Whose classes are pooled: .npz files, Omniglot's zip files, image folders or Hub ids, with "
            "?options (vision_tasks/domains.py); options with commas in them need a JSON list."
        },
    )
    learner: str = field(default="anil", metadata={"help": f"What is learned: {', '.join(LEARNERS)}."})
    train_classes: int = field(default=24, metadata={"help": "Classes that meta-train; which, is alike in all runs."})
    validation_classes: int = field(default=12, metadata={"help": "Others that evaluations in training are of."})
    test_classes: int = field(default=12, metadata={"help": "Others that are tested."})
    n_way: int = field(default=10, metadata={"help": "Classes of a task."})
    images_per_class: int = field(
        default=500, metadata={"help": "Of a class in a task at most: half of them train, half judge."}
    )
    shots: int | None = field(default=None, metadata={"help": "So many of these train, not half; the others judge."})
    batch_images: int = field(default=100, metadata={"help": "Images of a step, as many of each class."})
    judge_images: int | None = field(
        default=None, metadata={"help": "Images that judge a step, as many of each class (default: batch_images)."}
    )
    test_images: int = field(default=2500, metadata={"help": "Images that test a task, as many of each class."})
    flip_rate: float = field(
        default=0.0, metadata={"help": "Probability that a training label is another class of its task."}
    )
    image_size: int = field(default=28, metadata={"help": "Pixels of a side; others are resized."})
    image_channels: int = field(default=1, metadata={"help": "1: images are turned grey; 3: grey ones are repeated."})
    conv_layers: int = field(default=4, metadata={"help": "Convolutional blocks of the net."})
    conv_channels: int = field(default=32, metadata={"help": "Channels of each."})
    weight_net_hidden: int = field(default=200, metadata={"help": "Hidden units of the weighting network."})
    augment: bool = field(default=False, metadata={"help": "Random crops of padded training images."})
    flips: bool = field(default=True, metadata={"help": "With augment: mirror images too (not for digits, letters)."})
    in_turn: bool = field(
        default=True, metadata={"help": "Evaluate tasks one after the other: faster on a CPU, not on a GPU."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("learner", self.learner, LEARNERS)
        counts = ("shots", "batch_images", "judge_images", "test_images")
        for name in (*counts, "image_size", "conv_layers", "conv_channels", "weight_net_hidden"):
            self.require_count(name, getattr(self, name))
        for name in ("n_way", "train_classes", "validation_classes", "test_classes", "images_per_class"):
            self.require_count(name, getattr(self, name), least=2)
        if self.image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 or 3, not {self.image_channels!r}")
        if not 0 <= self.flip_rate < 1:
            raise ValueError(f"flip_rate must be at least 0 and below 1, not {self.flip_rate}")
        if not self.domains:
            raise ValueError("domains are empty: name those whose classes are pooled")
        if self.image_size >> self.conv_layers == 0:
            raise ValueError(
                f"images of {self.image_size} pixels are too small for {self.conv_layers} blocks: lower conv_layers"
            )
        refuse_few_classes(self.classes(), self.n_way)
        self.size()

    def classes(self) -> tuple[int, int, int]:
        """Of the splits."""
        return self.train_classes, self.validation_classes, self.test_classes

    def size(self) -> ManyShotSize:
        """Of a task.

        Raises:
            ValueError: for batches that are no multiple of the classes, or shots that leave no image to judge.
        """
        return ManyShotSize(
            self.n_way, self.images_per_class, self.batch_images, self.test_images, self.shots, self.judge_images
        )


class ManyShotTask(MetaLearningTask[ManyShotArguments]):
    """Many-shot meta-learning of image classifiers (Lee et al., ICLR 2022, section 5)."""

    settings = ManyShotArguments
    training = VisionTrainingArguments
    title = "Many-shot meta-learning"
    sources = (
        "Lee et al., Online Hyperparameter Meta-Learning with Hypergradient Distillation, ICLR 2022",
        "Flennerhag et al., Meta-Learning with Warped Gradient Descent, ICLR 2020",
        "Shu et al., Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting, NeurIPS 2019",
    )
    configs = "long_horizon"
    measured = ("accuracy", "cost")
    units: ClassVar = {"accuracy": "%", "cost": ""}
    shown_only = ("cost",)
    greater_is_better = True

    def load(self, settings: ManyShotArguments, args: MetaTrainingArguments) -> TaskSplits:
        domains = [read_domain(text) for text in located_domains(settings.data, settings.domains)]
        pool = make_pool(domains, side=settings.image_size, channels=settings.image_channels)
        own = args.seed if args.data_seed is None else args.data_seed
        seeds = mix_seed(0, own), mix_seed(_VALIDATION), mix_seed(_TEST)  # tasks that test are alike in all runs
        transform = PadCropFlip(flips=settings.flips) if settings.augment else None
        made = [
            ManyShotTasks(part, settings.size(), seed, flip_rate=settings.flip_rate, transform=transform)
            for part, seed in zip(pool.split(settings.classes(), settings.size()), seeds, strict=True)
        ]
        return TaskSplits(*made)

    def make_learner(self, settings: ManyShotArguments, data: TaskSplits) -> MetaLearner:
        return make_learner(
            settings.learner,
            tasks=settings.meta_batch,
            way=settings.n_way,
            image=(settings.image_channels, settings.image_size),
            layers=settings.conv_layers,
            channels=settings.conv_channels,
            hidden=settings.weight_net_hidden,
            in_turn=settings.in_turn,
        )
