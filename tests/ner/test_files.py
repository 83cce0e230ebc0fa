"""The files that people have: each layout of docs/ner_data.md by its own settings, and tables of JSON and CSV."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from metaxl_evo.ner import sources
from metaxl_evo.ner.data import load_ner_dataset
from metaxl_evo.ner.layout import LayoutArguments
from tests.hub_cache import REPOSITORY, prepare_cache, run_python
from tests.ner.test_data import tags_of, write

ROW = re.compile(r"\| `(--dataset .*)` \|")
LINES = [shlex.split(line) for line in ROW.findall((REPOSITORY / "docs/ner_data.md").read_text(encoding="utf-8"))]
WORDS, TAGS = ["Ada", "of", "Rome"], ["B-PER", "O", "B-LOC"]
UNER = "# sent_id = a-1\n# text = Ada of Rome\n1\tAda\tB-PER\t-\tann\n2\tof\tO\n3\tRome\tB-LOC\t-\tann\n"
FILES = {  # of the data sets that come as files: the name of a split's, and its text
    "wikineural/data/wikineural": ("{}.conllu", "0\tAda\tB-PER\n1\tof\tO\n2\tRome\tB-LOC\n\n"),
    "masakhane-ner/data": ("{}.txt", "Ada B-PER\nof O\nRome B-LOC\n\n"),
    "masakhane-ner/MasakhaNER2.0/data": ("{}.txt", "Ada B-PER\nof O\nRome B-LOC\n\n"),
    "uner": ("xx_yyy-ud-{}.iob2", UNER),
    "multiconer": ("xx_{}.conll", "# id 5f-1\tdomain=en\nAda _ _ B-PER\nof _ _ O\nRome _ _ B-LOC\n\n"),
}
LOAD = """
import json, sys
from metaxl_evo.ner.arguments import NerArguments, NerTrainingArguments
from metaxl_evo.ner.target_data import load_target
from metaxl_evo.training.parser import parse_arguments
for argv in json.loads(sys.argv[1]):
    argv += ["--output_dir", "unused", "--use_cpu", "true"]
    ner, args = parse_arguments((NerArguments, NerTrainingArguments), argv)
    data = load_target(ner, *ner.target_languages, label_names=args.label_names)
    parts = [*data.sources.values(), data.target, data.dev, data.test]
    print(json.dumps([[part["tokens"][0], [data.names[tag] for tag in part["ner_tags"][0]]] for part in parts]))
"""


def prepare_hub(home: Path) -> None:
    """What the Hub's data sets leave in its cache, in the splits, columns and types that they have there."""
    names = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
    own, by_language = ("train", "validation", "test"), itertools.product(("train", "val", "test"), ("en", "nl"))
    for dataset, configurations, kind, splits in (
        ("unimelb-nlp/wikiann", ["en", "qu"], ClassLabel(names=names), own),
        ("bltlab/open-ner-core-types", ["GermEval_deu", "TurkuNLP_fin"], ClassLabel(names=names), own),
        ("Babelscape/wikineural", ["default"], Value("int32"), map("_".join, by_language)),
    ):
        features = Features({"tokens": List(Value("string")), "ner_tags": List(kind)})
        rows = [{"tokens": WORDS, "ner_tags": list(map(names.index, TAGS))}]
        for configuration in configurations:
            prepare_cache(home, dataset, configuration, features, dict.fromkeys(splits, rows))


def test_every_line_of_the_page_reads_its_data_set(tmp_path: Path) -> None:
    prepare_hub(tmp_path / "home")
    for dataset, (name, text) in FILES.items():
        (argv,) = [line for line in LINES if line[1] == dataset]
        for language in (argv[argv.index(f"--{side}_languages") + 1] for side in ("source", "target")):
            write(tmp_path / dataset, language, **{name.format(split): text for split in ("train", "dev", "test")})
    lines = [[*line[:1], str(tmp_path / line[1]) if line[1] in FILES else line[1], *line[2:]] for line in LINES]
    printed = run_python(LOAD, tmp_path / "home", json.dumps(lines)).stdout.splitlines()
    assert [json.loads(line) for line in printed] == [[[WORDS, TAGS]] * 4] * 8


