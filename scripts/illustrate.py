"""EvoGrad's one-dimensional problem with any list of estimators: two figures and their numbers, in seconds.

python scripts/illustrate.py --config configs/vision/illustration.yaml --output_dir DIR [--estimators a,b]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments
from vision_tasks.illustration import IllustrationArguments
from vision_tasks.illustration_report import run_illustration


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the settings and run both studies; results.json and the figures go into the output folder."""
    (settings,) = parse_arguments((IllustrationArguments,), argv, "vision")
    return run_illustration(settings)


if __name__ == "__main__":
    main()
