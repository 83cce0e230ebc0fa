"""Pictures of the noisy-labels task: what a run's network learned, and how runs fare as noise grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from metaxl_evo.experiments.records import Record
from metaxl_evo.training.figures import figure
from metaxl_evo.training.weight_watch import COLOURS, draw_over_time


def plot_weights(weights: Mapping[str, Any], path: Mapping[str, Any] | None, file: Path) -> None:
    """The learned weight over the loss, how right and wrong labels are weighted, and how they were over the steps.

    Args:
        weights: of `weights_of`.
        path: of `over_time`; None for results of before it was logged.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    columns = 2 if path is None else 3
    with figure(file, columns, (4.5 * columns, 3.4)) as (left, right, *times):
        left.plot(weights["curve"]["loss"], weights["curve"]["weight"])
        left.set(xlabel="loss of an image", ylabel="learned weight", ylim=(0, None), title="weight against loss")
        bins = weights["histogram"]["bins"]
        for name, colour in COLOURS.items():
            counts = np.array(weights["histogram"].get(name, ()))
            if counts.sum():
                right.stairs(counts / counts.sum(), bins, fill=True, alpha=0.5, color=colour, label=f"{name} labels")
        right.set(xlabel="learned weight", ylabel="share of the images", title="training images at the end")
        right.legend()
        for axis in times:
            draw_over_time(axis, path or {})
            axis.set(title="weights in training")


def plot_noise(records: Sequence[Record], file: Path) -> None:
    """Test accuracy against the share of wrong labels: every run a point, the mean a line, a colour a method.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    with figure(file) as (axis,):
        for name, colour in colours(records).items():
            scores: dict[float, list[float]] = {}
            for one in records:
                if one.run == name:
                    scores.setdefault(one.settings["noise_rate"], []).append(100 * one.scores["accuracy"])
            rates = sorted(scores)
            axis.plot(rates, [fmean(scores[rate]) for rate in rates], color=colour, label=name)
            for rate in rates:
                axis.plot([rate] * len(scores[rate]), scores[rate], ".", color=colour, alpha=0.6)
        axis.set(xlabel="share of wrong labels", ylabel="test accuracy, %")
        axis.legend(fontsize="small")


def plot_weight_curves(records: Sequence[Record], file: Path) -> None:
    """At the most noise, the learned weight against the loss, of its largest: a line a run, a colour a method.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    most = max((one.settings["noise_rate"] for one in records), default=0.0)
    shown = [one for one in records if "weights" in one.facts and one.settings["noise_rate"] == most]
    with figure(file) as (axis,):
        found = colours(records)
        for name in dict.fromkeys(one.run for one in shown):
            for number, one in enumerate(one for one in shown if one.run == name):
                curve = one.facts["weights"]["curve"]
                heights = [value / max(curve["weight"]) for value in curve["weight"]]
                axis.plot(curve["loss"], heights, color=found[name], alpha=0.8, label="" if number else name)
        axis.set(xlabel="loss of an image", ylabel="learned weight, of its largest", ylim=(0, 1.05))
        if shown:
            axis.legend(fontsize="small")


def colours(records: Sequence[Record]) -> dict[str, str]:
    """The colour of each method, the same in all pictures."""
    return {name: f"C{number}" for number, name in enumerate(dict.fromkeys(one.run for one in records))}
