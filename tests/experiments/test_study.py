"""A study in one process: the task of the docs' page, what is kept, what fails, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import pytest

from metaxl_evo.cli import main
from metaxl_evo.experiments import engines
from metaxl_evo.experiments import study as studies
from metaxl_evo.experiments.run_folder import alone
from metaxl_evo.experiments.task import Task
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from tests.experiments import faults
from tests.experiments.own_task import blocks, write_own_task
from tests.scripts.runs import cut_off_after

QUICK = ["--engine", "inline", "--max_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true"]
Study = Callable[..., int]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    write_own_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda *options, out="out": main(["study", "trust.yaml", "--output_dir", out, *QUICK, *options])


def read(file: str) -> Any:
    return json.loads(Path(file).read_text(encoding="utf-8"))


def no_step(*given: Any, **named: Any) -> None:
    raise AssertionError("a training step was made")


def test_the_task_of_the_page_is_short() -> None:
    files = blocks()
    assert set(files) == {"trust.py", "trust.yaml"}
    assert len(files["trust.py"].splitlines()) < 60


@pytest.mark.slow
def test_a_study_of_the_page_s_task(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study("--seeds", "3,4") == 0
    printed = capsys.readouterr().out
    folders = [
        f"{run}/{case}/{seed}" for run in ("baseline", "one_step") for case in ("one", "two") for seed in (3, 4)
    ]
    scores = {one: read(f"out/{one}/results.json")["test"]["accuracy"] for one in folders}
    for one in folders:
        table = pd.read_csv(f"out/{one}/outcomes.csv", header=[0, 1])["accuracy"]
        assert len(table) == 500
        assert table["numerator"].sum() / table["denominator"].sum() == scores[one]
        assert list(pd.read_csv(f"out/{one}/history.csv")["step"]) == [1, 2]
        files = {path.name for path in Path("out", one).iterdir()}
        assert files >= {"config.json", "model.safetensors", "meta", "README.md", "history.png"}
        assert not files & {"_lock", "_progress"}
    summary = read("out/results.json")
    for case in ("one", "two"):
        expected = [scores[f"one_step/{case}/{seed}"] for seed in (3, 4)]
        assert summary["test"]["one_step"][case]["accuracy"]["values"] == expected
        assert summary["test"]["one_step"][case]["accuracy"]["mean"] == pytest.approx(fmean(expected))
    average = fmean(scores[one] - scores[one.replace("one_step", "baseline")] for one in folders[4:])
    (found,) = [one for one in summary["differences"] if one["case"] == "average"]
    assert (found["mean"], found["pairs"]) == (pytest.approx(100 * average), 2)
    assert f"| one_step | average | {100 * average:+.2f} |" in printed
    assert "out/report.html\n" in printed
    assert summary["settings"]["max_steps"] == 2
    monkeypatch.setattr(MetaTrainer, "training_step", no_step)
    assert study("--seeds", "3,4") == 0
    assert read("out/results.json") == summary
    with pytest.raises(ValueError, match=r"one/3/results.json was made with another learning_rate: give the settings"):
        study("--seeds", "3,4", "--learning_rate", "0.1")
    assert main(["report", "out"]) == 0
    assert read("out/results.json") == summary


def test_a_part_of_a_study(study: Study) -> None:
    assert study("--only", "run=baseline,case=two,seed=1,seed=2") == 0
    assert sorted(str(file.parent) for file in Path("out").rglob("outcomes.csv")) == [
        "out/baseline/two/1",
        "out/baseline/two/2",
    ]
    failed = read("out/results.json")["failed"]
    assert len(failed) == 10
    assert set(failed.values()) == {"not made yet"}


def test_a_part_does_not_bring_other_settings(study: Study) -> None:
    """Which the report would mix with those of the rest."""
    study("--only", "run=baseline,case=one,seed=0")
    with pytest.raises(ValueError, match=r"one/0/results.json was made with another learning_rate: give the settings"):
        study("--only", "run=baseline,case=one,seed=1", "--learning_rate", "0.1")


def test_one_process_of_a_launch_writes_for_all(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("should_save", "should_log"):
        monkeypatch.setattr(MetaTrainingArguments, name, False)
    assert study("--only", "run=baseline,case=one,seed=0") == 0
    assert not [path for path in Path("out").rglob("*") if path.is_file()]
    assert "##" not in capsys.readouterr().out


def test_runs_that_fail_are_told_and_the_others_go_on(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"baseline": None, "one_step": None, "well": {}, "fails": {"method": "fails"}, "nan": {"method": "nan"}}
    given = ["--task", "trust.py:Unwell", "--runs", json.dumps(runs), "--cases.two", "null", "--seeds", "0"]
    assert study(*given) == 1
    summary = read("out/results.json")
    assert summary["failed"] == {
        "out/fails/one/0": "no score to be had",
        "out/nan/one/0": "its accuracy is nan",
    }
    assert list(summary["test"]) == ["well"]
    assert Path("out/fails/one/0/model.safetensors").is_file()  # what was trained is kept
    assert not Path("out/fails/one/0/results.json").exists()
    page = Path("out/report.md").read_text(encoding="utf-8")
    assert "no score to be had" in page
    assert "no score to be had" in capsys.readouterr().out


def test_a_picture_that_fails_costs_no_results(
    study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def plot(self: Task[Any, Any], folder: Path, results: Any) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr(Task, "plot", plot)
    assert study("--only", "run=baseline,case=one,seed=0") == 0
    assert "a picture could not be drawn: no picture" in caplog.messages
    assert "accuracy" in read("out/baseline/one/0/results.json")["test"]


def test_a_plan_and_its_runs_one_by_one(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert study("--plan", "true", "--seeds", "5") == 0
    assert "4 runs: metaxl-evo run out/plan.json --index 0 to 3" in capsys.readouterr().out
    assert not list(Path("out").rglob("results.json"))
    plan = read("out/plan.json")["runs"]
    assert [one["folder"] for one in plan] == ["baseline/one/5", "one_step/one/5", "baseline/two/5", "one_step/two/5"]
    Path("out").rename("moved")
    assert main(["run", "moved/plan.json", "--index", "2"]) == 0
    assert [str(file.parent) for file in Path().rglob("results.json")] == ["moved/baseline/two/5"]
    assert "one_step" not in capsys.readouterr().out
    assert main(["run", "moved/plan.json", "--index", "2"]) == 0
    assert capsys.readouterr().out == "baseline, two, seed 5: moved/baseline/two/5\n"
    with pytest.raises(ValueError, match=r"index: moved/plan.json has the runs 0 to 3, not 4"):
        main(["run", "moved/plan.json", "--index", "4"])
    with pytest.raises(ValueError, match=r"trust.yaml is no plan of a study .*: give OUT/plan.json"):
        main(["run", "trust.yaml", "--index", "0"])


def test_a_check_of_every_method(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    study("--check", "true")
    printed = capsys.readouterr().out
    assert "## baseline, one, seed 0" in printed
    assert "## one_step, one, seed 0" in printed
    assert not Path("out").exists()


REFUSED = [
    (["--task", "nre"], "unknown task 'nre': did you mean 'ner'.*, or file.py:Class"),
    (["--task", "trust.py:Trusted"], "task trust.py:Trusted: cannot be imported"),
    (["--task", "other.py:TrustTask"], "task other.py:TrustTask: cannot be imported"),
    (["--task", "trust.py:Trust"], "Trust must be a subclass of metaxl_evo.Task"),
    (["--baselines", "basline"], "unknown baseline 'basline': did you mean 'baseline'"),
    (["--margin", "0"], "margin must be above 0"),
    (["--only", "run"], "only: 'run' must be run=NAME, case=NAME or seed=N"),
    (["--only", "seed=7"], "unknown seed of only '7': Valid: 0, 1, 2"),
    (["--engine", "slurm"], "unknown engine 'slurm'"),
    (["--jobs", "0"], "jobs must be at least 1"),
    (["--runs.one_step.confused", "3"], "run one_step and case one both set confused: leave it to one of them"),
    (["--cases", '{"a/b": {}}'], "cases: 'a/b' names a folder"),
    (["--runs.one_step.estimatr", "sama"], "unknown setting of run one_step 'estimatr'"),
    (["--runs.one_step.seed", "1"], "unknown setting of run one_step 'seed'"),
    (
        ["--runs", '{"report.html": {}}'],
        "runs: 'report.html' names a folder, beside files of such names: leave its ending",
    ),
    (["--hub_token", "secret"], "hub_token would stand in plan.json: leave it out, and log in by `hf auth login`"),
    (["--runs.one_step.hub_token", "secret"], "hub_token would stand in plan.json: leave it out"),
    (["--score", "acuracy"], "unknown score 'acuracy': did you mean 'accuracy'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_is_refused_before_training(
    study: Study, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(MetaTrainer, "training_step", no_step)
    with pytest.raises(ValueError, match=message):
        study(*options)
    assert not Path("out").exists()


def test_the_settings_of_a_task_are_its_own(study: Study) -> None:
    text = (
        Path("trust.py")
        .read_text(encoding="utf-8")
        .replace("    confused: int", "    seeds: int = 1\n    confused: int")
    )
    Path("trust.py").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="the setting seeds is one of every study: give it another name"):
        study()


PLANS = ["null", '{"task": 1, "options": []}', '{"task": "ner", "options": [1]}', '{"task": "ner"}', "[" * 200_000]


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_no_plan(study: Study, plan: str) -> None:
    Path("out").mkdir()
    Path("out/plan.json").write_text(plan, encoding="utf-8")
    for made in (study, lambda: main(["report", "out"]), lambda: main(["run", "out/plan.json", "--index", "0"])):
        with pytest.raises(
            ValueError, match=r"^error: out/plan.json is no plan of a study \(.+\): give OUT/plan.json$"
        ):
            made()
    assert Path("out/plan.json").read_text(encoding="utf-8") == plan


def test_two_studies_do_not_write_into_one_folder(study: Study) -> None:
    held = rf"out: process {os.getpid()} on .* makes this run: wait for it"
    with alone(Path("out")), pytest.raises(ValueError, match=held):
        study()
    assert not list(Path("out").iterdir())


def test_changed_data_are_refused_before_a_worker_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that was cut off, which has no results to say so."""
    data = tmp_path / "data.json"
    data.write_text("1.0", encoding="utf-8")
    fixed = {"task": f"{faults.__file__}:LineTask", "data": data, "output_dir": tmp_path / "out", "seeds": "0,1"}
    steps = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "use_cpu": True, "disable_tqdm": True}
    options = [f"--{name}={value}" for name, value in (fixed | steps).items()]
    with cut_off_after(2):
        studies.Study([*options, "--engine=inline"]).run()
    data.write_text("2.0", encoding="utf-8")
    monkeypatch.setattr(engines, "RunProcess", lambda *of: pytest.fail("a worker was started"))
    with pytest.raises(ValueError, match=r"out/\w+/0 was made with another test data, train data: give the data of"):
        studies.Study([*options, "--engine=local"]).run()
    assert not list((tmp_path / "out").rglob("results.json"))


