"""The pages on estimators say what is: the tables, the settings, and the page on adding one, which is followed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

from metaxl_evo.estimators import ESTIMATORS
from metaxl_evo.estimators.table import ALSO, BLOCKS, MARKED, main, updated
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.episodes import Episodes
from metaxl_evo.training.parser import parse_arguments

ROOT = Path(__file__).parents[1]
CHOOSING = ROOT / "docs/estimators.md"
ADDING = ROOT / "docs/adding_an_estimator.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"`(?P<name>\w+\.py)`\s+in\s+`(?P<folder>[\w/]+/)`:|[Ii]n\s+`(?P<file>[\w/]+\.py)`:")


# The tables ----------------------------------------------------------------------------------------------------------


def test_the_tables_are_the_estimators_own() -> None:
    text = CHOOSING.read_text("utf-8")
    assert [found[2] for found in MARKED.finditer(text)] == ["summary", "facts", "costs", "formulas"]
    assert updated(text) == text, "run `make docs`, or: python -m metaxl_evo.estimators.table docs/estimators.md"


def test_a_stale_table_is_written_anew_and_nothing_else(tmp_path: Path) -> None:
    text = CHOOSING.read_text("utf-8")
    stale = text.replace("| at most 64 numbers |", "| any |").replace("2 F + 2 B + 1 J", "1 F")
    assert stale != text
    assert updated(stale) == text
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{stale}\nAfter `<!-- end -->`\n", "utf-8")
    main([str(page)])
    assert page.read_text("utf-8") == f"Before\n{text}\nAfter `<!-- end -->`\n"


def cells(block: str) -> dict[str, list[str]]:
    """Label -> the other cells of its row."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in BLOCKS[block]().splitlines()]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row[1:] for row in rows[2:]}


def test_every_estimator_has_its_rows() -> None:
    variants = {f"{name}, " + ", ".join(f"{k}: {v}" for k, v in also.items()) for name, also in ALSO.items()}
    assert list(cells("summary")) == list(ESTIMATORS)
    assert cells("facts").keys() == cells("costs").keys() == ESTIMATORS.keys() | variants
    assert re.findall(r"^- `(\w+)`", BLOCKS["formulas"](), re.MULTILINE) == list(ESTIMATORS)


@pytest.mark.parametrize("block", ["summary", "facts", "costs"])
def test_no_cell_is_empty(block: str) -> None:
    assert all(cell for row in cells(block).values() for cell in row)


def test_formulas_are_formulas() -> None:
    for line in BLOCKS["formulas"]().splitlines():
        assert re.match(r"- `\w+`: `value = [^`]*(vjp|w_k eps_k)[^`]*`\. .*\d{4}", line), line


@pytest.mark.parametrize(
    ("block", "label", "expected"),
    [  # by hand, from the papers' algorithms
        ("facts", "first_order", {"never", "nothing", "any", "no", "read by the outer loss"}),
        ("facts", "one_step", {"always", "at any step", "nothing", "SGD, Adam, AdamW", "yes"}),
        ("facts", "evograd", {"in expectation", "before the step", "none", "no"}),
        ("facts", "neumann", {"at optimum", "after it", "none with `finite_difference"}),
        ("facts", "unroll", {"always", "at an episode's end", "the episode's steps", "yes"}),
        ("facts", "unroll, horizon: 3", {"always", "at any step", "the episode's steps"}),
        ("facts", "drmad", {"never", "SGD", "the episode's steps"}),
        ("facts", "forward_mode", {"always", "trees like w", "at most 64 numbers"}),
        ("facts", "greedy", {"a tree like lam", "at any step"}),
        ("facts", "hyperdistill, scale: fixed", {"trees like w", "SGD, Adam, AdamW"}),
        ("costs", "sama", {"3 F + 3 B"}),  # the outer loss, and the inner one on two sides
        ("costs", "evograd", {"3 F + 3 B"}),  # the outer loss, and two copies
        ("costs", "unroll, horizon: 3", {"1 F + 1 B + 1 D", "1 F + 1 B + 3 D", "horizon: 3, recompute: false"}),
        ("costs", "greedy", {"2 F + 2 B + 1 J", "11 F + 11 B + 10 J"}),
        ("costs", "conjugate_gradient", {"1 F + 1 B + 6 J"}),  # five iterations and the mixed product
    ],
)
def test_facts_by_hand(block: str, label: str, expected: set[str]) -> None:
    assert expected <= set(cells(block)[label])


# The settings --------------------------------------------------------------------------------------------------------


def arguments(folder: Path, text: str) -> MetaTrainingArguments:
    file = folder / "settings.yaml"
    file.write_text(text, "utf-8")
    given = ["--config", str(file), "--use_cpu", "true", "--output_dir", str(folder)]
    return parse_arguments((MetaTrainingArguments,), given)[0]


SETTINGS = [body for kind, body in FENCE.findall(CHOOSING.read_text("utf-8")) if kind == "yaml"]


def test_the_settings_are_there() -> None:
    names = [re.findall(r"^estimator: (\w+)", text, re.MULTILINE) for text in SETTINGS]
    assert names == [["one_step"], ["evograd"], ["hyperdistill"], ["unroll"], ["forward_mode"]]


@pytest.mark.parametrize("text", SETTINGS, ids=lambda text: text.split()[1])
def test_settings_are_accepted(text: str, tmp_path: Path) -> None:
    """By the parser, the estimator, and the episodes of a trainer."""
    args = arguments(tmp_path, text)
    estimator = args.make_estimator()
    assert estimator is not None
    Episodes(estimator, args)