@pytest.mark.parametrize(("splits", "valid"), [(("train_en", "val_en"), "en"), (("train", "test"), "default")])
def test_one_configuration_on_the_hub(monkeypatch: pytest.MonkeyPatch, splits: tuple[str, ...], valid: str) -> None:
    """Its languages are in the names of its splits, or it is the only one."""
    part = Dataset.from_dict({"tokens": [WORDS], "ner_tags": [TAGS]})
    monkeypatch.setattr(sources, "is_offline_mode", lambda: False)
    monkeypatch.setattr(sources, "require_reachable", lambda *of: None)
    monkeypatch.setattr(sources, "configurations_of", lambda *of: ["default"])
    monkeypatch.setattr(sources, "load_from_hub", lambda *of, **more: DatasetDict(dict.fromkeys(splits, part)))
    train = load_ner_dataset("some/data", [valid], splits=["train"])[valid]["train"]
    assert (list(train["tokens"]), tags_of(train)) == ([WORDS], [TAGS])
    with pytest.raises(ValueError, match=f"unknown language of some/data 'xx': Valid: {valid}$"):
        load_ner_dataset("some/data", ["xx"], splits=["train"])


SENTENCES = [
    {"tokens": ["NA", "of", "A\u2028b"], "ner_tags": ["B-PER", "O", "B-LOC"]},
    {"tokens": ["null"], "ner_tags": ["O"]},
]
BY_WORD = "Sentence #,Word,POS,Tag\nSentence: 1,NA,N,B-PER\n,of,,O\n,A\u2028b,N,B-LOC\nSentence: 2,null,N,O\n"
TABLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lines of JSON": ("train.jsonl", "\n".join(map(json.dumps, SENTENCES)), {}),
    "lines of JSON, unescaped": (
        "train.json",
        "\n".join(json.dumps(row, ensure_ascii=False) for row in SENTENCES),
        {},
    ),
    "a list of JSON": ("train.json", json.dumps(SENTENCES, indent=1), {}),
    "other names": (
        "train.jsonl",
        "\n".join(json.dumps({"w": row["tokens"], "t": row["ner_tags"]}) for row in SENTENCES),
        {"tokens_column": "w", "label_column_name": "t"},
    ),
    "integers": (
        "train.jsonl",
        '{"tokens": ["NA", "of", "A\\u2028b"], "tags": [1, 0, 3]}\n{"tokens": ["null"], "tags": [0]}',
        {"label_names": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]},
    ),
    "CSV, a row a word": ("train.csv", BY_WORD, {"tokens_column": "Word", "label_column_name": "Tag"}),
    "CSV, an id on each row": (
        "train.csv",
        "tokens,ner_tags,sent_id\nNA,B-PER,7\nof,O,7\nA\u2028b,B-LOC,7\nnull,O,9\n",
        {},
    ),
    "CSV of lists": (
        "train.csv",
        "tokens,ner_tags\n\"['NA', 'of', 'A\\u2028b']\",\"['B-PER', 'O', 'B-LOC']\"\n\"[\"\"null\"\"]\",['O']\n",
        {},
    ),
    "CSV of integers": (
        "train.csv",
        "sentence_id,tokens,tags\n1,NA,1\n1,of,0\n1,A\u2028b,3\n2,null,0\n",
        {"label_names": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]},
    ),
    "text columns by number": (
        "train.tsv",
        "B-PER\tx\tNA\tB-X\nO\tx\tof\tO\nB-LOC\tx\tA\u2028b\tO\n\nO\tx\tnull\tO\n",
        {"tokens_column": "3", "label_column_name": "1"},
    ),
    "text with integers": (
        "train.conll",
        "NA 1\nof 0\nA\u2028b 3\n\nnull 0\n",
        {"label_names": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]},
    ),
}


