"""Tokenizers that make of a word in a list what they make of it in running text.

Byte-level and Gemma-like tokenizers write the space before a word into its first sub-token, and give a word of a list
none. A prefix space for every word mends that; by which setting differs, so what comes out decides.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from metaxl_evo.ner.encoding import unchanged

logger = logging.getLogger(__name__)

SENTENCES = 200  # of the data, whose words are tried
ENOUGH = 0.9  # odd characters are read in their context: not all words have to come out the same
SPACED = ("ByteLevel", "RobertaProcessing")  # components with the flag add_prefix_space
PREFIX = {"type": "Prepend", "prepend": " "}
ANCHOR = "a"  # what stands before a word when its sub-tokens in running text are asked for

Ids = list[int]


def as_in_text(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[Sequence[str]],
    config: PretrainedConfig,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer, or one with a prefix space, whose sub-tokens of split words are those of running text.

    Args:
        sentences: words of the data that it is for.
        config: of the model, which decides as what a saved tokenizer is loaded.
        trust_remote_code: that of the model, for the same purpose.

    Raises:
        ValueError: where no setting leads there, or one that does is lost when the tokenizer is saved.
    """
    tried = [words for row in sentences[:SENTENCES] if (words := list(filter(str.strip, row)))]
    with unchanged(tokenizer):
        expected = [_behind_a_space(tokenizer, words) for words in tried]
        if _share(_split(tokenizer, tried), expected):
            return tokenizer
    for candidate in _with_prefix_space(tokenizer):
        reloaded = _reloaded(candidate, config, trust_remote_code)
        if all(_is_as_expected(one, tried, expected) for one in (candidate, reloaded)):
            logger.info("%s: each word gets the space that it has in running text", type(tokenizer).__name__)
            return candidate
    raise ValueError(
        f"model_name_or_path: its {type(tokenizer).__name__} makes other sub-tokens of a word in a list than of one "
        "in running text, and no prefix space changes that: use a model with another tokenizer"
    )


def _behind_a_space(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> list[Ids]:
    """The sub-tokens of each word in running text."""
    before, *found = tokenizer(
        [ANCHOR, *(f"{ANCHOR} {word}" for word in words)], add_special_tokens=False, verbose=False
    )["input_ids"]
    return [list(ids[len(before) :]) for ids in found]


def _split(tokenizer: PreTrainedTokenizerBase, sentences: list[list[str]]) -> list[list[Ids]]:
    """The sub-tokens of each word of each list."""
    batch = tokenizer(sentences, is_split_into_words=True, add_special_tokens=False, verbose=False)
    found: list[list[Ids]] = [[[] for _ in words] for words in sentences]
    for row, ids in enumerate(batch["input_ids"]):
        for number, word in zip(ids, batch.word_ids(row), strict=True):
            found[row][word].append(number)
    return found


def _is_as_expected(tokenizer: PreTrainedTokenizerBase, sentences: list[list[str]], expected: list[list[Ids]]) -> bool:
    """Whether lists and plain sentences get the same, and the places of its sub-tokens hold a sentence's letters."""
    texts = [" ".join(words) for words in sentences]
    with unchanged(tokenizer):
        plain = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        split = _split(tokenizer, sentences)
    letters = [{at for at, character in enumerate(text) if character != " "} for text in texts]
    held = [{at for start, end in places for at in range(start, end)} for places in plain["offset_mapping"]]
    return (
        _share(split, expected)
        and _share([plain["input_ids"]], [[list(chain(*words)) for words in expected]])
        and _share([[one & own for one, own in zip(held, letters, strict=True)]], [letters])
    )


def _share(found: list[list[Any]], wanted: list[list[Any]]) -> bool:
    """Whether enough of all the items are the same."""
    same = [a == b for pair in zip(found, wanted, strict=True) for a, b in zip(*pair, strict=True)]
    return sum(same) >= ENOUGH * len(same)


def _with_prefix_space(tokenizer: Any) -> Iterator[Any]:
    """The tokenizer with a prefix space by each of its components that can add one, as its own class and as a plain
    one, whose file alone says how it splits."""
    before = json.loads(tokenizer.backend_tokenizer.to_str())
    flagged = {**before, **{part: _flagged(before[part]) for part in ("pre_tokenizer", "post_processor")}}
    own = before["normalizer"]
    prepended = {**before, "normalizer": {"type": "Sequence", "normalizers": [PREFIX, *([own] if own else [])]}}
    for spec in (flagged, prepended):
        if spec == before:
            continue
        backend = Tokenizer.from_str(json.dumps(spec))
        yield _copy(tokenizer, type(tokenizer), backend)
        yield _copy(tokenizer, PreTrainedTokenizerFast, backend)


def _flagged(component: Any) -> Any:
    """A component of a tokenizer's file with every switch for a prefix space on."""
    if not isinstance(component, dict):
        return component
    if component.get("type") in SPACED:
        return {**component, "add_prefix_space": True}
    if component.get("type") == "Metaspace":
        return {**component, "prepend_scheme": "always"}
    return {
        key: [_flagged(one) for one in value] if isinstance(value, list) else value for key, value in component.items()
    }


def _copy(tokenizer: Any, kind: Any, backend: Tokenizer) -> Any:
    """A tokenizer of another class or backend, with the same special tokens and settings."""
    if kind is type(tokenizer):
        copied: Any = copy.deepcopy(tokenizer)
        copied._tokenizer = backend
        copied.add_prefix_space = copied.init_kwargs["add_prefix_space"] = True
        return copied
    names = (
        "model_max_length",
        "padding_side",
        "truncation_side",
        "model_input_names",
        "clean_up_tokenization_spaces",
    )
    settings = {name: getattr(tokenizer, name) for name in names}
    return kind(tokenizer_object=backend, **settings, **tokenizer.special_tokens_map, add_prefix_space=True)


def _reloaded(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer as others will read it once it is saved beside the model."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
