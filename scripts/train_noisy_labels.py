"""Train an image classifier on noisy labels with learned example weights, beside the same training without them.

accelerate launch scripts/train_noisy_labels.py --config configs/vision/noisy_labels_paper.yaml [--any_field value]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from metaxl_evo.experiments.command import run_command
from metaxl_evo.training.cli import ends_with_one_line
from vision_tasks.noisy_labels_task import NoisyLabelsTask


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the settings, then make (or check) the runs; returns their results, or what the check found."""
    return run_command(NoisyLabelsTask(), argv)


if __name__ == "__main__":
    sys.exit(1 if main().get("problems") else 0)
