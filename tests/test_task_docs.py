"""The pages on adding a task and on weighting run as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.printed import printed

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_page_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = BLOCK.findall((Path(__file__).parents[1] / "docs/adding_a_task.md").read_text("utf-8"))
    assert len(blocks) == 4
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), "utf-8")
    monkeypatch.chdir(tmp_path)
    lines = printed(script, monkeypatch=monkeypatch, capsys=capsys)
    assert "OK" in lines
    weights = [float(number) for number in re.findall(r"\d\.\d+", lines[-1])]
    assert weights[0] > 1 > weights[1]  # the domain that judges
    assert (tmp_path / "runs/mixture/config.json").is_file()


def test_the_page_on_weighting_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = BLOCK.findall((Path(__file__).parents[1] / "docs/weighting.md").read_text("utf-8"))
    script = tmp_path / "page.py"
    script.write_text(block, "utf-8")
    monkeypatch.chdir(tmp_path)
    last = printed(script, monkeypatch=monkeypatch, capsys=capsys)[-1]
    assert all(0.1 < float(number) < 1 for number in re.findall(r"\d\.\d+", last))
    assert (tmp_path / "runs/weighted/weigher/model.safetensors").is_file()
