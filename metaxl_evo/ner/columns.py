"""Text files of words and tags: which column is the word, what is a comment, what is a prefix.

A file says of itself how it is laid out; what it does not say for sure is refused with the file and the line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from metaxl_evo.ner.layout import Layout
from metaxl_evo.ner.schemes import PartsOfSpeech

CODE = r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{1,8})*|simple"  # of a language, as WikiAnn writes it before each token
DOCUMENT = "-DOCSTART-"
CONLLU = 10  # columns of a treebank's file
MANY = 200  # lines, among which some words come twice
CHANCE = 10  # tokens that look as if they had a prefix
LAYOUT = "a line is TOKEN<TAB>TAG, or label_column_name is the number of the tag's column"


class Line(NamedTuple):
    """A line of a file: its number, counted from 1, and its columns up to the tag."""

    number: int
    columns: list[str]


def read_columns(path: Path, language: str, layout: Layout) -> tuple[list[list[str]], list[list[str]]]:
    """The tokens and the tags of each sentence of a text file.

    A line holds `token<TAB>tag` or, separated by spaces, CoNLL columns with the token first, or behind a running
    number, and the tag last, or behind number and token the only one in the line; where it is otherwise, `layout` has
    the numbers of the columns. `language:` before every token is taken off, as are comments before a sentence.

    Raises:
        ValueError: with the file and the line, for what is not laid out so.
    """
    sentences = _sentences(path, layout)
    if not sentences:
        raise ValueError(f"{path} is empty: it must hold at least one sentence")
    place = _token_column(path, sentences) if layout.tokens is None else int(layout.tokens) - 1
    if layout.tags is None:
        _require_one_tag(path, sentences, place, layout)
    lines = [line for sentence in sentences for line in sentence]
    names = without_prefix(
        [line.columns[place] for line in lines], language, [f"{path}:{line.number}" for line in lines]
    )
    words = iter(names)
    tokens = [[next(words) for _ in sentence] for sentence in sentences]
    tags = [[line.columns[-1] for line in sentence] for sentence in sentences]
    kept = [row for row, words in enumerate(tokens) if words != [DOCUMENT]]
    if not kept:
        raise ValueError(f"{path} is empty: it must hold at least one sentence")
    return [tokens[row] for row in kept], [tags[row] for row in kept]


def without_prefix(tokens: Sequence[str], language: str, places: Sequence[str]) -> list[str]:
    """The tokens without the language code that WikiAnn's files put before each, if all of them have one.

    Args:
        language: its own code may be any word; another language's is recognised by its form.
        places: where each token stands, for an error message.

    Raises:
        ValueError: where most tokens have a prefix, or more than chance gives one, and some have none.
    """
    prefix = re.compile(rf"(?:{re.escape(language)}|{CODE}):")
    found = [prefix.match(token) is not None or token == DOCUMENT for token in tokens]
    if all(found):
        return [prefix.sub("", token, count=1).strip(" ") for token in tokens]
    codes = Counter(token.partition(":")[0] for token in tokens if prefix.match(token)).most_common(1)
    # A word such as doi:10 has such a form too; a tenth of a text, which one code begins, are prefixes.
    if codes and (codes[0][1] > len(tokens) / 2 or codes[0][1] >= max(len(tokens) / 10, CHANCE)):
        first = found.index(False)
        raise ValueError(
            f"{places[first]}: {tokens[first]!r} lacks the prefix '{codes[0][0]}:' that {codes[0][1]} of "
            f"{len(tokens)} tokens have: give it to all or to none"
        )
    return list(tokens)


def read_words(path: Path, column: int) -> list[list[str]]:
    """The words of sentences without tags, a word a line: its column, counted from 1; comments as in `read_columns`.

    Raises:
        ValueError: with the file, and the line that has no such column.
    """
    sentences: list[list[str]] = [[]]
    for number, line in enumerate(text_lines(path), start=1):
        columns = _split(line)
        if not columns or columns[0].startswith(DOCUMENT):
            sentences.append([])
        elif len(columns) == 1 or sentences[-1] or not _is_comment(columns):
            if len(columns) < column:
                raise ValueError(
                    f"{path}:{number}: {len(columns)} columns, tokens_column must be one of them, not {column}"
                )
            sentences[-1].append(columns[column - 1])
    return list(filter(None, sentences))


def text_lines(path: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        ValueError: for one that is not UTF-8.
        OSError: for one that cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it, e.g. with iconv") from error
    return text.split("\n")  # not splitlines: tokens hold U+2028 and the like


def _sentences(path: Path, layout: Layout) -> list[list[Line]]:
    lines = text_lines(path)
    split = [_split(line) for line in lines]
    no_words = {number for number, columns in enumerate(split, start=1) if _is_no_word(columns, layout)}
    width = _width(split)
    is_plain = width <= 2 and layout.tokens is None and layout.tags is None
    found = None if is_plain else _tag_column(path, split, layout)
    if found is not None:
        kept, tag_column = found
        # What stands behind the tag, as Universal NER's annotators do, may lack on some lines if tabs tell the others.
        split = [
            [*row[:kept], row[tag_column]] if len(row) > tag_column and (len(row) == width or "\t" in line) else row
            for row, line in zip(split, lines, strict=True)
        ]
        width = kept + 1
    between = [
        {line[at] for line in split if len(line) == width and not _is_comment(line)} for at in range(1, width - 1)
    ]
    sentences: list[list[Line]] = [[]]
    for number, columns in enumerate(split, start=1):
        if not columns or columns[0].startswith(DOCUMENT):
            sentences.append([])
            continue
        if number in no_words:
            continue
        if any("\0" in column or "\r" in column for column in columns):
            raise ValueError(
                f"{path}:{number}: NUL bytes or old Mac line ends, not a text file of this system: convert it"
            )
        tag = columns[-1] if len(columns) > 1 else ""
        fits = layout.tag.fullmatch(tag) and len(columns) == width
        if _is_comment(columns) and not sentences[-1]:
            if not fits:
                continue
            seen = all(text in known for text, known in zip(columns[1:-1], between, strict=True))
            if not seen and "\t" not in lines[number - 1]:
                raise ValueError(
                    f"{path}:{number}: a comment, or the token {columns[0]}? Take it out, or separate columns by tabs"
                )
        if not layout.tag.fullmatch(tag):
            raise ValueError(f"{path}:{number}: {layout.refusal(tag)} ({LAYOUT})")
        if not fits:
            raise ValueError(
                f"{path}:{number}: {len(columns)} columns where most lines have {width}: {LAYOUT}, and a token with a "
                "space in it needs the tab"
            )
        sentences[-1].append(Line(number, columns))
    return list(filter(None, sentences))


def _split(line: str) -> list[str]:
    """The columns of a line, between tabs where there are any, else between runs of spaces; none of a blank one."""
    text = line.rstrip()
    columns = [column.strip(" ") for column in text.split("\t")] if "\t" in text else re.split(" +", text.strip(" "))
    columns[0] = columns[0].removeprefix("\ufeff") or columns[0]  # the mark of a file that was appended to another
    while len(columns) > 2 and not columns[0]:
        del columns[0]  # an indent
    return columns if text.strip() else []


def _is_comment(columns: list[str]) -> bool:
    """Whether a line may be one: `# text`, `#key = value`; a token may begin with # as well."""
    return (
        columns[0] == "#" or columns[0].startswith("# ") or (columns[0].startswith("#") and "=" in " ".join(columns))
    )


