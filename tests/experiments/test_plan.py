"""Which runs a command makes, where they are, and what each is made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metaxl_evo.estimators import EvoGrad, OneStep
from metaxl_evo.experiments.arguments import RunsArguments, StudyArguments
from metaxl_evo.experiments.plan import Run, plan_runs, selected
from metaxl_evo.ner.arguments import NerArguments
from metaxl_evo.ner.task import NerTask
from metaxl_evo.training.parser import parse_arguments
from tests.training.tiny import tiny_arguments
from tests.vision_tasks.small import arguments
from vision_tasks.noisy_labels_task import NoisyLabelsArguments, NoisyLabelsTask

RUNS = {
    "base": {"method": "baseline"},
    "evo": {"estimator": "evograd", "estimator_kwargs": {"copies": 4}, "learning_rate": 0.25},
    "plain_evo": {"estimator": "evograd"},
    "as-it.is": {},
}


def planned(
    folder: Path, which: dict[str, Any] | None = None, *, nested: bool = False, **fields: Any
) -> list[Run[Any]]:
    settings = NoisyLabelsArguments(noise_rate=0.3)
    args = arguments(folder, **fields)
    return plan_runs(NoisyLabelsTask(), RunsArguments(**which or {}), settings, args, nested=nested)


def of_languages(folder: Path, which: dict[str, Any], *targets: str) -> list[Run[Any]]:
    settings = NerArguments(source_languages=["en"], target_languages=list(targets))
    return plan_runs(NerTask(), RunsArguments(**which), settings, tiny_arguments(folder))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--runs.evo.estimator_kwargs.copies", "16"], {"base": {}, "evo": {"estimator_kwargs": {"copies": 16}}}),
        (["--runs.evo", "null"], {"base": {}}),
        (["--runs", '{"other": {"estimator": "sama"}}'], {"other": {"estimator": "sama"}}),
    ],
)
def test_the_command_line_changes_a_run_leaves_one_out_or_replaces_all(
    tmp_path: Path, options: list[str], expected: dict[str, Any]
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("runs: {base: {}, evo: {estimator_kwargs: {copies: 4}}}", encoding="utf-8")
    (found,) = parse_arguments((RunsArguments,), ["--config", str(file), *options])
    assert found.runs == expected


def folders(runs: list[Run[Any]], root: Path) -> list[str]:
    assert [Path(str(run.args.output_dir)) for run in runs] == [run.folder for run in runs]
    return [str(run.folder.relative_to(root)) for run in runs]


def test_every_run_of_every_case_with_every_seed_has_a_folder(tmp_path: Path) -> None:
    cases = {"little": {"noise_rate": 0.1}, "much": {"noise_rate": 0.6}}
    runs = planned(tmp_path, {"runs": RUNS, "cases": cases, "seeds": [7, 2]})
    expected = [(run, case, seed) for seed in (7, 2) for case in cases for run in RUNS]
    assert [run.key for run in runs] == expected
    assert folders(runs, tmp_path) == [f"{run}/{case}/{seed}" for run, case, seed in expected]
    assert [(run.args.seed, run.args.meta_seed) for run in runs] == [(7, 7)] * 8 + [(2, 2)] * 8
    assert [run.settings.noise_rate for run in runs] == ([0.1] * 4 + [0.6] * 4) * 2
    assert runs[1].args.hub_model_id == f"{tmp_path.name}-evo-little-7"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("which", "nested", "places"),
    [
        ({}, False, ["."]),
        ({"seeds": [5]}, False, ["."]),
        ({"runs": {"evo": {}}}, False, ["."]),
        ({"seeds": [1, 2]}, False, ["run/1", "run/2"]),
        ({"runs": {"a": {}, "b": {}}}, False, ["a/3", "b/3"]),
        ({"cases": {"x": {}, "y": {}}}, False, ["x", "y"]),
        ({}, True, ["run/3"]),
        ({"runs": {"evo": {}}, "cases": {"x": {}}}, True, ["evo/x/3"]),
    ],
)
def test_a_single_run_has_the_output_folder(
    tmp_path: Path, which: dict[str, Any], nested: bool, places: list[str]
) -> None:
    assert folders(planned(tmp_path, which, nested=nested), tmp_path) == places


@pytest.mark.parametrize(
    ("which", "places"),
    [
        ({}, ["qu", "gn"]),
        ({"runs": {"a": {}}, "seeds": [1]}, ["a/qu/1", "a/gn/1"]),
        ({"cases": {"first": {"target_languages": ["mi"]}}}, ["."]),
    ],
)
def test_each_language_is_a_case(tmp_path: Path, which: dict[str, Any], places: list[str]) -> None:
    runs = of_languages(tmp_path, which, "qu", "gn")
    assert folders(runs, tmp_path) == places
    assert [run.settings.target_languages for run in runs] == ([["qu"], ["gn"]] if len(places) == 2 else [["mi"]])
    single = of_languages(tmp_path, {}, "qu")
    assert (folders(single, tmp_path), single[0].case, single[0].args.hub_model_id) == (["."], "qu", None)


def test_repositories_are_named_by_the_user(tmp_path: Path) -> None:
    runs = planned(tmp_path, {"seeds": [1, 2]}, hub_model_id="me/x")
    assert [run.args.hub_model_id for run in runs] == ["me/x-run-1", "me/x-run-2"]
    assert planned(tmp_path, hub_model_id="me/x")[0].args.hub_model_id == "me/x"


def test_what_a_run_says_wins_over_the_rest(tmp_path: Path) -> None:
    base, evo, plain, as_it_is = planned(tmp_path, {"runs": RUNS})
    assert base.args.make_estimator() is None
    assert base.args.estimator_kwargs is None
    assert evo.args.make_estimator() == EvoGrad(copies=4)
    assert plain.args.make_estimator() == EvoGrad()  # not of the engine that the config chose for another
    assert as_it_is.args.make_estimator() == OneStep(engine="double_backward")
    assert [run.args.learning_rate for run in (base, evo, plain)] == [1e-3, 0.25, 1e-3]
    assert [run.settings.method for run in (base, evo)] == ["baseline", "meta_weight_net"]
    own = planned(tmp_path, {"runs": {"a": {"noise_rate": 0.1, "meta_seed": 9, "max_steps": 8}, "b": {}}})
    found = [(run.settings.noise_rate, run.args.meta_seed, run.args.max_steps) for run in own]
    assert found == [(0.1, 9, 8), (0.3, 3, 3)]


def test_settings_are_read_as_those_of_a_file(tmp_path: Path) -> None:
    changes = {"train_size": "100", "image_mean": [0.5], "learning_rate": "1e-3", "lr_milestones": None, "bf16": "no"}
    (run,) = planned(tmp_path, {"runs": {"a": changes}}, lr_scheduler_type="constant", lr_milestones=[0.5])
    assert (run.settings.train_size, run.settings.image_mean) == (100, [0.5])
    assert (run.args.learning_rate, run.args.lr_milestones, run.args.bf16) == (1e-3, None, False)
    assert run.args.lr_scheduler_type == "constant"


def test_a_meta_seed_of_its_own_and_the_launch_stay(tmp_path: Path) -> None:
    runs = planned(tmp_path, {"seeds": [1, 2]}, meta_seed=40)
    assert [(run.args.seed, run.args.meta_seed) for run in runs] == [(1, 40), (2, 40)]
    given = {"dispatch_batches": False, "even_batches": False}
    (run,) = planned(tmp_path, accelerator_config=given)
    assert run.args.accelerator_config.to_dict().items() >= given.items()


def test_what_a_run_is_made_with(tmp_path: Path) -> None:
    run = planned(tmp_path, {"runs": RUNS, "seeds": [7, 2]})[1]
    found = run.all_settings(run.args)
    expected = {
        "noise_rate": 0.3,
        "estimator": "evograd",
        "estimator_kwargs": {"copies": 4},
        "seed": 7,
        "meta_seed": 7,
    }
    assert found.items() >= (expected | {"learning_rate": 0.25, "backbone": "resnet32"}).items()
    assert not found.keys() & {"runs", "cases", "seeds", "check"}


SEEDS = r"seeds must be different whole numbers of at least 0, below 2\*\*32, not "
BAD: list[tuple[dict[str, Any], str]] = [
    ({"runs": {"a": {"estimatr": 1}}}, "unknown setting of run a 'estimatr': did you mean 'estimator'"),
    ({"cases": {"a": {"estimatr": 1}}}, "unknown setting of case a 'estimatr': did you mean 'estimator'"),
    ({"runs": {"a": {"seed": 1}}}, "unknown setting of run a 'seed'"),
    ({"runs": {"a": {"output_dir": "x"}}}, "unknown setting of run a 'output_dir'"),
    ({"runs": {"a": {"runs": {}}}}, "unknown setting of run a 'runs'"),
    ({"runs": {"a": {"degrees": 1}}}, "unknown setting of run a 'degrees'"),  # of another task
    ({"runs": {"a": 3}}, "runs: a must be a mapping of settings, as in {}, not 3"),
    ({"cases": {"a": [1]}}, r"cases: a must be a mapping of settings, as in {}, not \[1\]"),
    ({"runs": {"../a": {}}}, "runs: '../a' names a folder: use letters, digits, dots, - and _"),
    ({"cases": {"average": {}}}, "no case can be named 'average', .*: rename it"),
    ({"cases": {"..": {}}}, "cases: '..' names a folder"),
    ({"runs": {"": {}}}, "runs: '' names a folder"),
    ({"runs": {"a": {"method": "basline"}}}, "unknown method 'basline': did you mean 'baseline'"),
    ({"runs": {"a": {"train_size": "few"}}}, "run a: train_size: expected an integer, found 'few'"),
    ({"runs": {"a": {"meta_size": 0.5}}}, "run a: meta_size: expected an integer, found '0.5'"),
    ({"runs": {"a": {"meta_size": None}}}, "run a: meta_size: null is no value of it"),
    ({"cases": {"a": {"noise_rate": "much"}}}, "case a: noise_rate: expected a number, found 'much'"),
    ({"runs": {"a": {"learning_rate": "fast"}}}, "run a: learning_rate: expected a number, found 'fast'"),
    ({"runs": {"a": {"image_mean": "grey"}}}, "run a: image_mean: expected a number, found 'grey'"),
    ({"runs": {"a": {"estimator": "evogard"}}}, "unknown estimator 'evogard': did you mean 'evograd'"),
    ({"runs": {"a": {"estimator": "sama", "estimator_kwargs": {"copies": 2}}}}, "unknown field of sama 'copies'"),
    (
        {"runs": {"a": {"noise": "flip"}}, "cases": {"b": {"noise": "unif"}}},
        "run a and case b both set noise: leave it",
    ),
    ({"seeds": []}, SEEDS + r"\[\]"),
    ({"seeds": [1, 1]}, SEEDS + r"\[1, 1\]"),
    ({"seeds": [0, -1]}, SEEDS),
    ({"seeds": [2**32]}, SEEDS),
]


@pytest.mark.parametrize(("which", "message"), BAD)
def test_runs_that_cannot_be(tmp_path: Path, which: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        planned(tmp_path, which)


def test_cases_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target_languages: 'a/b' names a folder: use letters, digits, dots, - and _"):
        of_languages(tmp_path, {}, "a/b")
    with pytest.raises(ValueError, match="run a and case qu both set target_languages: leave it to one of them"):
        of_languages(tmp_path, {"runs": {"a": {"target_languages": ["mi"]}}}, "qu")
    with pytest.raises(ValueError, match=r"case both: target_languages must be one, .* not qu, gn"):
        of_languages(tmp_path, {"cases": {"both": {}}}, "qu", "gn")


def test_a_null_takes_a_run_out_of_a_config(tmp_path: Path) -> None:
    assert [run.name for run in planned(tmp_path, {"runs": {"a": {}, "b": None, "c": {}}})] == ["a", "c"]


@pytest.mark.parametrize(
    ("only", "numbers"),
    [
        (None, [0, 1, 2, 3]),
        (["run=b"], [1, 3]),
        (["seed=2"], [2, 3]),
        (["seed=2", "run=a"], [2]),
        (["run=a", "run=b", "seed=1"], [0, 1]),
    ],
)
def test_some_of_the_runs(tmp_path: Path, only: list[str] | None, numbers: list[int]) -> None:
    runs = planned(tmp_path, {"runs": {"a": {}, "b": {}}, "seeds": [1, 2]})
    assert list(selected(runs, only)) == numbers


def test_some_that_are_not_there(tmp_path: Path) -> None:
    runs = planned(tmp_path, {"runs": {"base": {}, "evo": {}}, "seeds": [1, 2]})
    with pytest.raises(ValueError, match="unknown run of only 'bas': did you mean 'base'"):
        list(selected(runs, ["run=bas"]))
    with pytest.raises(ValueError, match=r"unknown seed of only '3': .*Valid: 1, 2"):
        list(selected(runs, ["seed=3"]))
    with pytest.raises(ValueError, match="only: 'sed=3' must be run=NAME, case=NAME or seed=N"):
        StudyArguments(only=["sed=3"])
