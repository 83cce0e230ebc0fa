"""Tiny runs of the NER scripts: a two-layer model and a handful of sentences of the synthetic family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from metaxl_evo.ner.synthetic import SyntheticFamily
from metaxl_evo.ner.synthetic_tagger import make_synthetic_tagger
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
    "disable_tqdm": "true",
}
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
        parts = FAMILY.load(language)
        for split in splits:
            part = parts["validation" if split == "dev" else split]
            names = part.features["ner_tags"].feature.names
            sentences = [
                "".join(f"{language}:{word}\t{names[tag]}\n" for word, tag in zip(words, tags, strict=True))
                for words, tags in zip(part["tokens"], part["ner_tags"], strict=True)
            ]
            (root / language / split).write_text("\n".join(sentences), encoding="utf-8")
    return root


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


def weights(folder: Path) -> dict[str, Tensor]:
    """The saved weights of both levels."""
    return load_file(folder / "model.safetensors") | {
        f"rtn.{name}": value for name, value in load_file(folder / "rtn/model.safetensors").items()
    }


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
