"""Small models with each kind of head, and random rows for them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.weighting.weighted_text import WeightedText

ROWS, LENGTH, WORDS, HIDDEN = 6, 7, 30, 16
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
HEADS = {"rows": BertForSequenceClassification, "tagging": BertForTokenClassification, "causal": LlamaForCausalLM}


def base_of(head: str, lora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES) if head == "causal" else BertConfig(**SIZES, num_labels=3)
    base: nn.Module = HEADS[head](config)
    if lora:
        base = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj" if head == "causal" else "query"]))
    return base.double()


def batch_of(head: str, seed: int = 1) -> dict[str, Tensor]:
    """Rows of unequal lengths, their numbers and two columns."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, WORDS, (ROWS, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([[7], [4], [6], [7], [3], [5]])).long()
    labels = torch.randint(3, (ROWS, LENGTH), generator=generator) if head == "tagging" else ids
    batch = {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": labels.masked_fill(mask == 0, -100),
        "number": torch.tensor([3, 0, 5, 0, 1, 4]),
        "columns": torch.randn(ROWS, 2, generator=generator).double(),
    }
    return batch | {"labels": torch.arange(ROWS) % 3} if head == "rows" else batch


def module_of(
    head: str, reads: str = "number", *, logit: float = 0.0, lora: bool = False, **further: Any
) -> WeightedText:
    base = base_of(head, lora)
    inputs = {"loss": 1, "hidden": HIDDEN, "columns": 2}
    meta = WeightTable(ROWS, start=logit) if reads == "number" else WeightNet(8, inputs[reads])
    made = WeightedText(base, meta, reads=reads, tokens=head != "rows", **further)
    return made.double().eval()
