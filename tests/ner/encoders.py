"""Tiny taggers of several architectures with the kinds of tokenizers that such models have, random and sharp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T
from seqeval.metrics import f1_score, precision_score, recall_score
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForTokenClassification, AutoTokenizer

from metaxl_evo.ner.labels import label_names

NAMES = label_names(("LOC", "PER"))
SENTENCES = [
    "Amani na Neema ( Bonde ) walikuwa katika Kisiwa , 2005 .",
    "jana Juma ni sana don't pia Zawadi leo",
    "Ziwa ya Mlima tena wa katika Bonde na Kisiwa na Ziwa",
]
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "<mask>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
LLAMA = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}


def byte_level(split: str | None = None) -> Tokenizer:
    """A byte-level BPE as published: no prefix space; `split` by a regular expression, or by its own."""
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    steps = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    return _bpe(pre_tokenizers.Sequence([*steps, spaced]) if steps else spaced)


def gemma() -> Tokenizer:
    """Spaces become a letter of the word behind them, as in Gemma and mmBERT; no prefix space."""
    learned = json.loads(_bpe(pre_tokenizers.Metaspace()).to_str())["model"]
    tokenizer = Tokenizer(models.BPE(learned["vocab"], [(a, b) for a, b in learned["merges"]], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


def _bpe(pre_tokenizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learning = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES * 3, learning)
    return tokenizer


def _fast(tokenizer: Tokenizer, *, framed: bool = True, **settings: Any) -> Any:
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 1)]
        )
    return T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **NAMED, unk_token="<unk>", mask_token="<mask>", **settings
    )


def _own(kind: Any, tokenizer: Tokenizer, **settings: Any) -> Any:
    """A tokenizer of a class that builds its parts anew, of vocabulary and merges alone."""
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [(a, b) for a, b in learned["merges"]]
    return kind(vocab=learned["vocab"], merges=merges, **NAMED, unk_token="<unk>", **settings)


def _word_pieces() -> Any:
    letters = sorted(set("".join(SENTENCES)) - {" "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return T.BertTokenizerFast(vocab=vocab, do_lower_case=False, padding_side="left")


def _pieces(*special: str) -> list[tuple[str, float]]:
    """A Unigram vocabulary: `special` first, then letters, words and the space on its own, all as likely."""
    words = sorted({word for text in SENTENCES for word in text.split()})
    counts = {piece: -1.0 for word in words for piece in ("▁", *word, *([f"▁{word}"] if len(word) > 3 else []))}
    return [*((piece, 0.0) for piece in special), *counts.items()]


def _xlmr() -> Any:
    return T.XLMRobertaTokenizer(vocab=_pieces("<s>", "<pad>", "</s>", "<unk>"))


def _deberta() -> Any:
    return T.DebertaV2Tokenizer(vocab=_pieces("[PAD]", "[CLS]", "[SEP]", "[UNK]"), unk_id=3)


def _mt5() -> Any:
    return T.T5Tokenizer(vocab=_pieces("<pad>", "</s>", "<unk>"), extra_ids=0)


MODERN = {**SMALL, **IDS, "cls_token_id": 2, "sep_token_id": 1, "max_position_embeddings": 256}
MDEBERTA = {  # the fields of microsoft/mdeberta-v3-base that choose parts
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
MT5 = {"d_model": 16, "num_heads": 2, "d_ff": 32, "d_kv": 8, "feed_forward_proj": "gated-gelu"}
KINDS: dict[str, Callable[..., tuple[Any, Any]]] = {  # of the number of layers
    "xlm-r, metaspace": lambda n=2: (_xlmr(), T.XLMRobertaConfig(**of(n), max_position_embeddings=402)),
    "bert, word pieces, left": lambda n=2: (_word_pieces(), T.BertConfig(**of(n))),
    "roberta, byte level": lambda n=2: (_own(T.RobertaTokenizerFast, byte_level()), T.RobertaConfig(**of(n), **IDS)),
    "modernbert, byte level": lambda n=2: (_fast(byte_level()), T.ModernBertConfig(**MODERN | of(n))),
    "mmbert, gemma, left": lambda n=2: (_own(T.GemmaTokenizerFast, gemma()), T.ModernBertConfig(**MODERN | of(n))),
    "llama, split byte level, left": lambda n=2: (
        _fast(byte_level(LLAMA), padding_side="left"),
        T.LlamaConfig(**of(n), **IDS),
    ),
    "bloom, unframed, left": lambda n=2: (
        _fast(byte_level(), framed=False, padding_side="left"),
        T.BloomConfig(hidden_size=16, n_layer=n, n_head=2, **IDS),
    ),
    "gpt2, absolute, left": lambda n=2: (
        _own(T.GPT2TokenizerFast, byte_level(), padding_side="left"),
        T.GPT2Config(n_embd=16, n_layer=n, n_head=2, **IDS),
    ),
    "mdeberta, unigram": lambda n=2: (_deberta(), T.DebertaV2Config(**of(n), **MDEBERTA)),
    "mt5, unigram, one end": lambda n=2: (_mt5(), T.MT5Config(num_layers=n, **MT5)),
}
ABSOLUTE = ("bert, word pieces, left", "gpt2, absolute, left")  # count positions from the left, padding included


def of(layers: int) -> dict[str, int]:
    return SMALL | {"num_hidden_layers": layers}


def write_encoder(kind: str, folder: Path, *, head: bool = True, layers: int = 2) -> Path:
    """A saved model and tokenizer of that kind; with a head, its weights are so large that sub-tokens differ."""
    tokenizer, config = KINDS[kind](layers)
    config.vocab_size = len(tokenizer)
    config.id2label = dict(enumerate(NAMES))
    config.label2id = {name: number for number, name in enumerate(NAMES)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForTokenClassification.from_config(config)
        for parameter in model.parameters():
            if head and parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    (model if head else model.base_model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scores_by_hand(folder: Path, file: Path) -> dict[str, float]:
    """seqeval on the raw file of a saved model, one sentence a pass; no code of the toolkit."""
    model, tokenizer = (
        AutoModelForTokenClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    truth, guess = [], []
    for block in file.read_text("utf-8").split("\n\n"):
        rows = [line.split("\t") for line in block.split("\n") if line]
        words, tags = [word.split(":", 1)[-1] for word, _ in rows], [tag for _, tag in rows]
        batch = tokenizer([words], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            found = model(batch["input_ids"]).logits[0].argmax(-1).tolist()
        first: dict[int | None, int] = {}
        for position, word in enumerate(batch.word_ids(0)):
            first.setdefault(word, position)
        truth.append(tags)
        guess.append(
            [model.config.id2label[found[first[word]]] if word in first else "O" for word in range(len(words))]
        )
    return {
        "f1": float(f1_score(truth, guess)),
        "precision": float(precision_score(truth, guess)),
        "recall": float(recall_score(truth, guess)),
        "accuracy": sum(a == b for pair in zip(truth, guess, strict=True) for a, b in zip(*pair, strict=True))
        / sum(map(len, truth)),
    }
