"""A causal language model of random weights, and a tokenizer made of the texts that train it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SCRATCH = "scratch"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
HEAD_WIDTH = 32
LEAST_PIECES = 256 + len(SPECIAL)  # all bytes, so that no text is unknown


def train_tokenizer(texts: Iterable[str], pieces: int, longest: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of bytes (Sennrich et al., ACL 2016; Radford et al., 2019): the same texts, the same pieces.

    Args:
        pieces: of the vocabulary, special tokens included; few texts may yield fewer.
        longest: tokens of a text that a model of it takes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **SPECIAL)


def model_from_scratch(tokenizer: PreTrainedTokenizerFast, layers: int, width: int) -> PreTrainedModel:
    """A Llama of the random state that there is, its head apart from its embeddings.

    Args:
        width: of the hidden states, a multiple of 32; the inner layers have three times as much.
    """
    ids: dict[str, Any] = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=tokenizer.model_max_length,
        **ids,
    )
    return LlamaForCausalLM(config)
