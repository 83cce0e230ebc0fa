"""A mixture on two processes, each of which sees one domain in a step, is that of one process."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from metaxl_evo.bilevel import tree
from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.weighting.trainer import WeightingTrainer
from metaxl_evo.weighting.weighted_text import WeightedText
from tests.processes import on_processes
from tests.weighting.small import base_of, batch_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NAMES = ("news", "tales", "notes")


def rows_of(seed: int) -> list[dict[str, Tensor]]:
    """24 padded rows of unequal lengths; even ones, which the first of two processes gets, are of one domain."""
    batches = [batch_of("causal", seed * 10 + one) for one in range(4)]
    rows = [
        {name: leaf[n] for name, leaf in batch.items() if name != "columns"} for batch in batches for n in range(6)
    ]
    return [{**row, "number": torch.tensor(n % 2 * (1 + n % 3 % 2))} for n, row in enumerate(rows)]


def trained(processes: int, accumulation: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The parameters of both levels, and what the log says of domains and weights."""
    rows = 8 // processes // accumulation
    with tempfile.TemporaryDirectory() as folder:
        args = MetaTrainingArguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=rows,
            per_device_meta_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            optimizer_class="SGD",
            learning_rate=0.1,
            meta_learning_rate=0.3,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        meta = WeightTable(len(NAMES), "softmax")
        module = WeightedText(base_of("causal"), meta, reads="number", tokens=True, domains=NAMES).double()
        data = {"train_dataset": rows_of(1), "meta_dataset": rows_of(2)}
        trainer = WeightingTrainer(module, args, data_collator=default_collate, **data)
        trainer.train()
        logs = [
            {key: row[key] for key in row if key.startswith(("domain_", "weights/"))}
            for row in trainer.state.log_history
        ]
        return tree.clone({**module.base_parameters(), **module.meta_parameters()}), logs[:3]


def on_two() -> Any:
    return trained(2, 1)


def test_a_mixture_is_the_same_on_two_processes() -> None:
    whole, logs = trained(1, 1)
    assert all(len([key for key in row if key.startswith("domain_")]) == 3 * len(NAMES) for row in logs)
    for found, said in (trained(1, 2), *on_processes(2, on_two)):
        for name, leaf in whole.items():
            torch.testing.assert_close(found[name], leaf, rtol=1e-8, atol=1e-11)
        assert said == [pytest.approx(row, rel=1e-6) for row in logs]
