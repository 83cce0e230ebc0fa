"""Any configuration of the scripts is accepted or refused by one readable line; nothing of a library comes through.

`METAXL_EXAMPLES=2000 pytest tests/scripts/test_config_properties.py` looks further than the suite does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.trainer_callback import CallbackHandler

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.estimators import ESTIMATORS
from metaxl_evo.experiments.arguments import RunsArguments, StudyArguments
from metaxl_evo.ner.arguments import NerArguments, NerTrainingArguments
from metaxl_evo.ner.evaluate_command import EvaluationArguments
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments
from scripts import train_ner
from tests.scripts.refusals import assert_is_one_line, yaml_of
from tests.scripts.runs import TINY, argv
from vision_tasks.fewshot_arguments import FewShotArguments
from vision_tasks.hyper_cleaning_task import HyperCleaningArguments
from vision_tasks.illustration import IllustrationArguments
from vision_tasks.noisy_labels_task import NoisyLabelsArguments
from vision_tasks.rotation_task import RotationArguments
from vision_tasks.schedule_task import ImageScheduleArguments

EXAMPLES = int(os.environ.get("METAXL_EXAMPLES", "0"))
SCRIPTS: dict[str, tuple[tuple[type, ...], dict[str, str]]] = {
    "train_ner": ((RunsArguments, NerArguments, NerTrainingArguments), {"use_cpu": "true"}),
    "evaluate_ner": (
        (EvaluationArguments,),
        {"model_name_or_path": "m", "dataset": "d", "languages": "[a]", "use_cpu": "true"},
    ),
    "benchmark_estimators": ((BenchmarkArguments,), {"output_dir": "o"}),
    "illustrate": ((IllustrationArguments,), {"output_dir": "o"}),
    # Their other arguments are those of train_ner.
    "study": ((StudyArguments,), {}),
    "train_noisy_labels": ((NoisyLabelsArguments,), {}),
    "train_fewshot": ((FewShotArguments,), {}),
    "train_rotation": ((RotationArguments,), {}),
    "train_hyper_cleaning": ((HyperCleaningArguments,), {}),
    "train_schedule": ((ImageScheduleArguments,), {}),
}
FIELDS = {
    script: [field.name for one in types for field in dataclasses.fields(one) if field.init]
    for script, (types, _) in SCRIPTS.items()
}
# What an option may start: a compiler, worker processes, a server, a run without end, a download.
STARTERS = {"torch_compile", "torch_compile_backend", "torch_compile_mode", "dataloader_num_workers", "report_to"}
STARTERS |= {"push_to_hub", "hub_always_push", "dataloader_persistent_workers", "dataset", "model_name_or_path"}


def bounded(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run, unless more are asked for."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# Configurations

NUMBERS = st.one_of(
    st.integers(-3, 12).map(str),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.sampled_from(["1e400", "-1e-400", "0x10", "1_000", "1e-4", "007", ".5", "+1", "٣"]),
)
WORDS = st.one_of(
    st.sampled_from(
        ["x", "no", "none", "null", "true", "false", "on", "latest", "all", "auto", "steps", "epoch", "best"]
    ),
    st.sampled_from([*ESTIMATORS, "lookahead", "SGD", "sgd", "cosine", "metaxl", "aru", "beru", "synthetic", "sdpa"]),
    st.sampled_from(["", "''", "a b", "a=b", "a=b,c=1", "--x", "-", "é\u202e", "~nouser/x", "/proc/x", "2024-01-01"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
YAML = st.one_of(
    NUMBERS,
    WORDS,
    VALUES.map(json.dumps),
    VALUES.map(json.dumps).map(lambda text: f"'{text}'"),
    st.sampled_from(
        [
            *("&a x", "*a", "&a [*a]", "{a: &b 1, c: *b}", "!!binary aGk=", "!!python/object:os.system x", "!!int x"),
            *("!foo x", "!!timestamp 2024-01-01", "{x: !!set {a}}", "{1: 2}", "{? [a] : 1}", "[", "}", "|", "? a"),
        ]
    ),
)


@st.composite
def estimators(draw: st.DrawFn, wild: bool = True) -> dict[str, str]:
    """An estimator, or nearly one, with fields of its own and of nobody, as one line of YAML each."""
    name = draw(st.sampled_from([*ESTIMATORS, "none", "evogard"]))
    own = [field.name for field in dataclasses.fields(ESTIMATORS[name])] if name in ESTIMATORS else []
    values = st.one_of(
        VALUES if wild else st.none(),
        st.sampled_from([0.5, 2, 4, "sign", "fixed", "jvp", "finite_difference", "^classifier"]),
    )
    fields = draw(st.dictionaries(st.sampled_from([*own, "copys"]), values, max_size=3))
    return {"estimator": name, "estimator_kwargs": json.dumps(fields)}


def entries(script: str) -> st.SearchStrategy[dict[str, str]]:
    """Up to four settings, known or not, as YAML."""
    keys = st.sampled_from(FIELDS[script]) | st.sampled_from(["leaning_rate", "config", "<<", "1", "no_strict"])
    some = st.dictionaries(keys, YAML, max_size=3)
    if script != "train_ner":
        return some
    return st.tuples(some, st.just({}) | estimators()).map(lambda both: both[0] | both[1])


@st.composite
def configurations(draw: st.DrawFn, script: str) -> tuple[str, list[str]]:
    """The text of a file, and a command line."""
    text = yaml_of(SCRIPTS[script][1] | draw(entries(script)))
    text += draw(st.sampled_from([""] * 9 + ["seed: 1\nseed: 2\n", "\tseed: 1\n", "- seed\n", "---\nseed: 1\n", "\0"]))
    options: list[str] = []
    for key in draw(st.lists(st.sampled_from(FIELDS[script]), max_size=2)):
        value = draw(st.one_of(NUMBERS, WORDS, VALUES.map(json.dumps)))
        dotted = draw(st.sampled_from([""] * 6 + [".a", ".copies", ".a.b", "."]))
        options += draw(st.sampled_from([[f"--{key}{dotted}", value], [f"--{key}{dotted}={value}"], [f"--{key}"]]))
    return text, options


@contextmanager
def restored() -> Iterator[None]:
    """Environment, accelerate's state and torch's switches as they were."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32 = tf32


