"""The meta level's numbers in a tracker, beside the loss: python watch_a_run.py [tensorboard | trackio]."""

import sys

import torch
from torch import nn
from transformers import set_seed

from metaxl_evo import BilevelModule, MetaTrainer, MetaTrainingArguments, WeightNet


class Reweight(BilevelModule):
    def inner_loss(self, batch):
        losses = self.outer_loss(batch)
        return self.meta(losses.detach()) * losses  # (B,)

    def outer_loss(self, batch):
        return (self.base(batch["x"])[:, 0] - batch["y"]).square()  # (B,)


def rows(count, seed, outliers=0.0):
    generator = torch.Generator().manual_seed(seed)
    x, far = torch.randn(count, 4, generator=generator), torch.rand(count, generator=generator) < outliers
    return [{"x": row, "y": row.sum() + 5.0 * out} for row, out in zip(x, far)]


tracker = sys.argv[1] if len(sys.argv) > 1 else "tensorboard"
set_seed(0)
args = MetaTrainingArguments("runs/watch_a_run", report_to=tracker, project="metaxl_evo", run_name="reweight",
                             max_steps=60, logging_steps=10, save_strategy="no", learning_rate=3e-2,
                             meta_learning_rate=1e-2)  # fmt: skip
trainer = MetaTrainer(Reweight(nn.Linear(4, 1), WeightNet()), args,
                      train_dataset=rows(256, 1, outliers=0.3), meta_dataset=rows(32, 2))  # fmt: skip
trainer.train()
pages = {"tensorboard": f"tensorboard --logdir {args.output_dir}", "trackio": "trackio show --project metaxl_evo"}
print("look at it by:", pages[tracker])
