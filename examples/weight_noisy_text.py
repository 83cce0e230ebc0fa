"""Noisy text: two of five annotators mix the classes up, and a few clean sentences tell whom to trust."""

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, set_seed

from metaxl_evo import BilevelModule, MetaTrainer, MetaTrainingArguments


class Trust(BilevelModule):
    def inner_loss(self, batch):
        return self.meta(batch["annotator"]).sigmoid()[:, 0] * self.losses(batch)  # (B,)

    def outer_loss(self, batch):
        return self.losses(batch)  # (B,)


def sentences(count, seed, confused=()):
    """Ten words a sentence, most of them of its class (words 2 to 21, or 22 to 41)."""
    generator = torch.Generator().manual_seed(seed)
    labels, annotators = (torch.randint(0, n, (count,), generator=generator) for n in (2, 5))
    of_class = torch.rand(count, 10, generator=generator) < 0.7
    ids = torch.randint(2, 22, (count, 10), generator=generator) + 20 * (of_class == labels[:, None])
    labels = labels ^ torch.isin(annotators, torch.tensor(confused))
    rows = zip(ids, labels.long(), annotators, strict=True)
    return [{"input_ids": words, "labels": label, "annotator": who} for words, label, who in rows]


noisy, clean, test = sentences(600, 1, confused=(3, 4)), sentences(60, 2), sentences(500, 3)
for estimator in ("none", "one_step"):
    set_seed(0)  # in real life: AutoModelForSequenceClassification.from_pretrained(...)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForSequenceClassification(BertConfig(vocab_size=42, max_position_embeddings=10, **sizes))
    args = MetaTrainingArguments("runs/weight_noisy_text", estimator=estimator, max_steps=400, learning_rate=3e-3,
                                 meta_learning_rate=3e-2, save_strategy="no", meta_portion=1.0)  # fmt: skip
    metrics = lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()}  # noqa: E731
    trainer = MetaTrainer(Trust(base, nn.Embedding(5, 1)), args, train_dataset=noisy, meta_dataset=clean,
                          eval_dataset=test, compute_metrics=metrics)  # fmt: skip
    trainer.train()
    print(estimator, "accuracy", trainer.evaluate()["eval_accuracy"])
print("trust:", [round(float(weight), 2) for weight in trainer.model.meta.weight.sigmoid()])