def _is_no_word(columns: list[str], layout: Layout) -> bool:
    """Whether a line of CoNLL-U, numbered 3-4 or 5.1, is of several words, or of one that is not written."""
    of_conllu = isinstance(layout.scheme, PartsOfSpeech) and len(columns) == CONLLU
    return of_conllu and re.fullmatch(r"\d+[-.]\d+", columns[0]) is not None


def _width(split: Sequence[list[str]]) -> int:
    """The usual number of columns, comments aside where there is anything else."""
    lines = [columns for columns in split if columns and not columns[0].startswith(DOCUMENT)]
    plain = [columns for columns in lines if not columns[0].startswith("#")]
    return Counter(map(len, plain or lines)).most_common(1)[0][0] if lines else 0


def _tag_column(path: Path, split: Sequence[list[str]], layout: Layout) -> tuple[int, int] | None:
    """How many columns to keep, and which, from 0, is the tag; None for all and the last."""
    lines = [line for line in split if line and not _is_comment(line) and not line[0].startswith(DOCUMENT)]
    lines = [line for line in lines if not _is_no_word(line, layout)]
    widths = set(map(len, lines))
    narrowest, widest = min(widths, default=0), max(widths, default=0)
    for setting, number in (("tokens_column", layout.tokens), ("label_column_name", layout.tags)):
        if number is not None and not (number.isdecimal() and 1 <= int(number) <= widest):
            raise ValueError(
                f"{setting} must be a number from 1 to {widest} for the columns of {path}, not {number!r}"
            )
    if layout.tags is not None:
        tag, kept = int(layout.tags) - 1, max(int(layout.tags) - 1, int(layout.tokens or 0))
        if not kept:
            raise ValueError(f"label_column_name is the first column of {path}: set tokens_column too")
        return kept, tag
    held = {
        at: [layout.tag.fullmatch(line[at]) is not None for line in lines if len(line) > at] for at in range(1, widest)
    }
    tags = [at for at in range(1, narrowest) if all(held[at])]
    alone = len(tags) == 1 and not any(any(held[at]) for at in held if at > tags[0])
    if tags and isinstance(layout.scheme, PartsOfSpeech) and all(line[0].isdecimal() for line in lines):
        return tags[0], tags[0]  # a treebank's own tags, behind, may be the same
    # Without the number it may be CoNLL 2003, whose chunks look like tags, with entities that do not.
    return (tags[0], tags[0]) if alone and all(line[0].isdecimal() for line in lines) else None


