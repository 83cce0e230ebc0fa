"""Train a cross-lingual NER tagger with a meta-learned representation transformation; report entity F1 per language.

accelerate launch scripts/train_ner.py --config configs/ner/metaxl_one_step.yaml [--any_field value]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from metaxl_evo.ner.arguments import NerArguments, NerTrainingArguments
from metaxl_evo.ner.check import check_experiment
from metaxl_evo.ner.experiment import run_experiment
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the settings, then run (or check) the experiment; returns its results, or what the check found."""
    ner, args = parse_arguments((NerArguments, NerTrainingArguments), argv)
    return check_experiment(ner, args) if ner.check else run_experiment(ner, args)


if __name__ == "__main__":
    sys.exit(1 if main().get("problems") else 0)
