"""The tables and plots of docs/results/vision_cpu.md, from the results that the runs left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaxl_evo.training.figures import figure
from metaxl_evo.training.runs import RESULTS
from vision_tasks.experiment import table

Summary = dict[str, Any]  # of `vision_tasks.experiment.summarise`


def read_summary(folder: Path) -> Summary:
    """What `summarise` left in a folder.

    Raises:
        ValueError: where it is not there.
    """
    file = folder / RESULTS
    if not file.is_file():
        raise ValueError(f"{file} is missing: run the comparison again, finished runs are kept")
    summary: Summary = json.loads(file.read_text(encoding="utf-8"))
    return summary


def page(output: Path, experiments: Mapping[str, Sequence[str]], costs: Sequence[str]) -> str:
    """The tables of all experiments.

    Args:
        output: where their folders are.
        experiments: folder -> scores to show.
        costs: folders of benchmarks.
    """
    parts = []
    for name, shown in experiments.items():
        summary = read_summary(output / name)
        firsts = [None, *(run for run in summary["test"] if run.endswith("_seen"))]  # the baselines of the learned
        parts += [f"### {name}\n\n{table(shown, summary, first)}" for first in firsts]
    parts += [f"### {name}\n\n{(output / name / 'table.md').read_text(encoding='utf-8').strip()}" for name in costs]
    return "\n\n".join(parts) + "\n"


def plot_noise(summaries: Mapping[float, Summary], file: Path) -> None:
    """Test accuracy against the share of wrong labels: every seed a point, the mean a line, a colour a run.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    with figure(file) as (axis,):
        rates = sorted(summaries)
        for number, name in enumerate(summaries[rates[0]]["test"]):
            scores = [summaries[rate]["test"][name]["accuracy"] for rate in rates]
            axis.plot(rates, [100 * one["mean"] for one in scores], color=f"C{number}", label=name)
            for rate, one in zip(rates, scores, strict=True):
                axis.plot(
                    [rate] * len(one["values"]), [100 * v for v in one["values"]], ".", color=f"C{number}", alpha=0.6
                )
        axis.set(xlabel="share of wrong labels (flip2)", ylabel="test accuracy, %", xticks=rates)
        axis.legend(fontsize="small")


def plot_weight_curves(summary: Summary, file: Path) -> None:
    """The learned weight against the loss, relative to its largest value: a line a seed, a colour a run.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    learned = [name for name, seeds in summary["run"].items() if all("weights" in run for run in seeds.values())]
    with figure(file) as (axis,):
        for number, name in enumerate(learned, start=1):  # the colours of `plot_noise`, where the baseline is first
            for seed, run in enumerate(summary["run"][name].values()):
                curve = run["weights"]["curve"]
                heights = [one / max(curve["weight"]) for one in curve["weight"]]
                axis.plot(curve["loss"], heights, color=f"C{number}", alpha=0.8, label="" if seed else name)
        axis.set(xlabel="loss of an image", ylabel="learned weight, of its largest", ylim=(0, 1.05))
        axis.legend(fontsize="small")
