"""Entity labels of a trained tagger for text or words without any, with confidences, in CoNLL columns.

python scripts/predict_ner.py --model_name_or_path DIR_OR_HUB_ID --text_file FILE --output_file FILE
"""

from __future__ import annotations

from collections.abc import Sequence

from metaxl_evo.ner.predict_command import PredictionArguments, predict
from metaxl_evo.ner.saved_tagger import Tagged
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> Tagged:
    """Parse the settings and predict; returns the labels and confidences."""
    (settings,) = parse_arguments((PredictionArguments,), argv)
    return predict(settings)


if __name__ == "__main__":
    main()
