"""A run's folder: what is refused, what of the settings counts, what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metaxl_evo.experiments.folders import (
    EXTENDED,
    OUTSIDE,
    OWN_FILES,
    RESULTS,
    checkpoint_settings,
    finished_run,
    hub_id,
    refuse_another_run,
    training_settings,
    write_results,
)
from tests.training.tiny import tiny_arguments

SIGNS = [*OWN_FILES, "own.json", "checkpoint-7", "below/results.json", "below/own.json", "below/checkpoint-7"]


@pytest.mark.parametrize("sign", SIGNS)
def test_a_folder_with_a_run_is_refused_unless_it_goes_on(tmp_path: Path, sign: str) -> None:
    file = tmp_path / sign
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    with pytest.raises(ValueError, match=rf"holds another run \({sign}\): choose another output_dir, or set resume_"):
        refuse_another_run(tmp_path, False, ["own.json"])
    refuse_another_run(tmp_path, True, ["own.json"])


def test_the_signs_are_these() -> None:
    assert len(SIGNS) == 14
    assert RESULTS == "results.json"


def test_other_folders_are_not_refused(tmp_path: Path) -> None:
    refuse_another_run(tmp_path / "absent", False)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "below/deeper").mkdir(parents=True)
    (tmp_path / "own.json").write_text("")
    (tmp_path / "below/deeper/results.json").write_text("")
    refuse_another_run(tmp_path, False)


@pytest.mark.parametrize("resuming", [False, True])
def test_what_can_be_no_folder_is_refused(tmp_path: Path, resuming: bool) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: choose another output_dir"):
        refuse_another_run(tmp_path / "file", resuming)
    with pytest.raises(ValueError, match=r"output_dir cannot be made \(.*too long.*\): choose another"):
        refuse_another_run(tmp_path / ("a" * 300), resuming)


def test_results_are_kept_where_the_settings_are_the_same(tmp_path: Path) -> None:
    settings = {"learning_rate": 0.1, "sizes": (1, 2), "where": tmp_path, "output_dir": "here", "seed": 1}
    results = {"test": {"accuracy": 0.5}, "settings": settings, "run": {}}
    write_results(tmp_path / "new/run", results)
    file = tmp_path / "new/run" / RESULTS
    assert json.loads(file.read_text()) == results | {"settings": settings | {"sizes": [1, 2], "where": str(tmp_path)}}
    assert finished_run(file, settings)["test"] == {"accuracy": 0.5}
    assert finished_run(file, settings | {"output_dir": "there", "hub_model_id": "me/x"})["test"]["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"results.json was made with another seed, sizes: give the settings of that"):
        finished_run(file, settings | {"seed": 2, "sizes": (1, 3)})
    with pytest.raises(ValueError, match="made with another max_steps"):
        finished_run(file, settings | {"max_steps": 3})  # a checkpoint may go on longer, a finished run was shorter
    del settings["learning_rate"]
    with pytest.raises(ValueError, match="made with another learning_rate"):
        finished_run(file, settings)


def test_a_default_of_earlier_versions_is_known(tmp_path: Path) -> None:
    """Of 0.5 they said nothing."""
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"test": {}, "settings": {"seed": 1}, "run": {}}), encoding="utf-8")
    finished_run(file, {"seed": 1, "meta_portion": 0.5})
    with pytest.raises(ValueError, match="made with another meta_portion"):
        finished_run(file, {"seed": 1, "meta_portion": 1.0})


def test_settings_off_their_defaults_and_those_always_named(tmp_path: Path) -> None:
    found = training_settings(tiny_arguments(tmp_path, estimator="evograd", learning_rate=5e-5, weight_decay=0.25))
    assert found.items() >= {"estimator": "evograd", "learning_rate": 5e-5, "weight_decay": 0.25, "seed": 3}.items()
    assert found["estimator_kwargs"] is None
    assert found["meta_seed"] == 3
    assert not found.keys() & {"warmup_steps", "adam_beta1", "meta_order", "output_dir"}
    assert not any(key.startswith("_") for key in found)


def test_what_makes_a_checkpoint_this_runs_own(tmp_path: Path) -> None:
    found = checkpoint_settings(training_settings(tiny_arguments(tmp_path, dataloader_num_workers=1)) | {"noise": 1})
    assert found["noise"] == 1
    assert {"estimator", "learning_rate", "seed"} <= found.keys()
    assert not found.keys() & {*OUTSIDE, *EXTENDED}
    assert {"max_steps", "per_device_train_batch_size", "dataloader_num_workers"} <= set(EXTENDED)


def test_what_a_card_links_to(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("")
    assert hub_id("ylecun/mnist") == "ylecun/mnist"
    assert hub_id(str(tmp_path)) is hub_id(str(tmp_path / "data.npz")) is None
    assert hub_id("synthetic", "drawn", "synthetic") is None


@pytest.mark.parametrize("content", ['{"test": ', "{}", "[]", '"text"'])
def test_results_that_are_none_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results.json holds no results \(.*\): remove it, and the run goes on$"):
        finished_run(tmp_path / "results.json", {})
