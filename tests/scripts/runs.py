"""Tiny runs of the NER scripts: a two-layer model and a handful of sentences of the synthetic family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from metaxl_evo.experiments.run_folder import MARK, OWN_FILES
from metaxl_evo.experiments.task import find_task
from metaxl_evo.ner.synthetic import SyntheticFamily
from metaxl_evo.ner.synthetic_tagger import make_synthetic_tagger
from metaxl_evo.training.trainer import MetaTrainer
from scripts.train_ner import main

FAMILY = SyntheticFamily(train_size=40, target_train_size=16, dev_size=10, test_size=30, words=20, names=20)
LANGUAGES = ("aru", "beru", "celu")
TINY: dict[str, Any] = {
    "source_languages": "aru",
    "target_languages": "beru",
    "max_length": 64,
    "eval_max_length": 64,
    "per_device_train_batch_size": 4,
    "per_device_meta_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "save_strategy": "no",
    "meta_history": "false",
    "use_cpu": "true",
}
OF_A_RUN = (  # files that any leaves
    *("README.md", "config.json", "model.safetensors", "results.json", "training_args.bin"),
    *("history.csv", "history.png", "outcomes.csv", "_run.json"),
)
OF_SEVERAL = ("results.json", "report.md", "report.html", "scores.csv", "differences.csv", "scores.png")
WITH_DEV: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": "true",
    "metric_for_best_model": "f1",
}


def write_data(
    root: Path, languages: Iterable[str] = LANGUAGES, splits: Iterable[str] = ("train", "dev", "test")
) -> Path:
    """The sentences of the family as a folder of `LANGUAGE/SPLIT` files in WikiAnn's format."""
    for language in languages:
        (root / language).mkdir(parents=True)
        for split in splits:
            (root / language / split).write_text(text_of(language, split), encoding="utf-8")
    return root


@cache
def text_of(language: str, split: str) -> str:
    part = FAMILY.load(language)["validation" if split == "dev" else split]
    names = part.features["ner_tags"].feature.names
    return "\n".join(
        "".join(f"{language}:{word}\t{names[tag]}\n" for word, tag in zip(words, tags, strict=True))
        for words, tags in zip(part["tokens"], part["ner_tags"], strict=True)
    )


def write_model(folder: Path, **sizes: Any) -> Path:
    """A model without a trained head (the base model alone) and its tokenizer."""
    tagger, tokenizer = make_synthetic_tagger(FAMILY, **{"hidden_size": 32, "heads": 2, "vocab_size": 400} | sizes)
    tagger.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def argv(settings: Mapping[str, Any]) -> list[str]:
    """`--key value` pairs."""
    return [token for key, value in settings.items() for token in (f"--{key}", str(value))]


def train(model: Path, data: Path, output: Path, *options: str, **settings: Any) -> dict[str, Any]:
    """`train_ner` with the tiny settings, those given over them."""
    places = {"model_name_or_path": model, "dataset": data, "output_dir": output}
    return main([*argv(places | TINY | settings), *options])


def read(folder: Path) -> dict[str, Any]:
    """`results.json`, which is JSON as others read it: without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)


@contextmanager
def cut_off_after(steps: int) -> Iterator[None]:
    """A KeyboardInterrupt in the step after so many."""
    made, step = 0, MetaTrainer.training_step

    def until_interrupted(self: MetaTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        if made > steps:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetaTrainer, "training_step", until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield
    assert made == steps + 1


def keep_checkpoints(folder: Path) -> Path:
    """What a run leaves that does not come to its end."""
    for path in folder.iterdir():
        if not path.name.startswith("checkpoint"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def unnamed(folder: Path, task: str) -> set[str]:
    """What a run has left though its task does not name it: such a file of the user's would be overwritten."""
    return {path.name for path in folder.iterdir()} - {MARK, *OWN_FILES, *find_task(task).own_files}


def weights(folder: Path) -> dict[str, Tensor]:
    """The saved weights of both levels."""
    return load_file(folder / "model.safetensors") | {
        f"rtn.{name}": value for name, value in load_file(folder / "rtn/model.safetensors").items()
    }


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
