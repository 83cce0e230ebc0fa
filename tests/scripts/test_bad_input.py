"""Bad input to `train_ner`: one clear line with the fix, before any training, and nothing of the user's changed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts.refusals import Settings, contents
from tests.scripts.runs import WITH_DEV, keep_checkpoints, train, write_data

# Settings: what is given, and what the one line says

SETTINGS: list[tuple[Settings, str]] = [
    ({"estimator": "evogard"}, "unknown estimator 'evogard': did you mean 'evograd'"),
    ({"estimator": "evograd", "estimator_kwargs": '{"copys": 8}'}, "copys.*copies"),
    ({"estimator": "evograd", "estimator_kwargs": '{"temperature": -1}'}, "temperature must be a positive number"),
    ({"estimator": "evograd", "estimator_kwargs": '{"copies": 1}'}, "copies must be an integer of at least 2"),
    (
        {"estimator_kwargs": '{"engine": "fast"}'},
        "engine 'fast': Valid: auto, double_backward, jvp, finite_difference",
    ),
    ({"estimator_kwargs": "copies"}, "estimator_kwargs"),
    ({"config": "YAML meta_lr: 1"}, r"run\.yaml:1: unknown key 'meta_lr': .*Valid: "),
    ({"config": "YAML learning_rate: [1, 2]"}, r"run\.yaml:1: learning_rate: expected one value, found a list"),
    ({"leaning_rate": 1}, "unknown option '--leaning_rate': did you mean '--learning_rate'"),
    ({"method": "metaxxl"}, "unknown method 'metaxxl': did you mean 'metaxl'.*zero_shot"),
    ({"rtn_kind": "gated"}, "unknown rtn_kind 'gated': .*gated_tied, gated_untied, perceptron, transformer"),
    ({"select": "best"}, "unknown select 'best': Valid: dev, last"),
    ({"meta_order": "before"}, "unknown meta_order 'before': .*Valid: after_step, lookahead"),
    ({"target_languages": "beruu"}, "'beruu': did you mean 'beru'.* Valid: aru, beru, celu"),
    ({"target_languages": "beru,aruu"}, "'aruu': did you mean 'aru'"),
    ({"source_languages": "arru"}, "'arru': did you mean 'aru'"),
    ({"target_languages": "beru,beru"}, "target_languages: beru is named twice: name it once"),
    ({"source_languages": "aru,celu,aru"}, "source_languages: aru is named twice: name it once"),
    ({"target_languages": "aru"}, "aru is both a source and a target language"),
    ({"target_train_size": 1}, "target beru: .* has 1 rows, too few for one step: a step needs 2"),
    ({"per_device_meta_batch_size": 1}, "a draw of meta rows has 1 rows, too few for one step"),
    ({"rtn_layers": 3}, "rtn_layers: 3 is not a layer of XLMRobertaForTokenClassification: valid are 1 to 2"),
    ({"rtn_layers": "0,1"}, "rtn_layers: 0 is not a layer"),
    (
        {"rtn_module_path": "roberta.layers"},
        "no encoder layers at roberta.layers .* one of roberta.encoder.layer",
    ),
    ({"learning_rate": "nan"}, "learning_rate must be a number of at least 0, not nan"),
    ({"learning_rate": -1}, "learning_rate must be a number of at least 0, not -1"),
    ({"learning_rate": "fast"}, "learning_rate: expected a number, found 'fast'"),
    ({"meta_learning_rate": "inf"}, "meta_learning_rate must be a number"),
    ({"weight_decay": -0.1}, "weight_decay must be"),
    ({"max_grad_norm": "nan"}, "max_grad_norm must be"),
    ({"meta_max_grad_norm": 0}, "meta_max_grad_norm must be .*above 0"),
    ({"warmup_steps": -5}, "warmup_steps"),
    ({"adam_beta1": 1.5}, "adam_beta1 must be"),
    ({"train_size": 0}, "train_size must be at least 1, not 0"),
    ({"target_train_size": -3}, "target_train_size must be at least 1, not -3"),
    ({"train_size": "many"}, "train_size: expected an integer, found 'many'"),
    ({"eval_size": 0}, "eval_size must be at least 1"),
    ({"rtn_bottleneck": 0}, "rtn_bottleneck must be at least 1"),
    ({"max_length": 2}, "max_length must be at least 8"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be .*at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be .*at least 1"),
    ({"max_steps": 0}, "max_steps must be at least 1, or -1"),
    ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs must be a number above 0"),
    ({"meta_every": 0}, "meta_every must be .*at least 1"),
    ({"meta_portion": 1.5}, "meta_portion must be .*between 0 and 1"),
    ({"logging_steps": -3}, "logging_steps must be"),
    ({"seed": -1}, "seed must be a whole number of at least 0"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
    ({"optimizer_class": "Adan"}, "unknown optimizer_class 'Adan': did you mean 'Adam"),
    ({"resume_from_checkpoint": "/absent/checkpoint-3"}, "/absent/checkpoint-3 is not a folder: give a checkpoint-N"),
    (
        {"resume_from_checkpoint": "/absent/checkpoint-3", "target_languages": "beru,celu"},
        "one checkpoint cannot continue several runs: use latest, or one run",
    ),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings(
    tmp_path: Path, data: Path, model: Path, refused: Callable[..., None], settings: Settings, message: str
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    settings = dict(settings)
    if "config" in settings:
        (tmp_path / "run.yaml").write_text(settings["config"].removeprefix("YAML "), encoding="utf-8")
        settings["config"] = tmp_path / "run.yaml"
    refused(message, model, data, output, **settings)


def test_the_tables_are_whole() -> None:
    assert len(SETTINGS) == 51
    assert len(SIGNS) == 5


def test_stray_inside_tags_are_only_warned_of(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_data(tmp_path / "data")
    (data / "beru/test").write_text("beru:Kalu\tI-PER\nberu:ma\tO\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="metaxl_evo"):
        results = train(model, data, tmp_path / "out", max_steps=1)
    assert results["test"]["beru"]["n_entities"] == 1
    assert "beru, test: 1 I- tags do not continue an entity" in caplog.text


# Output folders and checkpoints

SIGNS = ["results.json", "config.json", "README.md", "rtn/config.json", "checkpoint-3/trainer_state.json"]


@pytest.mark.parametrize(
    ("sign", "where"), [(sign, ("", "celu", "dalu")[index % 3]) for index, sign in enumerate(SIGNS)]
)
def test_a_folder_that_holds_what_no_run_has_left(
    tmp_path: Path, data: Path, model: Path, refused: Callable[..., None], sign: str, where: str
) -> None:
    file = tmp_path / "out" / where / sign
    file.parent.mkdir(parents=True)
    file.write_text("{}", encoding="utf-8")
    message = r"holds \S+, and no run to resume: choose another output_dir"
    refused(message, model, data, tmp_path / "out", target_languages="beru,celu")


def test_an_output_folder_that_is_a_file(
    tmp_path: Path, data: Path, model: Path, refused: Callable[..., None]
) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    refused("out is a file: choose another output_dir", model, data, tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_the_interrupted_run_is_a_good_one(tmp_path: Path, data: Path, model: Path, interrupted: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(interrupted, output)
    results = train(model, data, output, resume_from_checkpoint="latest")
    assert results["run"]["steps"] == 4


def test_latest_passes_over_a_checkpoint_that_was_cut_off(
    tmp_path: Path, data: Path, model: Path, interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    shutil.copytree(interrupted, output)
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-3")
    (output / "checkpoint-3" / "trainer_state.json").unlink()
    assert train(model, data, output, resume_from_checkpoint="latest")["run"]["steps"] == 4
    assert "checkpoint-3/trainer_state.json is missing" in caplog.text
    assert f"the run goes on from {output / 'checkpoint-2'}" in caplog.text


def test_latest_says_that_there_is_nothing_to_go_on_from(
    tmp_path: Path, data: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(model, data, tmp_path / "run", resume_from_checkpoint="latest", max_steps=1)
    assert f"{tmp_path / 'run'} holds no complete checkpoint: the run starts at step 0" in caplog.text


@pytest.mark.parametrize(
    ("option", "value"),
    [("target_languages", "celu"), ("learning_rate", 0.5), ("target_train_size", 8), ("rtn_kind", "perceptron")],
)
def test_a_checkpoint_is_resumed_only_with_its_own_settings(
    tmp_path: Path,
    data: Path,
    model: Path,
    interrupted: Path,
    refused: Callable[..., None],
    option: str,
    value: object,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(interrupted, output)
    message = rf"checkpoint-2 was made with another .*\b{option} \(.* there, .*{value}.* here\)"
    refused(message, model, data, output, resume_from_checkpoint="latest", **{option: value})


def test_a_run_may_go_on_for_longer(tmp_path: Path, data: Path, model: Path, interrupted: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(interrupted, output)
    assert train(model, data, output, resume_from_checkpoint="latest", max_steps=6)["run"]["steps"] == 6


def test_a_finished_run_is_kept_only_with_its_own_settings(tmp_path: Path, data: Path, model: Path) -> None:
    first = train(model, data, tmp_path / "run")
    before = contents(tmp_path / "run")
    again = train(model, data, tmp_path / "run", resume_from_checkpoint="latest")
    assert again["test"] == first["test"]
    for option, value in (("learning_rate", 0.5), ("estimator", "evograd"), ("target_train_size", 8)):
        with pytest.raises(ValueError, match=f"results.json was made with another {option}"):
            train(model, data, tmp_path / "run", resume_from_checkpoint="latest", **{option: value})
    assert contents(tmp_path / "run") == before


def test_changed_data_are_refused(tmp_path: Path, data: Path, model: Path) -> None:
    """By the results of a finished run, and by its checkpoint where nothing else is left."""
    own, folder = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    train(model, own, folder, save_strategy="steps", save_steps=4)
    for language, split, part in (("beru", "test", "test"), ("aru", "train", "sources.aru")):
        file = own / language / split
        held = file.read_text(encoding="utf-8")
        first, _, rest = held.partition("\n\n")
        file.write_text(f"{rest.rstrip()}\n\n{first}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"results.json was made with another {part} data: give the data of that"):
            train(model, own, folder, resume_from_checkpoint="latest", save_strategy="steps", save_steps=4)
        if split == "test":
            file.write_text(held, encoding="utf-8")
    keep_checkpoints(folder)
    before = contents(folder)
    message = r"checkpoint-4 was made with another sources.aru data \(\w{16} there, \w{16} here"
    with pytest.raises(ValueError, match=message):
        train(model, own, folder, resume_from_checkpoint="latest", max_steps=6)
    assert contents(folder) == before


def test_a_metric_that_is_not_measured(tmp_path: Path, data: Path, model: Path, refused: Callable[..., None]) -> None:
    settings = {**WITH_DEV, "metric_for_best_model": "f11"}
    message = "unknown metric_for_best_model 'f11': did you mean 'f1'"
    refused(message, model, data, tmp_path / "run", **settings)
    message = "greater_is_better would choose the checkpoint with the worst f1: leave it out"
    refused(message, model, data, tmp_path / "run", **WITH_DEV, greater_is_better="false")
