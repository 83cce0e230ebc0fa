"""How far the outer loss falls for one step of the meta parameters, by the horizon of the hypergradient.

python scripts/compare_horizons.py --task ner --config configs/ner/wikiann_cpu.yaml --target_languages sw \
    --horizons 1,5,20 --seeds 0,1,2 --output_dir DIR
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pandas as pd

from metaxl_evo.benchmark.horizons import compare_horizons
from metaxl_evo.training.cli import ends_with_one_line


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Parse the settings and measure; horizons.csv and horizons.md go into the output folder."""
    return compare_horizons(list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
