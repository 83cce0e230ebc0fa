"""The sentences of one run: source languages, one target, dev and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from metaxl_evo.ner.arguments import SHUFFLED, TaggingArguments
from metaxl_evo.ner.data import (
    evaluated_rows,
    label_corpus,
    overlap,
    read_corpus,
    require_types,
    sample,
    shuffled_labels,
)
from metaxl_evo.ner.pretrained import head_of, trained_labels
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.meta_rows import MetaRows


@dataclass
class TargetData:
    """The sentences of one run; the sources count the steps also where a method does not train on them."""

    sources: dict[str, Dataset]
    target: Dataset | None
    dev: Dataset | None
    test: Dataset
    names: list[str]
    overlap: int


def load_for_model(ner: TaggingArguments, target: str, label_names: Sequence[str] | None) -> TargetData:
    """As `load_target`, with the labels of the model's trained head where it has one that is to stay.

    Raises:
        ValueError: for languages, splits or labels that are not there.
    """
    trained = trained_labels(ner.model_name_or_path, head_of(ner.scorer), trust_remote_code=ner.trust_remote_code)
    if trained is None or not ner.ignore_mismatched_sizes:
        return load_target(ner, target, trained, label_names)
    data = load_target(ner, target, None, label_names)
    return load_target(ner, target, trained, label_names) if set(data.names) <= set(trained) else data


def load_target(
    ner: TaggingArguments, target: str, names: Sequence[str] | None = None, label_names: Sequence[str] | None = None
) -> TargetData:
    """Source, target and evaluation sentences of one run, all with one label set: `names`, or that of the data.

    `label_names` are those of integer tags.

    Raises:
        ValueError: for languages, splits or labels that are not there.
    """
    recipe, sources, layout = ner.recipe, ner.source_languages, ner.layout(label_names)
    wants_dev = ner.select == "dev"
    target_splits = ["train"] * recipe.target + ["validation"] * (wants_dev and recipe.target) + ["test"]
    source_splits = ["train"] + ["validation"] * (wants_dev and not recipe.target)
    source_corpus = read_corpus(ner.dataset, sources, source_splits, layout)
    target_corpus = read_corpus(ner.dataset, [target], target_splits, layout)
    require_types(layout, {**source_corpus, **target_corpus})
    loaded = label_corpus(source_corpus, layout, names)
    names_of = "the model" if names is not None else sources[0]
    names = names or loaded[sources[0]]["train"].features["ner_tags"].feature.names
    of_target = label_corpus(target_corpus, layout, names, names_of)[target]
    train = sample(of_target["train"], ner.target_train_size, ner.sample_seed, name=target) if recipe.target else None
    dev = None
    if wants_dev:  # a zero-shot run knows no target labels, not even for choosing a checkpoint
        dev = of_target["validation"] if recipe.target else loaded[sources[0]]["validation"]
    samples = {one: sample(loaded[one]["train"], ner.train_size, ner.sample_seed, name=one) for one in sources}
    if ner.shuffle is not None:
        samples[SHUFFLED] = shuffled_labels(samples[ner.shuffle], ner.sample_seed)
    return TargetData(
        sources=samples,
        target=train,
        dev=None if dev is None else evaluated_rows(dev, ner.eval_size, layout),
        test=evaluated_rows(of_target["test"], ner.eval_size, layout),
        names=of_target["test"].features["ner_tags"].feature.names,
        overlap=0 if train is None else overlap(train, of_target["test"]),
    )


def require_enough(ner: TaggingArguments, args: MetaTrainingArguments, target: str, data: TargetData) -> None:
    """Every target has the sentences for one step, known before the first one is trained.

    Raises:
        ValueError: naming the target, how many it has and how many a step needs.
    """
    if data.target is None or not ner.recipe.source:
        return
    portion = 0.0 if ner.recipe.all_target_rows else args.meta_portion
    rows = args.per_device_meta_batch_size * args.world_size
    try:
        MetaRows(data.target, rows, portion=portion, seed=0)
    except ValueError as error:
        raise ValueError(f"target {target}: {error}: raise target_train_size or per_device_meta_batch_size") from error
