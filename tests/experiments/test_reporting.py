"""What stands above several runs, what is read of their folders, and scores that bring their test examples."""

from __future__ import annotations

import json
import re
from math import nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metaxl_evo.experiments.curves import read_curves, write_curves
from metaxl_evo.experiments.folders import write_results
from metaxl_evo.experiments.plan import Run
from metaxl_evo.experiments.records import Record
from metaxl_evo.experiments.reporting import Question, compare, read_record, shared, summarise
from metaxl_evo.experiments.scores import Rate, read_outcomes, write_outcomes
from metaxl_evo.experiments.task import Task
from metaxl_evo.ner.task import NerTask
from tests.vision_tasks.small import arguments
from vision_tasks.fewshot_task import FewShotTask
from vision_tasks.rotation_task import RotationArguments, RotationTask

BASE, EVO = [0.5, 0.7, 0.6], [0.62, 0.81, 0.73]


def records(case: str = "", seeds: tuple[int, ...] = (1, 2, 5)) -> list[Record]:
    return [
        Record(
            run, case, seed, Path(run, case, str(seed)), scores={"accuracy": score, "degrees": 30.0 + seed},
            settings={"width": 2, "run": run}, facts={"train_seconds": 20 + seed},
        )
        for run, scores in (("base", BASE), ("evo", EVO))
        for seed, score in zip((1, 2, 5), scores, strict=True)
        if seed in seeds
    ]  # fmt: skip


def summary(found: list[Record], score: str = "accuracy", baseline: str = "base") -> dict[str, Any]:
    return summarise(compare(RotationTask(), found, Question(score, [baseline])))


def test_what_is_neither_better_nor_worse_is_not_compared() -> None:
    for task, score in ((RotationTask(), "degrees"), (FewShotTask(), "interval")):
        with pytest.raises(ValueError, match=f"unknown score '{score}': .*Valid: accuracy"):
            Question.of(task, [], score)


def test_a_card_lacks_a_score_that_its_task_announced() -> None:
    with pytest.raises(ValueError, match=r"unknown score in units of the task 'accuracy_upright': .*Valid: accuracy$"):
        RotationTask().table({"accuracy": 1.0})


def test_the_summary_of_several_seeds() -> None:
    found = summary(records())
    assert list(found) == ["test", "differences", "failed", "seeds", "settings", "run"]
    assert found["test"]["evo"]["accuracy"]["values"] == EVO
    assert found["test"]["base"]["accuracy"] == {
        "mean": pytest.approx(0.6),
        "std": pytest.approx(0.1),
        "values": BASE,
    }
    assert found["test"]["evo"]["degrees"]["std"] == pytest.approx(sqrt(13 / 3))  # of 31, 32, 35
    (difference,) = found["differences"]
    assert (difference["run"], difference["baseline"], difference["pairs"]) == ("evo", "base", 3)
    assert difference["mean"] == pytest.approx(12)  # points
    assert found["run"]["evo"]["5"] == {"train_seconds": 25}
    assert (found["seeds"], found["settings"], found["failed"]) == ([1, 2, 5], {"width": 2}, {})


def test_cases_are_a_level_of_their_own_and_failures_are_named() -> None:
    lost = Record("evo", "y", 5, Path("evo/y/5"), error="killed")
    found = summary([*records("x"), *records("y")[:5], lost])
    assert list(found["test"]["evo"]) == ["x", "y"]
    assert found["test"]["evo"]["y"]["accuracy"]["values"] == EVO[:2]
    assert list(found["run"]["evo"]["y"]) == ["1", "2"]
    assert found["failed"] == {"evo/y/5": "killed"}


def test_the_summary_of_one_seed_is_plain_json() -> None:
    """An interval of a single difference has no bounds, and JSON has no infinity."""
    found = summary(records(seeds=(2,)))
    (difference,) = found["differences"]
    assert (difference["low"], difference["high"], difference["reading"]) == (None, None, "undecided")
    assert found["test"]["evo"]["accuracy"]["std"] == 0
    json.dumps(found, allow_nan=False)


def test_what_is_asked(tmp_path: Path) -> None:
    (difference,) = summary(records(), "degrees", "evo")["differences"]
    assert (difference["run"], difference["baseline"], difference["mean"]) == ("base", "evo", 0)
    args = arguments(tmp_path)
    runs = [Run(name, "", 1, tmp_path / name, RotationArguments(), args) for name in ("base", "evo")]
    assert Question.of(RotationTask(), runs) == Question("accuracy", ["base"])
    with pytest.raises(ValueError, match="unknown score 'acuracy': did you mean 'accuracy'"):
        Question.of(RotationTask(), runs, score="acuracy")
    with pytest.raises(ValueError, match="unknown baseline 'bas': did you mean 'base'"):
        Question.of(RotationTask(), runs, baselines=["bas"])


def test_a_score_that_is_no_number_is_a_failure() -> None:
    lost = Record("evo", "", 7, Path("evo/7"), scores={"accuracy": nan})
    found = summary([*records(), lost])
    assert found["failed"] == {"evo/7": "its accuracy is nan"}
    assert found["test"]["evo"]["accuracy"]["values"] == EVO


def test_settings_that_all_have_alike() -> None:
    assert shared([{"a": 1, "b": None, "c": 3}, {"a": 1, "b": None, "c": 4}, {"a": 1, "b": None}]) == {
        "a": 1,
        "b": None,
    }
    assert shared([]) == {}


