"""Tagged sentences of which some entities are marked wrong, and clean ones apart from them that judge."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from metaxl_evo.models.adapters import LoraArguments
from metaxl_evo.ner.arguments import SHORTEST
from metaxl_evo.ner.data import evaluated_rows, label_corpus, overlap, read_corpus, require_types, sample
from metaxl_evo.ner.layout import Layout, LayoutArguments
from metaxl_evo.ner.metrics import entities
from metaxl_evo.ner.pretrained import trained_labels
from metaxl_evo.ner.schemes import TagScheme
from metaxl_evo.weighting.arguments import WeigherArguments
from metaxl_evo.weighting.drawn import SYNTHETIC

logger = logging.getLogger(__name__)

NOISES = ("drop", "type", "both")
OUTSIDE = "O"


@dataclass
class TaggedArguments(LoraArguments, LayoutArguments, WeigherArguments):
    """Which sentences train, which judge, and how entities are spoilt for an experiment.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    model_name_or_path: str = field(
        default=SYNTHETIC,
        metadata={"help": "Hub id or folder of a model, or `synthetic`: a small random one for the synthetic data."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the model brings along (auto_map); read it first."}
    )
    dataset: str = field(
        default=SYNTHETIC,
        metadata={"help": "Hub id (a configuration a language), a folder LANG/{train,dev,test}, or `synthetic`."},
    )
    language: str = field(default="aru", metadata={"help": "Of the sentences: a folder or configuration of dataset."})
    meta_dataset: str | None = field(
        default=None,
        metadata={"help": "Where the clean sentences are, the part `train` of language there (default: split off)."},
    )
    meta_size: int = field(default=100, metadata={"help": "Clean sentences at most."})
    train_size: int | None = field(default=900, metadata={"help": "Noisy sentences at most (null: all)."})
    eval_size: int | None = field(default=None, metadata={"help": "Dev and test sentences at most (null: all)."})
    sample_seed: int = field(default=42, metadata={"help": "Seed of the choice of sentences."})
    max_length: int = field(default=200, metadata={"help": "Sub-tokens of a training sentence at most."})
    eval_max_length: int = field(default=512, metadata={"help": "The same in evaluation; words beyond count as O."})
    noise: str = field(
        default="both",
        metadata={"help": f"One of {', '.join(NOISES)}: entities are dropped, given a wrong type, or half of each."},
    )
    noise_rate: float = field(
        default=0.0, metadata={"help": "Share of the noisy entities that are spoilt, for experiments."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lora()
        self.check_weigher()
        self.require_known("noise", self.noise, NOISES)
        for name in ("meta_size", "train_size", "eval_size"):
            self.require_count(name, getattr(self, name))
        for name in ("max_length", "eval_max_length"):
            self.require_count(name, getattr(self, name), SHORTEST)
        if not 0 <= self.noise_rate <= 1:
            raise ValueError(f"noise_rate must be from 0 to 1, not {self.noise_rate}")
        if self.model_name_or_path == SYNTHETIC and self.dataset != SYNTHETIC:
            raise ValueError(
                "model_name_or_path: the synthetic model knows the synthetic words alone: give a model for these data"
            )


@dataclass(frozen=True, eq=False)
class TaggedData:
    """Columns `tokens` and `ner_tags` (numbers of `names`, IOB2).

    Args:
        wrong: which words of `train` have a wrong tag, a list a sentence; None where nobody knows.
        seen: test sentences that train, too; none judges.
    """

    train: Dataset
    wrong: list[list[bool]] | None
    meta: Dataset
    dev: Dataset | None
    test: Dataset
    names: list[str]
    seen: int


def load_tagged(
    settings: TaggedArguments, seed: int, *, wants_dev: bool = False, label_names: Sequence[str] | None = None
) -> TaggedData:
    """Read, split and spoil the sentences.

    Args:
        seed: of what is spoilt.
        label_names: of tags that are integers.

    Raises:
        ValueError: one line for data that cannot serve.
    """
    trained = trained_labels(settings.model_name_or_path, trust_remote_code=settings.trust_remote_code)
    layout, language = settings.layout(label_names), settings.language
    splits = ["train", *["validation"] * wants_dev, "test"]
    corpus = read_corpus(settings.dataset, [language], splits, layout)
    require_types(layout, corpus)
    parts = label_corpus(corpus, layout, trained)[language]
    names: list[str] = parts["train"].features["ner_tags"].feature.names
    meta, noisy = _meta_and_noisy(settings, parts["train"], parts["test"], layout, names)
    noisy = _without_twins(noisy, meta)
    noisy = noisy.select(range(min(len(noisy), settings.train_size or len(noisy))))
    if not len(noisy):
        raise ValueError(f"all sentences of {settings.dataset} are among the clean ones: none is left to train")
    if not any(tag for tags in meta["ner_tags"] for tag in tags):
        raise ValueError("the clean sentences have no entity: they would teach the model to say O: give others")
    if seen := overlap(parts["test"], noisy):
        logger.warning("%d test sentences train, too", seen)
    clean = noisy
    if settings.noise_rate:
        clean = well_formed(noisy, names)
        noisy = spoilt(clean, names, settings.noise, settings.noise_rate, np.random.default_rng(seed))
    return TaggedData(
        train=noisy,
        wrong=_differing(clean, noisy) if settings.noise_rate else None,
        meta=meta,
        dev=evaluated_rows(parts["validation"], settings.eval_size, layout) if wants_dev else None,
        test=evaluated_rows(parts["test"], settings.eval_size, layout),
        names=names,
        seen=seen,
    )


def spoilt(rows: Dataset, names: list[str], noise: str, rate: float, generator: np.random.Generator) -> Dataset:
    """The same well-formed sentences, round(rate * n) of their n entities dropped or of another type, whole ones.

    Args:
        names: of the tags, IOB2.
        noise: `drop`, `type`, or `both`: every second of them is dropped.

    Raises:
        ValueError: where there is no other type, or no entity.
    """
    kinds = sorted({name[2:] for name in names if name != OUTSIDE})
    if noise != "drop" and len(kinds) < 2:
        raise ValueError(f"noise {noise}: there is no type but {', '.join(kinds)}: set noise to drop")
    number = {name: place for place, name in enumerate(names)}
    tags = [[names[tag] for tag in row] for row in rows["ner_tags"][:]]
    found = [(row, *mark) for row, words in enumerate(tags) for mark in sorted(entities(words, strict=False))]
    if not found:
        raise ValueError("noise_rate: the noisy sentences have no entity that could be spoilt: give others")
    chosen = generator.permutation(len(found))[: round(rate * len(found))]
    for turn, place in enumerate(chosen):
        row, kind, first, last = found[place]
        others = [one for one in kinds if one != kind]
        dropped = noise == "drop" or (noise == "both" and turn % 2 == 0)
        other = None if dropped else others[generator.integers(len(others))]
        tags[row][first : last + 1] = [
            OUTSIDE if other is None else f"{'B' if word == first else 'I'}-{other}" for word in range(first, last + 1)
        ]
    return _with_tags(rows, [[number[tag] for tag in row] for row in tags])


def well_formed(rows: Dataset, names: list[str]) -> Dataset:
    """The same entities, each begun by B-: one that a stray I- begins would join what is spoilt before it."""
    number = {name: place for place, name in enumerate(names)}
    tags = [TagScheme("iob1").to_iob2([names[tag] for tag in row]) for row in rows["ner_tags"][:]]
    if lacking := sorted({tag for row in tags for tag in row} - set(names)):
        raise ValueError(
            f"noise_rate: the labels lack {', '.join(lacking)}, by which an entity begins: give it to them"
        )
    return _with_tags(rows, [[number[tag] for tag in row] for row in tags])


def _with_tags(rows: Dataset, tags: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"tokens": rows["tokens"][:], "ner_tags": tags}, features=rows.features)


def _differing(right: Dataset, given: Dataset) -> list[list[bool]]:
    pairs = zip(right["ner_tags"][:], given["ner_tags"][:], strict=True)
    return [[here != there for here, there in zip(*pair, strict=True)] for pair in pairs]


def _meta_and_noisy(
    settings: TaggedArguments, train: Dataset, test: Dataset, layout: Layout, names: list[str]
) -> tuple[Dataset, Dataset]:
    """The clean sentences, the user's own or split off from those that are not tested, and all the others."""
    tested = set(map(tuple, test["tokens"]))
    drawn = sample(train, len(train), settings.sample_seed)
    if settings.meta_dataset is None:
        if not settings.noise_rate:
            logger.warning(
                "meta_dataset is not given: %d of the training sentences judge, and their tags are taken for right",
                settings.meta_size,
            )
        size = settings.meta_size
        if size >= len(drawn):
            raise ValueError(
                f"{settings.dataset}: all {len(drawn)} sentences would judge, and none train: lower meta_size, or set "
                "meta_dataset"
            )
        judging = [row for row, words in enumerate(drawn["tokens"][:]) if tuple(words) not in tested][:size]
        if len(judging) < size:
            raise ValueError(
                f"{settings.dataset}: {len(judging)} of {len(drawn)} training sentences are not tested and may judge: "
                f"lower meta_size ({size}), or set meta_dataset"
            )
        return drawn.select(judging), drawn.select(sorted(set(range(len(drawn))) - set(judging)))
    corpus = read_corpus(settings.meta_dataset, [settings.language], ["train"], layout)
    own = label_corpus(corpus, layout, names, settings.dataset)[settings.language]["train"]
    if leaked := overlap(own, test):
        raise ValueError(
            f"meta_dataset: {leaked} sentences of {settings.meta_dataset} are tested, too: take them out of one"
        )
    return sample(own, settings.meta_size, settings.sample_seed, name="meta_dataset"), drawn


def _without_twins(noisy: Dataset, meta: Dataset) -> Dataset:
    """The noisy sentences that are none of the clean ones."""
    held = set(map(tuple, meta["tokens"]))
    kept = [row for row, words in enumerate(noisy["tokens"][:]) if tuple(words) not in held]
    if lost := len(noisy) - len(kept):
        logger.warning("%d noisy sentences are among the clean ones, and are left out", lost)
    return noisy.select(kept)
