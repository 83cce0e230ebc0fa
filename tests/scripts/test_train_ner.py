"""`train_ner` end to end: every method, what the output folder holds, resuming, checking, uploading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForTokenClassification, pipeline

from metaxl_evo.estimators import ESTIMATORS
from metaxl_evo.experiments.run_folder import State, state_of
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.arguments import METHODS
from scripts.train_ner import main
from tests.scripts.runs import (
    TINY,
    WITH_DEV,
    argv,
    cut_off_after,
    read,
    same,
    train,
    unnamed,
    weights,
    write_data,
    write_model,
)

COUNTS = {"n_sentences": 30, "n_truncated_words": 0}
SETTINGS = {"copies": 4, "parameters": "^classifier"}


def assert_documented(scores: dict[str, Any], targets: list[str]) -> None:
    """`{LANG: {f1, precision, recall, n_sentences, n_entities}, "average": {...}}`, the average over the targets."""
    assert list(scores) == [*targets, "average"]
    for row in scores.values():
        assert {"f1", "precision", "recall", "n_sentences", "n_entities"} <= row.keys()
        assert all(0 <= row[rate] <= 1 for rate in ("f1", "precision", "recall"))
        assert row["n_entities"] > 0
    for rate in ("f1", "precision", "recall"):
        assert scores["average"][rate] == pytest.approx(sum(scores[one][rate] for one in targets) / len(targets))
    assert scores["average"]["n_sentences"] == sum(scores[one]["n_sentences"] for one in targets)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(tmp_path: Path, model: Path, data: Path, method: str) -> None:
    further = {"source_weights": "hidden"} if method == "weighted" else {}
    results = train(model, data, tmp_path / "out", method=method, **further)
    assert_documented(results["test"], ["beru"])
    assert results["test"]["beru"].items() >= COUNTS.items()
    assert results["run"]["steps"] == 4
    assert (results["run"].get("rtn_relative_change", 0) > 0) == (method == "metaxl")
    assert results["settings"]["method"] == method


def test_it_begins_with_a_trained_rtn(
    tmp_path: Path, model: Path, data: Path, trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = tmp_path / "out"
    train(model, data, begun, method="frozen_rtn", rtn_name_or_path=trained, seed=5)
    assert "was trained with" not in caplog.text
    found, given = (
        {name: leaf for name, leaf in weights(folder).items() if name.startswith("rtn.")}
        for folder in (begun, trained)
    )
    assert same(found, given)
    with pytest.raises(ValueError, match=r"has layers \[2\], not \[1\]: set rtn_layers, rtn_kind, \.\.\. as it has$"):
        train(model, data, tmp_path / "other", rtn_name_or_path=trained, rtn_layers=1)
    another = write_model(tmp_path / "another")
    train(another, data, tmp_path / "of_another", rtn_name_or_path=trained, max_steps=1)
    assert f"was trained with {model}, not {another}" in caplog.text


def test_the_methods_are_seven() -> None:
    assert len(METHODS) == 7


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("evograd", ["--estimator_kwargs.copies", "4", "--meta_order", "lookahead", "--meta_dropout", "true"]),
        ("one_step", ["--estimator_kwargs.engine", "finite_difference", "--gradient_accumulation_steps", "2"]),
        ("one_step", ["--meta_order", "lookahead", "--optimizer_class", "Adam", "--rtn_layers", "1,2"]),
    ],
)
def test_estimators_and_orders(tmp_path: Path, model: Path, data: Path, estimator: str, options: list[str]) -> None:
    assert estimator in ESTIMATORS
    results = train(model, data, tmp_path / "out", *options, estimator=estimator)
    assert results["run"]["rtn_relative_change"] > 0
    assert results["run"]["skipped_meta_steps"] == 0


def test_several_targets(tmp_path: Path, model: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    results = train(model, data, out, target_languages="beru,celu", **WITH_DEV)
    assert results == read(out)
    for split in ("test", "dev"):
        assert_documented(results[split], ["beru", "celu"])
    assert results["settings"]["target_languages"] == ["beru", "celu"]
    for target in ("beru", "celu"):
        own = read(out / target)
        assert own["test"][target] == results["test"][target]
        assert own["settings"]["target_languages"] == [target]
        assert own["run"]["best_checkpoint"].startswith(str(out / target / "checkpoint-"))
        assert AutoModelForTokenClassification.from_pretrained(out / target).config.num_labels == 7
    assert not (out / "config.json").exists()
    printed, logged = capfd.readouterr()
    assert [line.split("|")[1].strip() for line in printed.splitlines()[-5:]] == [
        *("language", "---", "beru", "celu", "average")
    ]
    assert "'meta_loss': " in printed
    assert not [sign for sign in ("\r", "LOAD REPORT") if sign in printed + logged]


def test_methods_are_compared_over_languages(tmp_path: Path, model: Path, data: Path) -> None:
    out, runs = tmp_path / "out", {"joint": {"method": "joint_training"}, "metaxl": {}}
    results = train(model, data, out, runs=json.dumps(runs), target_languages="beru,celu", seed=5, max_steps=1)
    assert results == read(out)
    for run in runs:
        for target in ("beru", "celu"):
            own = read(out / run / target / "5")
            assert_documented(own["test"], [target])
            assert results["test"][run][target]["f1"]["values"] == [own["test"][target]["f1"]]
            assert own["settings"]["target_languages"] == [target]
    differences = [(one["run"], one["case"]) for one in results["differences"]]
    assert differences == [("metaxl", case) for case in ("beru", "celu", "average")]


def test_the_output_folder(trained: Path) -> None:
    results = read(trained)
    assert_documented(results["test"], ["beru"])
    assert not unnamed(trained, "ner")
    tag = pipeline("token-classification", model=str(trained))
    names = set(AutoModelForTokenClassification.from_pretrained(trained).config.id2label.values())
    assert names == {"O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"}
    assert {found["entity"] for found in tag("Lima kalu miro")} <= names
    rtn = RepresentationTransform.from_pretrained(trained)
    assert rtn.languages == ("aru",)
    assert rtn.layers == (2,)
    assert sorted(path.name for path in (trained / "rtn").iterdir()) == ["config.json", "model.safetensors"]
    for file in ("model.safetensors", "rtn/model.safetensors"):
        with safe_open(trained / file, framework="pt") as saved:
            assert {saved.get_slice(name).get_dtype() for name in saved.keys()} == {"F32"}  # noqa: SIM118


def test_the_model_card(trained: Path) -> None:
    card = (trained / "README.md").read_text(encoding="utf-8")
    row, history = read(trained)["test"]["beru"], read(trained)["run"]["meta_history"]
    rates = " | ".join(f"{100 * row[rate]:.2f}" for rate in ("f1", "precision", "recall"))
    assert f"| beru | {rates} | 30 | {row['n_entities']} |" in card
    for kind, own in row["per_type"].items():
        assert f"| {kind} | {100 * own['f1']:.2f} | " in card
    first, last = (f"| {one['step']} | {one['loss']:.4g} | {one['meta_loss']:.4g} |" for one in history)
    assert f"## Meta level\n\n| step | loss | meta_loss | meta_moved |\n|---:|---:|---:|---:|\n{first}" in card
    assert f"\n{last} {read(trained)['run']['rtn_relative_change']:.4g} |\n" in card
    assert (trained / "history.png").exists() == ("(history.png)" in card)
    assert "| `learning_rate` | `0.001` |" in card
    assert "| `method` | `metaxl` |" in card
    assert "Xia et al., MetaXL" in card
    assert ESTIMATORS["one_step"]().citation in card
    assert "- metaxl-evo" in card
    found = {one.metric_type: one for one in ModelCard(card).data.eval_results}
    assert {name: one.metric_value for name, one in found.items()} == {
        name: pytest.approx(row[name]) for name in ("f1", "precision", "recall")
    }
    assert (found["f1"].dataset_type, found["f1"].dataset_config) == ("local", "beru")
    assert ModelCard(card).data.get("widget") is None  # sentences of the user's own files stay there


def test_the_words_synthetic(tmp_path: Path) -> None:
    settings = {"model_name_or_path": "synthetic", "dataset": "synthetic", "output_dir": tmp_path / "out"}
    results = main(argv(settings | TINY | {"train_size": 20, "max_steps": 2, "eval_size": 15}))
    card = ModelCard.load(tmp_path / "out/README.md").data
    assert len(card.get("widget")) == 3
    assert card.eval_results[0].dataset_name == "synthetic"
    assert results["test"]["beru"]["n_sentences"] == 15
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_without_any_dev_files(tmp_path: Path, model: Path) -> None:
    data = write_data(tmp_path / "data", ("aru", "beru"), ("train", "test"))
    with pytest.raises(ValueError, match=r"beru has no split 'validation'; present: test, train"):
        train(model, data, tmp_path / "out")
    results = train(model, data, tmp_path / "out", select="last", **WITH_DEV)
    assert "dev" not in results
    assert results["run"]["best_checkpoint"] is None


def test_the_best_checkpoint_is_that_of_dev_f1(
    tmp_path: Path, model: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no metric is named, too; and where the last weights are left, no other is said to be."""
    unnamed = {name: value for name, value in WITH_DEV.items() if name != "metric_for_best_model"}
    settings = train(model, data, tmp_path / "best", **unnamed)["settings"]
    assert (settings["metric_for_best_model"], settings["greater_is_better"]) == ("f1", True)
    caplog.clear()
    last = train(model, data, tmp_path / "last", **WITH_DEV | {"load_best_model_at_end": "false"})
    assert last["run"]["best_checkpoint"] is None
    assert "load_best_model_at_end is off: the last weights are tested and saved" in caplog.text


