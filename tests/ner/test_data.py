"""The three sources behind one loader, what is made of them, and one clear error for each bad input."""

from __future__ import annotations

import copy
import itertools
import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from metaxl_evo.ner import sources
from metaxl_evo.ner.data import load_ner_dataset, overlap, sample
from metaxl_evo.ner.encoding import IGNORED, STRIDE, PadRight, encode, lost_words, plain_labels
from metaxl_evo.training import hub
from tests.hub_cache import prepare_dataset_cache, run_python

WIKIANN_NAMES = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
TWO_SENTENCES = "xx:Ada\tB-PER\nxx:Lovelace\tI-PER\nxx:wrote\tO\n\nxx:Paris\tB-LOC\nxx:.\tO\n"


def write(root: Path, language: str = "xx", **splits: str) -> Path:
    """A data set of text files; double underscores stand for the dot of a file name."""
    (root / language).mkdir(parents=True, exist_ok=True)
    for name, text in splits.items():
        (root / language / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return root


def load_train(root: Path, *languages: str) -> dict[str, Dataset]:
    loaded = load_ner_dataset(str(root), languages or ("xx",), splits=("train",))
    return {language: splits["train"] for language, splits in loaded.items()}


def tags_of(dataset: Dataset) -> list[list[str]]:
    names = dataset.features["ner_tags"].feature.names
    return [[names[tag] for tag in tags] for tags in dataset["ner_tags"]]


# Text files


def test_wikiann_lines(tmp_path: Path) -> None:
    train = load_train(write(tmp_path, train=TWO_SENTENCES))["xx"]
    assert list(train["tokens"]) == [["Ada", "Lovelace", "wrote"], ["Paris", "."]]
    assert tags_of(train) == [["B-PER", "I-PER", "O"], ["B-LOC", "O"]]
    names = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert train.features == Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})


def test_prefix_is_stripped_once_and_tokens_may_be_odd(tmp_path: Path) -> None:
    text = "xx:xx:open:source\tO\nxx:\tO\nxx::\tO\nxx:12:30\tO\nxx:a\u2028b\tO\nxx:New York\tB-LOC\nxx:\u00a0\tO"
    train = load_train(write(tmp_path, train=text))["xx"]
    assert list(train["tokens"]) == [["xx:open:source", "", ":", "12:30", "a\u2028b", "New York", "\u00a0"]]


@pytest.mark.parametrize("gap", [" ", "   ", "\t"])
def test_conll_lines(tmp_path: Path, gap: str) -> None:
    rows = ["-DOCSTART- -X- O", "", "Ada NNP B-PER", "xx:wrote VBD O", "", "", "Hi UH O"]
    text = "\ufeff" + "\r\n".join(row.replace(" ", gap) for row in rows)
    train = load_train(write(tmp_path, train__conll=text))["xx"]
    assert list(train["tokens"]) == [["Ada", "xx:wrote"], ["Hi"]]
    assert tags_of(train) == [["B-PER", "O"], ["O"]]


@pytest.mark.parametrize("name", ["dev", "valid", "validation", "dev__txt", "valid__tsv", "validation__iob2"])
def test_names_of_the_validation_split(tmp_path: Path, name: str) -> None:
    root = write(tmp_path, **{name: TWO_SENTENCES})
    for asked in ("dev", "validation"):
        assert len(load_ner_dataset(str(root), ["xx"], splits=[asked])["xx"]["validation"]) == 2


def test_a_split_not_asked_for_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, train=TWO_SENTENCES, test="broken")
    assert list(load_ner_dataset(str(tmp_path), ["xx"], splits=["train"])["xx"]) == ["train"]


def test_loading_writes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "data", train=TWO_SENTENCES)
    Dataset.from_dict({"tokens": [["a"]], "ner_tags": [["B-PER"]]}).to_parquet(tmp_path / "data/xx/test.parquet")
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys; from transformers import AutoTokenizer; from metaxl_evo.ner import data\n"
        "loaded = data.load_ner_dataset(sys.argv[1], ['xx'], splits=['train', 'test'])['xx']\n"
        "assert data.sample(loaded['train'], 1, seed=0).num_rows == 1"
    )
    run_python(code, tmp_path / "home", str(tmp_path / "data"))
    assert sorted(tmp_path.rglob("*")) == before


# Real data


