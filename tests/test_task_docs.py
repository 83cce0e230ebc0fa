"""The page on adding a task runs as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_page_runs_as_printed(tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / "docs/adding_a_task.md").read_text("utf-8"))
    assert len(blocks) == 4
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), "utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert "OK" in printed
    weights = [float(number) for number in re.findall(r"\d\.\d+", printed[-1])]
    assert weights[0] > 1 > weights[1]  # the domain that judges
    assert (tmp_path / "runs/mixture/config.json").is_file()