# What is read of a run's folder


def test_a_run_is_read_as_it_was_left(tmp_path: Path) -> None:
    run = Run("evo", "x", 3, tmp_path, RotationArguments(), arguments(tmp_path))
    assert read_record(RotationTask(), run).error == "not made yet"
    test = {"accuracy": Rate.mean([1, 0, 1]), "degrees": 4.5, "words": "none"}
    write_outcomes(tmp_path, test)
    write_curves(tmp_path, [{"step": 1, "loss": 0.5}])
    write_results(tmp_path, {"test": test, "settings": {"a": 1}, "run": {"steps": 2}})
    found = read_record(RotationTask(), run)
    assert (found.run, found.case, found.seed, found.folder, found.error) == ("evo", "x", 3, tmp_path, None)
    assert found.scores == {"accuracy": 2 / 3, "degrees": 4.5}
    assert found.outcomes["accuracy"].tolist() == [[1, 1], [0, 1], [1, 1]]
    assert (found.settings, found.facts, found.history) == ({"a": 1}, {"steps": 2}, [{"step": 1, "loss": 0.5}])
    assert read_record(RotationTask(), run, "killed").error == "killed"


@pytest.mark.parametrize(
    ("task", "test", "error"),
    [
        (NerTask(), {}, r"results.json holds no results \(StopIteration\): remove it, and the run goes on"),
        (NerTask(), {"beru": 3}, r"holds no results \('int' object has no attribute 'items'\): remove it"),
        (RotationTask(), {"accuracy": None, "degrees": 3}, "^its accuracy is missing$"),
        (RotationTask(), {"accuracy": 10**400, "degrees": 3}, r"holds no results \(.*too large.*: remove it"),
    ],
)
def test_scores_that_somebody_has_edited(tmp_path: Path, task: Task[Any, Any], test: Any, error: str) -> None:
    write_results(tmp_path, {"test": test, "settings": {}, "run": {}})
    run = Run("evo", "", 7, tmp_path, RotationArguments(), arguments(tmp_path))
    score, *_ = task.units
    found = summarise(compare(task, [read_record(task, run)], Question(score, ["evo"])))
    assert re.search(error, found["failed"][str(tmp_path)])


@pytest.mark.parametrize("name", ["history.csv", "outcomes.csv"])
@pytest.mark.parametrize("held", ["", "a,b\n1,2\n"])
def test_tables_that_somebody_has_edited(tmp_path: Path, name: str, held: str) -> None:
    write_results(tmp_path, {"test": {"accuracy": 0.5}, "settings": {}, "run": {}})
    (tmp_path / name).write_text(held, encoding="utf-8")
    run = Run("evo", "", 7, tmp_path, RotationArguments(), arguments(tmp_path))
    assert re.search(f"{name} holds no results", str(read_record(RotationTask(), run).error))


def test_a_score_that_not_all_seeds_have_is_left_out() -> None:
    few = Record("evo", "", 8, Path("evo/8"), scores={"accuracy": 0.5})
    assert list(summary([*records(), few])["test"]["evo"]) == ["accuracy"]


def test_learning_curves_are_a_row_a_step(tmp_path: Path) -> None:
    log = [
        {"step": 2, "loss": 0.5, "epoch": 0.5},
        {"step": 2, "eval_loss": 0.25, "eval_runtime": 3.0},
        {"step": 4, "loss": 0.125, "epoch": 1.0},
        {"step": 4, "train_runtime": 9.0, "total_flos": 0.0},
    ]
    write_curves(tmp_path, log)
    first, last = read_curves(tmp_path)
    assert first == {"step": 2, "loss": 0.5, "epoch": 0.5, "eval_loss": 0.25}
    assert last == {"step": 4, "loss": 0.125, "epoch": 1.0}
    assert read_curves(tmp_path / "absent") == []


# Scores with their examples


def test_a_rate_is_a_number_and_its_examples() -> None:
    rate = Rate.of([1.0, 0.0, 4.0], [2.0, 1.0, 5.0])
    assert rate == 5 / 8
    assert json.dumps(rate) == "0.625"
    assert rate.outcomes.tolist() == [[1, 2], [0, 1], [4, 5]]
    assert Rate.mean(np.array([True, False, False, True])) == 0.5
    assert Rate.of([0.0], [0.0]) == 0
    assert Rate.of([1.0], [3.0], value=0.3333333) == 0.3333333
    with pytest.raises(
        ValueError, match=r"a score of 0.5 is not that of its examples, 0.625: please report this as a"
    ):
        Rate.of([5.0], [8.0], value=0.5)


def test_examples_outlive_the_process(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((7, 2))
    scores = {"f1": Rate.of(*values.T), "accuracy": Rate.mean([0, 1, 1, 0, 1, 0, 1]), "loss": 0.3}
    write_outcomes(tmp_path, scores)
    found = read_outcomes(tmp_path)
    assert list(found) == ["f1", "accuracy"]
    np.testing.assert_array_equal(found["f1"], values)
    assert found["accuracy"].sum(0).tolist() == [4, 7]
    write_outcomes(tmp_path / "absent", {"loss": 0.3})
    assert read_outcomes(tmp_path / "absent") == {}
    with pytest.raises(ValueError, match="the scores f1, loss are of different numbers of test examples"):
        write_outcomes(tmp_path, {"f1": Rate.mean([1]), "loss": Rate.mean([1, 2])})