def accepted_or_refused(main: Callable[[Sequence[str]], Any], arguments: Sequence[str]) -> bool:
    """Whether `main` accepts; a refusal is one readable line, and anything else fails the test."""
    with restored():
        try:
            main(arguments)
        except SystemExit as stop:
            assert_is_one_line(stop.code, "error: .{8}")
            return False
        return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_parsing(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main = ends_with_one_line(lambda given: parse_arguments(SCRIPTS[script][0], given))
    seen = {True: 0, False: 0}

    @bounded(100)
    @given(configurations(script))
    def check(configuration: tuple[str, list[str]]) -> None:
        text, options = configuration
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        if "--help" not in options:
            seen[accepted_or_refused(main, ["--config", str(tmp_path / "run.yaml"), *options])] += 1

    check()
    assert min(seen.values()) >= 3  # of both kinds, or the strategies are worthless


# One value for one setting

AWKWARD = ["x", "-1", "1e400", "{a: 1}"]
MORE_AWKWARD = [
    *AWKWARD,
    "''",
    ".nan",
    str(10**20),
    "[1, 2]",
    '"\\0"',
    "true",
    "{",
    "!!binary aGk=",
    "0x10",
    "~",
    "1e-400",
    "{}",
]


@pytest.mark.parametrize(
    ("values", "every"), [(AWKWARD, 2), pytest.param(MORE_AWKWARD, 1, marks=pytest.mark.slow)], ids=["", "more"]
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_with_awkward_values(
    script: str, values: list[str], every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every other one, the settings in turn; a slow test has them all."""
    monkeypatch.chdir(tmp_path)
    types, needed = SCRIPTS[script]
    main = ends_with_one_line(lambda given: parse_arguments(types, given))
    file = tmp_path / "run.yaml"
    for index, key in enumerate(FIELDS[script]):
        for value in values[index % every :: every]:
            file.write_text(yaml_of({**needed, key: value}), encoding="utf-8")
            with restored():
                try:
                    main(["--config", str(file)])
                except SystemExit as stop:
                    assert_is_one_line(stop.code, rf"\b{key}|run\.yaml:\d+: cannot be read|{key.removesuffix('s')} ")


def test_every_field_is_there() -> None:
    assert {
        script: len(names) > least
        for (script, names), least in zip(FIELDS.items(), (150, 9, 15, 8, 10, 12, 25, 7, 7, 20), strict=True)
    } == dict.fromkeys(SCRIPTS, True)


# One training step


class StepMade(BaseException):
    """Ends a run behind its first step."""


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = CallbackHandler.on_step_end

    def on_step_end(self: CallbackHandler, *arguments: Any) -> None:
        ends(self, *arguments)
        raise StepMade

    monkeypatch.setattr(CallbackHandler, "on_step_end", on_step_end)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Settings over those of a tiny run: numbers that a user might try, and a few that nobody should."""
    keys = [key for key in FIELDS["train_ner"] if key not in STARTERS and key not in TINY and key != "output_dir"]
    values = st.one_of(
        st.sampled_from(
            ["0", "1", "2", "3", "0.5", "1e-3", "true", "false", "-1", "1e30", "x", "steps", "epoch", "no"]
        ),
        YAML,
    )
    known = st.just({}) | estimators(wild=False)  # 10**20 copies take their time: no mistake that can be seen
    return draw(st.dictionaries(st.sampled_from(keys), values, max_size=1)) | draw(known)


def test_a_first_step_is_made_or_refused(
    tmp_path: Path, data: Path, model: Path, one_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = {True: 0, False: 0}

    def first_step(arguments: Sequence[str]) -> None:
        with pytest.raises(StepMade):
            train_ner.main(arguments)

    @bounded(60)
    @given(runs())
    def check(chosen: dict[str, Any]) -> None:
        output = tmp_path / "out"
        shutil.rmtree(output, ignore_errors=True)
        file = tmp_path / "run.yaml"
        file.write_text(yaml_of(TINY | {"max_steps": 1} | chosen), encoding="utf-8")
        places = {"model_name_or_path": model, "dataset": data, "output_dir": output}
        seen[accepted_or_refused(first_step, ["--config", str(file), *argv(places)])] += 1

    check()
    assert min(seen.values()) > 5
