"""Models of a folder that would give other numbers than their own, or run code, are refused in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metaxl_evo.weighting.arguments import TextArguments
from metaxl_evo.weighting.drawn import draw_classifier
from metaxl_evo.weighting.pretrained import SEQUENCE, load_classifier, trained_labels

NAMES = ["bad", "good"]


@pytest.fixture
def settings(tmp_path: Path) -> TextArguments:
    base, tokenizer = draw_classifier(NAMES)
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return TextArguments(model_name_or_path=str(tmp_path), data="texts.csv")


def test_a_model_that_is_whole_is_read(settings: TextArguments) -> None:
    assert trained_labels(settings, SEQUENCE) == NAMES
    assert len(load_classifier(settings, NAMES)[1]) > 10


def test_a_tokenizer_without_its_files(settings: TextArguments) -> None:
    """transformers makes one up, to which every word is unknown."""
    for file in Path(settings.model_name_or_path).glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no vocabulary of a tokenizer"):
        load_classifier(settings, NAMES)


def test_a_tokenizer_of_a_larger_model(settings: TextArguments) -> None:
    file = Path(settings.model_name_or_path) / "tokenizer.json"
    held = json.loads(file.read_text(encoding="utf-8"))
    pieces = held["model"]["vocab"]
    pieces["more"] = len(pieces)
    file.write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(ValueError, match=r"word embeddings for a tokenizer with a vocabulary of"):
        load_classifier(settings, NAMES)


def test_a_kernel_of_the_hub(settings: TextArguments) -> None:
    file = Path(settings.model_name_or_path) / "config.json"
    held = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**held, "_attn_implementation": "someone/kernel"}), encoding="utf-8")
    for read in (lambda: trained_labels(settings, SEQUENCE), lambda: load_classifier(settings, NAMES)):
        with pytest.raises(ValueError, match="attention kernel someone/kernel of the Hub"):
            read()
