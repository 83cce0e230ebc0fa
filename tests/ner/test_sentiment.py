"""Classification of texts: tables as they come, labels joined or left out, losses and scores by other means."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.metrics import accuracy_score, f1_score
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, pipeline

from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.arguments import NerArguments, SentimentArguments
from metaxl_evo.ner.data import evaluated_rows, load_ner_dataset
from metaxl_evo.ner.encoding import PadRight, encode
from metaxl_evo.ner.pretrained import TEXTS, load_classifier
from metaxl_evo.ner.sources import read_table
from metaxl_evo.ner.synthetic import SyntheticFamily
from metaxl_evo.ner.tagger import TARGET, CrossLingualClassifier
from metaxl_evo.ner.target_data import load_target
from scripts import evaluate_ner, predict_ner, train_sentiment
from tests.ner.test_data import tags_of

LAYOUT = SentimentArguments().layout()
ROWS = [('"so so', "bad"), ("NA", "good"), ("a, b", "good")]
TABLE = pd.DataFrame(ROWS, columns=["text", "label"])


def laid_out(**settings: object) -> object:
    return SentimentArguments(**settings).layout()  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json", ".parquet"])
def test_tables_are_read_as_they_are(tmp_path: Path, suffix: str) -> None:
    """A quotation mark is one in TSV, and "NA" is a text."""
    (tmp_path / "xx").mkdir()
    file = tmp_path / f"xx/train{suffix}"
    written = {
        ".tsv": lambda: file.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS)),
        ".csv": lambda: TABLE.to_csv(file, index=False),
        ".jsonl": lambda: TABLE.to_json(file, orient="records", lines=True),
        ".json": lambda: TABLE.to_json(file, orient="records"),
        ".parquet": lambda: TABLE.to_parquet(file),
    }
    written[suffix]()
    data = load_ner_dataset(str(tmp_path), ["xx"], splits=["train"], layout=LAYOUT)["xx"]["train"]
    assert data["tokens"][:] == [[text] for text, _ in ROWS]
    assert tags_of(data) == [[label] for _, label in ROWS]
    assert data.features["ner_tags"].feature.names == ["bad", "good"]


def test_a_table_of_the_hub_is_read_with_its_label_names() -> None:
    features = Features({"text": Value("string"), "sentiment": ClassLabel(names=["neg", "pos"])})
    table = Dataset.from_dict({"text": ["x y", "z"], "sentiment": [1, 0]}, features=features)
    assert read_table(table, "here", LAYOUT) == ([["x y"], ["z"]], [["pos"], ["neg"]], ["neg", "pos"])


@pytest.mark.parametrize(
    ("train", "settings", "says"),
    [
        ("tweet\tlabel\nx\tgood\n", {}, "needs the columns text and label, but has tweet, label: name them by"),
        ("text\tlabel\n \tgood\n", {}, "1 rows have no text, such as row 0: leave them out"),
        ("text\tlabel\nx\t\n", {}, "malformed label ''"),
        ("text\tlabel\n1\tx\tgood\n2\ty\tbad\n", {}, "fewer names of columns in its first line than columns"),
        ("text\tlabel\nx\tgood\ny\tgood\n", {}, "all labels are good: there is nothing to tell apart"),
        ("text\tlabel\nx\tgood\ny\tbad\n", {"label_map": {"well": "good"}}, "well"),
        ("text\tlabel\nx\tgood\ny\tbad\n", {"label_map": {"good": "drop", "bad": "drop"}}, "leaves no text"),
        ("text\tlabel\nx\tgood\ny\tdrop\n", {}, "malformed label 'drop'"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path: Path, train: str, settings: dict[str, object], says: str) -> None:
    (tmp_path / "xx").mkdir()
    (tmp_path / "xx/train.tsv").write_text(train)
    with pytest.raises(ValueError, match=says) as refused:
        load_ner_dataset(str(tmp_path), ["xx"], splits=["train"], layout=laid_out(**settings))
    assert "\n" not in str(refused.value)


def test_texts_in_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "xx").mkdir()
    (tmp_path / "xx/train.txt").write_text("x\tgood\n")
    with pytest.raises(ValueError, match=r"train.txt holds no table: texts and their labels are read from .parquet"):
        load_ner_dataset(str(tmp_path), ["xx"], splits=["train"], layout=LAYOUT)


def test_labels_that_the_source_lacks_are_dropped_or_joined(shared: Path) -> None:
    """Of real files: English has two labels, Swahili three; without a word said nothing is guessed."""
    root, languages = shared / "data/sentiment", ["en", "sw"]
    with pytest.raises(ValueError, match="label sets differ: en has negative, positive, but sw has negative, neutral"):
        load_ner_dataset(str(root), languages, splits=["test"], layout=LAYOUT)
    truth = pd.read_csv(root / "sw/test.tsv", sep="\t", quoting=3, keep_default_na=False)
    assert len(truth) == 748
    for name, expected in {
        "drop": truth[truth["label"] != "neutral"],
        "negative": truth.assign(label=truth["label"].replace("neutral", "negative")),
    }.items():
        layout = laid_out(label_map={"neutral": name})
        data = load_ner_dataset(str(root), languages, splits=["test"], layout=layout)["sw"]["test"]
        assert [row[0] for row in data["tokens"]] == list(expected["text"])
        assert [row[0] for row in tags_of(data)] == list(expected["label"])


@pytest.mark.parametrize("language", ["ha", "ig", "rw", "sw"])
def test_a_part_of_a_sorted_file_has_the_labels_of_the_whole(shared: Path, language: str) -> None:
    """AfriSenti's rows are sorted by label: the first 600 of ha are all positive."""
    settings = SentimentArguments(
        dataset=str(shared / "data/sentiment"),
        target_languages=[language],
        eval_size=120,
        label_map={"neutral": "drop"},
    )
    data = load_target(settings, language)
    for part, name in ((data.dev, "dev"), (data.test, "test")):
        truth = pd.read_csv(settings.dataset + f"/{language}/{name}.tsv", sep="\t", quoting=3, keep_default_na=False)
        positive = (truth["label"][truth["label"] != "neutral"] == "positive").mean()
        assert part is not None
        assert len(part) == len(set(map(tuple, part["tokens"]))) == 120
        assert np.mean([tags == ["positive"] for tags in tags_of(part)]) == pytest.approx(positive, abs=0.1)


