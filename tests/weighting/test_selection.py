"""Methods that leave doubtful labels out: against a count by hand, and against the noise that was drawn."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from metaxl_evo.cli import main
from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.cli import SettingsError
from metaxl_evo.weighting.selection import FOLDS, SmallLossText, SmallLossTrainer, doubted, folds, smallest
from tests.weighting.small import base_of, batch_of

RUN = (
    *("--max_steps", "6", "--meta_size", "20", "--train_size", "60", "--eval_size", "40", "--noise_rate", "0.4"),
    *("--per_device_train_batch_size", "8", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"),
)


def test_the_smallest_losses_count_alike() -> None:
    losses = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    assert smallest(losses, 0.4).tolist() == pytest.approx([5 / 3, 5 / 3, 5 / 3, 0, 0])
    assert smallest(losses, 0.0).tolist() == [1] * 5
    assert smallest(losses, 0.99).tolist() == [0, 5, 0, 0, 0]


def test_what_trains_is_the_mean_of_the_smallest_losses() -> None:
    """By the gradient of the mean of the rows that numpy picks."""
    batch = {
        name: leaf for name, leaf in batch_of("rows").items() if name in ("input_ids", "attention_mask", "labels")
    }
    module = SmallLossText(base_of("rows"), WeightTable(6), reads="number", weighted=False).eval()
    module.left_out = 0.5
    losses = module.outer_loss(batch)
    picked = losses[torch.tensor(np.argsort(losses.detach().numpy())[:3].copy())].mean()
    weights = list(module.base_parameters().values())
    expected = torch.autograd.grad(picked, weights, allow_unused=True)
    found = torch.autograd.grad(module.inner_loss(batch).mean(), weights, allow_unused=True)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


def test_folds_have_their_part_of_each_class() -> None:
    labels = np.array([0] * 31 + [1] * 8)
    parts = folds(labels, seed=3)
    for label in (0, 1):
        counts = np.bincount(parts[labels == label], minlength=FOLDS)
        assert counts.max() - counts.min() <= 1


def test_cleanlab_doubts_the_labels_that_were_flipped() -> None:
    """A classifier that is right and sure but for the sixth of labels that are wrong."""
    pytest.importorskip("cleanlab")
    truth = np.arange(60) % 3
    labels = np.where(np.arange(60) % 6 == 1, (truth + 1) % 3, truth)
    logits = np.full((60, 3), -2.0)
    logits[np.arange(60), truth] = 2.0
    assert doubted(labels, logits).tolist() == (labels != truth).tolist()


def test_small_losses_train_a_run(tmp_path: Path) -> None:
    assert main(["weight-text", *RUN, "--method", "small_loss", "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["run"]["steps"] == 6
    assert not (tmp_path / "run/weights.csv").exists()


@pytest.mark.slow
def test_confident_learning_trains_on_what_it_keeps(tmp_path: Path) -> None:
    pytest.importorskip("cleanlab")
    options = ["--method", "confident", "--learning_rate", "3e-3", "--max_steps", "40", "--train_size", "300"]
    assert main(["weight-text", *RUN, *options, "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    with (tmp_path / "run/weights.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert results["run"]["steps"] == 40
    assert {row["weight"] for row in table} == {"0.0", "1.0"}
    kept = [row["wrong"] == "True" for row in table if row["weight"] == "1.0"]
    assert np.mean(kept) < results["run"]["wrong_labels"]


def test_selections_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, line in (
        (["--method", "small_loss", "--noise_rate", "0"], "method small_loss leaves out drop_rate of a batch: set it"),
        (["--drop_warmup", "0"], "drop_warmup must be above 0 and at most 1, not 0.0"),
        (["--drop_rate", "1"], "drop_rate must be above 0 and below 1, not 1.0"),
        (
            ["--method", "small_loss", "--per_device_train_batch_size", "1"],
            "small_loss compares the losses of a batch",
        ),
    ):
        with pytest.raises(SettingsError, match=line):
            main(["weight-text", *RUN, *options, "--output_dir", str(tmp_path / "none")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install metaxl_evo\[cleanlab\]"):
        main(["weight-text", *RUN, "--method", "confident", "--output_dir", str(tmp_path / "none")])


def test_the_share_that_is_left_out_grows_and_stays(tmp_path: Path) -> None:
    seen: list[float] = []

    class Noting(SmallLossText):
        def inner_loss(self, batch: Batch) -> Tensor:
            seen.append(self.left_out)
            return super().inner_loss(batch)

    module = Noting(base_of("rows").float(), WeightTable(6), reads="number", weighted=False)
    row = {"input_ids": [1, 2, 3], "labels": 1}
    fields: dict[str, Any] = {"per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none"}
    args = MetaTrainingArguments(str(tmp_path), max_steps=6, estimator="none", use_cpu=True, **fields)
    rows = Dataset.from_list([row] * 12)
    SmallLossTrainer(module, args, train_dataset=rows, drop_rate=0.4, drop_warmup=0.5).train()
    assert seen == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4])
