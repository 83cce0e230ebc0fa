"""Mixtures as settings of other libraries, read back by these, or by what they hand them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, interleave_datasets, load_dataset

from metaxl_evo.cli import main
from metaxl_evo.weighting.export import rounded

SHARES = {"news": 0.2, "tales": 0.5, "notes": 0.3}
ROWS = {"news": 30, "tales": 60, "notes": 100}
TAKEN = {"news": 24, "tales": 60, "notes": 36}  # of 60 / 0.5 = 120 in all


@pytest.fixture
def run(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("news", "tales"):
        (data / f"{name}.txt").write_text("".join(f"{name} {number}\n" for number in range(ROWS[name])))
    lines = [json.dumps({"text": f"notes {number}"}) for number in range(ROWS["notes"])]
    (data / "notes.jsonl").write_text("\n".join(lines))
    place = tmp_path / "run"
    place.mkdir()
    table = "".join(f"{name},{ROWS[name]},1.0,{share}\n" for name, share in SHARES.items())
    (place / "mixture.csv").write_text(f"domain,texts,weight,share\n{table}")
    (place / "results.json").write_text(json.dumps({"settings": {"data": str(data)}}))
    return place


def said(capsys: pytest.CaptureFixture[str], *options: object) -> Any:
    assert main(["export-mixture", *map(str, options)]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def shares_of(texts: list[str]) -> dict[str, int]:
    return {name: sum(text.startswith(name) for text in texts) for name in SHARES}


def test_trl(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trl = pytest.importorskip("trl")
    mixture = trl.DatasetMixtureConfig(**said(capsys, run, "--to", "trl"))
    assert shares_of(trl.get_dataset(mixture)["train"]["text"][:]) == TAKEN


def test_axolotl(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It hands `ds_type`, `path` and `split` of a single file to `load_dataset`, and joins what comes."""
    held = said(capsys, run, "--to", "axolotl")["datasets"]
    texts = [
        text
        for one in held
        for text in load_dataset(one["ds_type"], data_files=one["path"], split=one["split"])["text"][:]
    ]
    assert shares_of(texts) == TAKEN


def test_llamafactory(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It parts both at commas and interleaves by the probabilities."""
    content = said(capsys, run, "--to", "llamafactory")
    names = content["dataset"].split(",")
    probabilities = [float(one) for one in content["interleave_probs"].split(",")]
    assert dict(zip(names, probabilities, strict=True)) == pytest.approx(SHARES)
    many = [Dataset.from_dict({"text": [name] * 4000}) for name in names]
    mixed = interleave_datasets(many, probabilities=probabilities, seed=0, stopping_strategy="first_exhausted")
    found = shares_of(mixed["text"][:])
    for name, share in SHARES.items():
        assert found[name] / len(mixed) == pytest.approx(share, abs=0.03)


def test_rounded_shares_sum_to_one() -> None:
    found = rounded({str(number): 1 / 7 for number in range(6)} | {"rest": 1 / 7, "least": 1e-9})
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert min(found.values()) > 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "name the run first"),
        (["--to", "trl"], "name the run first"),
        (["{run}", "--to", "trll"], "unknown to 'trll': did you mean 'trl'"),
        (["{run}/none", "--to", "trl"], "mixture.csv is not there|none is not there"),
        (["{run}", "--to", "trl", "--data", "{run}"], "has no file of the domain news"),
        (["{run}", "--to", "axolotl", "--data", "synthetic"], "is no folder with a file a domain"),
    ],
)
def test_what_cannot_be_exported(options: list[str], line: str, run: Path) -> None:
    with pytest.raises(SystemExit, match=line):
        main(["export-mixture", *(one.format(run=run) for one in options)])
