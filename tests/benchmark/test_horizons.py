"""What a step of the meta parameters is worth, against the exact hypergradient's own slope."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from scripts.compare_horizons import main

CONFIG = Path(__file__).parents[2] / "configs/ner/quickstart.yaml"
QUICK = [
    *("--config", str(CONFIG), "--target_languages", "beru", "--train_size", "40"),
    *("--eval_size", "10", "--starts", "2", "--steps", "3", "--horizons", "1,3", "--moves", "0.001"),
]


def test_the_outer_loss_falls_as_the_exact_slope_says(tmp_path: Path) -> None:
    """To first order it falls by |move| |hypergradient| cosine, whatever made the direction."""
    out = tmp_path / "out"
    table = main([*QUICK, "--output_dir", str(out)]).set_index("direction")
    assert list(table.index) == ["no step", "unroll 1", "unroll 3", "hyperdistill", "random direction"]
    fallen = table.loc["no step", "own"] - table["own"]
    assert table.loc["unroll 3", "cosine"] == pytest.approx(1)
    assert fallen["unroll 3"] == pytest.approx(table.loc["unroll 3", "predicted"], rel=0.05)
    assert fallen["unroll 1"] == pytest.approx(table.loc["unroll 1", "predicted"], rel=0.05)
    assert abs(fallen["random direction"]) < fallen["unroll 3"] / 10
    assert table.loc["no step", "own_at_start"] > table.loc["no step", "own"]
    assert len(pd.read_csv(out / "horizons.csv")) == 5
    assert (out / "horizons.md").read_text(encoding="utf-8").count("| 2 | unroll 3 | 0.1 % | 1.00 |") == 1
    with pytest.raises(ValueError, match=r"horizons\.csv exists: choose another output_dir$"):
        main([*QUICK, "--output_dir", str(out)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--horizons", "4"), r"horizons must be from 1 to steps, 3, not \[4\]$"),
        (("--moves", "0"), "starts and moves must be given: at least 0, and above 0"),
        (("--others", "{evogrod: null}"), "evogrod"),
    ],
)
def test_refusals(tmp_path: Path, options: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*QUICK, *options, "--output_dir", str(tmp_path / "out")])