@pytest.mark.parametrize(("size", "rows"), [(1, [0]), (2, [0, 5]), (3, [0, 3, 6]), (10, range(10)), (99, range(10))])
def test_texts_that_are_scored_are_spread_and_sentences_the_first(size: int, rows: Sequence[int]) -> None:
    dataset = Dataset.from_dict({"row": range(10)})
    assert evaluated_rows(dataset, size, LAYOUT)["row"][:] == list(rows)
    assert evaluated_rows(dataset, size, NerArguments().layout())["row"][:] == list(range(min(size, 10)))


def test_texts_are_read_as_the_tokenizer_reads_them(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/xlmr-mini")
    data = load_ner_dataset(
        str(shared / "data/sentiment"), ["ha"], splits=["dev"], layout=laid_out(label_map={"neutral": "drop"})
    )["ha"]["validation"]
    rows = encode(data.select(range(300)), tokenizer, 128)
    texts = [row[0] for row in data["tokens"][:300]]
    assert rows["input_ids"][:] == tokenizer(texts, truncation=True, max_length=128)["input_ids"]
    assert all(sum(label >= 0 for label in row) == 1 for row in rows["labels"])


def test_losses_are_those_of_the_classifier_on_transformed_states() -> None:
    """Cross-entropy of logits made by hand: the encoder, the RTN on source rows alone, the head."""
    family = SyntheticFamily(train_size=8)
    base, tokenizer = load_classifier("synthetic", ["bad", "good"], head=TEXTS)
    base.eval()
    module = CrossLingualClassifier(base, RepresentationTransform(96, layers=[2]), pad_token_id=1)
    texts = [" ".join(words) for words in family.load("aru")["train"]["tokens"][:6]]
    truth = torch.tensor([0, 1, 1, 0, 1, 0])
    rows = [
        {
            **tokenizer(text),
            "labels": [-100, label, *[-100] * (len(tokenizer(text)["input_ids"]) - 2)],
            "language": side,
        }
        for text, label, side in zip(texts, truth.tolist(), [0, TARGET, 0, TARGET, 0, 0], strict=True)
    ]
    batch, source = PadRight(1)(rows), torch.tensor([True, False, True, False, True, True])
    with torch.no_grad():
        hidden = base.roberta(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        with module.meta.active(batch["language"], attention_mask=batch["attention_mask"]):
            transformed = module.meta.apply_layer(hidden, 0)
        assert transformed is not None
        losses = cross_entropy(base.classifier(transformed), truth, reduction="none")
        plain = cross_entropy(base.classifier(hidden), truth, reduction="none")
        found = module.inner_loss(batch)
        torch.testing.assert_close(found["source"], losses[source])
        torch.testing.assert_close(found["target"], plain[~source])
        torch.testing.assert_close(module.outer_loss(batch)["target"], plain)
    assert module.counts(batch) == {"source": 4, "target": 2}
    assert (losses[source] - plain[source]).abs().min() > 1e-4


def test_a_run_its_evaluation_its_labels_and_the_pipeline_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = tmp_path / "run", tmp_path / "predictions.conll"
    argv = ["--model_name_or_path", "synthetic", "--source_languages", "aru", "--target_languages", "beru"]
    argv += ["--train_size", "60", "--eval_size", "40", "--max_steps", "6", "--per_device_train_batch_size", "4"]
    argv += ["--select", "last", "--learning_rate", "1e-3", "--save_strategy", "no", "--use_cpu", "true"]
    judged = train_sentiment.main([*argv, "--output_dir", str(run)])["test"]["beru"]
    argv = ["--dataset", "synthetic", "--languages", "beru", "--eval_size", "40", "--use_cpu", "true"]
    again = evaluate_ner.main(["--model_name_or_path", str(run), *argv, "--predictions", str(file)])
    assert again["test"]["beru"] == judged
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if "\t" in line]
    texts, true, found = ([row[at] for row in rows] for at in range(3))
    assert len(rows) == judged["n_sentences"] == judged["n_texts"] == 40
    assert {name: row["n_texts"] for name, row in judged["per_type"].items()} == Counter(true)
    assert judged["accuracy"] == pytest.approx(accuracy_score(true, found))
    assert judged["macro_f1"] == pytest.approx(f1_score(true, found, average="macro", zero_division=0))
    said = pipeline("text-classification", model=str(run), device="cpu")(texts)
    assert [one["label"] for one in said] == found
    np.testing.assert_allclose([one["score"] for one in said], [float(row[3]) for row in rows], atol=6e-5)
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    labels = predict_ner.main([
        *("--model_name_or_path", str(run), "--text_file", str(tmp_path / "texts.txt"), "--use_cpu", "true"),
    ]).labels  # fmt: skip
    assert [row[0] for row in labels] == found
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card or "text-classification" in card
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["architectures"] == [
        "XLMRobertaForSequenceClassification"
    ]
