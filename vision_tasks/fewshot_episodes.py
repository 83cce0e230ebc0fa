"""Episodes of few-shot learning as a map-style data set: row i of an epoch is a function of (seed, epoch, i) alone.

A *domain* is a set of labelled images of one look, its classes split into base, val and novel. An *episode* draws a
few classes of one domain, and of each a few support images and a few queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.messages import unknown
from vision_tasks.augmentation import Transform, to_float

SPLITS = ("base", "val", "novel")
ROLES = ("seen", "unseen", "all", "test")
PAIR, ROW, NOISE = range(3)  # what is drawn with a seed of its own

AUX_DECAY, AUX_DECAYS = 0.9, 20  # the auxiliary loss's weight, and how often it falls in a run


def interleaved(classes: int) -> dict[str, tuple[int, ...]]:
    """The cross-domain benchmark's split: even classes are base, the odd ones are val and novel by turns."""
    return {
        "base": tuple(range(0, classes, 2)),
        "val": tuple(range(1, classes, 4)),
        "novel": tuple(range(3, classes, 4)),
    }


def whole(classes: int) -> dict[str, tuple[int, ...]]:
    """All classes in every split: for a domain that is held out as a whole, or that has few classes."""
    return dict.fromkeys(SPLITS, tuple(range(classes)))


@dataclass(frozen=True, eq=False)
class Domain:
    """Labelled images of one look.

    Args:
        name: for messages.
        images: item i is a uint8 array (H, W, C), C 1 or 3; it may be decoded on access.
        labels: (N,) int64, indices of `classes`.
        classes: their names.
        splits: the classes of each of SPLITS.

    Raises:
        ValueError: for images, labels and splits that do not fit together.
    """

    name: str
    images: Sequence[Any]
    labels: np.ndarray
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        labels = self.labels
        if labels.dtype != np.int64 or labels.ndim != 1 or len(labels) != len(self.images):
            raise ValueError(
                f"domain {self.name}: {len(self.images)} images need as many int64 labels, got {labels.dtype} "
                f"of shape {labels.shape}"
            )
        if not len(labels):
            raise ValueError(f"domain {self.name} has no images")
        if labels.min() < 0 or labels.max() >= len(self.classes):
            raise ValueError(
                f"domain {self.name}: labels go from {labels.min()} to {labels.max()}, there are "
                f"{len(self.classes)} classes"
            )
        for split, members in self.splits.items():
            if split not in SPLITS:
                raise ValueError(unknown("split", split, SPLITS))
            empty = [self.classes[c] for c in members if not len(self.members[c])]
            if empty:
                raise ValueError(f"domain {self.name}: class {empty[0]!r} of its {split} split has no images")
        try:
            to_float(self.images[0])
        except ValueError as error:
            raise ValueError(f"domain {self.name}: {error}") from error

    @cached_property
    def members(self) -> list[np.ndarray]:
        """The numbers of the images of each class, in order."""
        return [np.flatnonzero(self.labels == label) for label in range(len(self.classes))]

    def split(self, name: str) -> tuple[int, ...]:
        """The classes of a split.

        Raises:
            ValueError: for a split that the domain has not.
        """
        if name not in self.splits:
            raise ValueError(f"domain {self.name} has no {name} split: it has {', '.join(self.splits)}")
        return self.splits[name]


