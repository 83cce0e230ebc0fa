"""Every command line of the docs has settings that there are: each is read as its command would, and not run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.cosines import CosineArguments
from metaxl_evo.benchmark.horizons import HorizonArguments
from metaxl_evo.cli import COMMANDS, RunArguments
from metaxl_evo.experiments import memory_command
from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.study import Study
from metaxl_evo.experiments.task import TASKS, find_task
from metaxl_evo.ner.evaluate_command import EvaluationArguments
from metaxl_evo.ner.predict_command import PredictionArguments
from metaxl_evo.ner.rank_command import RankArguments
from metaxl_evo.training.memory_estimate import MemoryArguments
from metaxl_evo.training.parser import given_text, parse_arguments
from metaxl_evo.weighting.export import ExportArguments
from vision_tasks.illustration import IllustrationArguments

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
CODE = re.compile(r"^```bash\n(.*?)^```|`([^`\n]+)`", re.DOTALL | re.MULTILINE)
OURS = re.compile(r"(?:metaxl-evo|(?:-m metaxl_evo(?!\.))|scripts/(\w+)\.py) (.*)")
Reader = Callable[[list[str]], object]


def of_task(name: str, *others: Any) -> Reader:
    task = find_task(name)
    types = (RunsArguments, *others, task.settings, task.training)
    return lambda argv: parse_arguments(types, [*argv, "--use_cpu=true"], task.configs)


def of(settings: type, room: str | None = None) -> Reader:
    return lambda argv: parse_arguments((settings,), argv, room)


def study(argv: list[str]) -> None:
    config = [] if argv[0].startswith("-") else ["--config"]
    Study([*config, *argv, "--output_dir=unused", "--use_cpu=true"])


READERS: dict[str, Reader] = {
    **{name.replace("_", "-"): of_task(name) for name in TASKS},
    "compare_cosines": lambda argv: of_task(given_text("task", argv) or CosineArguments.task, CosineArguments)(argv),
    "compare_horizons": of_task("ner", HorizonArguments),
    "evaluate": of(EvaluationArguments),
    "predict": of(PredictionArguments),
    "rank-sources": of(RankArguments),
    "benchmark": of(BenchmarkArguments, "benchmark"),
    "estimate-memory": lambda argv: of(MemoryArguments)(memory_command.options(argv)),
    "illustrate": of(IllustrationArguments, "vision"),
    "run": lambda argv: parse_arguments((RunArguments,), argv[1:]),
    "export-mixture": lambda argv: of(ExportArguments)(argv[1:]),
    "study": study,
    "check": lambda argv: READERS[argv[0]](argv[1:]),
    **dict.fromkeys(("report", "env", "configs", "demo"), lambda argv: None),
}
SCRIPTS = {
    "train_ner": "ner", "train_pos": "pos", "train_sentiment": "sentiment",
    "train_noisy_labels": "noisy-labels", "train_fewshot": "fewshot",
    "train_rotation": "rotation",
    "train_hyper_cleaning": "hyper-cleaning", "train_schedule": "schedule",
    "evaluate_ner": "evaluate", "predict_ner": "predict", "benchmark_estimators": "benchmark",
}  # fmt: skip


def commands(text: str) -> Iterator[str]:
    """Lines of bash blocks and code in a line, without comments."""
    for block, inline in CODE.findall(text):
        yield from re.sub(r"\\\n", " ", block or inline).splitlines()


class Command(NamedTuple):
    """The script that a line names, if any; its word behind `metaxl-evo`; the options."""

    script: str | None
    name: str
    argv: list[str]


def parsed(line: str) -> Command | None:
    """The command of a line, where it holds one that is not an abbreviation."""
    found = OURS.search(line)
    if found is None:
        return None
    text = found[2].replace("$SLURM_ARRAY_TASK_ID", "0")
    words = shlex.split(re.split(r"[>|&;]", text)[0], comments=True)
    name, argv = (words[0], words[1:]) if found[1] is None else (SCRIPTS.get(found[1], found[1]), words)
    if not argv or "..." in argv or argv == ["--help"] or name not in {*READERS, *COMMANDS}:
        return None
    return Command(found[1], name, argv)


def read(line: str) -> bool:
    """Whether a line holds one of our commands with options, all of which there are."""
    command = parsed(line)
    if command is None:
        return False
    READERS[command.name]([word for word in command.argv if not word.startswith("--accelerate_config")])
    return True


@pytest.fixture(scope="module")
def lines() -> list[tuple[str, str]]:
    return [(page.name, line) for page in PAGES for line in commands(page.read_text("utf-8"))]


def test_every_command_has_settings_that_there_are(
    lines: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("study", "trust"):  # the pages' own files
        (tmp_path / f"{name}.yaml").write_text(
            "target_languages: [sw, ig]\nruns: {joint: {method: joint_training}, evograd: {estimator: evograd}}\n"
        )
    assert sum(read(line) for _, line in lines) >= 48


def test_one_that_is_wrong_is_seen() -> None:
    with pytest.raises(ValueError, match="unknown option '--methodd'"):
        read("accelerate launch scripts/train_ner.py --config configs/ner/quickstart.yaml --methodd metaxl")
    with pytest.raises(ValueError, match="unknown settings file 'quickstartt'"):
        read("metaxl-evo check ner --config quickstartt")
