"""`evaluate_ner`: the scores that training wrote, more languages, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.evaluate_ner import main
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
    printed = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "tset"], "unknown split 'tset': did you mean 'test'"),
        (["--languages", "beruu"], "'beruu': did you mean 'beru'"),
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
