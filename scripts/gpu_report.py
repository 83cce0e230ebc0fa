"""What a GPU computes beside the CPU, in which precision, and at what cost.

python scripts/gpu_report.py --output_dir DIR [--small true]
"""

from __future__ import annotations

from collections.abc import Sequence

from metaxl_evo.benchmark.gpu import GpuReportArguments, write_gpu_report
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> str:
    """Parse the settings and make the report; gpu.md goes into the output folder."""
    (settings,) = parse_arguments((GpuReportArguments,), argv)
    return write_gpu_report(settings)


if __name__ == "__main__":
    main()
