"""Methods compared over seeds and languages: means, spreads, paired differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from metaxl_evo.training.figures import figure
from metaxl_evo.training.statistics import Interval, paired_difference, spread

RunKey = tuple[str, str, int]  # method, language, seed


@dataclass(frozen=True)
class Comparison:
    """The results of all runs, by (method, language, seed)."""

    runs: dict[RunKey, dict[str, Any]]
    methods: Sequence[str]
    languages: Sequence[str]
    seeds: Sequence[int]

    def f1(self, method: str, language: str) -> list[float]:
        """Test F1 in percent, one value a seed; for `average` the mean over the languages of each seed."""
        if language == "average":
            return [fmean(self._percent(method, one, seed) for one in self.languages) for seed in self.seeds]
        return [self._percent(method, language, seed) for seed in self.seeds]

    def of_run(self, method: str, key: str) -> list[float]:
        """A number of the `run` section, over all languages and seeds."""
        return [float(self.runs[method, one, seed]["run"][key]) for one in self.languages for seed in self.seeds]

    def difference(self, method: str, baseline: str) -> Interval:
        """Mean paired difference of F1 over (language, seed), in points."""
        pairs = [(one, seed) for one in self.languages for seed in self.seeds]
        return paired_difference(*([self._percent(one, *pair) for pair in pairs] for one in (method, baseline)))

    def _percent(self, method: str, language: str, seed: int) -> float:
        return 100 * self.runs[method, language, seed]["test"][language]["f1"]

    def markdown(self, baseline: str) -> str:
        """The tables of scores, of differences to `baseline`, and of cost."""
        columns = [*self.languages, "average"]
        lines = [f"| method | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        lines += [f"| {m} | {' | '.join(spread(self.f1(m, c)) for c in columns)} |" for m in self.methods]
        lines += ["", f"| method | points over {baseline} | 95 % interval | reading |", "|---|---:|---:|---|"]
        for method in self.methods:
            if method != baseline:
                found = self.difference(method, baseline)
                lines.append(
                    f"| {method} | {found.mean:+.2f} | {found.low:+.2f} to {found.high:+.2f} | {found.reading} |"
                )
        lines += [
            "",
            "| method | seconds a run | RTN moved, % of its norm | skipped meta steps |",
            "|---|---:|---:|---:|",
        ]
        for method in self.methods:
            moved = [100 * value for value in self.of_run(method, "rtn_relative_change")]
            skipped = int(sum(self.of_run(method, "skipped_meta_steps")))
            lines.append(
                f"| {method} | {spread(self.of_run(method, 'train_seconds'), 0)} | {spread(moved)} | {skipped} |"
            )
        return "\n".join(lines) + "\n"

    def plot(self, file: Path) -> None:
        """Test F1 of every run, by language and method, with each method's mean: what the table says, to look at.

        Raises:
            ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
        """
        columns = [*self.languages, "average"]
        with figure(file, len(columns), (2.6 * len(columns), 3.6)) as axes:
            for axis, column in zip(axes, columns, strict=True):
                for row, method in enumerate(self.methods):
                    values = self.f1(method, column)
                    axis.plot(range(len(values)), values, "o", color=f"C{row}", alpha=0.6)
                    axis.axhline(fmean(values), color=f"C{row}", label=method)
                axis.set(title=column, xlabel="seed", xticks=range(len(self.seeds)), xticklabels=self.seeds)
            axes[0].set_ylabel("test F1, %")
            legend = axes[0].get_legend_handles_labels()
            axes[0].figure.legend(*legend, loc="outside lower center", ncols=3)


def read_comparison(
    folder: Path, methods: Sequence[str], languages: Sequence[str], seeds: Sequence[int]
) -> Comparison:
    """Read `folder/METHOD/LANGUAGE/SEED/results.json` of every run.

    Raises:
        ValueError: naming the first run that is missing.
    """
    runs: dict[RunKey, dict[str, Any]] = {}
    for key in [(method, language, seed) for method in methods for language in languages for seed in seeds]:
        file = run_folder(folder, *key) / "results.json"
        if not file.is_file():
            raise ValueError(f"{file} is missing: run the comparison again, finished runs are kept")
        runs[key] = json.loads(file.read_text(encoding="utf-8"))
    return Comparison(runs, methods, languages, seeds)


def run_folder(folder: Path, method: str, language: str, seed: int) -> Path:
    """Where one run of a comparison lives."""
    return folder / method / language / str(seed)
