"""`evaluate_ner` and `predict_ner`: the scores that training wrote, more languages, files, and what they refuse."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from seqeval.metrics import f1_score
from transformers import pipeline

from scripts.evaluate_ner import main
from scripts.predict_ner import main as predict
from tests.scripts.runs import argv, train


def evaluate(model: Path, data: Path, languages: str = "beru", *options: str) -> dict[str, Any]:
    settings = {"model_name_or_path": model, "dataset": data, "languages": languages, "use_cpu": "true"}
    return main([*argv(settings), *options])


@pytest.fixture(scope="session")
def better(tmp_path_factory: pytest.TempPathFactory, data: Path, model: Path) -> Path:
    """A model that has learned enough to have scores above zero, cut off at a length that loses words."""
    folder = tmp_path_factory.mktemp("better") / "run"
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 16, "max_steps": 40, "eval_max_length": 14}
    train(model, data, folder, **settings, method="joint_training")
    return folder


def test_it_reproduces_the_scores_of_training(better: Path, data: Path) -> None:
    written = json.loads((better / "results.json").read_text(encoding="utf-8"))
    assert written["test"]["beru"]["f1"] > 0.05
    assert written["test"]["beru"]["n_truncated_words"] > 0
    for batch_size in ("3", "32"):
        found = evaluate(better, data, "beru", "--max_length", "14", "--batch_size", batch_size)
        assert found["test"] == written["test"]
    dev = evaluate(better, data, "beru", "--max_length", "14", "--split", "dev")
    assert dev["dev"] == written["dev"]
    assert evaluate(better, data)["test"]["beru"]["n_truncated_words"] == 0


def test_a_model_of_mapped_labels_is_judged_by_the_same_map(tmp_path: Path, model: Path, data: Path) -> None:
    train(model, data, tmp_path / "out", "--label_map.LOC", "O")
    written = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert evaluate(tmp_path / "out", data, "beru", "--label_map.LOC", "O")["test"] == written["test"]
    with pytest.raises(ValueError, match="label_map"):
        evaluate(tmp_path / "out", data)


def test_several_languages_are_printed_and_saved(
    better: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(better.rglob("*"))
    output = tmp_path / "new/scores.json"
    found = evaluate(better, data, "celu,beru", "--output_file", str(output))
    assert json.loads(output.read_text(encoding="utf-8")) == found
    assert list(found["test"]) == ["celu", "beru", "average"]
    assert found["test"]["average"]["n_sentences"] == 60
    assert {"f1", "precision", "recall", "n_sentences", "n_entities"} <= found["test"]["average"].keys()
    printed = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[-5:]]
    assert printed == ["language", "---", "celu", "beru", "average"]
    assert sorted(better.rglob("*")) == before


def test_strict_counts_no_stray_entity(better: Path, data: Path) -> None:
    lenient, strict = evaluate(better, data), evaluate(better, data, "beru", "--strict", "true")
    assert strict["settings"]["strict"]
    assert strict["test"]["beru"]["n_entities"] == lenient["test"]["beru"]["n_entities"]
    assert strict["test"]["beru"]["f1"] != lenient["test"]["beru"]["f1"]


def test_an_existing_file_is_kept_unless_asked(trained: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    output.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"scores\.json exists: choose another name, or set overwrite: true$"):
        evaluate(trained, data, "beru", "--output_file", str(output))
    assert output.read_text(encoding="utf-8") == "mine"
    evaluate(trained, data, "beru", "--output_file", str(output), "--overwrite", "true")
    assert "test" in json.loads(output.read_text(encoding="utf-8"))


def test_models_that_cannot_be_evaluated(trained: Path, model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has no trained token-classification head: train one with scripts/train_ner"
    ):
        evaluate(model, data)
    (tmp_path / "several/beru").mkdir(parents=True)
    (tmp_path / "several/beru/config.json").write_text((trained / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match=r"holds no config.json: give one of its models: .*several/beru$"):
        evaluate(tmp_path / "several", data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no config.json: give a folder that save_pretrained wrote$"):
        evaluate(tmp_path / "empty", data)
    with pytest.raises(ValueError, match="synthetic has no trained token-classification head"):
        evaluate(Path("synthetic"), data)


def test_predictions_are_what_is_scored(
    better: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of columns, read by seqeval alone; the errors that are printed and saved add up to its counts."""
    file = tmp_path / "new/predictions.conll"
    options = ("--max_length", "14", "--eval_size", "20", "--predictions", str(file))
    results = evaluate(better, data, "celu,beru", *options)
    printed, written = capsys.readouterr().out, file.read_text(encoding="utf-8").split("# language = ")[1:]
    assert [text.partition("\n")[0] for text in written] == ["celu", "beru"]
    for text, (language, scores) in zip(written, results["test"].items(), strict=False):
        blocks = text.partition("\n")[2].rstrip("\n").split("\n\n")
        rows = [[line.split("\t") for line in block.split("\n")] for block in blocks]
        true, found = ([[row[at] for row in sentence] for sentence in rows] for at in (1, 2))
        assert (len(rows), f1_score(true, found, average="micro")) == (20, pytest.approx(scores["f1"]))
        confidences = [row[3] for sentence in rows for row in sentence]
        assert confidences.count("-") == scores["n_truncated_words"] + scores["n_words_without_sub_token"] > 0
        assert all(1 / 7 < float(one) <= 1 for one in confidences if one != "-")
        errors = results["errors"][language]
        assert {kind: sum(row.values()) for kind, row in errors["confusion"].items() if kind != "O"} == {
            kind: row["n_entities"] for kind, row in scores["per_type"].items()
        }
        assert len(errors["worst_sentences"]) == 10
        assert f"{language}, sentence {errors['worst_sentences'][0]['sentence']}, " in printed
    with pytest.raises(
        ValueError, match=r"predictions: .*predictions\.conll exists: choose another name, or set over"
    ):
        evaluate(better, data, "beru", "--predictions", str(file))


