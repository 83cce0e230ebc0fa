"""The check of any task: what it finds wrong, what it only warns of, and what it costs."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metaxl_evo.estimators import OneStep
from metaxl_evo.ner.tagger import CrossLingualTagger
from metaxl_evo.training.check import check_training
from metaxl_evo.training.check_report import CheckReport
from metaxl_evo.training.diagnostics import Diagnostics
from metaxl_evo.training.few_steps import FewSteps
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.test_diagnostics import once_differentiable_tagger
from tests.training.test_trainer import exploding
from tests.training.tiny import PAD, SHALLOW, collate, logged, meta_weights, random_rows, tiny_arguments, tiny_tagger


def shallow(**settings: Any) -> CrossLingualTagger:
    return tiny_tagger(dropout=False, base=SHALLOW, **settings)


def checked(
    folder: Path, make: Callable[[], CrossLingualTagger] = shallow, **fields: Any
) -> tuple[dict[str, Any], MetaTrainer]:
    """The findings at rates at which both levels move."""

    def build(args: Any) -> MetaTrainer:
        has_meta = args.estimator != "none"
        return MetaTrainer(
            make(),
            args,
            train_dataset=random_rows(24, seed=1, language=0),
            meta_dataset=random_rows(12, seed=2) if has_meta else None,
            data_collator=collate,
        )

    settings = {"meta_learning_rate": 0.05, "max_steps": 300, **fields}
    report, trainer = check_training(build, tiny_arguments(folder, **settings))
    return report.as_dict(), trainer


def lines_of(found: dict[str, Any]) -> list[str]:
    """The report as it prints itself."""
    rest = {key: value for key, value in found.items() if key not in ("problems", "warnings")}
    return str(CheckReport(rest, found["problems"], found["warnings"])).splitlines()


def untransformed() -> CrossLingualTagger:
    tagger = shallow()
    return CrossLingualTagger(tagger.base, tagger.meta, pad_token_id=PAD, transform=False)


@pytest.mark.parametrize("order", ["after_step", "lookahead"])
def test_nothing_wrong(tmp_path: Path, order: str) -> None:
    found, trainer = checked(tmp_path / "out", meta_order=order, warmup_steps=100, meta_warmup_steps=100)
    assert found["problems"] == found["warnings"] == []
    assert lines_of(found)[-1] == "OK"
    assert not (tmp_path / "out").exists()
    assert found["planned_steps"] == 300
    assert found["base_parameters"] == sum(p.numel() for p in trainer.model.base.parameters())
    assert found["meta_parameters"] == sum(p.numel() for p in trainer.model.meta.parameters())
    assert (found["attention_kernel"], found["second_derivatives"]) == ("sdpa", "possible")
    assert found["estimator"] == str(OneStep())
    assert found["meta_cosine_to_exact"] == pytest.approx(1, abs=1e-9)
    assert found["meta_norm_by_exact"] == pytest.approx(1, abs=1e-6)
    assert len(found["inner_loss"]) == len(found["meta_loss"]) == 9
    assert [entry["step"] for entry in trainer.state.log_history if "meta_cosine_to_exact" in entry] == [3, 6, 9]
    assert logged(trainer, "learning_rate") == [1e-3] * 9  # no warm-up
    assert logged(trainer, "meta_learning_rate") == [0.05] * 9
    assert 0 < found["base_moved"] < 1
    step = found["meta_moved_a_step"]
    before, now = (torch.cat([p.flatten() for p in held.values()]) for held in (start_of(), meta_weights(trainer)))
    assert step == pytest.approx(float((now - before).norm() / before.norm()) / 9, rel=1e-5)
    assert found["meta_moves_at_least"] == pytest.approx(step * math.sqrt(300), rel=1e-12)
    assert found["meta_moves_at_most"] == pytest.approx(step * 300, rel=1e-12)
    assert found["times_the_plain_step"] > 1


def start_of() -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in shallow().meta.named_parameters()}


def test_drops_of_the_rate_are_not_checked(tmp_path: Path) -> None:
    rates = [
        checked(tmp_path / str(index), lr_scheduler_type="constant", lr_milestones=milestones)[0]["base_moved"]
        for index, milestones in enumerate((None, [0.1]))
    ]
    assert rates[0] == rates[1]


def test_planned_steps_are_counted_from_epochs(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, max_steps=-1, num_train_epochs=2.5, gradient_accumulation_steps=4, estimator="none")
    assert found["planned_steps"] == math.ceil(2.5 * 2)  # 24 rows are 6 batches of 4, two windows of them an epoch


def test_without_an_estimator(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, estimator="none")
    assert found["problems"] == found["warnings"] == found["meta_loss"] == []
    assert found["estimator"] == "none"
    assert not {"times_the_plain_step", "meta_moved_a_step", "meta_cosine_to_exact"} & found.keys()


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "base stands still": ({"learning_rate": 0.0, "estimator": "none"}, "the base model did not move: raise learning_"),
    "meta stands still": ({"meta_learning_rate": 0.0}, "the meta network did not move: raise meta_learning_rate"),
    "zero": ({"make": untransformed}, "the hypergradient is zero: the meta network does not reach the meta loss"),
    "NaN": (
        {"make": lambda: exploding(lambda index: index in (3, 8))},
        "2 of 9 hypergradients were not finite: see the losses, lower learning_rate",
    ),
    "all NaN": (
        {"make": lambda: exploding(lambda index: True), "max_skipped_meta_steps": 2},
        "9 of 9 hypergradients were not finite: see the losses, lower learning_rate",
    ),
    "inexact": (
        {"estimator_kwargs": {"engine": "finite_difference", "radius": 300.0}},
        r".*radius=300.0.*\) has a cosine of [-0.\d]+ to the exact hypergradient: set engine: double_backward",
    ),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_problems(tmp_path: Path, what: str) -> None:
    settings, message = PROBLEMS[what]
    found, _ = checked(tmp_path, **settings)
    (problem,) = found["problems"]
    assert re.match(message, problem)
    lines = lines_of(found)
    assert lines[-1].startswith("PROBLEM: ")
    assert f"PROBLEM: {problem}" in lines
    assert "OK" not in lines
    assert "\n" not in problem


def test_meta_parameters_without_a_hypergradient_are_named(tmp_path: Path) -> None:
    found, trainer = checked(tmp_path, lambda: shallow(languages=("source", "other")))
    (warning,) = found["warnings"]
    other = [name for name in meta_weights(trainer) if name.startswith("nets.1.")]
    assert len(other) > 2
    assert warning == f"the hypergradient of {', '.join(other)} was zero in every step: they learn nothing"
    assert f"WARNING: {warning}" in lines_of(found)
    assert found["problems"] == []


def test_a_meta_network_that_hardly_moves_is_a_warning(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, meta_learning_rate=1e-6)
    (warning,) = found["warnings"]
    assert "may stay at its start; raise meta_learning_rate" in warning
    assert found["problems"] == []


def test_what_the_diagnostics_warn_of_is_found(tmp_path: Path) -> None:
    found, trainer = checked(tmp_path, estimator="evograd", estimator_kwargs={"sigma": 1.0}, meta_adam_epsilon=1e3)
    warned = trainer.meta_level.diagnostics.warned  # type: ignore[union-attr]
    assert {"regime", "epsilon"} <= warned.keys()
    assert set(warned.values()) <= set(found["warnings"])
    assert found["meta_effective_copies"] < 1.1
    assert found["meta_noise_scale"] > 10


def test_finite_differences_are_said_to_stand_in(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, activation_checkpointing=True)
    assert found["problems"] == []
    assert found["second_derivatives"].startswith("activation_checkpointing")
    assert found["warnings"] == [
        "the diagnostics compare with finite differences, not exactly: the task rules second derivatives out"
    ]


def test_a_kernel_that_cannot_is_refused_as_in_a_run(tmp_path: Path) -> None:
    def fused() -> CrossLingualTagger:
        tagger = tiny_tagger()
        tagger.base.config._attn_implementation = "flash_attention_2"
        return tagger

    with pytest.raises(ValueError, match=r"attention kernel.*: use one_step with engine finite_difference"):
        checked(tmp_path, fused, meta_precision="bf16", estimator_kwargs={"engine": "jvp"})


def test_an_engine_that_cannot_is_refused_as_in_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine jvp cannot differentiate.*: use engine double_backward"):
        checked(tmp_path, once_differentiable_tagger, estimator_kwargs={"engine": "jvp"})


def test_where_nothing_is_exact_the_rest_is_checked(tmp_path: Path) -> None:
    found, _ = checked(tmp_path, estimator="evograd", optim="rmsprop")
    assert "RMSprop has no rule" in found["exact_hypergradient"]
    assert "meta_cosine_to_exact" not in found
    assert found["problems"] == []
    assert found["times_the_plain_step"] > 0


FITTED = {"optim": "sgd", "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    ("name", "fields", "steps", "answers"),
    [
        ("unroll", {"episode_length": 4}, 12, [4, 8, 12]),
        ("greedy", {"episode_length": 4, "meta_every": 2}, 18, range(2, 19, 2)),
        ("hyperdistill", {"episode_length": 5, "meta_every": 2, **FITTED}, 24, range(6, 25, 2)),
    ],
)
def test_estimators_with_episodes(
    tmp_path: Path, name: str, fields: dict[str, Any], steps: int, answers: Sequence[int]
) -> None:
    """Three episodes of an estimator that answers at their ends; one more of one that may need the first itself."""
    found, trainer = checked(tmp_path, lambda: tiny_tagger(dropout=False), estimator=name, **fields)
    assert trainer.state.global_step == steps
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "meta_loss" in entry] == list(answers)
    assert found["problems"] == []
    if name == "unroll":  # whose horizon is not one step, which is no problem
        assert found["meta_cosine_to_one_step"] < 0.99
    assert found.keys() >= {"meta_cosine_to_one_step", "meta_norm_by_one_step"}
    assert not found.keys() & {"meta_cosine_to_exact", "meta_norm_by_exact"}
    period = found["meta_moves_at_most"] / found["meta_moved_a_step"]
    assert period == pytest.approx(300 / (answers[1] - answers[0]))


def test_no_meta_step_at_all_is_a_problem(tmp_path: Path) -> None:
    """There is none at a learning rate of zero."""
    found, _ = checked(tmp_path, learning_rate=0.0)
    assert found["problems"] == [
        "the base model did not move: raise learning_rate",
        "no meta step was made in 9 base steps",
    ]


def test_steps_that_are_diagnosed_and_the_first_period_are_not_timed() -> None:
    run = object.__new__(FewSteps)
    args = SimpleNamespace(meta_every=2, episode_length=None)
    seconds = [[50, 50], [1, 3], [90, 90], [2, 4], [3, 5], [90, 90], [4, 6], [50, 0], [90, 90]]
    run._seconds = [float(second) for pair in seconds for second in pair]
    level = SimpleNamespace(estimator=OneStep(), diagnostics=Diagnostics(OneStep(), 6))
    run.trainer = SimpleNamespace(args=args, estimator=OneStep(), meta_level=level)  # type: ignore[assignment]
    assert run.seconds_per_step == 4.0  # the median of 2, 3, 4, 5 and 25


def test_the_arguments_are_left_alone(tmp_path: Path) -> None:
    args = tiny_arguments(tmp_path, estimator="none", max_steps=77)
    before = copy.deepcopy(args.to_dict())
    check_training(
        lambda own: MetaTrainer(
            tiny_tagger(), own, train_dataset=random_rows(8, seed=1, language=0), data_collator=collate
        ),
        args,
    )
    assert args.to_dict() == before


def test_the_report_reads_well() -> None:
    found = {"a": 1234567, "b": 0.123456, "c": {"x": 1, "y": 2.0}, "d": [1.5, 2.25], "e": "text", "problems": []}
    assert lines_of({**found, "warnings": ["careful"]}) == [
        "a: 1,234,567", "b: 0.1235", "c: x 1, y 2", "d: 1.5 2.25", "e: text", "WARNING: careful", "OK, with 1 warning",
    ]  # fmt: skip
    assert lines_of({**found, "warnings": ["careful", "slow"]})[-1] == "OK, with 2 warnings"
