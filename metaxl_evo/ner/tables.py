"""Files of tables: parquet, JSON, CSV and TSV, each read as the columns of words and of tags, a row a sentence."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
from datasets import Dataset

from metaxl_evo.messages import one_line
from metaxl_evo.ner.layout import Layout


def columns_of(there: Sequence[str], layout: Layout, where: str) -> tuple[str, str]:
    """The names of the columns of tokens and of tags.

    Raises:
        ValueError: where a table has none of this name, with those that it has.
    """
    columns = layout.scheme.columns
    tokens, tags = (
        layout.tokens or layout.scheme.words,
        layout.tags or next(filter(there.__contains__, columns), columns[0]),
    )
    if not {tokens, tags} <= set(there):
        raise ValueError(
            f"{where} needs the columns {tokens} and {tags}, but has {', '.join(there) or 'none'}: name them by "
            "tokens_column and label_column_name"
        )
    return tokens, tags


def read_file(path: Path, layout: Layout) -> Dataset:
    """The columns of tokens and tags of a file; a parquet file with its declared label names.

    JSON holds a list of objects, or an object a line. CSV holds lists as Python or JSON writes them, or a row a token,
    with a column beside that tells the sentences: its name begins with `sent`, as `Sentence #` and `sent_id` do, and
    it may be empty where a sentence goes on. Of whole texts CSV and TSV hold a row each, and TSV knows no quotes.

    Raises:
        ValueError: with the file, for what is not laid out so.
    """
    try:
        return READERS[path.suffix](path, layout)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it, e.g. with iconv") from error
    except (pyarrow.ArrowException, pandas.errors.ParserError, pandas.errors.EmptyDataError, OSError) as error:
        kind = path.suffix.removeprefix(".")
        raise ValueError(f"{path} is not a readable {kind} file: fetch it again ({one_line(error)})") from error


def _read_parquet(path: Path, layout: Layout) -> Dataset:
    return Dataset(pyarrow.parquet.read_table(path))  # Dataset.from_parquet would fill the user's cache folder


def _read_json(path: Path, layout: Layout) -> Dataset:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = _parsed(text, str(path))
    else:
        lines = enumerate(text.split("\n"), start=1)  # not splitlines: tokens hold U+2028 and the like
        rows = [_parsed(line, f"{path}:{number}") for number, line in lines if line.strip()]
    _require_rows(rows, path)
    if not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{path} must hold objects with the words and the tags of a sentence each")
    there = list(dict.fromkeys(key for row in rows for key in row))
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns_of(there, layout, str(path))})


def _require_rows(rows: Sized, path: Path) -> None:
    if not len(rows):
        raise ValueError(f"{path} is empty: it must hold at least one sentence")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error}): a list of objects, or an object a line") from error


def _read_csv(path: Path, layout: Layout) -> Dataset:
    table = _read_lines(path)
    there = list(table.columns)
    names = columns_of(there, layout, str(path))
    if layout.of_texts:
        return Dataset.from_dict({name: table[name].tolist() for name in names})
    if all(table[name].str.startswith("[").all() for name in names):
        return Dataset.from_dict({name: [_list(text, str(path)) for text in table[name]] for name in names})
    of_sentence = [name for name in there if name.lower().startswith("sent") and name not in names]
    if len(of_sentence) != 1:
        raise ValueError(
            f"{path}: a row a token needs one column that tells the sentences: call it sentence_id, not one of "
            f"{', '.join(there)}"
        )
    ids = table[of_sentence[0]].where(table[of_sentence[0]] != "").ffill()
    number = (ids != ids.shift()).cumsum()
    if ids.isna().any() or ids.nunique() < number.max():
        raise ValueError(
            f"{path}: {of_sentence[0]} must be the same on all rows of a sentence, and nowhere else: sort it"
        )
    return Dataset.from_dict({name: table.groupby(number)[name].agg(list).tolist() for name in names})


def _read_lines(path: Path, **form: Any) -> pandas.DataFrame:
    """The cells as text, "NA" too; longer lines than the first one are refused, which pandas takes for row names."""
    table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", **form)
    _require_rows(table, path)
    if not isinstance(table.index, pandas.RangeIndex):
        raise ValueError(f"{path} has fewer names of columns in its first line than columns: name them all")
    return table


def _read_tsv(path: Path, layout: Layout) -> Dataset:
    table = _read_lines(path, sep="\t", quoting=csv.QUOTE_NONE)
    return Dataset.from_dict({name: table[name].tolist() for name in columns_of(list(table), layout, str(path))})


def _list(text: str, where: str) -> list[Any]:
    """A list as JSON or Python writes it; numpy's, without commas, would run its words together."""
    try:
        return list(json.loads(text))
    except json.JSONDecodeError:
        pass
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        found = None
    if repr(found) != text:
        raise ValueError(f"{where}: {text[:40]!r} is no list of words as JSON or Python writes it: write it anew")
    return list(found)


READERS: dict[str, Callable[[Path, Layout], Dataset]] = {
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,  # of whole texts: else its lines are those of words
}
