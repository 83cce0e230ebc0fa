"""How near estimates come to the exact hypergradient of an episode, at some episodes of a run.

python scripts/compare_cosines.py --task sinusoid --config long_horizon/sinusoid_paper --seeds 0,1 \
    --episodes 0,10,29 --output_dir DIR
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pandas as pd

from metaxl_evo.benchmark.cosines import compare_cosines
from metaxl_evo.training.cli import ends_with_one_line


@ends_with_one_line
def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Parse the settings and measure; cosines.csv and cosines.md go into the output folder."""
    return compare_cosines(list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
