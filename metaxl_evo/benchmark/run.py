"""One benchmark: the rows of a problem, measured and written."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.peers import measure_peers
from metaxl_evo.benchmark.report import require_own, write_report
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.benchmark.steps import measure_tagger, measure_weight_net, measure_widths
from metaxl_evo.benchmark.trajectories import measure_regression
from metaxl_evo.benchmark.vision import fewshot, rotation

MEASURES: dict[str, Callable[[BenchmarkArguments], Iterator[list[Row]]]] = {
    "regression": measure_regression,
    "tagger": measure_tagger,
    "weight_net": measure_weight_net,
    "rotation": partial(measure_widths, rotation),
    "fewshot": partial(measure_widths, fewshot),
    "peers": measure_peers,
}


def run_benchmark(settings: BenchmarkArguments) -> list[Row]:
    """Measure the problem case by case, each written down when it is done; print the table at the end."""
    require_own(Path(settings.output_dir))
    rows: list[Row] = []
    table = ""
    gc.freeze()  # what was there before is looked at no more: memory is counted quickly
    try:
        for found in MEASURES[settings.problem](settings):
            rows += found
            table = write_report(Path(settings.output_dir), settings, rows)
    finally:
        gc.unfreeze()
    print(table)
    return rows
