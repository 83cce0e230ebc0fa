"""A causal language model on three domains: how much of each makes it good at one? With --lora, by an adapter."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from metaxl_evo import BilevelModule, MetaTrainer, MetaTrainingArguments


class MixDomains(BilevelModule):
    def inner_loss(self, batch):
        weights = 3 * self.meta.weight.softmax(0)[batch["domain"], 0]  # (B,), 1 on average
        return weights * self.losses(batch)  # (B,)

    def outer_loss(self, batch):
        return self.losses(batch)  # (B,)


def texts(count, domain, seed):
    """Token ids that count up in steps of the domain's own, from a random start."""
    starts = torch.randint(0, 40, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = (starts + torch.arange(12) * (2 + 3 * domain)) % 40
    return [{"input_ids": row, "labels": row, "domain": torch.tensor(domain)} for row in ids]


set_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
base = LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=12, **sizes))
if "--lora" in sys.argv:
    base = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
mixture = nn.Embedding.from_pretrained(torch.zeros(3, 1), freeze=False)
args = MetaTrainingArguments("runs/mix_domains", max_steps=60, learning_rate=1e-2, meta_learning_rate=3e-2)
train = [row for domain in range(3) for row in texts(200, domain, seed=domain)]
trainer = MetaTrainer(MixDomains(base, mixture), args, train_dataset=train, meta_dataset=texts(50, 0, seed=9))
trainer.train()
weights = 3 * trainer.model.meta.weight.softmax(0)
print("weights of the domains:", [round(float(weight), 2) for weight in weights])