@pytest.mark.parametrize(
    ("language", "sizes", "repeated"),
    [("en", (20000, 10000, 10000), 226), ("sw", (1000,) * 3, 108), ("ig", (100,) * 3, 18), ("rw", (100,) * 3, 5)],
)
def test_wikiann_sizes_and_overlap(shared: Path, language: str, sizes: tuple[int, ...], repeated: int) -> None:
    loaded = load_ner_dataset(str(shared / "data/wikiann"), [language])[language]
    assert tuple(len(loaded[split]) for split in ("train", "validation", "test")) == sizes
    assert loaded["train"].features["ner_tags"].feature.names == WIKIANN_NAMES
    assert overlap(loaded["train"], loaded["test"]) == repeated


def test_first_sentences_of_all_wikiann_languages(shared: Path) -> None:
    root = shared / "data/wikiann-first-sentences"
    languages = sorted(folder.name for folder in root.iterdir())
    assert len(languages) == 176
    for language in languages:
        loaded = load_ner_dataset(str(root), [language], names=WIKIANN_NAMES)[language]
        assert {split: len(part) for split, part in loaded.items()} == {"train": 1, "validation": 1, "test": 1}
        for file, split in (("train", "train"), ("dev", "validation"), ("test", "test")):
            lines = (root / language / file).read_text("utf-8").strip("\n").split("\n")
            rejoined = [
                f"{language}:{word}\t{tag}"
                for word, tag in zip(loaded[split]["tokens"][0], tags_of(loaded[split])[0], strict=True)
            ]
            assert rejoined == lines


# Parquet and the Hub


def test_parquet_shards_with_class_labels(tmp_path: Path) -> None:
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER", "I-PER"]))})
    (tmp_path / "xx").mkdir()
    for shard, tag in enumerate([1, 0]):
        table = Dataset.from_dict({"tokens": [[f"w{shard}"]], "ner_tags": [[tag]]}, features=features)
        table.to_parquet(tmp_path / f"xx/train-{shard:05}-of-00002.parquet")
    train = load_train(tmp_path)["xx"]
    assert list(train["tokens"]) == [["w0"], ["w1"]]
    assert train.features == features
    assert tags_of(train) == [["B-PER"], ["O"]]


PART = "train-0000{}-of-0000{}{}.parquet".format
SETS = {
    "two shards": ([PART(0, 2, ""), PART(1, 2, "")], None),
    "a shard with a hash": ([PART(0, 1, "-1f2e3d")], None),
    "a file of another name beside": (["train.parquet", "train-old.parquet"], 1),
    "shards and a file": ([PART(0, 1, ""), "train.parquet"], "hold the same split: keep one of them"),
    "two names of a split": (["dev.parquet", "validation.parquet"], "hold the same split: keep one of them"),
    "a shard twice": ([PART(0, 1, "-1f2e3d"), PART(0, 1, "-2a")], "hold the same split: keep one of them"),
    "shards of two sets": ([PART(0, 2, ""), PART(1, 3, "")], "hold the same split: keep one of them"),
    "a shard that is missing": ([PART(1, 2, "")], "is one of 2 shards, 1 are there: fetch them all"),
}


@pytest.mark.parametrize("name", SETS)
def test_a_split_is_one_file_or_all_its_shards(tmp_path: Path, name: str) -> None:
    files, found = SETS[name]
    (tmp_path / "xx").mkdir()
    for file in files:
        Dataset.from_dict({"tokens": [["Ada"]], "ner_tags": [["B-PER"]]}).to_parquet(tmp_path / "xx" / file)
    split = "validation" if name == "two names of a split" else "train"
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            load_ner_dataset(str(tmp_path), ["xx"], splits=(split,))
    else:
        read = load_ner_dataset(str(tmp_path), ["xx"], splits=(split,))["xx"][split]
        assert len(read) == (found or len(files))


def test_hub_id_from_the_offline_cache(tmp_path: Path) -> None:
    prepare_dataset_cache(tmp_path, ("qu", "gn"))
    code = """
from metaxl_evo.ner.data import load_ner_dataset
loaded = load_ner_dataset("unimelb-nlp/wikiann", ["qu", "gn"], splits=["train", "dev"])
for language in ("qu", "gn"):
    for split in ("train", "validation"):
        part = loaded[language][split]
        assert part[0] == {"tokens": [split, "Lima"], "ner_tags": [0, 5]}, part[0]
        assert part.features["ner_tags"].feature.names[5] == "B-LOC"
for languages, splits in ((["qv"], ["train"]), (["qu"], ["test"])):
    try:
        load_ner_dataset("unimelb-nlp/wikiann", languages, splits=splits)
    except ValueError as error:
        print(error)
"""
    unknown_language, missing_split = run_python(code, tmp_path).stdout.splitlines()
    assert "'qv'" in unknown_language
    assert "['gn', 'qu']" in unknown_language
    assert missing_split.endswith("unimelb-nlp/wikiann, qu has no split 'test'; present: train, validation")


