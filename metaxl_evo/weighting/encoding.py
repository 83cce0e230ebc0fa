"""Texts as a model reads them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Tokens of each text, unpadded, at most `max_length` of them; the tokenizer stays as it was."""
    longest = min(max_length, tokenizer.model_max_length)
    reader = copy.deepcopy(tokenizer)  # a call leaves its truncation in a tokenizer, which would save it
    return Dataset.from_dict(dict(reader(list(texts), truncation=True, max_length=longest)))