@dataclass(frozen=True)
class EpisodeSize:
    """Classes of an episode, and the support images and queries of each (paper: 5, 1 or 5, 16; tests 15).

    Raises:
        ValueError: for fewer than two classes, or none of the others.
    """

    way: int = 5
    shot: int = 5
    queries: int = 16

    def __post_init__(self) -> None:
        for field, least in (("way", 2), ("shot", 1), ("queries", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"an episode needs n_{field} of at least {least}, got {getattr(self, field)}")

    def require(self, domain: Domain, split: str) -> None:
        """Raise ValueError where a split of `domain` is too small for an episode."""
        classes, each = domain.split(split), self.shot + self.queries
        if len(classes) < self.way:
            raise ValueError(
                f"domain {domain.name} has {len(classes)} {split} classes, an episode needs {self.way}: lower n_way, "
                "or read it with classes=whole"
            )
        for label in classes:
            if len(domain.members[label]) < each:
                raise ValueError(
                    f"domain {domain.name}: class {domain.classes[label]!r} has {len(domain.members[label])} images, "
                    f"an episode needs {self.shot} + {self.queries}: lower n_shot or n_query"
                )


@dataclass(frozen=True)
class Auxiliary:
    """Images for an auxiliary classifier, which keeps the features of its domain; its weight falls during a run.

    Args:
        domain: of the images; its classes in `split` are those of the classifier.
        total_epochs: of the run.
        images: a row.

    Raises:
        ValueError: for a split with fewer images.
    """

    domain: Domain
    total_epochs: int
    images: int = 16
    split: str = "base"

    def __post_init__(self) -> None:
        if not 1 <= self.images <= len(self.pool):
            raise ValueError(
                f"aux_images must be from 1 to {len(self.pool)}, the {self.split} images of {self.domain.name}, "
                f"got {self.images}"
            )
        if self.total_epochs < 1:
            raise ValueError(
                f"the auxiliary weight falls over total_epochs, which must be positive: {self.total_epochs}"
            )

    @property
    def classes(self) -> int:
        """Of the auxiliary classifier."""
        return len(self.domain.split(self.split))

    @cached_property
    def pool(self) -> np.ndarray:
        """(image, label among the split's classes), (N, 2)."""
        classes = self.domain.split(self.split)
        pairs = [
            np.stack([self.domain.members[c], np.full(len(self.domain.members[c]), k)], 1)
            for k, c in enumerate(classes)
        ]
        return np.concatenate(pairs) if pairs else np.empty((0, 2), np.int64)

    def weight(self, epoch: int) -> float:
        """0.9 to the power of the twentieths of the run that are over."""
        return AUX_DECAY ** (AUX_DECAYS * epoch // self.total_epochs)

    def row(self, epoch: int, transform: Transform, generator: Generator) -> dict[str, Tensor]:
        """Different images of the split, with their labels and the weight of their loss."""
        chosen = self.pool[torch.randperm(len(self.pool), generator=generator)[: self.images].numpy()]
        return {
            "aux_images": torch.stack([transform(self.domain.images[i], generator) for i in chosen[:, 0]]),
            "aux_labels": torch.from_numpy(chosen[:, 1].copy()),
            "aux_weight": torch.tensor(self.weight(epoch)),
        }


class Episodes(Dataset[dict[str, Tensor]]):
    """Episodes over some domains; which domain a row is of depends on the role.

    | role | the domain of a row |
    |---|---|
    | `seen`, `unseen` | the first and the second of two different domains, drawn anew for every epoch |
    | `all` | each domain as often as the others, in random order (the baselines' training) |
    | `test` | the only one; the rows are the same in every epoch |

    The pseudo-seen and the pseudo-unseen episodes of a run are two data sets with one seed: the latter take the former
    as `partner`, so that both are of one pair however many episodes a step takes of each.
    Rows hold `support` (way, shot, ch, H, W), `query` (way, queries, ch, H, W), `labels` (way * queries,),
    `noise_seed` () and what an Auxiliary adds.

    Args:
        domains: with names of their own.
        role: one of ROLES.
        size: of an episode.
        length: episodes in an epoch.
        seed: of all that is drawn.
        transform: from a uint8 image to the model's input.
        split: whose classes are drawn.
        aux: images that go along with every episode.
        partner: the episodes whose epoch tells the pair (default: the own one).

    Raises:
        ValueError: for domains too few or too small for such episodes, and for an unknown role.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        role: str,
        size: EpisodeSize,
        *,
        length: int,
        seed: int,
        transform: Transform,
        split: str = "base",
        aux: Auxiliary | None = None,
        partner: Episodes | None = None,
    ):
        _check_roles(domains, role, length)
        for domain in domains:
            size.require(domain, split)
        self.domains, self.role, self.size, self.length = list(domains), role, size, length
        self.seed, self.transform, self.split, self.aux = seed, transform, split, aux
        self.partner, self.epoch = partner, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of this epoch from now on; those of role `test` stay."""
        if self.role != "test":
            self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def domain_of(self, index: int) -> Domain:
        """The domain of a row of the current epoch."""
        epoch = self.epoch if self.partner is None else self.partner.epoch
        generator = torch.Generator().manual_seed(mix_seed(self.seed, PAIR, epoch))
        if self.role in ("seen", "unseen"):
            pair = torch.randperm(len(self.domains), generator=generator)
            return self.domains[int(pair[int(self.role == "unseen")])]
        order = torch.randperm(self.length, generator=generator)
        return self.domains[int(order[index]) % len(self.domains)]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length} episodes")
        keys = ROLES.index(self.role), self.epoch, index
        generator = torch.Generator().manual_seed(mix_seed(self.seed, ROW, *keys))
        row = {
            **self._episode(self.domain_of(index), generator),
            "noise_seed": torch.tensor(mix_seed(self.seed, NOISE, *keys)),
        }
        return row if self.aux is None else row | self.aux.row(self.epoch, self.transform, generator)

    def choose(self, domain: Domain, generator: Generator) -> Tensor:
        """The images of an episode by number, (way, shot + queries): distinct classes, distinct images of each."""
        classes, each = domain.split(self.split), self.size.shot + self.size.queries
        order = torch.randperm(len(classes), generator=generator)[: self.size.way]
        chosen = []
        for place in order.tolist():
            members = torch.from_numpy(domain.members[classes[place]])
            chosen.append(members[torch.randperm(len(members), generator=generator)[:each]])
        return torch.stack(chosen)

    def _episode(self, domain: Domain, generator: Generator) -> dict[str, Tensor]:
        chosen = self.choose(domain, generator)
        pixels = [self.transform(domain.images[i], generator) for i in chosen.flatten().tolist()]
        images = torch.stack(pixels).unflatten(0, chosen.shape)  # (way, shot + queries, ch, H, W)
        shot, queries = self.size.shot, self.size.queries
        return {
            "support": images[:, :shot],
            "query": images[:, shot:],
            "labels": torch.arange(self.size.way).repeat_interleave(queries),
        }


def _check_roles(domains: Sequence[Domain], role: str, length: int) -> None:
    if role not in ROLES:
        raise ValueError(unknown("role", role, ROLES))
    if length < 1:
        raise ValueError(f"an epoch needs at least one episode, got {length}")
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise ValueError(f"domains must differ in name, got {', '.join(names)}: name them (PATH?name=NAME)")
    if role in ("seen", "unseen") and len(domains) < 2:
        raise ValueError(
            f"a pseudo-unseen domain needs another one beside it: give 2 seen domains or more, not {len(domains)}"
        )
    if role == "test" and len(domains) != 1:
        raise ValueError(f"test episodes are of one domain, not {len(domains)}")
    if not domains:
        raise ValueError("episodes need a domain")
