"""A small XLM-R tagger, random token rows and trainers around them; nothing is downloaded, everything is seeded."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification

from metaxl_evo.bilevel import Hypergradient, Tree, tree
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.ner.source_weights import SourceWeights
from metaxl_evo.ner.tagger import IGNORED, TARGET, CrossLingualTagger
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.callbacks import MetaCallback
from metaxl_evo.training.checkpoint import MANIFEST, seal
from metaxl_evo.training.trainer import MetaTrainer

PAD, VOCABULARY, LABELS, HIDDEN, LAYERS = 1, 100, 5, 32, 2
ESTIMATES: dict[str, dict[str, Any]] = {
    "double_backward": {"estimator": "one_step", "estimator_kwargs": {"engine": "double_backward"}},
    "jvp": {"estimator": "one_step", "estimator_kwargs": {"engine": "jvp"}},
    "finite_difference": {
        "estimator": "one_step",
        "estimator_kwargs": {"engine": "finite_difference", "radius": 1e-4},
    },
    "evograd": {"estimator": "evograd", "estimator_kwargs": {"sigma": 0.05, "copies": 3}},
    "evograd_head": {
        "estimator": "evograd",
        "estimator_kwargs": {"sigma": 0.05, "copies": 3, "parameters": "^classifier"},
    },
}
ORDERS = ("after_step", "lookahead")


def tiny_base(dtype: torch.dtype = torch.float32, **fields: Any) -> XLMRobertaForTokenClassification:
    """A two-layer XLM-R token classifier; dropout 0.1 unless told otherwise."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
        "initializer_range": 0.2,
        "num_labels": LABELS,
        "pad_token_id": PAD,
    }
    return XLMRobertaForTokenClassification(XLMRobertaConfig(**settings | fields)).to(dtype)


SHALLOW = {"num_hidden_layers": 1}  # costs half, where the layers above the network are beside the point
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tiny_tagger(
    dtype: torch.dtype = torch.float32,
    *,
    dropout: bool = True,
    layers: Sequence[int] = (1,),
    languages: Sequence[str] = ("source",),
    kind: str = "gated_tied",
    base: dict[str, Any] | None = None,
    reads: str | None = None,
    proportions: Sequence[float] | None = None,
    **settings: Any,
) -> CrossLingualTagger:
    """With `reads` its source rows have learned weights: those of the languages, or of a small network."""
    model = tiny_base(dtype, **({} if dropout else NO_DROPOUT), **(base or {}))
    torch.manual_seed(1)
    rtn = RepresentationTransform(HIDDEN, layers=layers, languages=languages, kind=kind).to(dtype)
    for name, parameter in rtn.named_parameters():
        # biases and mixing logits start at 0, where their effects would hide
        if name.endswith("bias") or name == "mixing_logits":
            torch.nn.init.normal_(parameter, std=0.3)
    if reads is not None:
        table = reads == "language"
        weigher = WeightTable(len(languages), "softmax") if table else WeightNet(5, 1 if reads == "loss" else HIDDEN)
        for parameter in weigher.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        count = len(languages)
        shares = [2 * (number + 1) / count / (count + 1) for number in range(count)]
        weights = SourceWeights(reads, shares, proportions)
        settings = {"weigher": weigher.to(dtype), "source_weights": weights, "languages": languages} | settings
    return CrossLingualTagger(model, rtn, pad_token_id=PAD, **settings)


