"""Operators that a whole step launches, beside a plain one: on a GPU a small step is as long as its launches."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import default_collate
from transformers import AutoModelForTokenClassification, TrainerCallback

from tests.processes import on_processes

STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "one_step, jvp": ("one_step", {"engine": "jvp"}),
    "one_step, finite_difference": ("one_step", {"engine": "finite_difference"}),
    "one_step, one-sided": ("one_step", {"engine": "finite_difference", "differences": "one_sided"}),
    "one_step, double_backward": ("one_step", {"engine": "double_backward"}),
    "sama": ("sama", {}),
    "evograd, head, 2 copies": ("evograd", {"copies": 2, "parameters": "^classifier"}),
    "evograd, head, 64 copies": ("evograd", {"copies": 64, "parameters": "^classifier"}),
    "evograd, 2 copies": ("evograd", {"copies": 2}),
    "evograd, 2 copies, normals": ("evograd", {"copies": 2, "noise": "gaussian"}),
    "evograd, 64 copies": ("evograd", {"copies": 64}),
}
BARS: dict[str, dict[str, tuple[float, int]]] = {  # launches, times the plain step's; waits of the host, above its
    "tagger": {
        "one_step, jvp": (3.97, 9),
        "one_step, finite_difference": (3.28, 11),
        "one_step, double_backward": (5.68, 9),
        "sama": (3.28, 11),
        "evograd, head, 2 copies": (1.94, 5),
        "evograd, head, 64 copies": (1.94, 5),
        "evograd, 2 copies": (3.09, 6),
        "evograd, 2 copies, normals": (3.29, 6),
    },
    "weight net": {
        "one_step, jvp": (3.72, 2),
        "one_step, finite_difference": (3.16, 2),
        "one_step, one-sided": (2.72, 2),
        "one_step, double_backward": (3.4, 2),
        "sama": (3.53, 2),
        "evograd, 2 copies": (3.86, 2),
        "evograd, 2 copies, normals": (3.99, 2),
        "evograd, 64 copies": (3.86, 2),
    },
}


class Counted(TrainerCallback):
    """The launches and the waits of the last step."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        from tests.pretend_gpu import gpu

        gpu().launched.clear()
        gpu().waited.clear()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        from tests.pretend_gpu import gpu

        self.found = gpu().launched.total(), gpu().waited.total()


def tagger(folder: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    """A pretrained encoder of 12M weights with its top layer transformed."""
    from metaxl_evo.models.rtn import RepresentationTransform
    from metaxl_evo.ner.tagger import TARGET, CrossLingualTagger

    base = AutoModelForTokenClassification.from_pretrained(folder, num_labels=7)
    rtn = RepresentationTransform(base.config.hidden_size, layers=[base.config.num_hidden_layers])

    def rows(language: int) -> list[dict[str, torch.Tensor]]:
        mask, languages = torch.ones(24, dtype=torch.long), torch.tensor(language)
        words, labels = torch.randint(5, 28_000, (24, 24)), torch.randint(7, (24, 24))
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": of, "language": languages}
            for ids, of in zip(words, labels, strict=True)
        ]

    return CrossLingualTagger(base, rtn, pad_token_id=1), rows(0), rows(TARGET), {"max_grad_norm": 1.0}


def weight_net(folder: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    from metaxl_evo.models.weight_net import WeightNet
    from vision_tasks.classification import make_classifier
    from vision_tasks.images import ImageRows, drawn
    from vision_tasks.weight_net import WeightedClassifier

    images = drawn(4, classes=10, side=28, seed=0)
    module = WeightedClassifier(make_classifier("lenet", images), WeightNet(100))
    return module, ImageRows(images), ImageRows(images), {"optim": "sgd", "max_grad_norm": 0.0, "meta_portion": 1.0}


MAKERS = {"tagger": tagger, "weight net": weight_net}


def counted(problem: str, folder: Path) -> dict[str, tuple[float, int]]:
    """By estimator: launches of its third step over those of a plain one, and waits above that one's."""
    from metaxl_evo.training import refusals
    from metaxl_evo.training.arguments import MetaTrainingArguments
    from metaxl_evo.training.trainer import MetaTrainer
    from tests.pretend_gpu import NAME, pretend_gpu

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU"):  # a process by itself
        del os.environ[name]
    with pretend_gpu():
        place = torch.device(NAME, 0)
    refusals.refuse_launch = lambda *args: None  # type: ignore[assignment]
    MetaTrainingArguments.device = property(lambda args: (args._setup_devices, place)[1])  # type: ignore
    found: dict[str, tuple[int, int]] = {}
    for name, (estimator, settings) in {"plain": ("none", {}), **STEPS}.items():
        if name != "plain" and name not in BARS[problem]:
            continue
        torch.manual_seed(0)
        module, train, meta, fields = MAKERS[problem](folder)
        args = MetaTrainingArguments(
            **{"output_dir": tempfile.mkdtemp(), "use_cpu": True, "max_steps": 3, "report_to": "none", **fields},
            estimator=estimator,
            estimator_kwargs=settings,
            meta_history=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            dataloader_pin_memory=False,
            per_device_train_batch_size=6,
            per_device_meta_batch_size=6,
        )
        steps = Counted()
        with pretend_gpu():
            given = {"train_dataset": train, "meta_dataset": meta, "data_collator": default_collate}
            trainer = MetaTrainer(module, args, callbacks=[steps], **given)
            trainer.accelerator.state.device = place
            for state in (PartialState, AcceleratorState):
                state._shared_state["device"] = place
            trainer.train()
        found[name] = steps.found
    launches, waits = found.pop("plain")
    return {name: (round(own / launches, 2), waited - waits) for name, (own, waited) in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("problem", BARS)
def test_launches_and_waits_of_a_step(shared: Path, problem: str) -> None:
    [found] = on_processes(1, counted, problem, shared / "models/xlmr-mini")
    print(problem, found)
    assert found.keys() == BARS[problem].keys()
    for name, (launches, waits) in found.items():
        assert 1 < launches <= BARS[problem][name][0], name
        assert waits <= BARS[problem][name][1], name
