"""What the docs point at exists: links, headings, files, make targets."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import metaxl_evo
from tests.test_layering import setup_keywords

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)")
PATH = re.compile(r"(?<![\w/.-])(?:configs|scripts|docs|tests|metaxl_evo|vision_tasks)/[\w./*-]*")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
MAKE = re.compile(r"(?:^|`|\$ |&& )make ([a-z][\w-]*)", re.MULTILINE)
HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings answer to."""
    headings = HEADING.findall(CODE.sub(lambda code: code[0] if "\n" not in code[0] else "", page.read_text("utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> Iterator[str]:
    for link in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", link):  # a URL: there is no network here to ask
            continue
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (fragment and target.suffix == ".md" and fragment not in anchors(target)):
            yield link


def missing_paths(text: str) -> Iterator[str]:
    """Files named by their path from the root; `configs/ner/NAME.yaml` stands for any name, `*` for several."""
    for path in PATH.findall(text):
        path = path.rstrip(".")
        if not any(Path(part).stem.isupper() for part in path.split("/")) and not any(ROOT.glob(path.rstrip("/"))):
            yield path


def unknown_targets(text: str) -> Iterator[str]:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    yield from (target for code in CODE.findall(text) for target in MAKE.findall(code) if target not in targets)


def test_the_pages_are_there():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert names >= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert names >= {"docs/estimators.md", "docs/adding_an_estimator.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_points_at_what_exists(page):
    text = page.read_text("utf-8")
    assert list(dead_links(page, text)) == []
    assert list(missing_paths(text)) == []
    assert list(unknown_targets(text)) == []


def test_every_config_of_a_paper_is_in_the_index_of_papers():
    configs = [str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*_paper.yaml")]
    assert len(configs) >= 6
    page = (ROOT / "docs/papers.md").read_text("utf-8")
    assert [config for config in configs if f"`{config}`" not in page] == []


def test_every_exported_name_is_on_the_page_of_the_api():
    names = re.findall(r"^::: metaxl_evo\.(\w+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(metaxl_evo.__all__)


def test_every_extra_is_on_the_first_page():
    rows = re.findall(r"^\| (`.*`) \| .* \|$", (ROOT / "docs/index.md").read_text("utf-8"), re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(named) == sorted(ast.literal_eval(setup_keywords()["extras_require"]))


def test_the_checks_see_what_is_dead():
    page = ROOT / "CONTRIBUTING.md"
    links = "[a](LICENSE) [b](nowhere.md) [c](#set-up) [d](#set-down) [e](CHANGELOG.md#nothing) [f](https://x.y)"
    assert list(dead_links(page, links)) == ["nowhere.md", "#set-down", "CHANGELOG.md#nothing"]
    paths = (
        "run `scripts/nothing.py --config configs/nothing.yaml`, configs/accelerate/cpu.yaml. configs/ner/NAME.yaml"
    )
    assert list(missing_paths(f"{paths} configs/accelerate/*.yaml ../shared/docs/none tests/")) == [
        "scripts/nothing.py",
        "configs/nothing.yaml",
    ]
    commands = "make sure; `make test` `make nonsense X=1`\n```\nmake docs\n$ make rubbish\n```\n"
    assert list(unknown_targets(commands)) == ["nonsense", "rubbish"]