def test_a_study_of_another_task_is_left_alone(study: Study) -> None:
    study("--plan", "true")
    with pytest.raises(
        ValueError, match=r"out holds a study of the task trust.py:TrustTask: choose another output_dir"
    ):
        study("--task", "trust.py:Unwell")


def test_a_folder_that_is_no_study_is_left_alone(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetaTrainer, "training_step", no_step)
    for place in ("out/config.json", "page/report.md", "deep/one_step/two/2/outcomes.csv"):
        Path(place).parent.mkdir(parents=True)
        Path(place).write_text("mine", encoding="utf-8")
        with pytest.raises(ValueError, match=r"holds \w+\.\w+, and no run to resume: choose another output_dir"):
            study(out=place.split("/")[0])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["studdy"], "unknown command 'studdy': did you mean 'study'"),
        (["run"], "run: name the plan, as in metaxl-evo run OUT/plan.json --index 0"),
        (["report"], "report: name the folder of a study"),
        (["report", "nowhere"], "nowhere holds no plan.json: give the folder of a study"),
        (["study"], "study: name its settings file first, as in metaxl-evo study CONFIG --output_dir OUT"),
        (["study", "--output_dir", "out", "trust.yaml"], "study: name its settings file first"),
        (["study", "absent.yaml"], "--config absent.yaml: "),
    ],
)
def test_commands_that_cannot_be(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(argv)


def test_a_study_wants_a_folder(study: Study) -> None:
    with pytest.raises(ValueError, match="output_dir: name the folder of the study, as in --output_dir runs/study"):
        main(["study", "trust.yaml", *QUICK])
