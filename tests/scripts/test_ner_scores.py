"""One score of a run: in `results.json`, by `evaluate_ner`, by hand, and by a pipeline on the sentences as text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from seqeval.metrics import f1_score
from transformers import (
    AutoConfig,
    AutoTokenizer,
    ConvBertConfig,
    ConvBertModel,
    XLMRobertaConfig,
    XLMRobertaModel,
    pipeline,
)

from metaxl_evo.ner.synthetic_tagger import train_tokenizer
from scripts.evaluate_ner import main as evaluate_ner
from tests.ner.encoders import KINDS, SENTENCES, SMALL, scores_by_hand, write_encoder
from tests.scripts.runs import FAMILY, argv, train

TRAINED = {
    "method": "joint_training",
    "source_languages": "en",
    "target_languages": "sw",
    "max_steps": 60,
    "eval_steps": 30,
    "eval_strategy": "steps",
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 7,
    "max_length": 512,
    "eval_max_length": 512,
    "dataloader_drop_last": "true",
    "train_sampling_strategy": "group_by_length",
}


def write_named(root: Path) -> Path:
    """Sentences of the words that the tokenizers know, in which a word has one label."""
    labels = {"Amani": "B-PER", "Neema": "B-PER", "Juma": "B-PER", "Bonde": "B-LOC", "Kisiwa": "B-LOC"}
    words, draw = " ".join(SENTENCES).split(), random.Random(0)
    for language in ("en", "sw"):
        (root / language).mkdir(parents=True)
        for split, size in (("train", 80), ("dev", 20), ("test", 40)):
            drawn = [draw.choices(words, k=draw.randint(1, 12)) for _ in range(size)]
            lines = ["".join(f"{language}:{one}\t{labels.get(one, 'O')}\n" for one in sentence) for sentence in drawn]
            (root / language / split).write_text("\n".join(lines), encoding="utf-8")
    return root


def evaluate(model: Path, data: Path, language: str = "beru", **settings: Any) -> dict[str, Any]:
    places = {"model_name_or_path": model, "dataset": data, "languages": language, "use_cpu": "true"}
    return evaluate_ner(argv(places | settings))["test"][language]


def sentences_of(file: Path) -> list[list[tuple[str, str]]]:
    blocks = file.read_text("utf-8").split("\n\n")
    return [[tuple(line.split(":", 1)[1].split("\t")) for line in block.split("\n") if line] for block in blocks]


def f1_of_pipeline(folder: Path, file: Path) -> float:
    """Of plain sentences: a word has the label of the first sub-token that begins with it, or with its space."""
    tag, truth, guess = pipeline("token-classification", model=str(folder), device="cpu", ignore_labels=[]), [], []
    for sentence in sentences_of(file):
        found, at, labels = tag(" ".join(word for word, _ in sentence)), 0, []
        for word, _ in sentence:
            labels.append(next(one["entity"] for one in found if one["start"] >= at - 1))
            at += len(word) + 1
        truth.append([label for _, label in sentence])
        guess.append(labels)
    return float(f1_score(truth, guess))


OF_A_KIND = (  # of tokenizers, sides of the padding and frames; the others are slow
    *("xlm-r, metaspace", "bert, word pieces, left", "mmbert, gemma, left"),
    *("llama, split byte level, left", "mt5, unigram, one end"),
)


@pytest.mark.parametrize(
    "kind", [*OF_A_KIND, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in OF_A_KIND)]
)
def test_all_ways_to_a_score_agree(kind: str, tmp_path: Path) -> None:
    model, data, out = (
        write_encoder(kind, tmp_path / "model", head=False),
        write_named(tmp_path / "data"),
        tmp_path / "out",
    )
    results = train(model, data, out, **TRAINED)["test"]["sw"]
    expected = scores_by_hand(out, data / "sw/test")
    assert expected["f1"] > 0.1
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    for size in (1, 32):
        assert evaluate(out, data, "sw", batch_size=size) == results
    assert f1_of_pipeline(out, data / "sw/test") == pytest.approx(results["f1"], abs=1e-12)


def test_a_model_that_reads_the_padding_is_scored_alone_or_refused(tmp_path: Path) -> None:
    """ConvBERT, whose convolutions know no attention mask."""
    model, data = (
        write_encoder("bert, word pieces, left", tmp_path / "model", head=False),
        write_named(tmp_path / "data"),
    )
    words = len(AutoTokenizer.from_pretrained(model))
    ConvBertModel(ConvBertConfig(**SMALL, vocab_size=words, embedding_size=16)).save_pretrained(model)
    settings = {**TRAINED, "max_steps": 30, "eval_strategy": "no"}
    with pytest.raises(ValueError, match=r"per_device_eval_batch_size must be 1 for ConvBertForTokenClassification"):
        train(model, data, tmp_path / "out", **settings)
    results = train(model, data, tmp_path / "out", **settings | {"per_device_eval_batch_size": 1})["test"]["sw"]
    expected = scores_by_hand(tmp_path / "out", data / "sw/test")
    assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert evaluate(tmp_path / "out", data, "sw", batch_size=1) == results
    with pytest.raises(ValueError, match=r": batch_size must be 1 for ConvBert"):
        evaluate(tmp_path / "out", data, "sw")


def test_the_tokenizer_is_left_behind_as_it_came(trained: Path, model: Path) -> None:
    """Its file too, without the truncation of training or a padding."""
    assert (trained / "tokenizer.json").read_text("utf-8") == (model / "tokenizer.json").read_text("utf-8")
    before, after = (json.loads((folder / "tokenizer_config.json").read_text("utf-8")) for folder in (model, trained))
    assert {name: after[name] for name in before} == before


def write_short(folder: Path, positions: int, **limit: Any) -> Path:
    """A model of few positions, whose tokenizer names no limit."""
    tokenizer = train_tokenizer(FAMILY, 400, 512)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config.pop("model_max_length")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    settings = XLMRobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **sizes)
    XLMRobertaModel(settings).save_pretrained(folder)
    return folder


def test_a_sentence_longer_than_the_positions_is_cut_and_counted(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, root = write_short(tmp_path / "model", 34), tmp_path / "data"
    for language in ("aru", "beru"):
        (root / language).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            long = f"{language}:neno\tB-LOC\n" * 90
            (root / language / split).write_text(f"{long}\n{(data / language / split).read_text('utf-8')}", "utf-8")
    settings = {"max_length": 200, "eval_max_length": 512, "max_steps": 2}
    assert AutoTokenizer.from_pretrained(model).model_max_length > 10**9
    assert train(model, root, tmp_path / "checked", check="true", **settings)["words_cut_off"]["test"] > 0.1
    assert capsys.readouterr().out.splitlines()[-1].startswith("OK")
    results = train(model, root, tmp_path / "out", **settings)["test"]["beru"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    cut = 0
    for sentence in sentences_of(root / "beru/test"):
        kept = tokenizer([word for word, _ in sentence], is_split_into_words=True).word_ids()[:31]
        cut += len(sentence) - len({word for word in kept if word is not None})
    assert results["n_truncated_words"] == cut > 50
    assert results["n_words_without_sub_token"] == 0
    assert evaluate(tmp_path / "out", root) == results


def test_a_limit_that_no_configuration_tells(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_short(tmp_path / "model", 12)
    monkeypatch.setattr("metaxl_evo.ner.evaluation.longest_input", lambda base: 10**6)
    with pytest.raises(ValueError, match=r"eval_max_length: the model cannot read a sentence of \d+ sub-tokens \("):
        train(model, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert AutoConfig.from_pretrained(model).max_position_embeddings == 12