def load(root: Path, settings: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    names = settings.get("label_names")
    layout = LayoutArguments(**{key: settings[key] for key in settings.keys() - {"label_names"}}).layout(names)
    train = load_ner_dataset(str(root), ["xx"], splits=["train"], layout=layout)["xx"]["train"]
    return list(train["tokens"]), tags_of(train)


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path: Path, name: str) -> None:
    file, text, settings = TABLES[name]
    assert load(write(tmp_path, **{file: text}), settings) == (
        [row["tokens"] for row in SENTENCES],
        [row["ner_tags"] for row in SENTENCES],
    )


ONE = '{"tokens": ["a"], "ner_tags": [1]}\n'
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "integers without names": ("train.jsonl", ONE, {}, "ner_tags has no label names: .* or set label_names"),
    "an integer in text": ("train", "a\t1\n", {}, "malformed tag '1': .* set label_names"),
    "an integer beyond the names": ("train.jsonl", ONE, {"label_names": ["O"]}, "label id 1 has no name among O"),
    "names of names": ("train", "a\tB-PER\n", {"label_names": ["O"]}, "malformed tag 'B-PER': label_names is for"),
    "a name twice": ("train.jsonl", ONE, {"label_names": ["O", "O"]}, "label_names has a name twice: O, O"),
    "an ignored position": ("train.jsonl", ONE.replace("1", "-100"), {"label_names": ["O"]}, "malformed tag '-100'"),
    "a name that is none": ("train.jsonl", ONE, {"label_names": ["O", "PER"]}, "label_names: malformed tag 'PER'"),
    "another column": ("train.jsonl", ONE, {"label_column_name": "x"}, "needs the columns tokens and x, but has"),
    "a column that is not there": ("train", "a\tO\n", {"tokens_column": "3"}, "must be a number from 1 to 2 for"),
    "a name in text": ("train", "a\tO\n", {"label_column_name": "tag"}, "label_column_name must be a number"),
    "the tag first": ("train", "O\ta\n", {"label_column_name": "1"}, "is the first column of .*: set tokens_column"),
    "one column": ("train", "", {"label_column_name": "1", "tokens_column": "1"}, "are both 1: name two columns"),
    "no JSON": ("train.jsonl", ONE + "{", {}, "jsonl:2 is no JSON"),
    "JSON of something else": ("train.json", "[1]", {}, "must hold objects with the words and the tags"),
    "a number among words": ("train.jsonl", ONE.replace('"a"', '"a", 1'), {}, "is not a readable jsonl file"),
    "a header alone": ("train.csv", "tokens,tags\n", {}, "train.csv is empty: it must hold at least one sentence"),
    "no object": ("train.jsonl", "\n", {}, "train.jsonl is empty: it must hold at least one sentence"),
    "nothing in a CSV": ("train.csv", "", {}, "is not a readable csv file"),
    "a CSV without sentences": ("train.csv", "tokens,tags\na,O\n", {}, "needs one column that tells the sentences"),
    "a CSV that is not sorted": ("train.csv", "tokens,tags,sent\na,O,1\na,O,2\na,O,1\n", {}, "nowhere else: sort it"),
    "numpy's lists": ("train.csv", "tokens,tags\n['a' 'b'],['O' 'O']\n", {}, "no list of words as JSON or Python"),
    "another suffix": ("train.xml", "", {}, r"none \(train.xml: the suffixes that are read are none, .txt, .*csv\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read(tmp_path: Path, name: str) -> None:
    file, text, settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, **{file: text}), settings)


def test_a_file_named_by_its_split_comes_before_one_whose_name_ends_so(tmp_path: Path) -> None:
    write(tmp_path, **{"train.txt": "Ada\tB-PER\n", "old-train.txt": "Eve\tB-PER\n"})
    assert load(tmp_path, {})[0] == [["Ada"]]
