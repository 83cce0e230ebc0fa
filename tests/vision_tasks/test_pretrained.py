"""Pretrained classifiers and their image processors: what of a checkpoint is kept, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

from tests.vision_tasks.models import SQUARE, write_classifier
from vision_tasks.pretrained import load_classifier, load_preparation

TIMM = pytest.param("timm", marks=pytest.mark.skipif(not find_spec("timm"), reason="timm is not installed"))
KINDS = ("resnet", "vit", "dinov2", TIMM)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_processor_does_in_two_parts_is_what_it_does(tmp_path: Path, kind: str) -> None:
    prepare = load_preparation(str(write_classifier(tmp_path, kind)))
    assert prepare.shape == ((32, 32, 3) if kind == "timm" else (16, 16, 3))
    image = np.random.default_rng(0).integers(0, 256, (30, 21, 3), np.uint8)
    found = (prepare(image) / 255 - prepare.image_mean) / prepare.image_std
    expected = prepare.processor(images=Picture.fromarray(image), return_tensors="pt")["pixel_values"][0].numpy()
    np.testing.assert_allclose(found.transpose(2, 0, 1), expected, atol=1e-5)
    grey = image[..., :1]
    assert np.array_equal(prepare(grey), prepare(grey.repeat(3, 2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", ["abcde", "abc"])
def test_a_head_of_other_classes_makes_way(
    tmp_path: Path, kind: str, names: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one of as many, whose weights would fit; all else is the checkpoint's."""
    model = str(write_classifier(tmp_path / f"{kind}{names}", kind))
    with caplog.at_level(logging.WARNING):
        bases = [load_classifier(model, names, load_preparation(model)) for _ in range(2)]
    said = [text for text in caplog.messages if "takes the place of" in text]
    assert said == [f"{model}: a new head for {len(names)} classes takes the place of its own (5)"]
    saved, held = AutoModelForImageClassification.from_pretrained(model).state_dict(), bases[0].state_dict()
    other = {name for name in held if not torch.equal(held[name], saved[name])}
    (head,) = {name for name in other if name.endswith("weight")}  # biases may be zero in both
    assert held[head].shape[0] == len(names)
    assert other <= {head, head.replace("weight", "bias")}
    assert list(bases[0].config.id2label.values()) == list(names)
    bases[0].save_pretrained(tmp_path / "again")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "again").config.id2label == dict(
        enumerate(names)
    )


def test_a_head_of_the_same_classes_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = dict(enumerate("abcde"))
    model = str(write_classifier(tmp_path, "vit", id2label=names))
    base = load_classifier(model, "abcde", load_preparation(model))
    saved = AutoModelForImageClassification.from_pretrained(model).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in base.state_dict().items())
    assert "takes the place" not in caplog.text


def _without_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def _of_several_sizes(folder: Path) -> None:
    ViTImageProcessor(do_resize=False).save_pretrained(folder)


def _too_large(folder: Path) -> None:
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)


def _without_normalising_levels(folder: Path) -> None:
    ViTImageProcessor(size=SQUARE, do_rescale=False, do_normalize=False).save_pretrained(folder)


def _without_a_layer(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    del held["vit.layernorm.weight"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def _of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))


def _with_code(folder: Path) -> None:
    """An unknown kind of model, whose code makes a file."""
    (folder / "odd.py").write_text(f"from pathlib import Path\nPath({str(folder / 'executed')!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    odd = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    (folder / "config.json").write_text(json.dumps(config | odd))


def _with_a_processors_code(folder: Path) -> None:
    _with_code(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit", "auto_map": {}}))
    odd = {"image_processor_type": "Odd", "auto_map": {"AutoImageProcessor": "odd.OddProcessor"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(odd))


def _with_a_kernel(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernel"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_with_code, "cannot be loaded"),
        (_with_a_processors_code, "has no image processor that can be loaded"),
        (_with_a_kernel, "its attention kernel someone/kernel of the Hub is code, which is not run"),
        (_without_processor, "has no image processor that can be loaded"),
        (_of_several_sizes, r"gives images of several sizes \(\(48, 48, 3\), .*: let it resize to a height"),
        (_too_large, "cannot read what its image processor gives, 3 x 24 x 24 pixels"),
        (_without_a_layer, "lacks 1 of its weights, such as vit.layernorm.weight: fetch or save it again"),
        (_of_another_kind, "cannot be loaded .*: give the folder of an image classifier"),
    ],
)
def test_models_that_cannot_serve(
    tmp_path: Path, spoil: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *of: "y")  # whoever asks for leave to run code gets it
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = write_classifier(tmp_path / "model", "vit")
    spoil(model)
    with pytest.raises(ValueError, match=message) as found:
        load_classifier(str(model), "abcde", load_preparation(str(model)))
    assert "\n" not in str(found.value)
    assert not (model / "executed").exists()


def test_pixels_that_are_not_rescaled_are_read_as_they_come(tmp_path: Path) -> None:
    _without_normalising_levels(write_classifier(tmp_path, "vit"))
    prepare = load_preparation(str(tmp_path))
    assert prepare.image_mean == [0, 0, 0]
    assert prepare.image_std == pytest.approx([1 / 255] * 3)
