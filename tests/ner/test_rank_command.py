"""Candidate sources by how near they are to a few target sentences, against numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metaxl_evo.cli import main
from metaxl_evo.ner.pretrained import load_classifier
from metaxl_evo.ner.rank_command import RankArguments, rank_sources
from metaxl_evo.ner.synthetic import LABELS
from tests.scripts.runs import FAMILY, write_data, write_model


def test_the_two_numbers_are_those_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row by row, without padding; a language is nearest to its own text, whose labels are not asked for."""
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    words: dict[str, Any] = {name: FAMILY.load(name)["train"]["tokens"][:] for name in ("aru", "beru", "celu")}
    text = tmp_path / "text"
    text.write_text("\n".join(" ".join(sentence) for sentence in words["beru"][:25]) + "\n\n")
    file = tmp_path / "ranks.json"
    given = [
        "--model_name_or_path",
        str(model),
        "--dataset",
        str(data),
        "--use_cpu",
        "true",
        "--output_file",
        str(file),
    ]
    assert main(["rank-sources", *given, "--source_languages", "aru,beru,celu", "--text_file", str(text)]) == 0
    found = json.loads(file.read_text())
    assert found["target_sentences"] == 16
    base, tokenizer = load_classifier(str(model), LABELS)
    base.eval()
    centroids, pieces = {}, {}
    for name, sentences in {**words, "target": words["beru"][:25]}.items():
        rows = [tokenizer(one, is_split_into_words=True, return_tensors="pt") for one in sentences]
        with torch.no_grad():
            states = [base.base_model(**row).last_hidden_state[0].mean(0).double() for row in rows]
        centroids[name] = torch.stack(states).mean(0)
        pieces[name] = {piece for row in rows for piece in row["input_ids"][0].tolist()}
    for name, row in found["sources"].items():
        cosine = centroids[name] @ centroids["target"] / centroids[name].norm() / centroids["target"].norm()
        assert row["hidden"] == pytest.approx(float(cosine), abs=1e-6)
        assert row["overlap"] == len(pieces[name] & pieces["target"]) / len(pieces["target"])
    assert next(iter(found["sources"])) == "beru"
    assert found["sources"]["beru"]["overlap"] == 1
    assert f"| aru | {found['sources']['aru']['hidden']:.4f} |" in capsys.readouterr().out
    settings = {"model_name_or_path": str(model), "dataset": str(data), "source_languages": ["aru", "celu"]}
    by_overlap = rank_sources(
        RankArguments(**settings, target_language="beru", sentences=5, by="overlap", use_cpu=True)
    )
    shares = [row["overlap"] for row in by_overlap["sources"].values()]
    assert shares == sorted(shares, reverse=True)
    assert by_overlap["target_sentences"] == 5


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"by": "vocabulary"}, "unknown by 'vocabulary'"),
        ({"sentences": 0}, "sentences must be at least 1, not 0"),
        ({"source_languages": ["en"]}, "name two or more to compare"),
        ({"target_language": None}, "give the target once"),
        ({"text_file": "file"}, "give the target once"),
        ({"target_language": "de"}, "de is both a source and the target"),
    ],
)
def test_what_cannot_be_ranked(given: dict[str, Any], line: str) -> None:
    settings: dict[str, Any] = {"dataset": "data", "source_languages": ["en", "de"], "target_language": "sw"}
    with pytest.raises(ValueError, match=line):
        RankArguments(**settings | given)