def test_the_default_written_out_is_the_default(tmp_path: Path) -> None:
    written, default = arguments(tmp_path, SETTINGS[0]), arguments(tmp_path, "")
    assert written.make_estimator() == default.make_estimator()
    assert (written.meta_order, written.meta_learning_rate) == (default.meta_order, default.meta_learning_rate)


def test_the_arguments_and_metrics_named_exist() -> None:
    source = "".join(file.read_text("utf-8") for file in (ROOT / "metaxl_evo").rglob("*.py"))
    updates = " ".join(re.findall(r"diagnostics\.update\((.*)\)", source))
    logged = re.findall(r'diagnostics\["(\w+)"\]', source) + re.findall(r"(\w+)=", updates)
    known = {f"meta_{name}" for name in logged} | {field.name for field in fields(MetaTrainingArguments)}
    named = set(re.findall(r"`((?:meta|episode|max|save|estimator)_\w+)", CHOOSING.read_text("utf-8")))
    assert len(named) > 12
    assert named <= known


# Adding one ----------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A code block of the page, and the file that the text before it names."""

    kind: str
    body: str
    file: str


def code_blocks(text: str) -> Iterator[Block]:
    end, place = 0, ""
    for found in FENCE.finditer(text):
        for named in PLACE.finditer(text[end : found.start()]):
            place = named["file"] or named["folder"] + named["name"]
        end = found.end()
        yield Block(found[1], found[2], place)


def insert(file: Path, diff: str) -> None:
    """The lines marked `+`, behind the line before them, which the file has once."""
    after, *new = diff.splitlines()
    text = file.read_text("utf-8")
    assert text.splitlines().count(after[1:]) == 1, f"{file} has not this line once: {after[1:]}"
    assert after[0] == " "
    assert all(line[0] == "+" for line in new)
    lines = "".join(line[1:] + "\n" for line in new)
    file.write_text(text.replace(f"{after[1:]}\n", f"{after[1:]}\n{lines}"), "utf-8")


class Copy:
    """A copy of what the page speaks of, in which it is followed block by block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("metaxl_evo", "tests/estimators"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        (folder / "docs").mkdir()
        for name in ("pyproject.toml", "tests/conftest.py", "tests/processes.py", "docs/estimators.md"):
            shutil.copy(ROOT / name, folder / name)
        self.commands: list[str] = []
        self.settings: list[str] = []

    def follow(self, text: str) -> None:
        for block in code_blocks(text):
            file = self.folder / block.file
            if block.kind == "python":
                assert not file.exists(), f"{block.file} is there already"
                file.write_text(block.body, "utf-8")
            elif block.kind == "diff":
                insert(file, block.body)
            elif block.kind == "yaml":
                self.settings.append(block.body)
            else:
                assert block.kind == "bash"
                self.commands += block.body.splitlines()

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """A command line of the page, with this interpreter, on the copy's own packages."""
        assert command.startswith("python ")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        return subprocess.run(
            f'"{sys.executable}" {command.removeprefix("python ")}',
            shell=True,
            cwd=self.folder,
            env=environment | {"PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=280,
        )


@pytest.mark.slow
def test_the_page_on_adding_an_estimator_is_followed(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    copy.follow(ADDING.read_text("utf-8"))
    tests, tables = copy.commands
    done = copy.run(tests)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 11 * 8  # tests of the suite, times the pairs

    assert copy.run(tables).returncode == 0
    before, after = ((folder / "docs/estimators.md").read_text("utf-8") for folder in (ROOT, tmp_path))
    added = [line for line in after.splitlines() if line not in before.splitlines()]
    assert added
    assert all("`virtual_step`" in line for line in added)

    (settings,) = copy.settings
    (tmp_path / "settings.yaml").write_text(settings, "utf-8")
    (tmp_path / "settings.py").write_text(
        "from metaxl_evo import MetaTrainingArguments\n"
        "from metaxl_evo.training.parser import parse_arguments\n"
        "given = ['--config', 'settings.yaml', '--use_cpu', 'true']\n"
        "print(parse_arguments((MetaTrainingArguments,), given)[0].make_estimator())\n",
        "utf-8",
    )
    assert "VirtualStep(engine='auto', radius=0.01, xi=0.05)" in copy.run("python settings.py").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong", "seen_by"),
    [
        ("radius=self.radius), -self.xi)", "radius=self.radius), self.xi)", "test_vjp_is_the_derivative_of_value"),
        ('"virtual_step": ("2F 2B 1J",', '"virtual_step": ("1F 2B 1J",', "test_passes_are_those_counted_by_hand"),
    ],
    ids=["sign", "passes"],
)
def test_a_broken_one_fails(right: str, wrong: str, seen_by: str, tmp_path: Path) -> None:
    text = ADDING.read_text("utf-8")
    assert text.count(right) == 1
    copy = Copy(tmp_path)
    copy.follow(text.replace(right, wrong))
    done = copy.run(f"{copy.commands[0]} --exitfirst")
    assert done.returncode == 1, done.stdout
    assert re.search(f"FAILED .*::{seen_by}", done.stdout), done.stdout


def test_blocks_know_their_files() -> None:
    kinds = [(block.kind, block.file) for block in code_blocks(ADDING.read_text("utf-8"))]
    assert kinds == [
        ("python", "metaxl_evo/estimators/virtual_step.py"),
        ("diff", "metaxl_evo/estimators/__init__.py"),
        ("diff", "metaxl_evo/estimators/__init__.py"),
        *[("diff", "tests/estimators/test_contract.py")] * 3,
        ("diff", "tests/estimators/test_processes.py"),
        *((kind, "tests/estimators/test_virtual_step.py") for kind in ("python", "bash", "yaml")),
    ]
