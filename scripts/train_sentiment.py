"""Train a cross-lingual classifier of texts with a meta-learned representation transformation; report accuracy.

accelerate launch scripts/train_sentiment.py --config configs/sentiment/sentiment_one_step.yaml --dataset FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from metaxl_evo.experiments.command import run_command
from metaxl_evo.ner.task import SentimentTask
from metaxl_evo.training.cli import ends_with_one_line


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the settings, then make the runs, or check one; returns their results, or what the check found."""
    return run_command(SentimentTask(), argv)


if __name__ == "__main__":
    sys.exit(1 if main().get("problems") else 0)
