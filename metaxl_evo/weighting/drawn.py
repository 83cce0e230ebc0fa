"""Drawn text for runs without data: sentences of numbered words, and small models of random weights that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SYNTHETIC = "synthetic"
CLASSES = ("blue", "green")
DOMAINS = ("twos", "fives", "shuffled")
WORDS = 20  # of each class, and as many that say nothing
LENGTH = 12
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def draw_sentences(count: int, seed: int) -> Dataset:
    """`text` and `label`: a third of a sentence's words are of its class, the others of either or of none."""
    generator = np.random.default_rng([17, seed])
    labels = generator.integers(len(CLASSES), size=count)
    kinds = generator.integers(len(CLASSES) + 1, size=(count, LENGTH))
    of_class = generator.random((count, LENGTH)) < 1 / 3
    words = np.where(of_class, labels[:, None], kinds) * WORDS + generator.integers(WORDS, size=(count, LENGTH))
    text = [" ".join(f"w{word}" for word in row) for row in words]
    return Dataset.from_dict({"text": text, "label": [CLASSES[label] for label in labels]})


def draw_parts(splits: Sequence[str]) -> dict[str, Dataset]:
    """Data to try a run with: 1,500 sentences that train, 200 and 500 that do not."""
    sizes = {"train": 1500, "validation": 200, "test": 500}
    return {split: draw_sentences(sizes[split], seed) for seed, split in enumerate(sizes) if split in splits}


def draw_documents(domain: str, count: int, seed: int) -> Dataset:
    """`text`: words that count up in the domain's own steps, a fifth of them replaced; of `shuffled` in no order."""
    generator = np.random.default_rng([19, DOMAINS.index(domain), seed])
    steps = np.arange(LENGTH) * (2 + 3 * DOMAINS.index(domain))
    words = (generator.integers(WORDS, size=(count, 1)) + steps) % WORDS
    words = np.where(generator.random(words.shape) < 1 / 5, generator.integers(WORDS, size=words.shape), words)
    words = generator.permuted(words, axis=1) if domain == "shuffled" else words
    return Dataset.from_dict({"text": [" ".join(f"w{word}" for word in row) for row in words]})


def draw_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the drawn words, each a token."""
    words = [*SPECIAL, *(f"w{number}" for number in range((len(CLASSES) + 1) * WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", SPECIAL.index("<s>")), ("</s>", SPECIAL.index("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **named)


def draw_classifier(names: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A BERT of one layer, of the random state that there is."""
    tokenizer = draw_tokenizer()
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
    return BertForSequenceClassification(BertConfig(**_sizes(tokenizer), **labels)), tokenizer


def draw_language_model() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A causal model of one layer, of the random state that there is."""
    tokenizer = draw_tokenizer()
    return LlamaForCausalLM(LlamaConfig(**_sizes(tokenizer))), tokenizer


def _sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "initializer_range": 0.1, **sizes, **ids}
