"""What a trained weigher says of each training text: a table, a few facts, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from metaxl_evo.training.weight_watch import COLOURS, draw_over_time
from metaxl_evo.weighting.labelled import LabelledData
from metaxl_evo.weighting.weighted_text import WeightedText

WEIGHTS_TABLE, WEIGHTS_PICTURE = "weights.csv", "weights.png"
BINS = 40
POINTS = 1000  # texts of a kind in the picture at most


def judged(trainer: MetaTrainer, rows: Dataset) -> pd.DataFrame:
    """`weight` and `loss` of each row, at the final weights in evaluation mode; of tokens the means of a row."""
    return items_judged(trainer, rows).groupby("row").mean().reindex(range(len(rows)), fill_value=0.0)


def items_judged(trainer: MetaTrainer, rows: Dataset) -> pd.DataFrame:
    """As `judged`, but of each item, rows or labelled tokens, with the number of its `row`."""
    values, of_rows = _of_items(trainer, rows, lambda module, batch: torch.stack(module.weighed(batch)[::-1]))
    return pd.DataFrame({"row": of_rows, "weight": values[0], "loss": values[1]})


def losses_of(trainer: MetaTrainer, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The loss of each row, summed over its items, and the number of these, in evaluation mode; (N,) each."""
    (losses,), of_rows = _of_items(trainer, rows, lambda module, batch: module.outer_loss(batch).unsqueeze(0))
    return np.bincount(of_rows, losses, len(rows)), np.bincount(of_rows, minlength=len(rows)).astype(float)


def _of_items(
    trainer: MetaTrainer, rows: Dataset, values: Callable[[WeightedText, Any], Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """What `values` says of the items of batches, (K, items), and the row of each, (items,)."""
    module, size = cast(WeightedText, trainer.model), trainer.args.per_device_eval_batch_size
    training, parts, of_rows = module.training, list[Tensor](), list[Tensor]()
    module.eval()
    with torch.no_grad():
        for start in range(0, len(rows), size):
            chosen = [rows[index] for index in range(start, min(start + size, len(rows)))]
            batch = send_to_device(trainer.data_collator(chosen), trainer.args.device)
            parts.append(values(module, batch).double().cpu())
            of_rows.append(start + (module.token_rows(batch).cpu() if module.tokens else torch.arange(len(chosen))))
    module.train(training)
    return torch.cat(parts, dim=1).numpy(), torch.cat(of_rows).numpy()


def weights_table(said: pd.DataFrame, data: LabelledData) -> pd.DataFrame:
    """A row a training text, the smallest weight first: id, weight, loss, label, domain, true_label, wrong."""
    names = np.array(data.names)
    table = said.assign(id=data.train["id"][:], label=names[np.asarray(data.train["label"])])
    if data.domains:
        table = table.assign(domain=data.train["domain"][:])
    if data.wrong is not None:
        table = table.assign(true_label=names[data.true_labels], wrong=data.wrong)
    return table[["id", *table.columns.drop("id")]].sort_values("weight", kind="stable")


def weights_facts(said: pd.DataFrame, wrong: np.ndarray | None) -> dict[str, Any]:
    """Means of the weights, the effective number of examples, and how well small weights tell wrong labels.

    `auc` is the share of pairs of a wrong and a right label of which the wrong one weighs less, ties a half.
    """
    weights = said["weight"].to_numpy()
    effective = weights.sum() ** 2 / (weights**2).sum() if weights.any() else 0.0
    found: dict[str, Any] = {"mean": weights.mean(), "effective": effective}
    groups = {"all": np.ones(len(weights), bool)} if wrong is None else {"right": ~wrong, "wrong": wrong}
    if wrong is not None and 0 < wrong.sum() < len(wrong):
        found |= {name: weights[which].mean() for name, which in groups.items()}
        found["auc"] = mannwhitneyu(weights[~wrong], weights[wrong]).statistic / (wrong.sum() * (~wrong).sum())
    bins = np.linspace(0, max(1.0, weights.max()), BINS + 1)
    counted = {name: np.histogram(weights[which], bins)[0].tolist() for name, which in groups.items()}
    pairs = {name: said[["loss", "weight"]][which].iloc[:POINTS].to_numpy().tolist() for name, which in groups.items()}
    plain = {name: float(value) for name, value in found.items()}
    return plain | {"histogram": {"bins": bins.tolist(), **counted}, "against_loss": pairs}


def plot_weights(facts: Mapping[str, Any], path: Mapping[str, Any] | None, file: Path, what: str = "text") -> None:
    """The weights of right and of wrong labels, or of all: how many, against the loss, and over the steps.

    Args:
        facts: of `weights_facts`.
        path: of `over_time`, where weights were learned.
        what: is weighed.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    histogram, columns = facts["histogram"], 2 if path is None else 3
    with figure(file, columns, (4.0 * columns, 3.6)) as (counts, losses, *times):
        for name, pairs in facts["against_loss"].items():
            if pairs:
                colour = COLOURS[name]
                counts.stairs(histogram[name], histogram["bins"], fill=True, alpha=0.5, color=colour, label=name)
                losses.scatter(*zip(*pairs, strict=True), s=4, alpha=0.4, color=colour, label=name)
        counts.set(xlabel="weight at the end", ylabel=f"training {what}s")
        losses.set(xlabel=f"loss of a {what} at the end", ylabel="its weight")
        for axis in times:
            draw_over_time(axis, path or {})
        for axis in (counts, losses):
            axis.legend()