def random_rows(count: int, *, seed: int, language: int | Sequence[int] | None = TARGET, length: int = 9) -> Dataset:
    """Rows of different lengths with different numbers of labelled tokens; `language=None` leaves the column out."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        size = int(torch.randint(4, length + 1, (), generator=generator))
        ids = torch.randint(5, VOCABULARY, (size,), generator=generator)
        labels = torch.randint(0, LABELS, (size,), generator=generator)
        labels[torch.rand(size, generator=generator) < 0.3] = IGNORED
        labels[0], labels[1] = IGNORED, index % LABELS
        row = {"input_ids": ids.tolist(), "attention_mask": [1] * size, "labels": labels.tolist()}
        if language is not None:
            row["language"] = language if isinstance(language, int) else language[index % len(language)]
        rows.append(row)
    return Dataset.from_list(rows)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows padded to the longest of them."""
    length = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORED}
    batch = {
        key: torch.tensor([list(row[key]) + [fill] * (length - len(row[key])) for row in rows])
        for key, fill in padding.items()
    }
    if "language" in rows[0]:
        batch["language"] = torch.tensor([row["language"] for row in rows])
    return batch


def stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of tensors of equal shapes as one batch."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def tiny_arguments(folder: Path | str, **fields: Any) -> MetaTrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_meta_batch_size": 4,
        "meta_portion": 0.5,
        "meta_history": False,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return MetaTrainingArguments(**settings | fields)


def tiny_trainer(
    folder: Path | str,
    *,
    tagger: CrossLingualTagger | None = None,
    train: Dataset | None = None,
    meta: Dataset | None = None,
    trainer_class: type[MetaTrainer] = MetaTrainer,
    trainer: dict[str, Any] | None = None,
    **fields: Any,
) -> MetaTrainer:
    """A MetaTrainer on source rows, with target rows as meta rows unless `meta_rows=None` is among `trainer`."""
    return trainer_class(
        tiny_tagger() if tagger is None else tagger,
        tiny_arguments(folder, **fields),
        train_dataset=random_rows(24, seed=1, language=0) if train is None else train,
        **{
            "meta_dataset": random_rows(12, seed=2) if meta is None else meta,
            "data_collator": collate,
            **(trainer or {}),
        },
    )


class Hypergradients(MetaCallback):
    """Keeps every hypergradient of a run."""

    def __init__(self) -> None:
        self.results: list[Hypergradient] = []

    def on_meta_step(
        self, args: Any, state: Any, control: Any, hypergradient: Hypergradient, *rest: Any, **kw: Any
    ) -> None:
        self.results.append(replace(hypergradient, grads=tree.clone(hypergradient.grads)))

    @property
    def grads(self) -> list[Tree]:
        return [result.grads for result in self.results]


def base_weights(trainer: MetaTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.base.named_parameters()}


def meta_weights(trainer: MetaTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.meta.named_parameters()}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not bitwise equal."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested containers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(a == b)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Every entry within `rtol` of the tree's largest, which must not be zero."""
    assert found.keys() == expected.keys()
    scale = max(float(leaf.abs().max()) for leaf in expected.values())
    assert scale > 0
    for name, leaf in expected.items():
        torch.testing.assert_close(
            found[name], leaf, rtol=0.0, atol=rtol * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def minus(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """The differences, by name."""
    return {name: a[name] - b[name] for name in a}


def final_state(trainer: Any) -> dict[str, Any]:
    """Everything that a resumed run has to share with one that was not cut off."""
    return {
        "base": base_weights(trainer),
        "meta": meta_weights(trainer),
        "optimizer": trainer.optimizer.state_dict(),
        "meta optimizer": None if trainer.meta_optimizer is None else trainer.meta_optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "meta scheduler": None if trainer.meta_scheduler is None else trainer.meta_scheduler.state_dict(),
        "rows": trainer.meta_rows.state_dict() if trainer.meta_rows is not None else None,
        "episodes": None if trainer.meta_level is None else trainer.meta_level.episodes.state_dict(),
        "skipped": trainer.skipped_meta_steps,
        "random": [torch.random.get_rng_state(), np.random.get_state(), random.getstate()],  # noqa: NPY002
    }


def reseal(checkpoint: Path) -> None:
    """A manifest of the files as they are now, for checkpoints that were altered by hand."""
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    seal(checkpoint, manifest["made_by"], manifest["processes"])
