"""Learn a schedule of an image classifier's learning rate, momentum and weight decay over a whole training.

python scripts/train_schedule.py --config configs/long_horizon/fds_cpu.yaml [--any_field value]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from metaxl_evo.experiments.command import run_command
from metaxl_evo.training.cli import ends_with_one_line
from vision_tasks.schedule_task import ScheduleTask


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the settings, then make (or check) the runs; returns their results, or what the check found."""
    return run_command(ScheduleTask(), argv)


if __name__ == "__main__":
    sys.exit(1 if main().get("problems") else 0)
