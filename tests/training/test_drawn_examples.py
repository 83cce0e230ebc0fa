"""HyperDistill's D* in the Trainer: of the rows seen, as many as a step has, the same however a step is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from metaxl_evo import BilevelModule, MetaTrainer
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.models.examples import examples_of
from metaxl_evo.models.losses import set_totals
from tests.training.tiny import collate as collate_tokens
from tests.training.tiny import random_rows, tiny_arguments, tiny_tagger

STEPS, ROWS = 6, 8


class Numbered(BilevelModule):
    def inner_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.meta(batch["x"]).sigmoid()[:, 0] * self.outer_loss(batch)

    def outer_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.base(batch["x"])[:, 0] - batch["y"]).square()


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.drawn: list[list[int]] = []
        self.sizes: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        held = self.trainer.meta_level.episodes.state["batch"]
        self.drawn.append(sorted(torch.cat([part["number"] for part in held]).tolist()))
        self.sizes.append(max(len(part["number"]) for part in held))

    trainer: Any


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_drawn_rows_do_not_depend_on_the_cut(tmp_path: Path, accumulation: int) -> None:
    found, alone = drawn(tmp_path / "cut", accumulation), drawn(tmp_path / "whole", 1)
    assert found.drawn == alone.drawn
    assert all(len(set(numbers)) == ROWS for numbers in found.drawn)
    # An epoch has no row twice, so a row of an earlier step is one that was kept; decay 1 keeps some of all steps.
    assert len({*found.drawn[-1]} & {*found.drawn[1]}) > 0
    assert max(found.sizes) <= ROWS // accumulation


def drawn(folder: Path, accumulation: int) -> Watch:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "x": torch.randn(3, generator=generator),
            "y": torch.randn((), generator=generator),
            "number": torch.tensor(n),
        }
        for n in range(STEPS * ROWS)
    ]
    args = tiny_arguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // accumulation,
        gradient_accumulation_steps=accumulation,
        meta_portion=1.0,
        estimator="hyperdistill",
        estimator_kwargs={"scale": "one", "decay": 1.0},
    )
    watch = Watch()
    model = Numbered(nn.Linear(3, 1), nn.Linear(3, 1))
    watch.trainer = MetaTrainer(model, args, train_dataset=rows, meta_dataset=rows[:8], callbacks=[watch])
    watch.trainer.train()
    return watch


def test_drawn_rows_of_sentences_make_the_mean_over_their_tokens() -> None:
    """Rows of other lengths are joined by the task; the loss of what is drawn is that of these rows as one batch."""
    tagger = tiny_tagger(torch.float64, dropout=False).eval()
    rows = list(random_rows(8, seed=1, language=[0, -1], length=14))
    first, second = ([collate_tokens(rows[i : i + 2]) for i in at] for at in ((0, 2), (4, 6)))
    for window in (first, second):
        set_totals(tagger, window, ("source", "target"))
    examples = examples_of(tagger, Processes())
    assert examples.size(first) == examples.size(second) == 4
    taken = [examples.take(window, torch.tensor(numbers)) for window, numbers in ((first, [3, 0]), (second, [1, 2]))]
    batch = examples.concat(taken)
    whole = collate_tokens([rows[i] for i in (0, 3, 5, 6)])
    torch.testing.assert_close(sum(map(tagger.mean_inner_loss, batch)), tagger.mean_inner_loss(whole))
    assert examples.size(batch) == 4
    assert [len(part["labels"]) for part in batch] == [2, 2]
