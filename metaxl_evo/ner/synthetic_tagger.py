"""A small tagger for the synthetic family: an XLM-R of random weights, and a tokenizer of the family's own words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaTokenizer,
)

from metaxl_evo.ner.synthetic import LABELS, SyntheticFamily


def make_synthetic_tagger(
    family: SyntheticFamily,
    *,
    labels: Sequence[str] = LABELS,
    layers: int = 2,
    hidden_size: int = 96,
    heads: int = 4,
    vocab_size: int = 2000,
    max_length: int = 128,
    seed: int = 0,
    of_texts: bool = False,
) -> tuple[XLMRobertaForTokenClassification | XLMRobertaForSequenceClassification, XLMRobertaTokenizer]:
    """A small, randomly initialised XLM-R that labels words, or texts, and a tokenizer of the family's sentences.

    Both have `save_pretrained` and load back by the Auto classes. PyTorch's global random state stays as it was.
    """
    tokenizer = train_tokenizer(family, vocab_size, max_length)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=max_length + 2,  # XLM-R counts positions from pad_token_id + 1
        type_vocab_size=1,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = XLMRobertaForSequenceClassification if of_texts else XLMRobertaForTokenClassification
        return made(config), tokenizer


def train_tokenizer(family: SyntheticFamily, vocab_size: int, max_length: int) -> XLMRobertaTokenizer:
    """A Unigram tokenizer with XLM-R's special tokens and `vocab_size` pieces, or fewer where the words run out.

    The pieces are learned by byte-pair merges and weighed by how often the merged text uses them, because the
    library's own Unigram trainer gives other scores in every run.
    """
    texts = [" ".join(words) for language in family.languages for words in family.load(language)["train"]["tokens"]]
    merger = Tokenizer(models.BPE())
    merger.pre_tokenizer = pre_tokenizers.Metaspace()
    merger.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size - 5, show_progress=False))
    counts = Counter(dict.fromkeys(sorted(merger.get_vocab()), 1))
    for encoding in merger.encode_batch(texts):
        counts.update(encoding.tokens)
    total = math.log(counts.total())
    pieces = [(piece, math.log(count) - total) for piece, count in counts.most_common()]
    vocab = [*((special, 0.0) for special in ("<s>", "<pad>", "</s>", "<unk>")), *pieces, ("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocab, model_max_length=max_length)
