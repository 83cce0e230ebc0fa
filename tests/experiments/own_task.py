"""The task that docs/studies.md writes, put where a study finds it, and a method of it that does not end well."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNWELL = '''

class Unwell(TrustTask):
    """Learns as ever, but for methods that fail after their first steps."""

    def learns(self, settings):
        return settings.method != "baseline"

    def score(self, trainer, settings, data):
        if settings.method == "dies":
            import os, signal

            os.kill(os.getpid(), signal.SIGKILL)
        if settings.method == "fails":
            raise RuntimeError("no score\\nto be had")
        if settings.method == "nan":
            return {"accuracy": float("nan")}
        return super().score(trainer, settings, data)
'''


def blocks() -> dict[str, str]:
    """The files that the page writes: name -> text."""
    page = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```(?:python|yaml)\n# (trust\.\w+)\n(.*?)```", page, re.DOTALL))


def write_own_task(folder: Path) -> None:
    """`trust.py` and `trust.yaml` of the page, the class `Unwell` behind the former."""
    files = blocks()
    (folder / "trust.py").write_text(files["trust.py"] + UNWELL, encoding="utf-8")
    (folder / "trust.yaml").write_text(files["trust.yaml"], encoding="utf-8")
