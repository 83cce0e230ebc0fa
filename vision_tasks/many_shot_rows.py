"""Many-shot tasks of image classes: task j draws some classes, and of each the images that train and those that judge.

All of it follows from (seed, j), and the images of a step from (seed, j, step).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Generator, Tensor

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.training.task_rows import Rows
from vision_tasks.augmentation import Transform, resize, to_channels, to_float
from vision_tasks.fewshot_episodes import Domain

SPLITS = ("train", "validation", "test")
_CLASSES, _TRAIN, _JUDGE, _TEST, _LABELS, _SPLIT = range(6)  # what is drawn with a seed of its own


@dataclass(frozen=True, eq=False)
class ClassPool:
    """Classes of several domains with their images, all of one size; item i is the i-th class and its images.

    Args:
        images: class -> uint8 (N, H, W, C).
    """

    images: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[str, Tensor]:
        return list(self.images.items())[number]

    def split(self, counts: Sequence[int], size: ManyShotSize) -> list[ClassPool]:
        """Pools of so many classes each, none in two of them; the same in every run.

        Raises:
            ValueError: for more classes than there are, or a class with too few images.
        """
        names = sorted(self.images)
        if sum(counts) > len(names):
            raise ValueError(
                f"{_named(counts)} classes are {sum(counts)}, and there are {len(names)}: lower train_classes, "
                "validation_classes or test_classes, or name more domains"
            )
        for name in names:
            if len(self.images[name]) < size.least:
                raise ValueError(
                    f"class {name} has {len(self.images[name])} images, and a task needs {size.least}, some of them "
                    "to judge: leave it out (?largest_classes=N of its domain)"
                )
        order = torch.randperm(len(names), generator=_generator(_SPLIT)).tolist()
        parts = [[names[place] for place in order[a:b]] for a, b in pairwise(accumulate(counts, initial=0))]
        return [ClassPool({name: self.images[name] for name in sorted(part)}) for part in parts]


def refuse_few_classes(counts: Sequence[int], way: int) -> None:
    """Refuse splits with fewer classes than a task takes.

    Raises:
        ValueError: with what they have.
    """
    if min(counts) < way:
        raise ValueError(f"a task has n_way {way} classes, and there are {_named(counts)} classes: raise the fewest")


def _named(counts: Sequence[int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in zip(SPLITS, counts, strict=True))


def make_pool(domains: Sequence[Domain], *, side: int, channels: int) -> ClassPool:
    """All classes of the domains, at `side` x `side` pixels and so many channels."""
    images: dict[str, Tensor] = {}
    for domain in domains:
        for name, members in zip(domain.classes, domain.members, strict=True):
            sized = [_sized(domain.images[place], side, channels) for place in members.tolist()]
            images[f"{domain.name}/{name}"] = torch.stack(sized)
    return ClassPool(images)


@dataclass(frozen=True)
class ManyShotSize:
    """What a task has.

    Args:
        way: classes.
        images: of a class at most.
        shots: those of them that train, the others judge (default: half).
        batch: images of a step, as many of each class; where a class has fewer, each of them several times.
        judge, test: images that judge a step (default: `batch`), and that test an adapted task; likewise.

    Raises:
        ValueError: for sizes that are no multiple of the classes, or classes without an image that judges.
    """

    way: int = 10
    images: int = 500
    batch: int = 100
    test: int = 2500
    shots: int | None = None
    judge: int | None = None

    def __post_init__(self) -> None:
        if self.shots is not None and self.shots >= self.images:
            raise ValueError(
                f"shots {self.shots} leave none of images_per_class {self.images} to judge: lower shots, or raise it"
            )
        for name in ("batch", "judge", "test"):
            if (getattr(self, name) or 0) % self.way:
                raise ValueError(
                    f"{name}_images {getattr(self, name)} is not a multiple of n_way {self.way}: every class of a "
                    "task has as many"
                )

    @property
    def least(self) -> int:
        """Images that a class has to have."""
        return 4 if self.shots is None else self.shots + 1


@dataclass(frozen=True, eq=False)
class ManyShotTasks:
    """Numbered tasks of the classes of a pool.

    Args:
        pool: of one split.
        seed: all of task j follows from (seed, j).
        flip_rate: probability that the label of a training image is another class of the task; those that judge and
            test are right.
        transform: of training images (default: none).
    """

    pool: ClassPool
    size: ManyShotSize
    seed: int
    flip_rate: float = 0.0
    transform: Transform | None = None

    def train(self, task: int, step: int) -> Rows:
        return self._rows(task, self.size.batch, _TRAIN, step, self.transform)

    def judge(self, task: int, step: int) -> Rows:
        return self._rows(task, self.size.judge or self.size.batch, _JUDGE, step)

    def test(self, task: int) -> Rows:
        return self._rows(task, self.size.test, _TEST, 0)

    def _rows(self, task: int, count: int, part: int, step: int, transform: Transform | None = None) -> Rows:
        """Images (count, C, H, W) in [0, 1], and their places among the classes of the task, (count,)."""
        generator, images, labels = _generator(self.seed, task, part, step), list[Tensor](), list[Tensor]()
        for held, places, known_as in self._classes(task, part):
            turns = -(-count // self.size.way // len(places))
            drawn = torch.cat([torch.randperm(len(places), generator=generator) for _ in range(turns)])
            chosen = drawn[: count // self.size.way]
            images.append(held[places[chosen]])
            labels.append(known_as[chosen])
        pixels = torch.cat(images)
        if transform is None:
            x = pixels.permute(0, 3, 1, 2).float() / 255
        else:
            x = torch.stack([transform(image, generator) for image in pixels])
        return {"x": x, "y": torch.cat(labels)}

    def _classes(self, task: int, part: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each class of a task all its images, the places of those that train or judge, and their labels."""
        generator, way = _generator(self.seed, task, _CLASSES), self.size.way
        for label, chosen in enumerate(torch.randperm(len(self.pool), generator=generator)[:way].tolist()):
            _, held = self.pool[chosen]
            places = torch.randperm(len(held), generator=generator)[: self.size.images]
            shots = self.size.shots or len(places) // 2
            places = places[:shots] if part == _TRAIN else places[shots:]
            labels = torch.full((len(places),), label)
            if part == _TRAIN and self.flip_rate:
                labels = _flipped(labels, self.flip_rate, way, _generator(self.seed, task, _LABELS, label))
            yield held, places, labels


def _flipped(labels: Tensor, rate: float, way: int, generator: Generator) -> Tensor:
    """Each label with probability `rate` another one of the task, all others alike."""
    others = torch.randint(1, way, labels.shape, generator=generator)
    wrong = torch.rand(labels.shape, generator=generator) < rate
    return torch.where(wrong, (labels + others) % way, labels)


def _generator(*keys: int) -> Generator:
    return torch.Generator().manual_seed(mix_seed(0, *keys))


def _sized(image: object, side: int, channels: int) -> Tensor:
    """uint8 (H, W, C) of any size -> uint8 (side, side, channels)."""
    pixels = resize(to_channels(to_float(image), channels), side, side)
    return (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
