"""`metaxl-evo`: its commands, their help, settings files by name, and the launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metaxl_evo.cli import COMMANDS, main
from metaxl_evo.experiments.task import TASKS
from metaxl_evo.training.cli import SettingsError
from metaxl_evo.training.shipped_configs import find_config

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = (
    *("--config", "quickstart", "--target_languages", "beru", "--train_size", "24", "--eval_size", "8"),
    *("--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
)


def test_every_task_has_a_command() -> None:
    assert {name.replace("_", "-") for name in TASKS} < COMMANDS.keys()
    assert len(COMMANDS) == 28


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_fits_a_screen_or_two(
    name: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    command = COMMANDS.get(name or "")
    if command is not None and command.shows_help:
        with pytest.raises(SystemExit) as ended:
            main([str(name), "--help"])
        assert ended.value.code == 0
    else:
        assert main(["--help"] if name is None else [name, "-h"]) == 0
    printed = capsys.readouterr().out
    assert 0 < printed.count("\n") <= 120
    if command is not None and command.launched and name not in ("evaluate", "predict"):
        groups = [text.partition("\n")[0] for text in printed.split("\n\n")]
        assert groups[-2:] == ["The meta level", "of transformers' TrainingArguments (114 in all)"]
        assert "  --meta_learning_rate             Learning rate of the meta optimiser. (default: 0.001)\n" in printed


def test_the_list_of_commands_does_not_wait_for_what_they_import() -> None:
    asks = "import sys, metaxl_evo.cli; print(*{'peft', 'scipy', 'pandas'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["pandas"]  # of datasets, whose bars are hidden first


def test_help_all_is_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["rotation", "--help_all"])
    assert "--torch_compile_backend" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "room", "found"),
    [
        ("metaxl_one_step", None, "ner/metaxl_one_step"),
        ("quickstart", "study", "study/quickstart"),
        ("quickstart", "ner", "ner/quickstart"),
        ("ner/quickstart", "study", "ner/quickstart"),
        ("configs/vision/rotation_cpu.yaml", "study", "vision/rotation_cpu"),
    ],
)
def test_settings_files_have_names(
    named: str, room: str | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(named, room) == CONFIGS / f"{found}.yaml"
    own = tmp_path / named
    own.mkdir(parents=True)  # a folder, such as an output_dir, takes no name away
    assert find_config(named, room) == CONFIGS / f"{found}.yaml"
    own.rmdir()  # a file of the user's own comes first
    own.write_text("", encoding="utf-8")
    assert find_config(named, room) == Path(named)


def test_names_that_are_none() -> None:
    with pytest.raises(SettingsError, match=r"--config quickstart: say which: ner/quickstart, study/quickstart$"):
        find_config("quickstart")
    with pytest.raises(SettingsError, match=r"unknown settings file 'metaxl_one_stepp': did you mean .*, or a path$"):
        find_config("metaxl_one_stepp", "ner")
    with pytest.raises(SettingsError, match=r"cpuu': did you mean 'cpu'\? Valid: cpu, fsdp2, .*, or a file$"):
        main(["ner", "--accelerate_config", "cpuu"])
    with pytest.raises(ValueError, match="--accelerate_config: study starts its processes itself"):
        main(["study", "x.yaml", "--accelerate_config=cpu"])
    with pytest.raises(SettingsError, match=r"^error: demo: name the folder of a trained tagger"):
        main(["demo"])
    with pytest.raises(ValueError, match="unknown command to check 'evaluate'"):
        main(["check", "evaluate"])


def test_configs_and_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    there = [path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "accelerate"]
    assert listed == sorted(f"{path.parent.name}/{path.stem}" for path in there)
    assert len(listed) >= 31
    assert main(["env"]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["python"] == sys.version.split()[0]
    assert {"torch", "transformers", "gpu", "commit"} <= said.keys()


def test_a_task_its_check_and_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["check", "ner", *TINY, "--output_dir", str(out)]) == 0
    assert not out.exists()
    assert main(["ner", *TINY, "--output_dir", str(out)]) == 0
    f1 = json.loads((out / "results.json").read_text(encoding="utf-8"))["test"]["beru"]["f1"]
    capsys.readouterr()
    data = ["--dataset", "synthetic", "--languages", "beru", "--eval_size", "8", "--use_cpu", "true"]
    assert main(["evaluate", "--model_name_or_path", str(out), *data]) == 0
    assert f"| beru | {100 * f1:.2f} |" in capsys.readouterr().out


def test_a_named_profile_goes_through_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(os, "execv", lambda program, argv: started.append([program, *argv]) or sys.exit(0))
    with pytest.raises(SystemExit):
        main(["ner", "--accelerate_config", "multi_gpu", "--config", "quickstart"])
    assert started == [
        [
            *(sys.executable, sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(CONFIGS / "accelerate/multi_gpu.yaml"), "-m", "metaxl_evo", "ner"),
            *("--config", "quickstart"),
        ]
    ]


@pytest.mark.slow
def test_the_launcher_starts_a_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "metaxl_evo", "ner", "--accelerate_config", "cpu", *TINY, "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/results.json").is_file()
