"""A causal language model on three domains: how much of each makes it good at one? With --lora, by an adapter."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from metaxl_evo import BilevelModule, MetaTrainer, MetaTrainingArguments


class Mixture(nn.Module):
    """Weights of the domains, 1 on average."""

    def __init__(self, domains):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(domains))

    def forward(self, domain):
        return len(self.logits) * self.logits.softmax(0)[domain]


class MixDomains(BilevelModule):
    def inner_loss(self, batch):
        return self.meta(batch["domain"]) * self.losses(batch)  # (B,)

    def outer_loss(self, batch):
        return self.losses(batch)  # (B,)


def texts(count, domain, seed):
    """Token ids that count up in steps of the domain's own, from a random start."""
    starts = torch.randint(0, 40, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = (starts + torch.arange(12) * (2 + 3 * domain)) % 40
    return [{"input_ids": i, "labels": i, "domain": torch.tensor(domain)} for i in ids]


set_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
base = LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=12, **sizes))
if "--lora" in sys.argv:
    base = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
args = MetaTrainingArguments("runs/mix_domains", max_steps=100, learning_rate=1e-2, meta_learning_rate=3e-2,
                             meta_optim="AdamW", save_strategy="no", report_to="none", meta_portion=1.0)  # fmt: skip
train = [row for domain in range(3) for row in texts(200, domain, seed=domain)]
trainer = MetaTrainer(MixDomains(base, Mixture(3)), args, train_dataset=train, meta_dataset=texts(50, 0, seed=9))
trainer.train()
print("weights of the domains:", [round(float(w), 2) for w in trainer.model.meta(torch.arange(3))])
