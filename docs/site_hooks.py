"""Pages of the site from outside docs/: the scripts and notebooks of examples/, and the links between the two."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).parents[1] / "examples"
LINK = re.compile(r"\]\(([^):#\s]+\.(?:md|py|ipynb))(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each script and notebook."""
    for source in sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("notebooks/*.ipynb")]):
        name = source.relative_to(EXAMPLES.parent).with_suffix(".md").as_posix()
        files.append(File.generated(config, name, content=as_markdown(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Links as they are on GitHub, where docs/ is a folder beside examples/, lead to the pages of the site."""
    here = page.file.src_uri
    place = posixpath.dirname(here if here.startswith("examples/") else f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(place, link[1])).removeprefix("docs/")
        return "](" + posixpath.relpath(re.sub(r"\.(py|ipynb)$", ".md", target), posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)


def as_markdown(source: Path) -> str:
    """A script under its name, or the cells of a notebook, which bring their own heading."""
    text = source.read_text("utf-8")
    if source.suffix == ".py":
        return f"# {source.name}\n\n{_fenced(text)}"
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(_fenced(body) if kind == "code" else body for kind, body in cells)


def _fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"
