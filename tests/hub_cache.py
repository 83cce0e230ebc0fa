"""What the Hub leaves on disk, made without it: a Hugging Face home with prepared data sets and model snapshots."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import ClassLabel, Features, Image, List, Value
from datasets.arrow_writer import ArrowWriter
from datasets.info import DatasetInfo
from datasets.splits import SplitDict, SplitInfo
from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]  # in the order of unimelb-nlp/wikiann
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Sentence = tuple[Sequence[str], Sequence[int]]
TWO_WORDS: Mapping[str, Sequence[Sentence]] = {split: [((split, "Lima"), (0, 5))] for split in ("train", "validation")}


def run_in_home(
    command: Sequence[str], home: Path, *, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with an own, offline Hugging Face home, whose place is read when the libraries are imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = inherited | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def run_python(code: str, home: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code that must succeed with an own Hugging Face home."""
    finished = run_in_home([sys.executable, "-c", code, *argv], home, **environment)
    assert finished.returncode == 0, finished.stderr
    return finished


def prepare_dataset_cache(
    home: Path, languages: Sequence[str], splits: Mapping[str, Sequence[Sentence]] = TWO_WORDS
) -> None:
    """What `load_dataset("unimelb-nlp/wikiann", language)` leaves in the cache; tags are indices of NAMES."""
    features = Features(
        {
            "tokens": List(Value("string")),
            "ner_tags": List(ClassLabel(names=NAMES)),
            "langs": List(Value("string")),
        }
    )
    for language in languages:
        rows = {
            split: [
                {"tokens": list(tokens), "ner_tags": list(tags), "langs": [language] * len(tokens)}
                for tokens, tags in sentences
            ]
            for split, sentences in splits.items()
        }
        prepare_cache(home, "unimelb-nlp/wikiann", language, features, rows)


def prepare_image_cache(
    home: Path,
    dataset: str,
    configuration: str,
    columns: Mapping[str, Sequence[str] | None],
    splits: Mapping[str, Sequence[Sequence[object]]],
) -> None:
    """What `load_dataset(dataset)` leaves of a data set of images.

    Args:
        columns: in their order, with the names of the classes; None for the images.
        splits: their rows, images as PIL has them.
    """
    features = Features(
        {name: Image() if names is None else ClassLabel(names=names) for name, names in columns.items()}
    )
    rows = {split: [dict(zip(columns, row, strict=True)) for row in held] for split, held in splits.items()}
    prepare_cache(home, dataset, configuration, features, rows)


def prepare_cache(
    home: Path,
    dataset: str,
    configuration: str,
    features: Features,
    splits: Mapping[str, Sequence[Mapping[str, object]]],
) -> None:
    """What `load_dataset(dataset, configuration)` leaves of any data set: the rows of its splits."""
    name = dataset.rpartition("/")[2]
    folder = home / "datasets" / dataset.replace("/", "___") / configuration / "0.0.0" / "0123456789abcdef"
    folder.mkdir(parents=True)
    written = SplitDict()
    for split, rows in splits.items():
        with ArrowWriter(path=str(folder / f"{name}-{split}.arrow"), features=features) as writer:
            for row in rows:
                writer.write(features.encode_example(row))
            n_examples, n_bytes = writer.finalize()
        written.add(SplitInfo(split, num_bytes=n_bytes, num_examples=n_examples, dataset_name=name))
    DatasetInfo(
        features=features,
        builder_name="parquet",
        dataset_name=name,
        config_name=configuration,
        version="0.0.0",
        splits=written,
    ).write_to_directory(str(folder))


def prepare_model_cache(home: Path, model_id: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """What downloading a model leaves in the cache; returns its snapshot folder."""
    repository = home / "hub" / f"models--{model_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    model.save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT, encoding="utf-8")
    return snapshot
