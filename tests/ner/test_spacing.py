"""Words of a list get the sub-tokens that they have in running text, in memory and where a pipeline reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from metaxl_evo.ner.spacing import as_in_text
from tests.ner.encoders import KINDS, SENTENCES, write_encoder

SPACELESS = ("roberta", "modernbert", "mmbert", "llama", "bloom", "gpt2")  # as published
WORDS = [sentence.split() for sentence in SENTENCES]


def load(kind: str, folder: Path) -> tuple[PreTrainedTokenizerBase, AutoConfig]:
    write_encoder(kind, folder)
    return AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)


def pieces(tokenizer: PreTrainedTokenizerBase, text: str | list[str]) -> list[str]:
    ids = tokenizer(text, is_split_into_words=isinstance(text, list), add_special_tokens=False)["input_ids"]
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_encoded_as_in_running_text(kind: str, tmp_path: Path) -> None:
    """Against the published tokenizer on text with a sentence before it."""
    published, config = load(kind, tmp_path / "before")
    tokenizer = as_in_text(published, WORDS, config)
    assert (tokenizer is published) == (not kind.startswith(SPACELESS))
    config.save_pretrained(tmp_path / "after")
    tokenizer.save_pretrained(tmp_path / "after")
    saved = AutoTokenizer.from_pretrained(tmp_path / "after")
    for sentence in SENTENCES:
        before, behind = pieces(published, "leo"), pieces(published, f"leo {sentence}")
        assert behind[: len(before)] == before
        for one in (tokenizer, saved):
            assert pieces(one, sentence.split()) == pieces(one, sentence) == behind[len(before) :]
    for name in ("padding_side", "model_max_length", "pad_token_id", "all_special_tokens", "model_input_names"):
        assert getattr(saved, name) == getattr(published, name), name
    framed = [one(["leo"], is_split_into_words=True)["input_ids"] for one in (published, saved)]
    assert [ids[-1] for ids in framed] == [framed[0][-1]] * 2 or kind.startswith(("bloom", "gpt2", "mmbert"))


def test_the_kinds_are_as_many_as_they_were() -> None:
    assert sum(kind.startswith(SPACELESS) for kind in KINDS) == 6
    assert len(KINDS) == 10


def test_truncation_and_padding_of_its_own_stay(tmp_path: Path) -> None:
    published, config = load("modernbert, byte level", tmp_path)
    published.backend_tokenizer.enable_truncation(max_length=9)
    published.backend_tokenizer.enable_padding(length=12)
    found = as_in_text(published, WORDS, config)
    assert found is not published
    for one in (published, found):
        assert one.backend_tokenizer.truncation["max_length"] == 9
        assert one.backend_tokenizer.padding["length"] == 12


def test_a_tokenizer_that_no_prefix_space_reaches_is_refused(tmp_path: Path) -> None:
    published, config = load("mmbert, gemma, left", tmp_path)
    backend = published.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Strip(), backend.normalizer])
    with pytest.raises(ValueError, match=r"^model_name_or_path: its .* makes other sub-tokens of a word in a list"):
        as_in_text(published, WORDS, config)


def test_odd_words_are_no_reason(tmp_path: Path) -> None:
    published, config = load("xlm-r, metaspace", tmp_path)
    assert as_in_text(published, [*WORDS, ["", "\u3000", "New York"]], config) is published
    assert as_in_text(published, [[""], []], config) is published
