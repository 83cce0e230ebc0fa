"""Mixtures that are sampled: what is drawn, its derivative, and that processes and resume change neither."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import default_collate

from metaxl_evo.bilevel import tree
from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.weighting.sampling import DRAWN, MixtureRows
from metaxl_evo.weighting.trainer import WeightingTrainer
from metaxl_evo.weighting.weighted_text import WeightedText
from tests.processes import on_processes
from tests.weighting.small import LENGTH, WORDS, base_of, batch_of

NAMES = ("news", "tales", "notes")
LOGITS = torch.tensor([0.5, -0.3, 0.1])


def rows_of(seed: int, numbers: tuple[int, ...] = (0,) * 6 + (1,) * 6 + (2,) * 12) -> Dataset:
    """Texts of one length."""
    ids = torch.randint(1, WORDS, (len(numbers), LENGTH), generator=torch.Generator().manual_seed(seed)).tolist()
    mask = [[1] * LENGTH] * len(numbers)
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": mask, "number": list(numbers)})


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return default_collate([{name: torch.as_tensor(value) for name, value in row.items()} for row in rows])


def module_of() -> WeightedText:
    table = WeightTable(len(NAMES), "softmax")
    table.logits.data = LOGITS.clone()
    return WeightedText(base_of("causal"), table, reads="number", tokens=True, domains=NAMES).double()


def test_domains_are_drawn_by_their_shares() -> None:
    rows, weights = MixtureRows(rows_of(0)), torch.tensor([0.3, 1.5, 1.2])
    found = rows.drawn(weights, 1, 2, range(4000))
    for number, share in enumerate((0.1, 0.5, 0.4)):
        own = [row for row in found if row["number"] == number]
        assert len(own) / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)
        assert {row[DRAWN] for row in own} == {float(weights[number])}
    assert len({tuple(row["input_ids"]) for row in found}) == len(rows)


def test_a_row_is_a_function_of_seed_step_and_place() -> None:
    rows, weights = MixtureRows(rows_of(0)), torch.ones(3)
    whole = rows.drawn(weights, 1, 2, range(8))
    assert rows.drawn(weights, 1, 2, range(4, 8)) == whole[4:]
    assert rows.drawn(weights, 1, 3, range(8)) != whole
    assert rows.drawn(weights, 2, 2, range(8)) != whole


def test_a_domain_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="domain number 1 has no rows to draw"):
        MixtureRows(rows_of(0, (0, 2, 2)))


def test_rows_that_stream_are_refused() -> None:
    with pytest.raises(ValueError, match="IterableDataset has no rows to draw by number: load it whole"):
        MixtureRows(cast(Any, rows_of(0).to_iterable_dataset()))


def test_the_derivative_is_unbiased() -> None:
    """Its mean over all draws of a row, each with its probability, is that of sum_k p_k times the mean loss of k."""
    rows, module = MixtureRows(rows_of(0)), module_of()
    table: Any = module.meta
    table.logits.requires_grad_()  # a module hands them over without
    now = table.weights().detach()
    drawn, mean, per_domain = torch.zeros(3).double(), 0.0, torch.zeros(3).double()
    for row in (rows[index] for index in range(len(rows))):
        number = row["number"]
        batch = collate([{**row, DRAWN: float(now[number])}])
        loss = module.mean_inner_loss(batch)
        probability = float(now[number] / now.sum()) / len(rows.places[number])
        drawn += probability * torch.autograd.grad(loss, table.logits)[0]
        mean += probability * float(loss)
        per_domain[number] += float(module.outer_loss(batch).mean()) / len(rows.places[number])
    logits = LOGITS.double().requires_grad_()
    exact = logits.softmax(0) @ per_domain
    assert mean == pytest.approx(float(exact), rel=1e-6)  # drawn weights are float32 in a batch
    torch.testing.assert_close(drawn, torch.autograd.grad(exact, logits)[0], rtol=1e-6, atol=1e-9)


def trainer_of(folder: Path | str, processes: int = 1, accumulation: int = 1, **further: Any) -> WeightingTrainer:
    args = MetaTrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=8 // processes // accumulation,
        per_device_meta_batch_size=8 // processes // accumulation,
        gradient_accumulation_steps=accumulation,
        optimizer_class="SGD",
        learning_rate=0.1,
        meta_learning_rate=0.3,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **further,
    )
    judges = [{key: leaf[n] for key, leaf in batch_of("causal", 3).items() if key != "columns"} for n in range(6)] * 4
    data = {"train_dataset": MixtureRows(rows_of(1)), "meta_dataset": judges}
    return WeightingTrainer(module_of(), args, data_collator=collate, **data)


def trained(processes: int, accumulation: int, folder: Path | str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    trainer = trainer_of(folder, processes, accumulation, save_strategy="no")
    trainer.train()
    module = trainer.model
    logs = [
        {key: row[key] for key in row if key.startswith("domain_")}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    return tree.clone({**module.base_parameters(), **module.meta_parameters()}), logs


def require_close(found: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    for name, leaf in whole.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-8, atol=1e-11)


def test_micro_batches_do_not_change_what_is_drawn(tmp_path: Path) -> None:
    whole, logs = trained(1, 1, tmp_path / "one")
    found, said = trained(1, 2, tmp_path / "two")
    require_close(found, whole)
    assert said == [pytest.approx(row, rel=1e-6) for row in logs]
    assert not any(key.startswith("weights/") for row in logs for key in row)
    last = [logs[-1][f"domain_weight/{name}"] for name in NAMES]
    assert sum(last) == pytest.approx(3, rel=1e-6)
    assert last != pytest.approx((3 * LOGITS.softmax(0)).tolist(), rel=1e-3)  # it has learned


def test_resume_draws_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", save_steps=2)
    whole.train()
    again = trainer_of(tmp_path / "again", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, leaf in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], leaf), name


def on_two() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return trained(2, 1, folder)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_draw_what_one_does(tmp_path: Path) -> None:
    whole, _ = trained(1, 1, tmp_path)
    for found, _ in on_processes(2, on_two):
        require_close(found, whole)
