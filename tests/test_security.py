"""What docs/security.md does not trust, tried as attacks: no code of theirs is run, nothing is fetched or written."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from huggingface_hub import ModelCard
from PIL import EpsImagePlugin, Image

from metaxl_evo.training.model_card import write_model_card
from scripts import evaluate_ner, predict_ner
from tests.scripts.runs import read, train, write_data, write_model
from vision_tasks.classification import spreadsheet
from vision_tasks.domains import read_domain
from vision_tasks.image_files import TableImages, decode

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForTokenClassification
Path({mark!r}).touch()

class OddConfig(BertConfig):
    model_type = "odd"

class OddModel(BertForTokenClassification):
    config_class = OddConfig
"""
CLASSES = {"AutoConfig": "odd.OddConfig", "AutoModelForTokenClassification": "odd.OddModel"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "family", ["aru", "beru"])


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a model; whoever asks for leave to run code gets it."""
    monkeypatch.setattr("builtins.input", lambda *of: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return write_model(tmp_path / "model")


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def bring_code(model: Path) -> Path:
    """An unknown kind of model, whose code makes a file."""
    mark = model.parent / "executed"
    (model / "odd.py").write_text(CODE.format(mark=str(mark)), encoding="utf-8")
    edit(model / "config.json", model_type="odd", auto_map=CLASSES)
    return mark


def refused(what: str, made: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=rf"brings code along \({what}\), which is not run unasked: read it") as error:
        made()
    assert "\n" not in str(error.value)


# Models


def test_code_of_a_model_is_not_run_unasked(model: Path, data: Path, tmp_path: Path) -> None:
    mark, text, place = bring_code(model), tmp_path / "text", ["--model_name_or_path", str(model)]
    text.write_text("a b\n", encoding="utf-8")
    refused("auto_map", lambda: train(model, data, tmp_path / "out"))
    refused("auto_map", lambda: predict_ner.main([*place, "--text_file", str(text)]))
    refused("auto_map", lambda: evaluate_ner.main([*place, "--dataset", str(data), "--languages", "beru"]))
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    train(model, data, tmp_path / "out", trust_remote_code="true", max_steps=1)
    assert mark.exists()
    assert read(tmp_path / "out")["run"]["steps"] == 1


def test_an_attention_kernel_of_the_hub_is_code(model: Path, data: Path, tmp_path: Path) -> None:
    edit(model / "config.json", attn_implementation="someone/kernel")
    refused("the attention kernel someone/kernel of the Hub", lambda: train(model, data, tmp_path / "out"))


# Images


def test_an_image_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript, which PIL would hand to Ghostscript whatever the file is called."""
    mark, ghostscript, file = tmp_path / "executed", tmp_path / "gs", tmp_path / "a.png"
    ghostscript.write_text(f"#!/bin/sh\ntouch {mark}\n", encoding="utf-8")
    ghostscript.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(ghostscript))
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    table = Dataset.from_dict({"image": [{"bytes": file.read_bytes()}]}, features=Features({"image": ImageFeature()}))
    for made in (lambda: decode(file, "a.png"), lambda: TableImages(table, "image", "pets")[0]):
        with pytest.raises(ValueError, match="cannot be read as an image"):
            made()
    assert not mark.exists()
    with pytest.raises(OSError, match=""), Image.open(file) as opened:  # the attack is one
        opened.load()
    assert mark.exists()


def test_an_image_of_a_table_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.features.image.xopen", lambda *of, **kw: pytest.fail("it was fetched"))
    where = [{"path": "https://example.invalid/a.png", "bytes": None}]
    table = Dataset.from_dict({"image": where}, features=Features({"image": ImageFeature()}))
    with pytest.raises(ValueError, match=r"pets, column image, row 0 cannot be read as an image"):
        TableImages(table, "image", "pets")[0]


def test_an_archive_writes_nothing(tmp_path: Path) -> None:
    """Names that lead out of a folder."""
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    place = tmp_path / "in/side"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "images.zip", "w") as archive:
        for name in ("../../../Latin/character01/0001_01.png", "/Latin/character02/0002_01.png"):
            archive.write(tmp_path / "a.png", name)
    before = sorted(tmp_path.rglob("*"))
    read_domain(str(place / "images.zip"))
    assert sorted(tmp_path.rglob("*")) == before


# What is left behind


def test_names_of_files_are_no_formulas(tmp_path: Path) -> None:
    """In a spreadsheet, where a class is a folder's name."""
    table = pd.DataFrame({"image": ["a.png", "=1+1/a.png"], "label": ["-1", "@SUM(A1)"], "loss": [-1.5, 2.0]})
    spreadsheet(table).to_csv(tmp_path / "a.csv", index=False)
    written = pd.read_csv(tmp_path / "a.csv", dtype=str)
    assert written.values.tolist() == [["a.png", "'-1", "-1.5"], ["'=1+1/a.png", "'@SUM(A1)", "2.0"]]
    assert table["label"][0] == "-1"


@pytest.mark.parametrize("name", ["a\n---\nlicense: mit", "'\"]}: &x *x !!python/object:os.system", "{{ evil }}"])
def test_a_card_says_what_a_name_is_and_no_more(tmp_path: Path, name: str) -> None:
    given = {"language": name, "tasks": name, "tags": name, "finetuned_from": name, "dataset_tags": name}
    write_model_card(tmp_path, [], model_name="a", further={"widget": [{"text": name}]}, **given)
    found = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert found.keys() <= {"language", "library_name", "pipeline_tag", "tags", "base_model", "datasets", "widget"}
    assert found["widget"] == [{"text": name}]