def test_hub_id_missing_from_the_offline_cache(tmp_path: Path) -> None:
    code = """
from metaxl_evo.ner.data import load_ner_dataset
try:
    load_ner_dataset("unimelb-nlp/wikiann", ["qu"])
except ConnectionError as error:
    print(error)
"""
    (line,) = run_python(code, tmp_path).stdout.splitlines()
    assert "neither a folder nor a reachable Hub id" in line
    assert "--dataset FOLDER" in line


@pytest.mark.parametrize("answers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_unreachable_hub_is_said_within_seconds(tmp_path: Path, answers: bool) -> None:
    code = """
import time
from metaxl_evo.ner.data import load_ner_dataset
from metaxl_evo.training import hub
hub.HUB_TIMEOUT /= 5
start = time.monotonic()
try:
    load_ner_dataset("unimelb-nlp/wikiann", ["qu"])
except ConnectionError as error:
    print(error)
assert time.monotonic() - start < 6, time.monotonic() - start
"""
    assert hub.HUB_TIMEOUT <= 5
    with socket.socket() as server:  # one that refuses, or one that takes the connection and never says a word
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        (line,) = run_python(code, tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint).stdout.splitlines()
    assert "'unimelb-nlp/wikiann' is neither a folder nor a reachable Hub id" in line
    assert line.endswith("use --dataset FOLDER, or HF_HUB_OFFLINE=1 with a filled cache")


def test_hub_configurations_and_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hub, sources):
        monkeypatch.setattr(module, "is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(hub, "get_dataset_config_names", lambda dataset: ["qu", "gn"])
    with pytest.raises(ValueError, match=r"unknown language of some/data 'qi': Valid: qu, gn$"):
        load_ner_dataset("some/data", ["qi"])

    def refuse(dataset: str) -> list[str]:
        raise RuntimeError("Dataset scripts are no longer supported, but found data.py")

    monkeypatch.setattr(hub, "get_dataset_config_names", refuse)
    with pytest.raises(ValueError, match=r"some/data is a dataset script, .* no longer supported: use"):
        load_ner_dataset("some/data", ["qu"])


# Label sets


def test_labels_that_do_not_occur_are_still_there(tmp_path: Path) -> None:
    write(tmp_path, train="a\tB-PER\nb\tI-PER\nc\tB-LOC\nd\tI-LOC\n")
    write(tmp_path, "yy", train="a\tB-PER\nb\tB-LOC\n")
    write(tmp_path, "zz", train="a\tB-LOC\n")
    loaded = load_train(tmp_path, "xx", "yy", "zz")
    names = [part.features["ner_tags"].feature.names for part in loaded.values()]
    assert names == [["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]] * 3
    assert tags_of(loaded["yy"]) == [["B-PER", "B-LOC"]]


def test_different_label_sets(tmp_path: Path) -> None:
    write(tmp_path, train="a\tB-PER\n")
    write(tmp_path, "yy", train="a\tB-DATE\n")
    with pytest.raises(ValueError, match="label sets differ: xx has O, B-PER, I-PER, but yy has B-DATE"):
        load_train(tmp_path, "xx", "yy")
    with pytest.raises(ValueError, match="label sets differ: the model has O, B-LOC, I-LOC, but xx has B-PER"):
        load_ner_dataset(str(tmp_path), ["xx"], splits=["train"], names=["O", "B-LOC", "I-LOC"])


def test_different_declared_label_sets(tmp_path: Path) -> None:
    for language, names in (("xx", ["O", "B-PER", "I-PER"]), ("yy", ["O", "B-PER"])):
        (tmp_path / language).mkdir()
        features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
        table = Dataset.from_dict({"tokens": [["w"]], "ner_tags": [[1]]}, features=features)
        table.to_parquet(tmp_path / language / "train.parquet")
    with pytest.raises(ValueError, match="label sets differ: xx has O, B-PER, I-PER, but yy has O, B-PER:"):
        load_train(tmp_path, "xx", "yy")


def test_names_of_a_model_give_the_order(tmp_path: Path) -> None:
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]
    write(tmp_path, train=TWO_SENTENCES)
    train = load_ner_dataset(str(tmp_path), ["xx"], splits=["train"], names=names)["xx"]["train"]
    assert list(train["ner_tags"]) == [[1, 2, 0], [3, 0]]


def test_stray_inside_tags_are_counted_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "a\tI-PER\nb\tI-PER\n\nc\tB-LOC\nd\tI-PER\ne\tI-PER\nf\tO\ng\tI-LOC\n"  # a, d and g are stray
    with caplog.at_level(logging.WARNING):
        train = load_train(write(tmp_path, train=text))["xx"]
    assert tags_of(train) == [["I-PER", "I-PER"], ["B-LOC", "I-PER", "I-PER", "O", "I-LOC"]]
    (record,) = caplog.records
    assert "xx, train: 3 I- tags" in record.getMessage()
    assert record.getMessage().endswith("set label_scheme: iob1)")


# Bad input


@pytest.mark.parametrize("line", ["w\tPER", "w\tB-", "w\tb-PER", "w\tB-PER I", "w", "xx:w\t", "w\tM-LOC"])
def test_malformed_tag_names_file_and_line(tmp_path: Path, line: str) -> None:
    write(tmp_path, train=f"xx:a\tO\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"{tmp_path}/xx/train:3: malformed tag .*: a tag is O, B-TYPE or I-TYPE"):
        load_train(tmp_path)


@pytest.mark.parametrize("text", ["", "\n\n \n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="xx/train is empty: it must hold at least one sentence"):
        load_train(write(tmp_path, train=text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, train="")
    (tmp_path / "xx/train").write_bytes("é\tO\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"xx/train is not UTF-8 text \(byte 0\): convert it"):
        load_train(tmp_path)
    (tmp_path / "xx/train").rename(tmp_path / "xx/train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet is not a readable parquet file: fetch it again"):
        load_train(tmp_path)


def test_tables_without_usable_tags(tmp_path: Path) -> None:
    (tmp_path / "xx").mkdir()
    for columns, message in (
        ({"tokens": [["a"]], "labels": [["O"]]}, "needs the columns tokens and ner_tags, but has tokens, labels"),
        ({"tokens": [["a"]], "ner_tags": [[3]]}, "ner_tags has no label names"),
        ({"tokens": [["a"]], "ner_tags": [["PER"]]}, "malformed tag 'PER'"),
        ({"tokens": [["a", "b"]], "ner_tags": [["O"]]}, "sentence 0 has 2 tokens but 1 tags"),
    ):
        Dataset.from_dict(columns).to_parquet(tmp_path / "xx/train.parquet")
        with pytest.raises(ValueError, match=message):
            load_train(tmp_path)


def test_unknown_language_is_said_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path, "sw", train="broken")
    write(tmp_path, "ig", train="broken")
    (tmp_path / "not-a-language").mkdir()
    with pytest.raises(ValueError, match=r"unknown language of .* 'sww': did you mean 'sw'\? Valid: ig, sw$"):
        load_train(tmp_path, "ig", "sww")


def test_missing_or_double_split(tmp_path: Path) -> None:
    write(tmp_path, train=TWO_SENTENCES, dev=TWO_SENTENCES)
    with pytest.raises(ValueError, match=r"xx has no split 'test'; present: validation, train$"):
        load_ner_dataset(str(tmp_path), ["xx"])
    with pytest.raises(ValueError, match=r"unknown split 'tset': did you mean 'test'\? Valid: train, dev"):
        load_ner_dataset(str(tmp_path), ["xx"], splits=["tset"])
    write(tmp_path, valid__txt=TWO_SENTENCES)
    with pytest.raises(ValueError, match=r"xx/dev and .*xx/valid\.txt hold the same split: keep one of them"):
        load_ner_dataset(str(tmp_path), ["xx"], splits=["dev"])


def test_not_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="holds no language: expected folders LANGUAGE with files train"):
        load_train(write(tmp_path / "flat", ".", train=TWO_SENTENCES))
    write(tmp_path / "scripted", "data").joinpath("scripted.py").write_text("")
    for script in (tmp_path / "scripted", tmp_path / "scripted/scripted.py"):
        with pytest.raises(ValueError, match=r"is a dataset script, .* no longer supported: use"):
            load_train(script)
    for offline in (True, False):
        for module in (hub, sources):
            monkeypatch.setattr(module, "is_offline_mode", lambda offline=offline: offline)
        start = time.monotonic()
        with pytest.raises(OSError, match=r"/absent' is neither a folder nor a reachable Hub id .*--dataset FOLDER"):
            load_train(tmp_path / "absent")
        assert time.monotonic() - start < 5


def test_unknown_synthetic_language() -> None:
    with pytest.raises(ValueError, match="unknown synthetic language 'aro': did you mean 'aru'"):
        load_ner_dataset("synthetic", ["aro"])


# Samples


def test_sample_is_deterministic_and_without_replacement(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Dataset.from_dict({"tokens": [[str(number)] for number in range(50)]})
    drawn = [words for (words,) in sample(dataset, 20, seed=3)["tokens"]]
    assert len(set(drawn)) == 20
    assert drawn == [words for (words,) in sample(dataset, 20, seed=3)["tokens"]]
    assert drawn[:5] == [words for (words,) in sample(dataset, 5, seed=3)["tokens"]]
    assert drawn != [words for (words,) in sample(dataset, 20, seed=4)["tokens"]]
    assert sample(dataset, None, seed=3) is dataset
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert len(sample(dataset, 51, seed=3)) == 50
    assert "there are only 50" in caplog.text
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        sample(dataset, 0, seed=3)


# Encoding


@pytest.fixture(scope="module")
def xlmr_tokenizer(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "models/xlmr-tokenizer")


def test_encoding_round_trip(shared: Path, xlmr_tokenizer: PreTrainedTokenizerBase) -> None:
    test = load_ner_dataset(str(shared / "data/wikiann"), ["rw"], splits=["test"])["rw"]["test"]
    plain, numbered = encode(test, xlmr_tokenizer, 512), encode(test, xlmr_tokenizer, 512, numbered=True)
    assert plain.column_names == numbered.column_names == ["input_ids", "attention_mask", "labels"]
    assert len(plain) == len(numbered) == len(test) == 100
    number = 0
    for row, counted, words, tags in zip(plain, numbered, test["tokens"], test["ner_tags"], strict=True):
        assert len(row["input_ids"]) == len(row["attention_mask"]) == len(row["labels"])
        assert (row["input_ids"][0], row["input_ids"][-1]) == (0, 2)  # <s> and </s>
        starts = [position for position, label in enumerate(row["labels"]) if label != IGNORED]
        assert [row["labels"][start] for start in starts] == tags
        pieces = [
            row["input_ids"][start:end] for start, end in itertools.pairwise([*starts, len(row["input_ids"]) - 1])
        ]
        assert pieces == [xlmr_tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        marks = [label for label in counted["labels"] if label != IGNORED]
        assert marks == [(number + place) * STRIDE + tag for place, tag in enumerate(tags)]
        assert plain_labels(torch.tensor(counted["labels"])).tolist() == row["labels"]
        number += len(tags)


def test_words_without_a_sub_token_are_not_truncated_ones(
    tmp_path: Path, xlmr_tokenizer: PreTrainedTokenizerBase
) -> None:
    write(tmp_path, train="xx:Kigali\tB-LOC\nxx:\tO\nxx:Rwanda\tB-LOC\nxx:Kigali\tB-LOC\nxx:\tO\n")
    train = load_train(tmp_path)["xx"]
    encoded = encode(train, xlmr_tokenizer, 4)[0]
    assert xlmr_tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == ["<s>", "▁Ki", "gali", "</s>"]
    assert encoded["labels"] == [-100, 1, -100, -100]
    assert lost_words(train, xlmr_tokenizer, 4) == (2, 2)
    assert lost_words(train, xlmr_tokenizer, 512) == (0, 2)


@pytest.mark.parametrize("own", [None, {"max_length": 7, "stride": 1, "strategy": "longest_first"}])
def test_encoding_leaves_the_tokenizer_as_it_was(xlmr_tokenizer: PreTrainedTokenizerBase, own: Any) -> None:
    """Truncation and padding of its own, as sentence encoders ship them, included."""
    tokenizer = copy.deepcopy(xlmr_tokenizer)
    if own is not None:
        tokenizer.backend_tokenizer.enable_truncation(**own)
        tokenizer.backend_tokenizer.enable_padding(length=9, pad_id=1, pad_token="<pad>")
    before = tokenizer.backend_tokenizer.to_str()
    rows = Dataset.from_dict({"tokens": [["Kigali"] * 9], "ner_tags": [[0] * 9]})
    assert len(encode(rows, tokenizer, 15)[0]["input_ids"]) == 15
    lost_words(rows, tokenizer, 8)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_rows_are_padded_on_the_right() -> None:
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [1, -100, 2], "language": 0}]
    rows.append({"input_ids": [8], "attention_mask": [1], "labels": [0], "language": -1})
    batch = {key: value.tolist() for key, value in PadRight(3)(rows).items()}
    assert batch == {
        "input_ids": [[5, 6, 7], [8, 3, 3]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[1, -100, 2], [0, -100, -100]],
        "language": [0, -1],
    }
