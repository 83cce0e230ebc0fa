"""Noisy text: two of five annotators mix the classes up, and a few clean sentences tell whom to trust."""

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, set_seed

from metaxl_evo import BilevelModule, MetaTrainer, MetaTrainingArguments


class Trust(BilevelModule):
    def inner_loss(self, batch):
        return self.meta(batch["annotator"]).sigmoid()[:, 0] * self.losses(batch)  # (B,)

    def outer_loss(self, batch):
        return self.losses(batch)


def sentences(count, seed, confused=()):
    generator = torch.Generator().manual_seed(seed)
    labels, annotators = (torch.randint(0, n, (count,), generator=generator) for n in (2, 5))
    of_class = torch.rand(count, 10, generator=generator) < 0.7
    ids = torch.randint(2, 22, (count, 10), generator=generator) + 20 * (of_class == labels[:, None])
    labels ^= sum(annotators == one for one in confused) if confused else 0
    return [dict(zip(("input_ids", "labels", "annotator"), row)) for row in zip(ids, labels, annotators)]


noisy, clean, test = sentences(600, 1, confused=(3, 4)), sentences(60, 2), sentences(500, 3)
for estimator in ("none", "one_step"):
    set_seed(0)  # in real life: AutoModelForSequenceClassification.from_pretrained(...)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForSequenceClassification(BertConfig(vocab_size=42, initializer_range=0.1, **sizes))
    args = MetaTrainingArguments("runs/weight_noisy_text", estimator=estimator, max_steps=120, learning_rate=3e-3,
                                 per_device_train_batch_size=32, per_device_meta_batch_size=60, save_strategy="no",
                                 meta_learning_rate=0.3, meta_lr_scheduler_type="constant")  # fmt: skip
    trust = Trust(base, nn.Embedding.from_pretrained(torch.zeros(5, 1)))
    trainer = MetaTrainer(trust, args, train_dataset=noisy, meta_dataset=clean)
    trainer.train()
    found = trainer.predict(test)
    print(estimator, "accuracy", (found.predictions.argmax(1) == found.label_ids).mean())
print("trust:", [round(float(weight), 2) for weight in trainer.model.meta.weight.sigmoid()])