def test_the_command_line_wins_over_the_file(tmp_path: Path, model: Path, data: Path) -> None:
    lines = [f"{key}: {value}" for key, value in TINY.items()] + ["seed: 3", "estimator_kwargs: {radius: 0.5}"]
    (tmp_path / "run.yaml").write_text("\n".join(lines), encoding="utf-8")
    places = {"model_name_or_path": model, "dataset": data, "output_dir": tmp_path / "out"}
    given = ["--config", str(tmp_path / "run.yaml"), *argv(places), "--max_steps=2", "--meta_learning_rate", "2e-3"]
    results = main(given)
    assert results["run"]["steps"] == 2
    expected = {"seed": 3, "max_steps": 2, "meta_learning_rate": 2e-3, "estimator_kwargs": {"radius": 0.5}}
    assert results["settings"].items() >= expected.items()


def test_resuming_gives_the_same_weights(tmp_path: Path, model: Path, data: Path) -> None:
    settings = {"target_languages": "beru,celu", "max_steps": 4, **WITH_DEV}
    whole = train(model, data, tmp_path / "whole", **settings)
    with cut_off_after(7):  # in the last step of the second target
        train(model, data, tmp_path / "halves", **settings)
    assert not (tmp_path / "halves/celu/results.json").exists()
    first = weights(tmp_path / "halves/beru")
    resumed = train(model, data, tmp_path / "halves", resume_from_checkpoint="latest", **settings)
    assert resumed["test"] == whole["test"]
    for target in ("beru", "celu"):
        assert same(weights(tmp_path / "whole" / target), weights(tmp_path / "halves" / target))
    assert same(first, weights(tmp_path / "halves/beru"))
    assert not same(first, weights(tmp_path / "halves/celu"))


