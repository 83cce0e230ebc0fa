"""`weight-tags`: which entities are spoilt, what the weights are of, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from seqeval.metrics.sequence_labeling import get_entities

from metaxl_evo.cli import main
from metaxl_evo.models.weighers import load_weigher
from metaxl_evo.training.cli import SettingsError
from metaxl_evo.weighting.tag_task import WeightTagsArguments
from metaxl_evo.weighting.tagged import load_tagged, spoilt

NAMES = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
SMALL: dict[str, Any] = {"train_size": 40, "meta_size": 20, "eval_size": 30}
SHORT = (
    *("--max_steps", "3", "--train_size", "40", "--meta_size", "20", "--eval_size", "30", "--logging_steps", "1"),
    *("--per_device_train_batch_size", "8", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"),
)


def tagged(*sentences: str) -> Dataset:
    """Of tags alone, the words being numbered."""
    tags = [one.split() for one in sentences]
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=NAMES))})
    words = [[str(place) for place, _ in enumerate(row)] for row in tags]
    return Dataset.from_dict({"tokens": words, "ner_tags": tags}, features=features)


def marks(rows: Dataset) -> dict[tuple[int, int, int], str]:
    """Sentence, first and last word -> type, by seqeval."""
    tags = [[NAMES[tag] for tag in row] for row in rows["ner_tags"]]
    return {(row, first, last): kind for row, one in enumerate(tags) for kind, first, last in get_entities(one)}


@pytest.mark.parametrize(("noise", "rate"), [("drop", 0.5), ("type", 0.3), ("both", 0.5), ("both", 1.0)])
def test_whole_entities_are_spoilt(noise: str, rate: float) -> None:
    rows = tagged(*(7 * ["B-PER I-PER O B-LOC B-LOC I-LOC O", "O B-ORG I-ORG I-ORG", "O O"]))
    before, after = marks(rows), marks(spoilt(rows, NAMES, noise, rate, np.random.default_rng(0)))
    gone = before.keys() - after.keys()
    other = {place for place in after if after[place] != before[place]}  # no entity is where there was none
    assert len(gone) + len(other) == round(rate * len(before)) > 0
    assert len(gone) == {"drop": len(gone | other), "type": 0, "both": -(-len(gone | other) // 2)}[noise]


@pytest.mark.parametrize("options", [(), ("--per_token", "true")])
def test_the_table_has_the_weights_and_the_wrong_tags(
    options: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights are what the saved weigher says of the losses beside them; wrong is what differs from the data."""
    given = ["--noise_rate", "0.5", "--meta_learning_rate", "0.1", "--per_device_meta_batch_size", "24", *options]
    assert main(["weight-tags", *SHORT, *given, "--output_dir", str(tmp_path / "run")]) == 0
    assert "the clean set has 20 rows, fewer than a meta batch of 24" in caplog.text
    table, run = (
        pd.read_csv(tmp_path / "run/weights.csv", keep_default_na=False),
        json.loads((tmp_path / "run/results.json").read_text())["run"],
    )
    assert table["weight"].is_monotonic_increasing
    meta = load_weigher(tmp_path / "run/weigher")
    with torch.no_grad():
        expected = meta(torch.tensor(table["loss"].to_numpy(), dtype=torch.float32))
    assert table["weight"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    noisy, right = (load_tagged(WeightTagsArguments(**SMALL, noise_rate=rate), seed=42) for rate in (0.5, 0.0))
    differs = [
        [here != there for here, there in zip(*pair, strict=True)]
        for pair in zip(noisy.train["ner_tags"], right.train["ner_tags"], strict=True)
    ]
    assert run["wrong_tags"] == sum(map(sum, differs)) > 0
    if not options:
        assert len(table) == 40
        assert set(table["sentence"][table["wrong"]]) == {row for row, one in enumerate(differs) if any(one)}
        return
    assert len(table) == sum(map(len, differs))
    words = noisy.train["tokens"][:]
    for row in table.itertuples():
        assert (row.word, row.wrong) == (words[row.sentence][row.place], differs[row.sentence][row.place])


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"noise": "swap"}, "unknown noise 'swap': .*Valid: drop, type, both"),
        ({"noise_rate": 1.5}, "noise_rate must be from 0 to 1, not 1.5"),
        ({"weigher": "columns"}, "unknown weigher 'columns': Valid: each, loss, hidden"),
        ({"method": "confident"}, "method confident doubts the one label of a text, not the tags of words"),
        ({"method": "small_loss"}, "method small_loss leaves out drop_rate of a batch"),
        ({"drop_rate": 1.0}, "drop_rate must be above 0 and below 1"),
        ({"form": "softmax"}, "form softmax is over all sentences, weigher loss sees one"),
        ({"max_length": 2}, "max_length must be a whole number of at least 8"),
        ({"dataset": "folder"}, "the synthetic model knows the synthetic words alone"),
        ({"floor": 1.0}, "floor must be at least 0 and below 1"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        WeightTagsArguments(**fields)


def test_sentences_that_cannot_serve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"all \d+ sentences would judge, and none train: lower meta_size"):
        load_tagged(WeightTagsArguments(**(SMALL | {"meta_size": 10_000})), seed=0)
    with pytest.raises(ValueError, match="noise type: there is no type but PER: set noise to drop"):
        spoilt(tagged("B-PER"), NAMES[:3], "type", 0.5, np.random.default_rng(0))
    with pytest.raises(ValueError, match="the noisy sentences have no entity that could be spoilt"):
        spoilt(tagged("O O"), NAMES, "drop", 0.5, np.random.default_rng(0))
    with caplog.at_level(logging.WARNING):
        load_tagged(WeightTagsArguments(**SMALL), seed=0)
    assert "20 of the training sentences judge, and their tags are taken for right" in caplog.text
    alone = ["--weight_normalisation", "sum", "--per_device_train_batch_size", "1", "--use_cpu", "true"]
    with pytest.raises(SettingsError, match="weights of a micro-batch of one are 1 once divided"):
        main(["weight-tags", *alone, "--output_dir", str(tmp_path / "run")])
    with pytest.raises(SettingsError, match="clean sentences judge alone: set meta_portion to 1"):
        main(["weight-tags", *SHORT, "--meta_portion", "0.5", "--output_dir", str(tmp_path / "run")])
