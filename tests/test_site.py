"""The site of the docs: it is made without a warning, holds what it should, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import metaxl_evo

pytest.importorskip("mkdocs", reason="needs the extra docs: make site")
ROOT = Path(__file__).parents[1]
LOADED = re.compile(r"""<(?:script|link|img|iframe)[^>]* (?:src|href)="?((?:https?:)?//[^" >]+)""")


@pytest.mark.slow
def test_the_site_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text("utf-8") for page in tmp_path.rglob("*.html")}
    sources = [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").glob("*.py"),
        *(ROOT / "examples").rglob("*.ipynb"),
    ]
    assert len(pages) == len(sources) + 1  # that of what is not found
    assert {name: found for name, page in pages.items() if (found := LOADED.findall(page))} == {}
    assert all(f'id="metaxl_evo.{name}"' in pages["api.html"] for name in metaxl_evo.__all__)
    assert 'href="examples/maml_regression.html"' in pages["estimators.html"]  # on GitHub a script above docs/
