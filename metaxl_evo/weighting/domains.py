"""Texts of several domains that train, and texts of a target domain that judge and test."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets

from metaxl_evo.messages import unknown
from metaxl_evo.weighting.arguments import TextArguments, WeigherArguments
from metaxl_evo.weighting.drawn import DOMAINS, SYNTHETIC, draw_documents
from metaxl_evo.weighting.sft import as_texts, format_of, require_trl
from metaxl_evo.weighting.sources import READERS, read_file, read_parts

logger = logging.getLogger(__name__)

DRAWN_TEXTS = 400  # a domain
SHUFFLED = "shuffled"
DATA_FORMATS = ("text", "sft")


@dataclass
class DomainArguments(TextArguments, WeigherArguments):
    """Which domains train, and which one is the target.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    data: str = field(
        default=SYNTHETIC,
        metadata={
            "help": "A folder with a file a domain (DOMAIN.txt, .jsonl, .csv, ...), a file or Hub id with a "
            "domain_column, or `synthetic`: drawn."
        },
    )
    data_format: str = field(
        default="text",
        metadata={
            "help": "text: text_column as it is; sft: messages, or prompt and completion, as trl (extra) reads them; "
            "the loss is then that of the completion."
        },
    )
    domain_column: str | None = field(default=None, metadata={"help": "Column of a text's domain."})
    domains: list[str] | None = field(
        default=None, metadata={"help": "Those that train (default: all but the target)."}
    )
    target: str = field(default=DOMAINS[0], metadata={"help": "The domain whose texts judge and test."})
    shuffle: str | None = field(
        default=None,
        metadata={"help": "Add the domain `shuffled`: the texts of this one, the words of each in no order."},
    )
    train_size: int | None = field(default=None, metadata={"help": "Texts of a domain at most, the first ones."})
    meta_size: int = field(default=100, metadata={"help": "Texts of the target that judge: its first ones."})
    test_size: int = field(default=200, metadata={"help": "Texts of the target that test: its last ones."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weigher()
        for name in ("train_size", "meta_size", "test_size"):
            self.require_count(name, getattr(self, name))
        self.require_known("data_format", self.data_format, DATA_FORMATS)
        if self.data_format == "sft" and (self.data == SYNTHETIC or self.shuffle is not None):
            raise ValueError("data_format: the drawn texts, and those of shuffle, are plain: leave sft out")
        if self.shuffle is not None and self.shuffle == self.target:
            raise ValueError("shuffle: the target's texts judge and test, and would train: name another domain")
        for name in self.domains or ():
            if self.domains is not None and self.domains.count(name) > 1:
                raise ValueError(f"domains: {name} is named twice: name it once")


@dataclass(frozen=True, eq=False)
class DomainData:
    """Texts by their domain; `meta` and `test` are of the target, and train nothing. Rows for trl are `as_texts`.

    Args:
        train: column `text`, and `number`, that of the domain.
        sizes: domain -> its training texts, in the order of their numbers.
    """

    train: Dataset
    meta: Dataset
    test: Dataset
    sizes: dict[str, int]


def load_domains(settings: DomainArguments) -> DomainData:
    """Read and split the texts: of the target the first judge, the last test, and what is between may train.

    Raises:
        ValueError: one line for domains that there are not, or too few texts.
    """
    if settings.data_format == "sft":
        require_trl()
    found = _with_shuffled(_by_domain(settings), settings)
    wanted = settings.domains or [name for name in found if name != settings.target]
    for name in (*wanted, settings.target):
        if name not in found:
            raise ValueError(f"{settings.data}: {unknown('domain', name, found)}")
    if len(wanted) < 2:
        raise ValueError(f"a mixture needs two domains that train, here are {', '.join(wanted) or 'none'}: name more")
    texts = found[settings.target]
    needed = settings.meta_size + settings.test_size
    if len(texts) < needed:
        raise ValueError(
            f"the target {settings.target} has {len(texts)} texts, {needed} are to judge and test: lower meta_size or "
            "test_size"
        )
    meta, test = texts[: settings.meta_size], texts[-settings.test_size :]
    own = {**found, settings.target: texts[settings.meta_size : -settings.test_size]}
    sources = _apart({name: own[name] for name in wanted}, meta, test)
    parts = [_numbered(texts[: settings.train_size], number) for number, texts in enumerate(sources.values())]
    return DomainData(
        train=concatenate_datasets(parts),
        meta=_numbered(meta, 0),
        test=_numbered([one for one in test if one not in set(meta)], 0),
        sizes={name: len(part) for name, part in zip(sources, parts, strict=True)},
    )


def _apart(sources: Mapping[str, Sequence[str]], meta: Sequence[str], test: Sequence[str]) -> dict[str, list[str]]:
    """The texts of each domain that neither judge nor test."""
    held = {*meta, *test}
    kept = {name: [text for text in texts if text not in held] for name, texts in sources.items()}
    for name, texts in kept.items():
        if lost := len(sources[name]) - len(texts):
            logger.warning("domain %s: %d texts judge or test, too, and do not train", name, lost)
        if len(texts) < 2:
            raise ValueError(f"domain {name} has {len(texts)} texts that train: leave it out, or give more")
    return kept


def _by_domain(settings: DomainArguments) -> dict[str, list[str]]:
    """Domain -> its texts."""
    place = Path(settings.data).expanduser()
    if settings.data == SYNTHETIC:
        return {name: draw_documents(name, DRAWN_TEXTS, 0)["text"][:] for name in DOMAINS}
    if place.is_dir() and settings.domain_column is None:
        files = {file.stem: file for file in sorted(place.iterdir()) if file.suffix in READERS}
        return {name: _texts(read_file(file), settings, str(file)) for name, file in files.items()}
    if settings.domain_column is None:
        raise ValueError(f"domain_column: {settings.data} is no folder with a file a domain: name the column")
    rows = read_parts(settings.data, ("train",), settings.data_configuration)["train"]
    texts = _texts(rows, settings, settings.data, settings.domain_column)
    found: dict[str, list[str]] = {}
    for name, text in zip(rows[settings.domain_column], texts, strict=True):
        found.setdefault(str(name), []).append(text)
    return found


def _with_shuffled(found: dict[str, list[str]], settings: DomainArguments) -> dict[str, list[str]]:
    """With a copy of a domain that has its words and nothing of their order; the same on each call."""
    name = settings.shuffle
    if name is None:
        return found
    if name not in found:
        raise ValueError(f"shuffle: {unknown('domain', name, found)}")
    if SHUFFLED in found:
        raise ValueError(f"shuffle: {settings.data} has a domain {SHUFFLED} of its own: leave shuffle out")
    generator = np.random.default_rng(23)
    return {**found, SHUFFLED: [" ".join(generator.permutation(text.split())) for text in found[name]]}


def _texts(rows: Dataset, settings: DomainArguments, where: str, *others: str) -> list[str]:
    sft = format_of(rows.column_names)
    for name in (*others, *([] if settings.data_format == "sft" else [settings.text_column])):
        if name not in rows.column_names:
            advice = ", or set data_format: sft" if sft and name not in others else ""
            raise ValueError(f"{where}: {unknown('column', name, rows.column_names)}{advice}")
    if settings.data_format == "sft":
        if sft is None:
            raise ValueError(f"{where} has neither messages nor prompt and completion: set data_format: text")
        return as_texts(rows, sft)
    texts: list[str] = rows[settings.text_column][:]
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: row {number} has no text: leave it out")
    return texts


def _numbered(texts: Sequence[str], number: int) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "number": [number] * len(texts)})
