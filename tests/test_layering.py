"""Imports only go down: a module knows its own room and the floors below it; setup.py names what is third-party."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FLOORS = {
    "metaxl_evo.messages": 0,
    "metaxl_evo.bilevel": 1,
    "metaxl_evo.estimators": 2,
    "metaxl_evo.models": 3,
    "metaxl_evo.training": 4,
    "metaxl_evo.experiments": 5,
    "metaxl_evo.ner": 6,
    "metaxl_evo.long_horizon": 6,
    "metaxl_evo.weighting": 7,
    "vision_tasks": 6,
    "metaxl_evo.benchmark": 8,
    "metaxl_evo.demo": 8,
    "metaxl_evo.cli": 9,
    "metaxl_evo.__main__": 10,
    "scripts": 10,
}
LAZY_ROOT = "metaxl_evo"  # its names may come from any floor, so only scripts may import them from there
THIRD_PARTY = {"metaxl_evo.messages": set(), "metaxl_evo.bilevel": {"torch"}, "metaxl_evo.estimators": {"torch"}}
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}  # where a module's name is not its distribution's


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room that a dotted name lies in; None for what is no room of ours."""
    return next((room for room in FLOORS if f"{module}.".startswith(f"{room}.")), None)


def imports(module: str, source: str, is_package: bool = False) -> Iterator[str]:
    """Every name that `source` imports, at any depth and under any condition, as an absolute dotted name."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What `module` imports and may not."""
    room = room_of(module)
    if room is None:
        return [] if module == LAZY_ROOT else [f"{module} has no floor: give its room one in FLOORS"]
    found = []
    for name in imports(module, source, is_package):
        target = room_of(name)
        top = name.split(".")[0]
        if target is not None:
            allowed = target == room or FLOORS[target] < FLOORS[room]
        elif top == LAZY_ROOT:
            allowed = room == "scripts"
        else:
            allowed = top in sys.stdlib_module_names or top in THIRD_PARTY.get(room, {top})
        if not allowed:
            found.append(f"{module} imports {name}")
    return found


def sources() -> list[Path]:
    return sorted(file for room in ("metaxl_evo", "vision_tasks", "scripts") for file in (ROOT / room).rglob("*.py"))


def setup_keywords() -> dict[str | None, ast.expr]:
    """What setup.py hands to `setup`, unevaluated."""
    return {
        keyword.arg: keyword.value
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
    }


def declared() -> set[str]:
    """The distributions that setup.py names, extras included."""
    keywords = setup_keywords()
    extras = ast.literal_eval(keywords["extras_require"]).values()
    requirements = [*ast.literal_eval(keywords["install_requires"]), *(one for extra in extras for one in extra)]
    return {re.split(r"[<>=!~\[; ]", requirement)[0].lower() for requirement in requirements}


def test_there_is_something_to_look_at():
    assert len(sources()) > 10
    assert {room_of(module_name(file)) for file in sources()} >= FLOORS.keys() - {"vision_tasks"}


def test_imports_only_go_down():
    found = [
        violation
        for file in sources()
        for violation in violations(module_name(file), file.read_text(encoding="utf-8"), file.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_files_do_not_import_each_other_in_a_circle():
    """Whatever hides an import: a function, or TYPE_CHECKING."""
    files = {module_name(file): file for file in sources() if module_name(file) != LAZY_ROOT}
    known: dict[str, set[str]] = {}
    for module, file in files.items():
        names = imports(module, file.read_text(encoding="utf-8"), file.name == "__init__.py")
        found = {name if name in files else name.rpartition(".")[0] for name in names}
        known[module] = found & files.keys() - {module}
    known["metaxl_evo.training.trainer"].remove("metaxl_evo.training.check")  # `check()` asks one floor up
    assert sum(map(len, known.values())) > len(files)
    TopologicalSorter(known).prepare()  # raises where there is one, and shows it


def test_every_third_party_import_is_declared():
    ours = {room.split(".")[0] for room in FLOORS}
    found = {
        name.split(".")[0]
        for file in sources()
        for name in imports(module_name(file), file.read_text(encoding="utf-8"), file.name == "__init__.py")
    }
    third_party = {DISTRIBUTIONS.get(top, top) for top in found - sys.stdlib_module_names - ours}
    assert "torch" in third_party
    assert third_party <= declared()


def test_every_package_that_setup_names_has_a_pin_in_its_range():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(re.compile("[^#]").match, lines))}
    keywords = setup_keywords()
    named = [ast.literal_eval(keywords["install_requires"]), *ast.literal_eval(keywords["extras_require"]).values()]
    asked = [Requirement(one) for group in named for one in group]
    assert len(asked) > 40
    for one in asked:
        (version,) = (pin.version for pin in pins[canonicalize_name(one.name)].specifier)
        assert version in one.specifier, one


def test_the_packages_say_that_they_are_typed_and_bring_their_data():
    packages = {room.split(".")[0] for room in FLOORS} - {"scripts"}
    assert all((ROOT / package / "py.typed").is_file() for package in packages)
    data = ast.literal_eval(setup_keywords()["package_data"])
    assert all("py.typed" in data[package] for package in packages)
    assert all((ROOT / package / name).is_file() for package, names in data.items() for name in names)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("metaxl_evo.messages", "import torch"),
        ("metaxl_evo.bilevel.tree", "import numpy"),
        ("metaxl_evo.bilevel.tree", "from metaxl_evo.estimators import ESTIMATORS"),
        ("metaxl_evo.estimators.evograd", "def f():\n    from transformers import Trainer"),
        ("metaxl_evo.estimators.evograd", "from ..models import rtn"),
        ("metaxl_evo.models.rtn", "from metaxl_evo import MetaTrainer"),
        ("metaxl_evo.training.trainer", "import metaxl_evo.ner.data as data"),
        ("metaxl_evo.training.trainer", "if TYPE_CHECKING:\n    from vision_tasks import heads"),
        ("metaxl_evo.ner.data", "from vision_tasks.data import images"),
        ("vision_tasks.data", "from metaxl_evo.ner import data"),
        ("metaxl_evo.training.parser", "from metaxl_evo.experiments.plan import Run"),
        ("metaxl_evo.experiments.task", "from metaxl_evo.ner.task import NerTask"),
        ("metaxl_evo.ner.data", "import scripts.train_ner"),
        ("metaxl_evo.helpers", ""),
    ],
)
def test_the_rule_sees_what_it_forbids(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("metaxl_evo.bilevel.tree", "import math\nimport torch.nn\nfrom metaxl_evo.messages import unknown"),
        ("metaxl_evo.bilevel.update", "from . import tree\nfrom .tree import add\nfrom ..messages import unknown"),
        ("metaxl_evo.training.trainer", "from metaxl_evo import messages\nfrom metaxl_evo.models.rtn import x"),
        ("scripts.train_ner", "from metaxl_evo import MetaTrainer\nimport vision_tasks"),
        ("metaxl_evo", "from metaxl_evo.training import MetaTrainer"),
    ],
)
def test_the_rule_lets_pass_what_it_allows(module, source):
    assert violations(module, source) == []


def test_the_lower_floors_leave_transformers_unimported():
    code = (
        "import sys, metaxl_evo, metaxl_evo.bilevel, metaxl_evo.estimators; assert metaxl_evo.estimators.__file__\n"
        "print(*{'transformers', 'datasets'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
