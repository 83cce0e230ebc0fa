"""A learning-rate schedule learned by gradient: five values over an episode of 30 steps, judged at its end."""

import torch
from torch import nn
from transformers import set_seed

from metaxl_evo import BilevelModule, MetaTrainer, MetaTrainingArguments
from metaxl_evo.bilevel import Windowed

STEPS, WINDOWS = 30, 5


class LearnSchedule(BilevelModule):
    tuned_optimizer = {"lr": Windowed("lr", STEPS)}  # the trainer puts it into the optimiser at every step

    def inner_loss(self, batch):
        return (self.base(batch["x"])[:, 0] - batch["y"]).square()  # (B,)

    outer_loss = inner_loss


def rows(count, seed):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [{"x": row, "y": torch.tanh(row[0] - row[1])} for row in x]


set_seed(0)
base = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 1))
schedule = nn.ParameterDict({"lr": torch.full((WINDOWS,), 0.02)})
args = MetaTrainingArguments("runs/learn_schedule", estimator="forward_mode", estimator_kwargs={"windows": WINDOWS},
                             max_steps=8 * STEPS, episode_length=STEPS, episode_reset="restart", optim="sgd",
                             max_grad_norm=0, meta_learning_rate=0.01, meta_lr_scheduler_type="constant",
                             logging_steps=STEPS, per_device_train_batch_size=32, per_device_meta_batch_size=256,
                             save_strategy="no")  # fmt: skip
trainer = MetaTrainer(LearnSchedule(base, schedule), args, train_dataset=rows(512, 1), meta_dataset=rows(256, 2))
trainer.train()
print("learned rates:", [round(float(rate), 3) for rate in trainer.model.meta["lr"]])
judged = [entry["meta_loss"] for entry in trainer.state.log_history if "meta_loss" in entry]
print(f"meta loss at the end of an episode: {judged[0]:.3f} -> {judged[-1]:.3f}")
