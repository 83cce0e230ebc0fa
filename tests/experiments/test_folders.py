"""What a run is made with, and its results: what of the settings counts, what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metaxl_evo.experiments.folders import (
    EXTENDED,
    OUTSIDE,
    RESULTS,
    checkpoint_settings,
    finished_run,
    hub_id,
    training_settings,
    write_results,
)
from tests.training.tiny import tiny_arguments


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
    finished_run(file, settings, {"test": "1f"})  # of an earlier version, which wrote no fingerprints
    del settings["learning_rate"]
    with pytest.raises(ValueError, match="made with another learning_rate"):
        finished_run(file, settings)


def test_results_are_of_their_data(tmp_path: Path) -> None:
    data = {"train": "0a", "test": "1f"}
    write_results(tmp_path, {"test": {}, "settings": {"seed": 1}, "data": data, "run": {}})
    file = tmp_path / RESULTS
    finished_run(file, {"seed": 1}, data)
    for other, named in (({"train": "0a", "test": "1e"}, "test data"), ({"test": "1f"}, "train data")):
        with pytest.raises(ValueError, match=rf"was made with another {named}: give the data of that run"):
            finished_run(file, {"seed": 1}, other)
    with pytest.raises(ValueError, match=r"was made with another seed: give the settings of that run"):
        finished_run(file, {"seed": 2}, {"test": "1f"})


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


OF_NO_FORM = ['{"test": {}, "run": {}, "settings": %s}' % one for one in ("null", "[]")]  # noqa: UP031
OF_NO_FORM.append('{"test": {}, "run": {}, "settings": {}, "dev": 3}')


@pytest.mark.parametrize("content", ['{"test": ', "{}", "[]", '"text"', "[" * 200_000, *OF_NO_FORM])
def test_results_that_are_none_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results.json holds no results \(.*\): remove it, and the run goes on$"):
        finished_run(tmp_path / "results.json", {})