def test_confidences_are_the_probabilities_of_the_pipeline(better: Path, data: Path, tmp_path: Path) -> None:
    """Of a sentence's first sub-tokens, by transformers' own pipeline, on the words in running text."""
    words = [line.partition("\t")[0].removeprefix("beru:") for line in (data / "beru/test").open(encoding="utf-8")]
    sentence = words[: words.index("\n")]
    (tmp_path / "text").write_text(" ".join(sentence) + "\n\n", encoding="utf-8")
    (tmp_path / "tokens").write_text("\n".join(f"{word}\tx" for word in sentence), encoding="utf-8")
    tagged = pipeline("token-classification", model=str(better), device="cpu", ignore_labels=[])(" ".join(sentence))
    first = {one["start"]: one for one in reversed(tagged)}
    starts = [0, *accumulate(len(word) + 1 for word in sentence[:-1])]
    for name in ("text", "tokens"):
        places = {f"{name}_file": tmp_path / name, "output_file": tmp_path / f"{name}.out"}
        labels, confidences = predict(argv({"model_name_or_path": better, "use_cpu": "true", **places}))
        assert labels == [[first[start]["entity"] for start in starts]]
        assert confidences[0] == pytest.approx([float(first[start]["score"]) for start in starts], abs=1e-5)
        lines = (tmp_path / f"{name}.out").read_text(encoding="utf-8").splitlines()
        columns = zip(sentence, labels[0], confidences[0], strict=True)
        assert lines == [f"{word}\t{label}\t{confidence:.4f}" for word, label, confidence in columns]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"give one file to read: text_file \(a sentence a line\) or tokens_file \(a word a line\)"),
        ({"text_file": "x", "tokens_file": "x"}, "give one file to read"),
        ({"text_file": "there/is/none"}, "there/is/none cannot be read"),
        (
            {"tokens_file": "one column", "tokens_column": 2},
            r"one column:1: 1 columns, tokens_column must be one of them",
        ),
        ({"text_file": "empty"}, "empty is empty: it must hold at least one sentence"),
        ({"tokens_file": "one column", "tokens_column": 0}, "tokens_column must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_predicted(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one column").write_text("Ada\n", encoding="utf-8")
    (tmp_path / "empty").write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        predict(argv({"model_name_or_path": trained, "use_cpu": "true", **given}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "tset"], "unknown split 'tset': did you mean 'test'"),
        (["--languages", "beruu"], "'beruu': did you mean 'beru'"),
        (["--output_file", "there", "--predictions", "there"], "output_file and predictions are both there"),
        (["--eval_size", "0"], "eval_size must be at least 1"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--max_length", "0"], "max_length must be at least 8"),
        (["--langages", "beru"], "unknown option '--langages': did you mean '--languages'"),
    ],
)
def test_settings_that_cannot_be(trained: Path, data: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(trained, data, "beru", *options)


def test_labels_that_the_head_does_not_know(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "xx").mkdir()
    (tmp_path / "xx/test").write_text("xx:Monday\tB-DATE\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"label sets differ: the model has O, B-LOC, .* but xx has B-DATE"):
        evaluate(trained, tmp_path, "xx")