def _token_column(path: Path, sentences: list[list[Line]]) -> int:
    """0, or 1 where the first column numbers the lines of each sentence."""
    first = [[line.columns[0] for line in sentence] for sentence in sentences]
    start, width = sentences[0][0].number, len(sentences[0][0].columns)
    several = max(map(len, first)) > 2
    if all(re.fullmatch(r"\d+([-.]\d+)?", text) for texts in first for text in texts) and (width > 2 or several):
        if width > 2 and all(text.isdecimal() for texts in first for text in texts) and all(map(_counts, first)):
            second = [line.columns[1] for sentence in sentences for line in sentence]
            if width > 3 and all(map(_has_digit, second)):
                raise ValueError(f"{path}:{start}: the first two columns hold numbers only: keep one, and the token")
            return 1
        if width > 2 or all(map(_counts, first)):
            raise ValueError(
                f"{path}:{start}: the first column holds numbers only: put the token there, or behind a number that "
                "counts the lines of each sentence"
            )
    if width > 2 and several and all(len(set(texts)) == 1 for texts in first):
        raise ValueError(
            f"{path}:{start}: the first column is the same on all lines of a sentence: put the token there"
        )
    texts = [text for texts in first for text in texts]
    if width > 2 and len(texts) >= MANY and len(set(texts)) == len(texts):
        raise ValueError(f"{path}:{start}: the first column never repeats, as words do: put the token there")
    if width > 2 and len(texts) > 1 and all(map(_has_digit, texts)):
        raise ValueError(
            f"{path}:{start}: the first column has a number on every line, as ids do: put the token there"
        )
    empty = [line for sentence in sentences for line in sentence if not re.sub(rf"^({CODE}):", "", line.columns[0])]
    if 2 * len(empty) > sum(map(len, sentences)):
        raise ValueError(f"{path}:{empty[0].number}: an empty token, as on most lines: {LAYOUT}")
    return 0


def _has_digit(text: str) -> bool:
    return re.search(r"\d", text) is not None


def _counts(texts: list[str]) -> bool:
    return all(text.isdecimal() and int(text) == int(texts[0]) + step for step, text in enumerate(texts))


def _require_one_tag(path: Path, sentences: list[list[Line]], place: int, layout: Layout) -> None:
    """Refuse two layers of the same entity types: nested ones, or truth and predictions."""
    lines = [line.columns for sentence in sentences for line in sentence]
    last = {columns[-1][2:] for columns in lines} - {""}
    for other in range(place + 1, len(lines[0]) - 1):
        if not all(layout.tag.fullmatch(columns[other]) for columns in lines):
            continue
        types = {columns[other][2:] for columns in lines} - {""}
        if types and (types & last or not last):
            raise ValueError(
                f"{path}:{sentences[0][0].number}: columns {other + 1} and {len(lines[0])} both hold tags: keep one, "
                "or set label_column_name"
            )
