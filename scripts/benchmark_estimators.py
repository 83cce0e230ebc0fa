"""Compare the hypergradient estimators on one problem: time, memory, distance from the exact hypergradient.

python scripts/benchmark_estimators.py --config configs/benchmark/toy.yaml --output_dir DIR [--estimators a,b]
"""

from __future__ import annotations

from collections.abc import Sequence

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.benchmark.run import run_benchmark
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Parse the settings and run the benchmark; results.json, table.md and plots go into the output folder."""
    (settings,) = parse_arguments((BenchmarkArguments,), argv, "benchmark")
    return run_benchmark(settings)


if __name__ == "__main__":
    main()
