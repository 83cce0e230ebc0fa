"""How text files are laid out: read as the words that they hold, or refused with the file and the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.ner.test_data import load_train, tags_of, write

WORDS, TAGS = [["Ada", "wrote"], ["in", "Rome", "."]], [["B-PER", "O"], ["O", "B-LOC", "O"]]
LAYOUTS = {
    "tabs": "{w}\t{t}",
    "spaces": "{w} {t}",
    "runs of spaces": "{w}     {t}",
    "its own prefix": "xx:{w}\t{t}",
    "another language's prefix": "sw:{w}\t{t}",
    "a prefix with a subtag": "zh-yue:{w}\t{t}",
    "a prefix of several subtags": "be-x-old:{w} {t}",
    "a prefix in capitals": "SW:{w}\t{t}",
    "a prefix and a space": "sw: {w}\t{t}",
    "simple english": "simple:{w}\t{t}",
    "a number from 0": "{i}\t{w}\t{t}",
    "a number from 1": "{j} {w} {t}",
    "a number and a prefix": "{j}\tsw:{w}\t{t}",
    "indented by a space": " {w} {t}",
    "indented by spaces, with tabs": "  {w}\t{t}",
    "indented by a tab": "\t{w}\t{t}",
    "columns between": "{w} NNP I-NP {t}",
    "columns of underscores": "{w} _ _ {t}",
    "columns behind the tag": "{j}\t{w}\t{t}\t-\tan annotator",
    "spaces around tabs": "{w} \t {t} ",
}
HEADS = {
    "nothing": "",
    "a byte order mark": "\ufeff",
    "a document start": "-DOCSTART-\n\n",
    "a document start with a tag": "-DOCSTART-\tO\n\n",
    "a document start in columns": "-DOCSTART- -X- -X- O\n\n",
    "a comment": "# source text of O\n",
    "a comment with tabs": "# id 00-1\tdomain=en\n",
    "comments": "# sent_id = 1\n# text = Ada wrote\n#newdoc = 1\n",
    "blank lines": "\n \n\t\n",
}


def laid_out(line: str, between: str = "\n") -> str:
    return between.join(
        "".join(f"{line.format(w=w, t=t, i=i, j=i + 1)}\n" for i, (w, t) in enumerate(zip(words, tags, strict=True)))
        for words, tags in zip(WORDS, TAGS, strict=True)
    )


def read(root: Path, text: str) -> tuple[list[list[str]], list[list[str]]]:
    train = load_train(write(root, train=text))["xx"]
    return list(train["tokens"]), tags_of(train)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    """Line ends by turns."""
    for number, head in enumerate(HEADS.values()):
        ends = ("\n", "\r\n")[(number + list(LAYOUTS).index(layout)) % 2]
        text = (head + laid_out(LAYOUTS[layout])).replace("\n", ends)
        assert read(tmp_path / str(number), text) == (WORDS, TAGS), head


def test_layouts_are_as_many_as_they_were() -> None:
    assert (len(LAYOUTS), len(HEADS), len(REFUSED)) == (20, 9, 24)


def test_comments_stand_before_every_sentence(tmp_path: Path) -> None:
    text = laid_out("{w}\t{t}", between="\n# sent_id = 2\n# text = in Rome .\n")
    assert read(tmp_path, text) == (WORDS, TAGS)


def test_a_file_that_was_appended_to_another(tmp_path: Path) -> None:
    text = laid_out("sw:{w}\t{t}")
    words, tags = read(tmp_path, f"{text}\n\ufeff-DOCSTART-\tO\n\n\ufeff{text}\nsw:-DOCSTART-\tO\n\n")
    assert (words, tags) == (WORDS * 2, TAGS * 2)


def test_a_token_that_its_columns_tell_from_a_comment(tmp_path: Path) -> None:
    assert read(tmp_path / "seen", "# NN O\n5 NN O\nAda NN B-PER\n")[0] == [["#", "5", "Ada"]]
    assert read(tmp_path / "tabs", "#\t#\tO\n5\tNN\tO\nAda\tNN\tB-PER\n")[0] == [["#", "5", "Ada"]]


@pytest.mark.parametrize("line", ["#\tO", "# O", "#rome\tB-LOC", "#1 O"])
def test_tokens_that_begin_like_a_comment(tmp_path: Path, line: str) -> None:
    gap = "\t" if "\t" in line else " "
    word, tag = line.split(gap)
    words, tags = read(tmp_path, f"{line}\nAda{gap}B-PER\n{line}\n\n{line}\n")
    assert words == [[word, "Ada", word], [word]]
    assert tags == [[tag, "B-PER", tag], [tag]]


def test_tokens_that_look_like_a_prefix(tmp_path: Path) -> None:
    words = ["12:30", "xx:", "Ada", "re:invent", "sw:Ada"]
    assert read(tmp_path, "".join(f"{word}\tB-PER\n" for word in words))[0] == [words]


REFUSED = {
    "a prefix on most tokens": ("sw:Ada\tB-PER\nsw:wrote\tO\nin\tO\n", r":3: 'in' lacks the prefix 'sw:'"),
    "a number that does not count": ("7\tAda\tB-PER\n9\twrote\tO\n", ":1: the first column holds numbers only"),
    "ranges of numbers": ("1-2\tAda\tB-PER\n1\twrote\tO\n", ":1: the first column holds numbers only"),
    "numbers without tokens": ("0\tB-PER\n1\tO\n2\tO\n\n0\tO\n", ":1: the first column holds numbers only"),
    "a sentence id": ("s1 Ada B-PER\ns1 wrote O\ns1 . O\n\ns2 Hi O\n", ":1: the first column is the same"),
    "a token id": ("".join(f"t{n}\tAda\tB-PER\n" for n in range(200)), ":1: the first column never repeats"),
    "a token id in a short file": (
        "s1-1 Ada B-PER\ns1-2 in O\n\ns2-1 Rome B-LOC\n",
        ":1: the first column has a number on",
    ),
    "two running numbers": ("17\t1\tAda\tB-PER\n18\t2\tin\tO\n", ":1: the first two columns hold numbers only"),
    "a prefix on some tokens": (
        "sw:Ada\tB-PER\n" * 12 + "in\tO\n" * 30,
        r":13: 'in' lacks the prefix 'sw:' that 12 of 42",
    ),
    "an invisible mark behind a tag": ("Ada\tB-PER\u200f\nin\tO\n", r":1: malformed tag 'B-PER\\u200f'"),
    "a token of two words": ("Ada B-PER\nin O\nNew York B-LOC\n", ":3: 3 columns where most lines have 2"),
    "a line with a column less": ("a X O\nb X B-PER\nc O\n", ":3: 2 columns where most lines have 3"),
    "nested tags": ("1\tAda\tB-PER\tB-LOC\n2\ta\tB-LOC\tO\n", ":1: columns 3 and 4 both hold tags: keep one"),
    "truth and predictions": ("Ada B-PER B-PER\nwrote O O\n", ":1: columns 2 and 3 both hold tags: keep one"),
    "a second layer without entities": ("Ada\tB-PER\tO\nwrote\tO\tO\n", ":1: columns 2 and 3 both hold tags"),
    "a comment, or the token #": ("# source text O\nAda NNP I-NP B-PER\n", r":1: a comment, or the token #\?"),
    "a comment within a sentence": ("Ada\tB-PER\n# note\nwrote\tO\n", ":2: malformed tag"),
    "a hashtag without a tag": ("#rome\nAda\tB-PER\n", ":1: malformed tag ''"),
    "chunks before entities of no scheme": ("Ada N B-NP PER\nruns V B-VP LOC\n", ":1: malformed tag 'PER'"),
    "two layers before other columns": ("1\tAda\tB-PER\tB-PER\t-\n", ":1: malformed tag '-'.* label_column_name"),
    "empty tokens": ("\tB-PER\n\tO\n", ":1: an empty token, as on most lines"),
    "prefixes alone": ("sw:\tB-PER\nsw:\tO\n", ":1: an empty token, as on most lines"),
    "comments alone": ("# text = Ada\n", "xx/train is empty"),
    "a document start alone": ("sw:-DOCSTART-\tO\n", "xx/train is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_laid_out_so(tmp_path: Path, name: str) -> None:
    text, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"xx/train{message}" if message.startswith(":") else message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([["sw:Ada", "sw:wrote"], ["sw:a"]], [["Ada", "wrote"], ["a"]]), ([["Ada"], ["sw:a"]], [["Ada"], ["sw:a"]])],
)
def test_prefixes_that_a_table_has_kept(tmp_path: Path, tokens: Any, expected: Any) -> None:
    (tmp_path / "xx").mkdir()
    tags = [["B-PER"] * len(words) for words in tokens]
    Dataset.from_dict({"tokens": tokens, "ner_tags": tags}).to_parquet(tmp_path / "xx/train.parquet")
    assert list(load_train(tmp_path)["xx"]["tokens"]) == expected


def test_a_table_of_empty_tokens(tmp_path: Path) -> None:
    (tmp_path / "xx").mkdir()
    Dataset.from_dict({"tokens": [["", " "]], "ner_tags": [["B-PER", "O"]]}).to_parquet(tmp_path / "xx/train.parquet")
    with pytest.raises(ValueError, match="xx, train has only empty tokens: repair the data"):
        load_train(tmp_path)
