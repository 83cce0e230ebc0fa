"""What a trained weigher says of each training text: a table, a few facts, and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from scipy.stats import mannwhitneyu
from torch import Tensor

from metaxl_evo.training.figures import figure
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.weighting.labelled import LabelledData
from metaxl_evo.weighting.weighted_text import WeightedText

BINS = np.linspace(0, 1, 41)


def judged(trainer: MetaTrainer, rows: Dataset) -> pd.DataFrame:
    """`weight` and `loss` of each row, at the final weights in evaluation mode; of tokens the means of a row."""
    module, size = cast(WeightedText, trainer.model), trainer.args.per_device_eval_batch_size
    training, parts = module.training, list[Tensor]()
    module.eval()
    with torch.no_grad():
        for start in range(0, len(rows), size):
            chosen = [rows[index] for index in range(start, min(start + size, len(rows)))]
            batch = send_to_device(trainer.data_collator(chosen), trainer.args.device)
            losses, weights = module.weighed(batch)
            parts.append(_by_row(module, batch, torch.stack([weights, losses])).cpu())
    module.train(training)
    return pd.DataFrame(torch.cat(parts, dim=1).T.double().numpy(), columns=["weight", "loss"])


def _by_row(module: WeightedText, batch: Any, values: Tensor) -> Tensor:
    """(2, N) of items -> (2, B)."""
    if not module.tokens:
        return values
    items = module.token_rows(batch)
    found = torch.bincount(items, minlength=len(batch["labels"])).clamp(min=1)
    return values.new_zeros(2, len(found)).index_add(1, items, values) / found


def weights_table(said: pd.DataFrame, data: LabelledData) -> pd.DataFrame:
    """A row a training text, the smallest weight first: id, weight, loss, label; true_label and wrong where known."""
    names = np.array(data.names)
    table = said.assign(id=data.train["id"][:], label=names[np.asarray(data.train["label"])])
    if data.wrong is not None:
        table = table.assign(true_label=names[data.true_labels], wrong=data.wrong)
    return table[["id", *table.columns.drop("id")]].sort_values("weight", kind="stable")


def weights_facts(said: pd.DataFrame, wrong: np.ndarray | None) -> dict[str, Any]:
    """Means of the weights, the effective number of examples, and how well small weights tell wrong labels.

    `auc` is the share of pairs of a wrong and a right label of which the wrong one weighs less, ties a half.
    """
    weights = said["weight"].to_numpy()
    found: dict[str, Any] = {"mean": weights.mean(), "effective": weights.sum() ** 2 / (weights**2).sum()}
    groups = {"all": np.ones(len(weights), bool)} if wrong is None else {"right": ~wrong, "wrong": wrong}
    if wrong is not None and 0 < wrong.sum() < len(wrong):
        pairs = wrong.sum() * (~wrong).sum()
        found |= {name: weights[which].mean() for name, which in groups.items()}
        found["auc"] = mannwhitneyu(weights[~wrong], weights[wrong]).statistic / pairs
    counted = {name: np.histogram(weights[which], BINS)[0].tolist() for name, which in groups.items()}
    return {name: float(value) for name, value in found.items()} | {"histogram": {"bins": BINS.tolist(), **counted}}


def plot_weights(histogram: Mapping[str, Any], file: Path) -> None:
    """The weights of right and of wrong labels, or of all.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    with figure(file) as (axis,):
        for name, colour in (("right", "C0"), ("wrong", "C3"), ("all", "C0")):
            if sum(histogram.get(name, ())):
                axis.stairs(histogram[name], histogram["bins"], fill=True, alpha=0.5, color=colour, label=name)
        axis.set(xlabel="learned weight", ylabel="training texts")
        axis.legend()
