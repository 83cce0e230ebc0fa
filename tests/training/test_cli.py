"""`parse_arguments`: YAML first, the command line over it, one line for whatever is wrong with either."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import TrainingArguments

from metaxl_evo.training.cli import SettingsError
from metaxl_evo.training.parser import given_text, parse_arguments, resolve_config


@dataclass
class RunArguments:
    name: str | None = field(default=None, metadata={"help": "a lone % and an escaped %% in one help text"})
    rate: float = 0.5
    steps: int = 10
    fast: bool = False
    clean: bool = True
    check: bool | None = None
    languages: list[str] = field(default_factory=lambda: ["en"])
    layers: list[int] | None = None
    order: Literal["after_step", "lookahead"] = "after_step"
    reports: None | str | list[str] = "none"  # noqa: RUF036 (HfArgumentParser looks at the second)
    estimator_kwargs: dict[str, Any] = field(default_factory=lambda: {"copies": 2, "noise": {"sigma": 0.1}})
    options: dict | str | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError("steps: expected at least 0, found -1")


@dataclass
class DataArguments:
    dataset: str
    portion: float = 0.25


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def parse(*argv: str) -> RunArguments:
    (arguments,) = parse_arguments((RunArguments,), argv)
    return arguments


def complaint(*argv: str, types: tuple[type, ...] = (RunArguments,)) -> str:
    with pytest.raises(SettingsError) as error:
        parse_arguments(types, argv)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- values ----------------------------------------------------------------------------------------------------------


def test_nothing_given_leaves_every_default_to_the_dataclass():
    assert parse() == RunArguments()


def test_yaml_then_command_line(config):
    file = config("rate: 0.1\nsteps: 3\n")
    assert (parse("--config", file).rate, parse("--config", file).steps) == (0.1, 3)
    over = parse("--steps", "4", f"--config={file}")  # wherever --config stands, the command line wins
    assert (over.rate, over.steps) == (0.1, 4)


def test_several_types_share_one_file(config):
    run, data = parse_arguments(
        (RunArguments, DataArguments), ["--config", config("rate: 1\ndataset: synthetic\n"), "--portion", "0.5"]
    )
    assert (run.rate, data) == (1.0, DataArguments("synthetic", 0.5))


YAML_VALUES = [
    ("rate: 1e-4", "rate", 1e-4),
    ("rate: -5E-5", "rate", -5e-5),
    ("rate: '2e-3'", "rate", 2e-3),
    ("rate: 1", "rate", 1.0),
    ("rate: null", "rate", 0.5),
    ("rate:", "rate", 0.5),
    ("name: no", "name", "no"),
    ("name: 007", "name", "007"),
    ("name: 2024-01-01", "name", "2024-01-01"),
    ("name: 'null'", "name", "null"),
    ("name: --fast", "name", "--fast"),
    ("name: ''", "name", ""),
    ("name: a = b", "name", "a = b"),
    ("fast: true", "fast", True),
    ("fast: yes", "fast", True),
    ("clean: false", "clean", False),
    ("check: false", "check", False),
    ("languages: [no, sw]", "languages", ["no", "sw"]),
    ("languages:\n  - -x\n  - a,b", "languages", ["-x", "a,b"]),
    ("languages: sw", "languages", ["sw"]),
    ("languages: []", "languages", []),
    ("layers: [6, 12]", "layers", [6, 12]),
    ("layers: 6", "layers", [6]),
    ("order: lookahead", "order", "lookahead"),
    ("reports: [a, b]", "reports", ["a", "b"]),
    ("reports: a,b", "reports", "a,b"),
    (
        "estimator_kwargs: {copies: 8, sigma: 1e-2, on: true, what: no, parts: [1, x], none: null}",
        "estimator_kwargs",
        {"copies": 8, "sigma": 0.01, "on": True, "what": "no", "parts": [1, "x"], "none": None},
    ),
    ("estimator_kwargs: '{\"copies\": 8}'", "estimator_kwargs", {"copies": 8}),
    ("options: {a: {b: 1}}", "options", {"a": {"b": 1}}),
    ("options: file.json", "options", "file.json"),
    ("", "rate", 0.5),
    ("# only a comment\n", "rate", 0.5),
]


@pytest.mark.parametrize(("text", "key", "value"), YAML_VALUES)
def test_yaml_value(config, text, key, value):
    found = getattr(parse("--config", config(text)), key)
    assert found == value
    assert type(found) is type(value)


def test_a_file_builds_on_another(config, tmp_path):
    """Each is read from the folder of the one that names it; null leaves the default, not what the base says."""
    (tmp_path / "more").mkdir()
    config("rate: 0.1\nsteps: 3\nname: deep\nlanguages: [sw, ig]\n", "more/deep.yaml")
    config("base: deep.yaml\nrate: 0.2\nname: middle\n", "more/middle.yaml")
    found = parse("--config", config("base: more/middle.yaml\nname: null\nlanguages: [rw]\n"), "--order", "lookahead")
    assert (found.rate, found.steps, found.name, found.languages, found.order) == (0.2, 3, None, ["rw"], "lookahead")
    assert complaint("--config", config("base: more/deep.yaml\nstep: 1\n")).startswith(
        f"{tmp_path}/run.yaml:2: unknown"
    )
    assert complaint("--config", config("base: more/bad.yaml\n")).endswith("Valid: deep.yaml, middle.yaml")


@pytest.mark.parametrize("text", ["base: [a.yaml]", "base:", "base: {a: b}"])
def test_a_base_is_one_file(config, text):
    assert complaint("--config", config(text)).endswith("run.yaml:1: base: expected one file name")


def test_a_file_cannot_build_on_itself(config):
    config("base: run.yaml\n", "other.yaml")
    message = complaint("--config", config("base: other.yaml\n"))
    assert message.endswith(
        "other.yaml:1: base: " + config("base: other.yaml\n") + " is read already: a file cannot build on itself"
    )


def test_options_say_what_a_file_does(config):
    file = config("rate: 1e-4\nfast: no\nlanguages: [no, sw]\nname: null\nestimator_kwargs: {a: {b: 1}}\n")
    given = ["--config", file, "--steps", "4", "--estimator_kwargs.c", "2"]
    options = resolve_config((RunArguments,), given)
    assert not any("config" in option for option in options)
    assert parse(*options) == parse(*given)


def test_one_setting_is_known_before_the_others(config):
    file = config("task: rotation\nleaning_rate: 1\n")
    assert given_text("task", ["--config", file]) == "rotation"
    assert given_text("task", ["--config", file, "--task", "ner"]) == "ner"
    assert given_text("task", ["--x", "1"]) is None


COMMAND_LINES = [
    ("--rate 1e-4", "rate", 1e-4),
    ("--rate -1", "rate", -1.0),
    ("--rate=-1e-4", "rate", -1e-4),
    ("--fast", "fast", True),
    ("--fast false", "fast", False),
    ("--no_clean", "clean", False),
    ("--languages sw,ig,rw", "languages", ["sw", "ig", "rw"]),
    ("--languages sw ig rw", "languages", ["sw", "ig", "rw"]),
    ("--languages sw, ig", "languages", ["sw", "ig"]),
    ("--layers 6,12", "layers", [6, 12]),
    ('--languages ["a,b"]', "languages", ["a,b"]),
    ("--reports a", "reports", "a"),
    ("--reports a b", "reports", ["a", "b"]),
    ('--estimator_kwargs {"copies":8}', "estimator_kwargs", {"copies": 8}),
    ("--estimator_kwargs.copies 8", "estimator_kwargs", {"copies": 8, "noise": {"sigma": 0.1}}),
    ("--estimator_kwargs.noise.sigma=1e-2", "estimator_kwargs", {"copies": 2, "noise": {"sigma": 0.01}}),
    ("--estimator_kwargs.shift -1", "estimator_kwargs", {"copies": 2, "noise": {"sigma": 0.1}, "shift": -1}),
    ("--options.a x --options.b true", "options", {"a": "x", "b": True}),
]


@pytest.mark.parametrize(("line", "key", "value"), COMMAND_LINES)
def test_command_line_value(line, key, value):
    found = getattr(parse(*line.split(" ")), key)
    assert found == value
    assert type(found) is type(value)


def test_null_unsets_what_the_file_has_set(config):
    file = config("layers: [1, 2]\ncheck: true\nname: 'null'\n")
    assert parse("--config", file).name == "null"  # a text of the file's
    found = parse("--config", file, "--layers", "null", "--check=null", "--name", "null", "--options", "null")
    assert (found.layers, found.check, found.name, found.options) == (None, None, None, None)
    assert "expected an integer, found 'null'" in complaint("--steps", "null")


def test_dotted_overrides_change_the_files_mapping_and_json_replaces_it(config):
    file = config("estimator_kwargs:\n  copies: 4\n  sigma: 0.5\n")
    assert parse("--config", file, "--estimator_kwargs.copies", "8").estimator_kwargs == {"copies": 8, "sigma": 0.5}
    assert parse("--config", file, "--estimator_kwargs", '{"copies": 1}').estimator_kwargs == {"copies": 1}
    both = parse("--config", file, "--estimator_kwargs.sigma", "2", "--estimator_kwargs", '{"copies": 1}')
    assert both.estimator_kwargs == {"copies": 1, "sigma": 2}


def test_a_list_on_the_command_line_replaces_the_files(config):
    assert parse("--config", config("languages: [a, b, c]"), "--languages", "d").languages == ["d"]


def test_defaults_are_not_shared_between_calls():
    parse("--estimator_kwargs.copies", "8")
    assert parse().estimator_kwargs == {"copies": 2, "noise": {"sigma": 0.1}}


def test_json_file(config):
    file = config('{\n\t"rate": 1e-4,\n\t"languages": ["no"],\n\t"estimator_kwargs": {"on": true}\n}', "run.json")
    found = parse("--config", file)
    assert (found.rate, found.languages, found.estimator_kwargs) == (1e-4, ["no"], {"on": True})


def test_sys_argv_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "7"])
    (found,) = parse_arguments((RunArguments,))
    assert found.steps == 7


# --- complaints ------------------------------------------------------------------------------------------------------

BAD_FILES = [
    ("rats: 1", ":1: unknown key 'rats': did you mean 'rate'? Valid: name, rate, steps"),
    ("steps: 1\n\nno_clean: true", ":3: unknown key 'no_clean'"),
    ("config: other.yaml", ":1: unknown key 'config'"),
    ("rate: 1\nsteps: 2\nrate: 3", ":3: cannot be read: 'rate' is given twice, first on line 1"),
    ("estimator_kwargs:\n  copies: 1\n  copies: 2", ":3: cannot be read: 'copies' is given twice, first on line 2"),
    ("- rate\n- steps", ":1: expected 'key: value' lines"),
    ("just a text", ":1: expected 'key: value' lines"),
    ("rate: 1\nlanguages: [a, b\nsteps: 2", ":3: cannot be read: expected ',' or ']'"),
    ("rate: 1\n\tsteps: 2", ":2: cannot be read: "),
    ("rate: 1\n---\nrate: 2", ":2: cannot be read: but found another document"),
    ("steps: 1\nrate: fast", ":2: rate: expected a number, found 'fast'"),
    ("steps: 1e3", ":1: steps: expected an integer, found '1e3'"),
    ("fast: maybe", ":1: fast: expected true or false, found 'maybe'"),
    ("layers: [1, two]", ":1: layers: expected an integer, found 'two'"),
    ("layers:\n- 1\n- [2]", ":3: layers: expected a list of plain values"),
    ("languages: [sw, null]", ":1: languages: expected a list of plain values"),
    ("rate: [1]", ":1: rate: expected one value, found a list"),
    ("rate: {a: 1}", ":1: rate: expected one value, found a mapping"),
    ("estimator_kwargs: [1]", ":1: estimator_kwargs: expected a mapping, found a list"),
    ("estimator_kwargs: 8", ":1: estimator_kwargs: expected a JSON mapping such as '{\"copies\": 8}', found '8'"),
    ("languages: {sw: 1}", ":1: languages: expected a list, found a mapping"),
    ("order: lookahed", ":1: order: unknown value 'lookahed': did you mean 'lookahead'? Valid: after_step, lookahead"),
]


@pytest.mark.parametrize(("text", "expected"), BAD_FILES)
def test_bad_file(config, text, expected):
    file = config(text)
    message = complaint("--config", file)
    assert message.startswith(file)
    assert expected in message


BAD_COMMAND_LINES = [
    ("--rats 1", "unknown option '--rats': did you mean '--rate'? Valid: --name, --rate"),
    ("--lang sw", "unknown option '--lang'"),  # no abbreviations
    ("--rate.x 1", "unknown option '--rate.x'"),
    ("--rate fast", "rate: expected a number, found 'fast'"),
    ("--rate", "rate: expected one argument"),
    ("--rate 1 2", "unexpected argument '2'"),
    ("-x", "unexpected argument '-x'"),
    ("--order never", "order: unknown value 'never'"),
    ("--layers 1,two", "layers: expected an integer, found 'two'"),
    ("--estimator_kwargs copies=8", "estimator_kwargs: expected a JSON mapping"),
    ("--estimator_kwargs.copies", "--estimator_kwargs.copies: expected one value"),
    ("--estimator_kwargs.copies --fast", "--estimator_kwargs.copies: expected one value"),
    ("--estimator_kwargs. 8", "--estimator_kwargs.: expected one value"),
    ("--estimator_kwargs.copies.x 8", "copies is 2 here, not a mapping"),
    ("--estimator_kwargs.x [1", "--estimator_kwargs.x: '[1' is not a value"),
    ("--options file.json --options.a 1", "options is 'file.json' here, not a mapping"),
    ("--config", "--config: expected one value"),
    ("--conf run.yaml", "unknown option '--conf': did you mean '--config'?"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_COMMAND_LINES)
def test_bad_command_line(line, expected):
    assert expected in complaint(*line.split(" "))


def test_the_place_is_the_files_only_where_the_file_is_to_blame(config):
    file = config("rate: 1\nsteps: 2\n")
    assert complaint("--config", file, "--rate", "fast") == "rate: expected a number, found 'fast'"


def test_missing_required_option():
    assert "--dataset" in complaint(types=(DataArguments,))


def test_a_typo_is_named_before_what_it_leaves_missing():
    message = complaint("--datasset", "x", types=(DataArguments,))
    assert message.startswith("unknown option '--datasset': did you mean '--dataset'?")


def test_unreadable_files(config, tmp_path):
    config("rate: 1", "quick.yaml")
    assert "unknown file 'quik.yaml': did you mean 'quick.yaml'?" in complaint("--config", str(tmp_path / "quik.yaml"))
    assert "no such file" in complaint("--config", str(tmp_path / "nowhere" / "run.yaml"))
    assert "expected a file that ends in .yaml, .yml, .json" in complaint("--config", config("rate: 1", "run.toml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read" in complaint("--config", str(tmp_path / "folder.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00rate: 1")
    assert "cannot be read" in complaint("--config", str(tmp_path / "binary.yaml"))
    (tmp_path / "control.yaml").write_bytes(b"rate: \x01")
    assert "cannot be read" in complaint("--config", str(tmp_path / "control.yaml"))


@dataclass
class Judged:
    """Settings that a library looks at, and does not name in its complaint."""

    backend: str = "nccl"
    timeout: int = 5
    folder: str = "here"

    def __post_init__(self) -> None:
        MADE.append(self)
        if self.timeout > 0 and self.backend == "gloo":
            raise RuntimeError("no\nrendezvous")
        if self.folder == "nowhere":
            raise OSError("no such place")
        if self.timeout < 0:
            raise LookupError("at no fault of these")


MADE: list[Judged] = []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--timeout 3 --folder here --backend gloo", "backend: cannot be used (RuntimeError: no rendezvous)"),
        ("--folder nowhere --backend gloo --timeout 0", "folder: cannot be used (OSError: no such place)"),
        ("--timeout -1 --folder there", "timeout: cannot be used (LookupError: at no fault of these)"),
    ],
)
def test_the_setting_to_blame_is_named(line, expected):
    MADE.clear()
    assert complaint(*line.split(" "), types=(Judged,)) == expected
    assert len(MADE) <= 3  # however many settings there are


@dataclass
class Faultless:
    name: str = "x"

    def __post_init__(self) -> None:
        if self.name:
            raise RuntimeError("whatever it is")


def test_where_no_setting_is_to_blame_the_class_is_named():
    assert complaint("--name", "y", types=(Faultless,)) == "Faultless: cannot be used (RuntimeError: whatever it is)"


def test_errors_of_post_init_pass_through():
    with pytest.raises(ValueError, match="steps: expected at least 0, found -1") as error:
        parse("--steps", "-1")
    assert type(error.value) is ValueError


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help_all")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--config", "--rate", "--no_clean", "--estimator_kwargs"))
    assert "a lone % and an escaped % in one help text" in " ".join(text.split())
    assert "(default: 0.5)" in text


@pytest.mark.slow
def test_uncaught_it_ends_a_script_with_one_line():
    code = (
        "import dataclasses\nfrom metaxl_evo.training.parser import parse_arguments\n"
        "A = dataclasses.make_dataclass('A', [('rate', float, 1.0)])\nparse_arguments((A,), ['--rats', '1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr == "unknown option '--rats': did you mean '--rate'? Valid: --rate, --config\n"


# --- with the library's own arguments --------------------------------------------------------------------------------


def test_training_arguments(config, tmp_path):
    file = config(
        f"output_dir: {tmp_path / 'out'}\nlearning_rate: 5e-5\nuse_cpu: true\noptim: adamw_torch\nreport_to: none\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nlabel_names: [labels]\neval_strategy: no\ndata_seed: 3\n"
    )
    run, training = parse_arguments((RunArguments, TrainingArguments), ["--config", file, "--max_steps", "5"])
    assert run == RunArguments()
    assert training.learning_rate == 5e-5
    assert isinstance(training.learning_rate, float)
    assert training.eval_strategy.value == "no"
    assert (training.max_steps, training.optim.value, training.data_seed) == (5, "adamw_torch", 3)
    assert (training.lr_scheduler_kwargs, training.label_names) == ({"num_cycles": 2}, ["labels"])


def test_training_arguments_defaults_are_the_librarys_own(tmp_path):
    given = ["--output_dir", str(tmp_path), "--use_cpu"]
    (ours,) = parse_arguments((TrainingArguments,), given)
    assert ours.to_dict() == TrainingArguments(output_dir=str(tmp_path), use_cpu=True).to_dict()


def test_training_arguments_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments((TrainingArguments,), ["--help"])
    assert stop.value.code == 0
    assert "--learning_rate" in capsys.readouterr().out


def test_an_option_that_transformers_dropped_is_unknown():
    assert "did you mean '--eval_strategy'" in complaint("--evaluation_strategy", "no", types=(TrainingArguments,))
