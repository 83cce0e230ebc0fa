"""Settings of a layout: runs of versions that had none go on, and what cannot be is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from metaxl_evo.experiments.folders import finished_run
from metaxl_evo.ner.arguments import NerArguments
from metaxl_evo.ner.layout import LayoutArguments


def test_runs_of_before_these_settings_stay_finished(tmp_path: Path) -> None:
    now, file = asdict(NerArguments()), tmp_path / "results.json"
    new = {field.name for field in fields(LayoutArguments)} | {"ignore_mismatched_sizes"}
    file.write_text(json.dumps({"test": {}, "run": {}, "settings": {key: now[key] for key in now.keys() - new}}))
    assert finished_run(file, now)
