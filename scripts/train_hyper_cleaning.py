"""Learn a weight for each training image, by hypergradients, beside the same training without weights.

accelerate launch scripts/train_hyper_cleaning.py --config configs/vision/hyper_cleaning_paper.yaml [--any_field value]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from metaxl_evo.experiments.command import run_command
from metaxl_evo.training.cli import ends_with_one_line
from vision_tasks.hyper_cleaning_task import HyperCleaningTask


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the settings, then make (or check) the runs; returns their results, or what the check found."""
    return run_command(HyperCleaningTask(), argv)


if __name__ == "__main__":
    sys.exit(1 if main().get("problems") else 0)