def test_check_ends_with_a_verdict(
    tmp_path: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(
        model, data, tmp_path / "out", check="true", target_languages="beru,celu", max_steps=50, warmup_steps=9
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "OK"
    assert found["problems"] == found["warnings"] == []
    assert not (tmp_path / "out").exists()
    assert found["sentences"] == {"train aru": 40, "train target": 16, "dev": 10, "test": 30}
    assert found["planned_steps"] == 50
    assert found["meta_cosine_to_exact"] == pytest.approx(1, abs=1e-4)
    assert found["meta_norm_by_exact"] == pytest.approx(1, rel=1e-3)
    assert found["evaluation_without_rtn"]
    assert found["rtn_reaches_training"]
    assert len(found["inner_loss"]) == len(found["meta_loss"]) == 9
    assert 0 < found["base_moved"] < 1
    assert 0 < found["meta_moved_a_step"] < found["meta_moves_at_least"] < found["meta_moves_at_most"]
    assert found["times_the_plain_step"] > 0


@pytest.mark.slow
def test_check_of_evograd_on_several_layers(tmp_path: Path, model: Path, data: Path) -> None:
    options = [
        "--check",
        "true",
        "--estimator_kwargs",
        json.dumps(SETTINGS),
        "--rtn_layers",
        "1,2",
        "--meta_every",
        "2",
    ]
    found = train(model, data, tmp_path / "out", *options, estimator="evograd")
    assert found["problems"] == []
    assert -1 <= found["meta_cosine_to_exact"] <= 1
    assert len(found["meta_loss"]) == 9


def test_check_of_a_baseline(tmp_path: Path, model: Path, data: Path) -> None:
    found = train(model, data, tmp_path / "out", check="true", method="joint_training")
    assert found["problems"] == []
    assert found["meta_loss"] == []
    assert "meta_cosine_to_exact" not in found


def test_check_finds_a_level_that_stands_still(
    tmp_path: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(model, data, tmp_path / "out", check="true", learning_rate=0.0)
    message = "the base model did not move: raise learning_rate"
    assert any(line.endswith(message) for line in found["problems"])
    assert not capsys.readouterr().out.splitlines()[-1].startswith("OK")


def test_check_sees_another_run(model: Path, data: Path, trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    found = train(model, data, trained, check="true")
    assert len(found["problems"]) == 1
    assert "holds another run (results.json): choose another output_dir" in found["problems"][0]
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@pytest.mark.parametrize("targets", [pytest.param("beru", marks=pytest.mark.slow), "beru,celu"])
def test_push_to_hub_carries_both_parts(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, targets: str
) -> None:
    """Where the Hub is away at the end of a run, its resume makes good for that, and trains nothing anew."""
    uploads: dict[str, set[str]] = {}
    away = True

    class Repository:
        def __init__(self, repo_id: str):
            self.repo_id = repo_id

    class Api:
        def create_repo(self, repo_id: str, **kwargs: Any) -> Repository:
            return Repository(f"me/{repo_id.split('/')[-1]}")

        def upload_folder(self, *, repo_id: str, folder_path: str, ignore_patterns: Any = (), **kwargs: Any) -> None:
            if away:
                raise ConnectionError("no route to it")
            root = Path(folder_path)
            files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
            assert list(ignore_patterns) == ["_*", "checkpoint-*"]
            assert repo_id not in uploads  # once, when all is there
            uploads[repo_id] = {name for name in files if not name.startswith(("_", "checkpoint-"))}

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    monkeypatch.setattr("metaxl_evo.experiments.run.HfApi", lambda token: Api())
    options = ["--push_to_hub", "true", "--hub_model_id", "me/tagger"]
    several, out = targets != "beru", tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"\(no route to it\): the run is finished, and resume_from_checkpoint: latest"
    ):
        train(model, data, out, *options, target_languages=targets)
    assert uploads == {}
    first = out / "beru" if several else out
    trained = (first / "model.safetensors").stat().st_mtime_ns
    away = False
    for _ in range(2):  # the second time there is nothing to do
        train(model, data, out, *options, target_languages=targets, resume_from_checkpoint="latest")
    assert (first / "model.safetensors").stat().st_mtime_ns == trained
    assert state_of(first) is State.PUBLISHED
    assert set(uploads) == ({"me/tagger-beru", "me/tagger-celu"} if several else {"me/tagger"})
    needed = {"config.json", "model.safetensors", "tokenizer.json", "rtn/config.json", "rtn/model.safetensors"}
    train(model, data, out, *options[:3], "me/other", target_languages=targets, resume_from_checkpoint="latest")
    assert len([name for name in uploads if name.startswith("me/other")]) == len(uploads) / 2  # there as well
    assert (first / "model.safetensors").stat().st_mtime_ns == trained
    for files in uploads.values():
        assert needed | {"README.md", "results.json"} <= files
