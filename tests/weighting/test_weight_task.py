"""`weight-text`: what is read, spoilt, refused and left behind."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from metaxl_evo.cli import main
from metaxl_evo.models.weighers import load_weigher
from metaxl_evo.training.cli import SettingsError
from metaxl_evo.weighting.drawn import CLASSES, draw_classifier, draw_sentences, draw_tokenizer
from metaxl_evo.weighting.labelled import LabelledArguments, load_labelled, spoilt
from metaxl_evo.weighting.sources import read_file

SHORT = (
    *("--max_steps", "3", "--meta_size", "20", "--train_size", "60", "--eval_size", "40", "--noise_rate", "0.4"),
    *("--per_device_train_batch_size", "8", "--use_cpu", "true", "--report_to", "none", "--logging_steps", "1"),
    *("--save_strategy", "no"),
)
WORDS = [f"w{number}" for number in range(50)]


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def rows_of(count: int, start: int = 0, **further: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"t{n}", "text": f"{WORDS[n % 50]} w{n}", "label": ("no", "yes")[n % 2]} | further
        for n in range(start, start + count)
    ]


def folder_of(
    place: Path, train: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    write(place / "train.csv", train)
    write(place / "test.csv", test or rows_of(6, 1000))
    return place


def settings_of(data: Path, **fields: Any) -> LabelledArguments:
    return LabelledArguments(model_name_or_path="some/model", data=str(data), **{"meta_size": 4, **fields})


@pytest.mark.parametrize(("noise", "shares"), [("uniform", [0.6, 0.2, 0.2]), ("pairwise", [0.6, 0.4, 0.0])])
def test_labels_become_other_classes(noise: str, shares: list[float]) -> None:
    labels = np.arange(30_000) % 3
    made = spoilt(labels, noise, 0.4, 3, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount((made - labels) % 3, minlength=3) / len(labels), shares, atol=0.012)


def test_tables_keep_the_words_that_pandas_would_lose(tmp_path: Path) -> None:
    rows = [("NA", "null"), ('say "no"', "1"), ("", "nan")]
    for name, between in (("a.tsv", "\t"), ("a.csv", ",")):
        text = "\n".join(between.join(row) for row in [("text", "label"), *rows])
        (tmp_path / name).write_text(f"{text}\n", encoding="utf-8")
        assert [tuple(map(str, row.values())) for row in read_file(tmp_path / name)] == rows
    (tmp_path / "a.jsonl").write_text('{"text": "NA"}\n{"text": "2020-01-01"}\n', encoding="utf-8")
    assert [str(row["text"])[:10] for row in read_file(tmp_path / "a.jsonl")] == ["NA", "2020-01-01"]
    (tmp_path / "a.txt").write_text("one line\n\nanother\n", encoding="utf-8")
    assert read_file(tmp_path / "a.txt")["text"][:] == ["one line", "another"]


def test_what_trains_judges_and_tests_is_apart(tmp_path: Path) -> None:
    """The clean set is balanced, with right labels, and none of its texts is trained on, not even its twin."""
    rows = rows_of(40)
    rows[7]["text"] = rows[5]["text"]
    truth = [{**row, "gold": row["label"], "label": "no"} for row in rows]
    settings = settings_of(folder_of(tmp_path, truth), true_label_column="gold", id_column="id", meta_size=36)
    data = load_labelled(settings, seed=0)
    assert np.bincount(data.meta["label"]).tolist() == [18, 18]
    assert not set(data.meta["text"]) & set(data.train["text"])
    gold = {row["id"]: row["gold"] for row in truth}
    assert [data.names[label] for label in data.meta["label"]] == [gold[one] for one in data.meta["id"]]
    assert data.wrong is not None
    assert [gold[one] == "yes" for one in data.train["id"]] == data.wrong.tolist()


REPEATED = [*rows_of(10), *rows_of(1)]
REFUSED: dict[str, tuple[Sequence[Mapping[str, Any]], dict[str, Any], str]] = {
    "ids": (REPEATED, {"id_column": "id"}, "1 ids are there twice, such as t0: name each text once"),
    "classes": (rows_of(10, label="no"), {}, "all labels are no: there is nothing to tell apart"),
    "column": (rows_of(10), {"text_column": "txt"}, "unknown column 'txt': did you mean 'text'"),
    "empty": ([*rows_of(9), {"id": "x", "text": " ", "label": "no"}], {}, "1 rows have no text, such as 9"),
    "size": (rows_of(10), {"meta_size": 5}, "meta_size must be a multiple of the 2 classes, not 5"),
    "many": (rows_of(10), {"meta_size": 10}, "meta_size 10 needs 6 texts of each class, one has 5"),
    "features": (rows_of(10, far=7), {"feature_columns": ["far"]}, "feature column far .* its deviation is 0"),
    "domain": (rows_of(10, of="a"), {"domain_column": "of"}, "all texts that train are of a: there is nothing"),
    "single": ([*rows_of(10, of="a"), *rows_of(1, 20, of="b")], {"domain_column": "of"}, "domain b has 1 text"),
    "words": (rows_of(10), {"feature_columns": ["id"]}, "feature_columns id must hold numbers"),
    "unnamed": ([*rows_of(9), {**rows_of(1, 20)[0], "id": ""}], {"id_column": "id"}, "1 texts have no id: name each"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_texts_that_cannot_serve(name: str, tmp_path: Path) -> None:
    rows, fields, line = REFUSED[name]
    with pytest.raises(ValueError, match=line):
        load_labelled(settings_of(folder_of(tmp_path, rows), **fields), seed=0)


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_text_without_a_domain_is_of_none(nothing: str | None, tmp_path: Path) -> None:
    """It was of a domain that is called None."""
    for name, rows in (("train", [*rows_of(9, of="a"), *rows_of(2, 20, of=nothing)]), ("test", rows_of(6, 1000))):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match="2 texts have no of, such as 9, 10: name it, or leave them out"):
        load_labelled(settings_of(tmp_path, domain_column="of"), seed=0)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        (rows_of(3, 4), r"meta_data overlaps the training texts: 3 of them are in .*clean.csv.* \(ids 4, 5, 6\)"),
        (rows_of(3, 1000), "the clean set overlaps the test texts: 3 are in both"),
        (rows_of(3, 2000), "the clean set overlaps the validation texts: 3 are in both"),
        ([{**row, "text": f" {row['text']}  "} for row in rows_of(3, 4)], "meta_data overlaps the training texts: 3"),
        (rows_of(3, 500, label="yes"), "the clean set has one class only, yes"),
        (rows_of(3, 500, label="maybe"), "unknown label of label 'maybe': Valid: no, yes"),
    ],
)
def test_clean_sets_that_cannot_judge(own: list[dict[str, Any]], line: str, tmp_path: Path) -> None:
    write(tmp_path / "clean.csv", own)
    write(tmp_path / "dev.csv", rows_of(6, 2000))
    settings = settings_of(folder_of(tmp_path, rows_of(20)), meta_data=str(tmp_path / "clean.csv"))
    with pytest.raises(ValueError, match=line):
        load_labelled(settings, seed=0)


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize(
    ("scored", "line"),
    [
        (rows_of(3, 1000, label="no"), "all {} texts are no: a model that says nothing else has an accuracy of 1"),
        (rows_of(3, 4), "3 {} texts are trained on, too"),
    ],
)
def test_parts_that_score_little_are_told(
    split: str, scored: list[dict[str, Any]], line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "clean.csv", rows_of(4, 500))
    write(folder_of(tmp_path, rows_of(20)) / f"{split}.csv", scored)
    load_labelled(settings_of(tmp_path, meta_data=str(tmp_path / "clean.csv")), seed=0)
    assert [record.getMessage() for record in caplog.records] == [line.format(split)]


@pytest.mark.parametrize("weigher", ["each", "loss", "hidden"])
def test_a_run_leaves_its_weigher_and_what_it_says(
    weigher: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--weigher", weigher, "--output_dir", str(tmp_path / "run"), "--meta_learning_rate", "0.1"]
    assert main(["weight-text", *options, *SHORT]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    with (tmp_path / "run/weights.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    weights = [float(row["weight"]) for row in table]
    assert len({row["id"] for row in table}) == 60
    assert weights == sorted(weights)
    assert np.mean(weights) == pytest.approx(results["run"]["weights"]["mean"])
    wrong = [row["wrong"] == "True" for row in table]
    assert wrong == [row["label"] != row["true_label"] for row in table]
    assert np.mean(wrong) == pytest.approx(results["run"]["wrong_labels"])
    seen = load_weigher(tmp_path / "run/weigher")
    if weigher == "each":
        assert sorted(seen.weights().tolist()) == pytest.approx(weights)  # type: ignore[operator]
    history = (tmp_path / "run/history.csv").read_text()
    assert all(name in history for name in ("weights/effective", "domain_weight/right", "domain_weight/wrong"))
    path = results["run"]["weights_over_time"]
    assert [step for step, _ in path["right"]] == [1, 2, 3]
    assert "fewer than" not in caplog.text  # a meta batch is of 12


@pytest.mark.slow
def test_domains_have_a_weight_each(tmp_path: Path) -> None:
    """On files of the drawn words: the text, its label and where it is from."""
    data = tmp_path / "data"
    data.mkdir()
    for split, seed in (("train", 0), ("test", 2)):
        drawn = draw_sentences(60, seed)
        write(data / f"{split}.csv", [{**row, "of": "ab"[n % 2]} for n, row in enumerate(drawn)])
    tokenizer = draw_tokenizer()
    draw_classifier(CLASSES)[0].save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ["--data", str(data), "--model_name_or_path", str(tmp_path / "model"), "--weigher", "domain"]
    options += ["--domain_column", "of", "--form", "softmax", "--output_dir", str(tmp_path / "run")]
    assert main(["weight-text", *SHORT, *options, "--train_size", "30"]) == 0
    domains = json.loads((tmp_path / "run/results.json").read_text())["run"]["domains"]
    assert sum(domains.values()) == pytest.approx(2)
    assert domains["a"] != domains["b"]
    plain = [*options[:-1], str(tmp_path / "plain"), "--form", "sigmoid", "--method", "plain"]
    assert main(["weight-text", *SHORT, *plain, "--train_size", "30"]) == 0
    history = (tmp_path / "run/history.csv").read_text()
    assert all(f"domain_{what}/{name}" in history for what in ("loss", "weight", "share") for name in "ab")


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    for options, line in (
        (["--form", "softmax"], "form softmax is over all texts, weigher loss sees one: use sigmoid"),
        (["--weigher", "domain"], "weigher domain reads a text's domain: set domain_column"),
        (["--weigher", "columns"], "weigher columns reads feature_columns: set both, or neither"),
        (["--weight_normalisation", "labels"], "unknown weight_normalisation 'labels': did you mean 'label'"),
        (["--floor", "1"], "floor must be at least 0 and below 1, not 1.0"),
        (["--data", "here.csv"], "the synthetic model knows the drawn words alone"),
        (["--meta_portion", "0.5"], "clean texts judge alone: set meta_portion to 1"),
        (["--load_best_model_at_end", "true", "--noise", "odd"], "unknown noise 'odd'"),
    ):
        with pytest.raises(SettingsError, match=line):
            main(["weight-text", *SHORT, *options, "--output_dir", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_scored_rows_are_spread_and_every_class_trains(tmp_path: Path) -> None:
    """Of files sorted by label the first rows have one alone."""
    rows = {split: [(f"{split} {n}", "bad" if n < 20 else "good") for n in range(40)] for split in ("train", "test")}
    for split, table in rows.items():
        pd.DataFrame(table, columns=["text", "label"]).to_csv(tmp_path / f"{split}.csv", index=False)
    settings = LabelledArguments(data=str(tmp_path), model_name_or_path="MODEL", meta_size=4, eval_size=10)
    assert load_labelled(settings, 0).test["label"][:] == [0] * 5 + [1] * 5
    with pytest.raises(ValueError, match="none of the 10 training texts is of class good: shuffle the file"):
        load_labelled(replace(settings, train_size=10), 0)
