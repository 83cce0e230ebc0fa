"""`mix-text`: what trains, judges and tests, what is refused, and that the domain of the target is found."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from metaxl_evo.cli import main
from metaxl_evo.models.weighers import WeightTable, load_weigher
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.weighting.domains import DomainArguments, load_domains
from metaxl_evo.weighting.drawn import draw_documents
from metaxl_evo.weighting.mix_task import MixTextArguments, MixTextTask
from metaxl_evo.weighting.weighted_text import WeightedText

LINES = {name: [f"{name} {number}" for number in range(30)] for name in ("news", "tales", "notes")}
SHORT = (
    *("--max_steps", "2", "--meta_size", "20", "--train_size", "30", "--test_size", "20", "--logging_steps", "1"),
    *("--per_device_train_batch_size", "8", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"),
)


def settings_of(place: Path, **fields: Any) -> DomainArguments:
    given = {"data": str(place), "target": "news", "meta_size": 10, "test_size": 5, **fields}
    return DomainArguments(model_name_or_path="some/model", **given)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, lines in LINES.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_stretches_of_the_target_judge_and_test(folder: Path) -> None:
    data = load_domains(settings_of(folder))
    assert data.meta["text"][:] == LINES["news"][:10]
    assert data.test["text"][:] == LINES["news"][-5:]
    assert data.sizes == {"notes": 30, "tales": 30}
    assert data.train["number"][:] == 30 * [0] + 30 * [1]
    own = load_domains(settings_of(folder, domains=["tales", "news"], train_size=12))
    assert own.train["text"][:] == LINES["tales"][:12] + LINES["news"][10:22]  # none of those that judge or test
    rows = "\n".join(json.dumps({"text": text, "of": name}) for name, lines in LINES.items() for text in lines)
    (folder / "all.jsonl").write_text(rows, encoding="utf-8")
    column = load_domains(settings_of(folder / "all.jsonl", domain_column="of", domains=["notes", "tales"]))
    assert column.train["text"][:] == data.train["text"][:]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"target": "new"}, "unknown domain 'new': did you mean 'news'"),
        ({"domains": ["tales"]}, "a mixture needs two domains that train, here are tales"),
        ({"domains": ["tales", "one"]}, "domain one has 1 texts that train: leave it out, or give more"),
        ({"domains": ["tales", "tales"]}, "tales is named twice"),
        ({"meta_size": 26}, "the target news has 30 texts, 31 are to judge and test"),
        ({"floor": 1.0}, "floor must be at least 0 and below 1"),
        ({"shuffle": "news"}, "shuffle: the target's texts judge and test, and would train"),
    ],
)
def test_domains_that_cannot_be_mixed(fields: dict[str, Any], line: str, folder: Path) -> None:
    (folder / "one.txt").write_text("alone", encoding="utf-8")
    with pytest.raises(ValueError, match=line):
        load_domains(settings_of(folder, **fields))


def test_a_file_without_a_domain_column(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"domain_column: .* is no folder with a file a domain: name the column"):
        load_domains(settings_of(folder / "news.txt"))


@pytest.mark.parametrize("method", ["mixture", pytest.param("uniform", marks=pytest.mark.slow)])
def test_a_run_leaves_a_mixture(method: str, tmp_path: Path) -> None:
    """Its test loss is that of the saved model on the texts that test."""
    run = tmp_path / "run"
    options = ["--domains", "twos,fives", "--method", method, "--meta_learning_rate", "0.1"]
    assert main(["mix-text", *SHORT, *options, "--output_dir", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    with (run / "mixture.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    weights = [float(row["weight"]) for row in rows]
    assert [row["domain"] for row in rows] == ["twos", "fives"]
    assert sum(weights) == pytest.approx(2)
    assert (weights[0] == weights[1]) == (method == "uniform")  # of as many texts each
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)
    assert "domain_loss/fives" in (run / "history.csv").read_text()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in draw_documents("twos", 400, 0)["text"][-20:]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert results["test"]["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("weigher", ["each", "hidden"])
def test_texts_are_weighed(weigher: str, tmp_path: Path) -> None:
    """The table has what the saved weigher says of the saved model's states, and the mixture its mean by domain."""
    run = tmp_path / "run"
    options = ["--domains", "twos,fives", "--weigher", weigher, "--meta_learning_rate", "0.1"]
    assert main(["mix-text", *SHORT, *options, "--output_dir", str(run)]) == 0
    table, mixture = pd.read_csv(run / "weights.csv"), pd.read_csv(run / "mixture.csv")
    assert len(table) == 60  # train_size of two domains
    assert table["weight"].is_monotonic_increasing
    means = table.groupby("domain")["weight"].mean()[mixture["domain"]]
    assert mixture["weight"].tolist() == pytest.approx((means / means.mean()).tolist(), rel=1e-6)
    meta = load_weigher(run / "weigher")
    if isinstance(meta, WeightTable):
        assert sorted(meta.weights().tolist()) == pytest.approx(table["weight"].tolist(), rel=1e-6)
        return
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in table["text"]])
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        assert meta(states.mean(1)).tolist() == pytest.approx(table["weight"].tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"weigher": "hiden"}, "unknown weigher 'hiden': did you mean 'hidden'"),
        (
            {"weigher": "each", "mixing": "sampling"},
            "weigher each learns weights of the losses of all texts",
        ),
        ({"weigher": "loss", "method": "union"}, "or take weigher domain"),
        ({"weigher": "each", "per_token": True}, "per_token: weigher each sees no tokens: take loss or hidden"),
        ({"weigher_hidden": 0}, "weigher_hidden must be a whole number of at least 1"),
    ],
)
def test_weighers_that_cannot_be(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        MixTextArguments(**fields)


def test_uniform_is_so_whatever_the_floor_of_learned_weights(tmp_path: Path) -> None:
    settings = MixTextArguments(method="uniform", domains=["twos", "fives"], floor=0.5, meta_size=150, test_size=50)
    data = load_domains(settings)
    trainer = MixTextTask().build_trainer(
        settings, MetaTrainingArguments(str(tmp_path), estimator="none", use_cpu=True, report_to="none"), data
    )
    small, large = data.sizes.values()
    assert small < large / 1.5
    weights = cast(WeightTable, cast(WeightedText, trainer.model).meta).weights()
    assert float(weights[0]) * small == pytest.approx(float(weights[1]) * large)
