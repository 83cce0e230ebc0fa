"""Rows that hold several texts, rows that stream, and what a mean over tokens divides by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from metaxl_evo.bilevel import tree
from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.weighting.trainer import WeightingTrainer
from metaxl_evo.weighting.weighted_text import WeightedText
from tests.weighting.small import ROWS, base_of, batch_of

NAMES = ("news", "tales", "notes")


def module_of() -> WeightedText:
    table = WeightTable(len(NAMES), "softmax")
    table.logits.data = torch.tensor([0.4, 0.0, -0.4])
    return WeightedText(base_of("causal"), table, reads="number", tokens=True, domains=NAMES).double()


def rows_of(count: int) -> list[dict[str, Tensor]]:
    """Texts of unequal lengths, of which the first two tokens have no label, as a prompt has none."""
    batches = [batch_of("causal", seed) for seed in range(count // ROWS)]
    rows = [
        {key: leaf[n] for key, leaf in batch.items() if key != "columns"} for batch in batches for n in range(ROWS)
    ]
    for n, row in enumerate(rows):
        row["number"] = torch.tensor(n % 3)
        row["labels"] = row["labels"].masked_fill(torch.arange(len(row["labels"])) < 2, -100)
    return rows


class Stream(IterableDataset[Any]):
    """The same rows, one after the other."""

    def __iter__(self) -> Iterator[Any]:
        return iter(rows_of(24))


def trained(folder: Path, rows: Any, accumulation: int = 1) -> dict[str, Tensor]:
    args = MetaTrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=8 // accumulation,
        per_device_meta_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        optimizer_class="SGD",
        learning_rate=0.1,
        meta_learning_rate=0.3,
        train_sampling_strategy="sequential",
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    module = module_of()
    WeightingTrainer(module, args, data_collator=default_collate, train_dataset=rows, meta_dataset=rows_of(12)).train()
    return tree.clone({**module.base_parameters(), **module.meta_parameters()})


@pytest.mark.parametrize(("rows", "accumulation"), [(Stream(), 1), (Stream(), 4), (rows_of(24), 2)])
def test_streams_and_micro_batches_are_the_whole(rows: Any, accumulation: int, tmp_path: Path) -> None:
    """The micro-batches of a step have unequal numbers of labels, and share the mean over all of them."""
    whole = trained(tmp_path / "whole", rows_of(24))
    found = trained(tmp_path / "parts", rows, accumulation)
    for name, leaf in whole.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("number", "shape"),
    [
        (torch.zeros(ROWS, 3, dtype=torch.long), r"\(6, 3\)"),  # a list of its texts for each row
        (torch.zeros(2 * ROWS, dtype=torch.long), r"\(12,\)"),  # padding-free: a number a text, fewer rows
    ],
)
def test_packed_texts_are_refused(number: Tensor, shape: str) -> None:
    batch = batch_of("causal") | {"number": number}
    with pytest.raises(ValueError, match=rf"number has the shape {shape} where a batch has 6 rows, as of"):
        module_of().inner_loss(batch)


def test_packed_texts_of_one_domain_weigh_as_it_does() -> None:
    """Two texts in a row, kept apart by mask and positions: the sum of their weighted losses is that of two rows."""
    module = module_of().eval()
    first, second = torch.randint(1, 30, (2, 4), generator=torch.Generator().manual_seed(5))
    apart = {"input_ids": torch.stack([first, second]), "labels": torch.stack([first, second])}
    mask = torch.block_diag(torch.ones(4, 4).tril(), torch.ones(4, 4).tril()).bool()[None, None]
    ids = torch.cat([first, second])[None]
    packed = {
        "input_ids": ids,
        "labels": ids.masked_fill(torch.arange(8) == 4, -100),  # nothing before it is of its text
        "position_ids": torch.arange(4).repeat(2)[None],
        "attention_mask": mask,
    }
    found = module.inner_loss(packed | {"number": torch.tensor([2])})
    torch.testing.assert_close(found, module.inner_loss(apart | {"number": torch.tensor([2, 2])}))
