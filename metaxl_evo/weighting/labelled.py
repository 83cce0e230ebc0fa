"""Labelled texts of which some labels are wrong, and clean ones apart from them that judge."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset

from metaxl_evo.messages import unknown
from metaxl_evo.training.values import evenly
from metaxl_evo.weighting.arguments import TextArguments, WeigherArguments
from metaxl_evo.weighting.sources import read_parts

logger = logging.getLogger(__name__)

NOISES = ("uniform", "pairwise")
SHOWN = 3  # names in a message


@dataclass
class LabelledArguments(TextArguments, WeigherArguments):
    """Which texts train, which judge, and how labels are spoilt for an experiment.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    meta_data: str | None = field(
        default=None,
        metadata={"help": "A file, folder or Hub id whose part `train` is the clean set (default: split off)."},
    )
    meta_size: int = field(
        default=100, metadata={"help": "Clean texts split off where meta_data is not given, equally many a class."}
    )
    id_column: str | None = field(default=None, metadata={"help": "Column that names a text (default: its row)."})
    true_label_column: str | None = field(
        default=None, metadata={"help": "Column of right labels beside the noisy ones of the training texts."}
    )
    feature_columns: list[str] | None = field(
        default=None, metadata={"help": "Numeric columns that weigher: columns reads."}
    )
    domain_column: str | None = field(
        default=None, metadata={"help": "Column of a text's source or domain, which weigher: domain reads."}
    )
    noise: str = field(default="uniform", metadata={"help": f"One of {', '.join(NOISES)}: drawn for an experiment."})
    noise_rate: float = field(
        default=0.0,
        metadata={
            "help": "Probability that a training label becomes another class: any, or with pairwise the next one."
        },
    )
    train_size: int | None = field(default=None, metadata={"help": "Training texts at most, the first ones."})
    eval_size: int | None = field(default=None, metadata={"help": "Validation and test texts at most."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weigher()
        self.require_known("noise", self.noise, NOISES)
        for name in ("meta_size", "train_size", "eval_size"):
            self.require_count(name, getattr(self, name))
        if not 0 <= self.noise_rate < 1:
            raise ValueError(f"noise_rate must be at least 0 and below 1, not {self.noise_rate}")
        if self.noise_rate and self.true_label_column:
            raise ValueError("true_label_column: the labels are noisy already: set noise_rate to 0")

    @property
    def columns(self) -> dict[str, str]:
        """The name of a column here -> its name in the data."""
        named = {"text": self.text_column, "label": self.label_column}
        return named if self.id_column is None else {**named, "id": self.id_column}


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Columns `id`, `text`, `label` (a number), and of `train` `features` and `domain` where they are asked for.

    Args:
        true_labels: (N,) of `train`; None where nobody knows them.
        names: of the labels.
    """

    train: Dataset
    true_labels: np.ndarray | None
    meta: Dataset
    test: Dataset
    validation: Dataset | None
    names: list[str]

    @property
    def domains(self) -> list[str]:
        """The names of the domains that train, sorted."""
        return sorted(set(self.train["domain"])) if "domain" in self.train.column_names else []

    @property
    def wrong(self) -> np.ndarray | None:
        """(N,) which train labels are wrong."""
        return None if self.true_labels is None else np.asarray(self.train["label"]) != self.true_labels


def load_labelled(settings: LabelledArguments, seed: int, trained: Sequence[str] | None = None) -> LabelledData:
    """Read, split and spoil the texts.

    Args:
        seed: of the split and the draws.
        trained: the labels of the model's head, whose order is kept.

    Raises:
        ValueError: one line for data that cannot serve.
    """
    parts = read_parts(settings.data, ("train", "validation", "test"), settings.data_configuration)
    for split in ("train", "test"):
        if split not in parts:
            raise ValueError(f"{settings.data} has no part {split}: give a folder, or a Hub id, with train and test")
    columns = [one for one in (settings.label_column, settings.true_label_column) if one is not None]
    names = label_names(parts["train"], columns, settings.data, trained)
    tables = {
        split: _table(rows, settings, f"{settings.data}, {split}", names, of_train=split == "train")
        for split, rows in parts.items()
    }
    generator = np.random.default_rng(seed)
    train, meta = _train_and_meta(settings, tables["train"], names, generator)
    train = train.iloc[: settings.train_size]
    _refuse_unfit(train, meta, tables, names)
    if settings.domain_column is not None:
        _refuse_small_domains(train["domain"])
    labels, known = train["true_label"].to_numpy(), settings.noise_rate > 0 or settings.true_label_column is not None
    if settings.noise_rate:
        train = train.assign(label=spoilt(labels, settings.noise, settings.noise_rate, len(names), generator))
    for split in (one for one in tables if one != "train"):
        _tell_unfit(split, tables[split], train, names)
    validation = _scored(tables["validation"], settings) if "validation" in tables else None
    return LabelledData(
        train=_dataset(train),
        true_labels=labels if known else None,
        meta=_dataset(meta),
        test=_dataset(_scored(tables["test"], settings)),
        validation=None if validation is None else _dataset(validation),
        names=names,
    )


def _scored(table: pd.DataFrame, settings: LabelledArguments) -> pd.DataFrame:
    return table.iloc[evenly(len(table), settings.eval_size)]


def spoilt(labels: np.ndarray, noise: str, rate: float, classes: int, generator: np.random.Generator) -> np.ndarray:
    """Each label with probability `rate` becomes another class: any other alike, or `pairwise` the next one; (N,)."""
    shift = generator.integers(1, classes, len(labels)) if noise == "uniform" else 1
    return np.where(generator.random(len(labels)) < rate, (labels + shift) % classes, labels)


def label_names(rows: Dataset, columns: Sequence[str], where: str, trained: Sequence[str] | None = None) -> list[str]:
    """The labels' names in these columns, in the order of the model's head where it has just these.

    Raises:
        ValueError: for columns that are not there or hold other than names and integers, and for a single label.
    """
    require_columns(rows, columns, where)
    feature, values = rows.features[columns[0]], {value for name in columns for value in rows[name][:]}
    if any(value is None or isinstance(value, float) for value in values):
        raise ValueError(f"{where}: {' and '.join(columns)} must hold names or integers, one a text")
    names = list(feature.names) if isinstance(feature, ClassLabel) else list(map(str, sorted(values)))
    if len(names) < 2:
        raise ValueError(f"{where}: all labels are {', '.join(names)}: there is nothing to tell apart")
    return list(trained) if trained is not None and set(trained) == set(names) else names


def _table(
    rows: Dataset, settings: LabelledArguments, where: str, names: Sequence[str], *, of_train: bool = False
) -> pd.DataFrame:
    """Columns id, text, label, true_label; of training texts by the user's ids, and with their features."""
    true = settings.true_label_column if of_train else None
    extra = (settings.feature_columns or []) if of_train else []
    domain = settings.domain_column if of_train else None
    columns = settings.columns if of_train else {key: settings.columns[key] for key in ("text", "label")}
    require_columns(rows, [*columns.values(), *extra, *filter(None, (true, domain))], where)
    made = pd.DataFrame({"id": np.arange(len(rows))} | {key: rows[name][:] for key, name in columns.items()})
    require_texts(made["text"], made["id"], where)
    if (unnamed := [value is None or value == "" for value in made["id"]]) and any(unnamed):
        raise ValueError(f"{where}: {sum(unnamed)} texts have no {settings.id_column}: name each text once")
    if made["id"].duplicated(keep=False).any():
        twice = made["id"][made["id"].duplicated()]
        raise ValueError(f"{where}: {len(twice)} ids are there twice, such as {_shown(twice)}: name each text once")
    made["label"] = label_numbers(rows, settings.label_column, names, where)
    made["true_label"] = made["label"] if true is None else label_numbers(rows, true, names, where)
    if domain is not None:
        missing = [value is None or value == "" for value in rows[domain]]
        if any(missing):
            which = _shown(made["id"][missing])
            raise ValueError(
                f"{where}: {sum(missing)} texts have no {domain}, such as {which}: name it, or leave them out"
            )
        made["domain"] = list(map(str, rows[domain]))
    if extra:
        made["features"] = list(_features(rows, extra, where))
    return made


def require_texts(texts: pd.Series, ids: pd.Series, where: str) -> None:
    """Refuse rows without a text, by their ids."""
    unread = [not isinstance(text, str) or not text.strip() for text in texts]
    if any(unread):
        raise ValueError(f"{where}: {sum(unread)} rows have no text, such as {_shown(ids[unread])}: leave them out")


def label_numbers(rows: Dataset, column: str, names: Sequence[str], where: str) -> list[int]:
    """The number of each row's label among the names.

    Raises:
        ValueError: for a label that has no name.
    """
    feature, known = rows.features[column], {name: number for number, name in enumerate(names)}
    values = rows[column][:]
    read = [feature.names[value] if isinstance(feature, ClassLabel) else str(value) for value in values]
    for name in read:
        if name not in known:
            raise ValueError(f"{where}: {unknown(f'label of {column}', name, names)}")
    return [known[name] for name in read]


def _features(rows: Dataset, columns: Sequence[str], where: str) -> np.ndarray:
    """(N, F) float32."""
    try:
        found = np.stack([np.asarray(rows[name][:], np.float32) for name in columns], axis=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: feature_columns {', '.join(columns)} must hold numbers") from error
    for name, values in zip(columns, found.T, strict=True):
        if not np.isfinite(values).all() or not 0.01 <= values.std() <= 100:
            raise ValueError(
                f"{where}: the feature column {name} must be finite and spread by about 1, its deviation is "
                f"{values.std():.3g}: scale it (mean 0, deviation 1)"
            )
    return found


def _train_and_meta(
    settings: LabelledArguments, train: pd.DataFrame, names: Sequence[str], generator: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The training texts, and the clean ones: the user's own, or split off with their right labels."""
    if settings.meta_data is not None:
        rows = read_parts(settings.meta_data, ("train",), settings.data_configuration)
        if "train" not in rows:
            raise ValueError(f"meta_data: {settings.meta_data} has no part train")
        own = _table(rows["train"], settings, settings.meta_data, names)
        twins = _bare(train).isin(_bare(own))
        if twins.any():
            raise ValueError(
                f"meta_data overlaps the training texts: {twins.sum()} of them are in {settings.meta_data}: take "
                f"them out of one (ids {_shown(train['id'][twins])})"
            )
        return train, own
    if not settings.noise_rate and settings.true_label_column is None:
        logger.warning(
            "meta_data is not given: %d of the training texts judge, and their labels are taken for right",
            settings.meta_size,
        )
    chosen = _balanced(train["true_label"].to_numpy(), len(names), settings.meta_size, generator)
    meta, rest = train.iloc[chosen], train.drop(train.index[chosen])
    twins = _bare(rest).isin(_bare(meta))
    if twins.any():
        logger.warning("%d training texts equal one of the clean set and are left out", twins.sum())
    return rest[~twins], meta.assign(label=meta["true_label"])


def _balanced(labels: np.ndarray, classes: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """(size,) sorted places, equally many of each class."""
    each, rest = divmod(size, classes)
    if rest or not each:
        raise ValueError(f"meta_size must be a multiple of the {classes} classes, not {size}: so it balances")
    members = [np.flatnonzero(labels == label) for label in range(classes)]
    if min(map(len, members)) <= each:
        raise ValueError(f"meta_size {size} needs {each + 1} texts of each class, one has {min(map(len, members))}")
    return np.sort(np.concatenate([generator.choice(one, each, replace=False) for one in members]))


def _refuse_unfit(
    train: pd.DataFrame, meta: pd.DataFrame, tables: Mapping[str, pd.DataFrame], names: Sequence[str]
) -> None:
    if missing := [name for number, name in enumerate(names) if number not in set(train["true_label"])]:
        raise ValueError(
            f"none of the {len(train)} training texts is of class {missing[0]}: shuffle the file, if "
            "train_size took its first ones, or leave the class out of the data"
        )
    if meta["label"].nunique() < 2:
        raise ValueError(
            f"the clean set has one class only, {names[meta['label'].iloc[0]]}: it would teach the model to say "
            "nothing else: give examples of each"
        )
    for split in (one for one in tables if one != "train"):
        leaked = _bare(meta).isin(_bare(tables[split]))
        if leaked.any():
            raise ValueError(
                f"the clean set overlaps the {split} texts: {leaked.sum()} are in both: take them out of one"
            )


def _tell_unfit(split: str, scored: pd.DataFrame, train: pd.DataFrame, names: Sequence[str]) -> None:
    """Warn of texts to be scored that are trained on, and of one class only."""
    if (seen := _bare(scored).isin(_bare(train))).any():
        logger.warning("%d %s texts are trained on, too", seen.sum(), split)
    if scored["label"].nunique() < 2:
        only = names[scored["label"].iloc[0]]
        logger.warning("all %s texts are %s: a model that says nothing else has an accuracy of 1", split, only)


def _bare(table: pd.DataFrame) -> pd.Series:
    """The texts as most tokenizers see them: white space apart."""
    return table["text"].str.split().str.join(" ")


def _refuse_small_domains(domains: pd.Series) -> None:
    counts = domains.value_counts()
    if len(counts) < 2:
        raise ValueError(f"domain_column: all texts that train are of {counts.index[0]}: there is nothing to weigh")
    if counts.min() < 2:
        raise ValueError(f"domain {counts.index[-1]} has 1 text that trains: leave it out, or give more")


def require_columns(rows: Dataset, names: Sequence[str], where: str) -> None:
    """Refuse a table without these columns."""
    for name in names:
        if name not in rows.column_names:
            raise ValueError(f"{where}: {unknown('column', name, rows.column_names)}")


def _shown(names: pd.Series) -> str:
    return ", ".join(map(str, names.iloc[:SHOWN]))


def _dataset(table: pd.DataFrame) -> Dataset:
    return Dataset.from_pandas(table.drop(columns="true_label"), preserve_index=False)
