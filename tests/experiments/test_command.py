"""What a script does with its runs: all that complains does so before the first step, and what is finished is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.command import check_runs, run_here
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from tests.vision_tasks.small import TRAINING, arguments, pack
from vision_tasks.rotation_task import RotationArguments, RotationTask

TWO = {"a": {}, "b": {"method": "baseline"}}


@pytest.fixture
def settings(tmp_path: Path) -> RotationArguments:
    return RotationArguments(data=str(pack(tmp_path / "a.npz")), backbone="convnet", meta_size=10)


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def training_step(*given: Any, **named: Any) -> Any:
        raise AssertionError("a training step was made")

    monkeypatch.setattr(MetaTrainer, "training_step", training_step)


def made(folder: Path, settings: RotationArguments, runs: dict[str, Any] | None = None, **fields: Any) -> Any:
    which = RunsArguments(runs=runs or {})
    return run_here(RotationTask(), which, settings, arguments(folder, **TRAINING | {"max_steps": 1} | fields))


@pytest.mark.parametrize(
    ("runs", "fields", "message"),
    [
        ({"a": {}, "c": {"estimator": "first_order"}}, {}, "first_order keeps only the direct term"),
        ({"a": {}, "b": {"load_best_model_at_end": True}}, {}, "load_best_model_at_end"),
        ({"a": {}, "c": {"meta_size": 40}}, {}, "meta_size 40 leaves none to train on: lower meta_size"),
        (TWO, {"resume_from_checkpoint": "checkpoint-3"}, "one checkpoint cannot continue several runs: use latest"),
    ],
)
def test_every_run_is_tried_before_the_first_step(
    tmp_path: Path, settings: RotationArguments, no_step: None, runs: dict[str, Any], fields: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path / "out", settings, runs, **fields)
    assert not (tmp_path / "out").exists()


def test_what_is_finished_is_kept(
    tmp_path: Path, settings: RotationArguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless it was made with other settings."""
    done = made(tmp_path / "out", settings, TWO)
    assert list(done["test"]) == ["a", "b"]
    monkeypatch.setattr(MetaTrainer, "training_step", None)
    changed = {"c": {}, "b": {"method": "baseline", "weight_decay": 0.1}}
    with pytest.raises(ValueError, match=r"b/3/results.json was made with another weight_decay: give the settings of"):
        made(tmp_path / "out", settings, changed, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"holds another run \(results.json\): choose another output_dir"):
        made(tmp_path / "out", settings, TWO)
    capsys.readouterr()
    assert made(tmp_path / "out", settings, TWO, resume_from_checkpoint="latest")["test"] == done["test"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["a, seed 3 (1 of 2): finished, kept", "b, seed 3 (2 of 2): finished, kept"]


def test_several_runs_are_not_resumed_over_a_single_one(tmp_path: Path, settings: RotationArguments) -> None:
    made(tmp_path / "out", settings)
    before = (tmp_path / "out/results.json").read_bytes()
    for resuming in ("latest", None):
        with pytest.raises(ValueError, match=r"holds a single run: choose another output_dir for several$"):
            made(tmp_path / "out", settings, TWO, resume_from_checkpoint=resuming)
    assert (tmp_path / "out/results.json").read_bytes() == before


def test_what_is_read_from_is_not_written_to(tmp_path: Path, no_step: None) -> None:
    (tmp_path / "images").mkdir()
    settings = RotationArguments(data=str(tmp_path / "images"), backbone="convnet")
    for folder in (tmp_path / "images", tmp_path / "images" / ".." / "images"):
        with pytest.raises(ValueError, match=r"output_dir is data \(.*images\), which would be overwritten: choose"):
            made(folder, settings, resume_from_checkpoint="latest")


def test_every_repetition_loads_its_own_data(tmp_path: Path, settings: RotationArguments) -> None:
    seeds: list[int] = []

    class Spied(RotationTask):
        def load(self, settings: RotationArguments, args: MetaTrainingArguments) -> Any:
            seeds.append(args.seed)
            return super().load(settings, args)

    run_here(Spied(), RunsArguments(seeds=[4, 1]), settings, arguments(tmp_path / "out", **TRAINING, max_steps=1))
    assert seeds == [4, 1, 4, 1]  # looked at before the first step, and trained on


def test_a_check_takes_the_first_run_that_learns(
    tmp_path: Path, settings: RotationArguments, capsys: pytest.CaptureFixture[str]
) -> None:
    which = RunsArguments(runs={"a": {"method": "baseline"}, "b": {}, "c": {}})
    args = arguments(tmp_path / "out", **TRAINING)
    found = check_runs(RotationTask(), which, settings, args)
    assert (found["run"], found["problems"], found["meta_parameters"]) == ("b", [], 1)
    assert found["meta_cosine_to_exact"] == pytest.approx(1)
    assert capsys.readouterr().out.splitlines()[-1].startswith("OK")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out/c/3").mkdir(parents=True)
    (tmp_path / "out/c/3/config.json").write_text("{}")
    found = check_runs(RotationTask(), which, settings, args)
    assert found["problems"] == [
        f"{tmp_path}/out/c/3 holds config.json, and no run to resume: choose another output_dir"
    ]
