"""A model whose trained head has other labels than the data: it stays where it knows them all, else makes way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from metaxl_evo.ner.labels import label_names
from metaxl_evo.ner.pretrained import load_classifier, trained_labels
from tests.ner.test_data import write
from tests.scripts.runs import train, write_data


def names_of_head(model: Any) -> list[str]:
    return [model.config.id2label[number] for number in range(model.config.num_labels)]


@pytest.mark.parametrize("types", [("LOC", "ORG", "PER"), ("ART", "LOC", "PER"), ("DATE",)])
def test_a_head_of_other_labels_makes_way(tmp_path: Path, types: tuple[str, ...]) -> None:
    """Of the same labels it stays; else it is new, also of the same size, and the encoder is the old one."""
    old, tokenizer = load_classifier("synthetic", label_names(("LOC", "ORG", "PER")))
    old.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    names, same = label_names(types), types == ("LOC", "ORG", "PER")
    if not same:
        with pytest.raises(ValueError, match=r"knows O, B-LOC, .*ignore_mismatched_sizes: true for a new head$"):
            load_classifier(str(tmp_path), names)
    set_seed(3)
    new, _ = load_classifier(str(tmp_path), names, ignore_mismatched_sizes=True)
    assert names_of_head(new) == names
    encoder = new.base_model.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in old.base_model.state_dict().items())
    heads = [model.classifier.weight for model in (old, new)]
    assert torch.equal(*heads) if same else heads[0].shape != heads[1].shape or not torch.equal(*heads)
    assert 0 < heads[1].std() < 1  # initialised


def test_a_run_goes_on_from_a_head_of_other_labels(tmp_path: Path, trained: Path) -> None:
    """Its labels are those of the data; a head that knows them all stays."""
    root = write_data(tmp_path / "other", languages=("aru", "beru"))
    for path in root.glob("*/*"):
        path.write_text(path.read_text(encoding="utf-8").replace("-ORG", "-ART"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"label sets differ: the model has .*ignore_mismatched_sizes drops another"):
        train(trained, root, tmp_path / "run", max_steps=1)
    train(trained, root, tmp_path / "run", max_steps=1, ignore_mismatched_sizes="true")
    assert trained_labels(str(tmp_path / "run")) == label_names(("ART", "LOC", "PER"))
    fewer = write(tmp_path / "fewer", train="Rome\tB-LOC\n", test="Rome\tB-LOC\n", dev="Rome\tB-LOC\n")
    settings = {"source_languages": "xx", "target_languages": "xy", "ignore_mismatched_sizes": "true"}
    write(tmp_path / "fewer", "xy", train="Rome\tB-LOC\n" * 9, test="Rome\tB-LOC\n", dev="Rome\tB-LOC\n")
    train(trained, fewer, tmp_path / "kept", max_steps=1, **settings, meta_portion=0.0, method="joint_training")
    assert trained_labels(str(tmp_path / "kept")) == trained_labels(str(trained))
