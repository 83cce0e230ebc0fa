"""Words as a model reads them: sub-tokens, a label on the first of each word, and what is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross entropy skips
STRIDE = 2**20  # of numbered labels; more than any label set has


@dataclass(frozen=True)
class PadRight:
    """Collate rows of unequal lengths to tensors (B, T), padded on the right whatever side the tokenizer pads on.

    So models that count positions from the left count them from each row's first sub-token, as in a row alone.
    """

    pad_token_id: int
    labels: tuple[str, ...] = ("labels",)  # columns of a number a token, -100 where there is none

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, **dict.fromkeys(self.labels, IGNORED)}
        length = max(len(row["input_ids"]) for row in rows)
        return {
            key: torch.tensor(
                [[*row[key], *[fill[key]] * (length - len(row[key]))] if key in fill else row[key] for row in rows]
            )
            for key in rows[0]
        }


class Lost(NamedTuple):
    """Words that have no prediction of their own: beyond the maximal length, or nothing to the tokenizer."""

    truncated: int
    without_sub_token: int


def encode(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, numbered: bool = False
) -> Dataset:
    """Tokenize words; the first sub-token of each carries its label, all other positions carry -100.

    The columns are `input_ids`, `attention_mask` and `labels`, unpadded, at most `max_length` long, or as long as the
    tokenizer says that its model can read. The tokenizer stays as it was.

    Args:
        numbered: a label is `number * STRIDE + label`, the words of the whole data set counted from 0. So what comes
            back beside predictions says of which word each is, whatever the order, the batches and the padding.

    Raises:
        ValueError: for a tokenizer that cannot map sub-tokens to words.
    """
    tags = dataset["ner_tags"][:]
    if numbered:
        counted = iter(range(sum(map(len, tags))))
        tags = [[next(counted) * STRIDE + tag for tag in row] for row in tags]
    max_length = min(max_length, tokenizer.model_max_length)
    with unchanged(tokenizer):
        batch = tokenizer(dataset["tokens"][:], is_split_into_words=True, truncation=True, max_length=max_length)
    labels = [_spread(row, batch.word_ids(number)) for number, row in enumerate(tags)]
    # A row without any sub-token still needs a position.
    return Dataset.from_dict(
        {
            "input_ids": [row or [tokenizer.pad_token_id] for row in batch["input_ids"]],
            "attention_mask": [row or [1] for row in batch["attention_mask"]],
            "labels": [row or [IGNORED] for row in labels],
        }
    )


def labelled_tokens(rows: Dataset) -> int:
    """How many positions of encoded rows have a label."""
    return sum(label != IGNORED for row in rows["labels"] for label in row)


def lost_words(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Lost:
    """How many words of a data set `encode` leaves without a label, by the reason."""
    words = dataset["tokens"][:]
    with unchanged(tokenizer):
        whole = _count_words(tokenizer(words, is_split_into_words=True, verbose=False))
        length = min(max_length, tokenizer.model_max_length)
        kept = _count_words(tokenizer(words, is_split_into_words=True, truncation=True, max_length=length))
    return Lost(truncated=whole - kept, without_sub_token=sum(map(len, words)) - whole)


def cut_off(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """How many sentences `encode` reads only in part."""
    with unchanged(tokenizer):
        whole = tokenizer(dataset["tokens"][:], is_split_into_words=True, verbose=False)["input_ids"]
    return sum(len(row) > min(max_length, tokenizer.model_max_length) for row in whole)


def plain_labels(labels: Tensor) -> Tensor:
    """The label ids of numbered labels, -100 where there is none; any shape."""
    return torch.where(labels < 0, labels, labels % STRIDE)


@contextmanager
def unchanged(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Undo what a call leaves in a fast tokenizer, which would save its truncation and padding with it.

    Raises:
        ValueError: for a tokenizer that is not a fast one, and cannot map sub-tokens to words.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} cannot map sub-tokens to words: use a fast tokenizer")
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009 (which the base class does not declare)
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.no_truncation()
        backend.no_padding()
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _spread(tags: Sequence[int], word_ids: list[int | None]) -> list[int]:
    """Each tag at the first sub-token of its word."""
    labels, seen = [IGNORED] * len(word_ids), set[int]()
    for position, word in enumerate(word_ids):
        if word is not None and word not in seen:
            labels[position] = tags[word]
            seen.add(word)
    return labels


def _count_words(batch: Any) -> int:
    return sum(len({word for word in batch.word_ids(row) if word is not None}) for row in range(len(batch.encodings)))
