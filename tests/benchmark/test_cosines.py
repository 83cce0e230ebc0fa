"""Estimates of an episode beside the exact hypergradient, at episodes of a run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from scripts.compare_cosines import main

QUICK = [
    *("--task", "sinusoid", "--config", "long_horizon/sinusoid_paper", "--hidden", "5", "--episode_length", "3"),
    *("--seeds", "0", "--runs", '{"one_step": {"estimator": "one_step"}}', "--episodes", "0,2"),
]


def test_the_judge_agrees_with_itself_and_the_episodes_are_those_of_the_run(tmp_path: Path) -> None:
    out, judged = tmp_path / "out", '{"unroll": {}, "first_order": {}, "drmad": {}, "greedy": {"decay": 1}}'
    table = main([*QUICK, "--judged", judged, "--output_dir", str(out)]).set_index(["estimator", "episode"])
    for episode in (0, 2):
        assert table.loc[("unroll", episode), ["cosine", "beyond_direct", "length"]].tolist() == pytest.approx(
            [1, 1, 1]
        )
    assert 0.5 < table.loc[("first_order", 0), "cosine"] < 1
    assert table.loc[("drmad", 0), "cosine"] > table.loc[("first_order", 0), "cosine"]  # lr H is small in three steps
    assert table.loc[("greedy", 0), "cosine"] != table.loc[("greedy", 2), "cosine"]  # lam and the head have moved
    assert len(pd.read_csv(out / "cosines.csv")) == 8
    with pytest.raises(ValueError, match=r"cosines\.csv exists: choose another output_dir$"):
        main([*QUICK, "--output_dir", str(out)])


def test_without_a_direct_term_all_is_beyond_it(tmp_path: Path) -> None:
    """Weights of losses act through the base alone."""
    table = main([
        *("--task", "many_shot", "--config", "long_horizon/many_shot_cpu", "--learner", "weight_net", "--n_way", "2"),
        *("--train_classes", "4", "--validation_classes", "3", "--test_classes", "3", "--conv_channels", "2"),
        *("--domains", '["synthetic:chalk"]', "--batch_images", "4", "--test_images", "4", "--episode_length", "2"),
        *("--runs", '{"one_step": {"estimator": "one_step"}}', "--seeds", "0", "--episodes", "0"),
        *("--judged", '{"unroll": {}, "one_step": {}, "first_order": {}}', "--output_dir", str(tmp_path / "out")),
    ]).set_index("estimator")  # fmt: skip
    assert table.loc["unroll", "beyond_direct"] == pytest.approx(1)
    assert table.loc["one_step", "beyond_direct"] == pytest.approx(table.loc["one_step", "cosine"])
    assert table.loc["first_order", "length"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--judged", '{"evogrod": null}'), "evogrod"),
        (("--episodes", "-1"), r"episodes must be given, each at least 0, not \[-1\]$"),
        (("--episode_length", "null"), "adapted in episode_length base steps: set it"),
    ],
)
def test_refusals(tmp_path: Path, options: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*QUICK, *options, "--output_dir", str(tmp_path / "out")])
