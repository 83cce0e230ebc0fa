"""Entity precision, recall and F1 of a trained tagger on each language, their average, and where it errs.

python scripts/evaluate_ner.py --model_name_or_path DIR_OR_HUB_ID --dataset DIR_OR_HUB_ID --languages sw,ig,rw
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metaxl_evo.ner.evaluate_command import EvaluationArguments, evaluate_model
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the settings and evaluate; returns the scores."""
    (settings,) = parse_arguments((EvaluationArguments,), argv)
    return evaluate_model(settings)


if __name__ == "__main__":
    main()
