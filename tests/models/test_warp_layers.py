"""Warp layers of a text model: where they stand, what is learned through them, and in several tasks at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from metaxl_evo.bilevel import SGD, run_episode
from metaxl_evo.estimators import make_estimator
from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.task_batch import SLOT, MetaLearner, TaskBatch
from metaxl_evo.models.warp_layers import WarpLayers
from tests.training.tiny import close

LAYERS, HIDDEN, TASKS, ROWS, LENGTH, RATE = 3, 8, 2, 4, 5, 0.1


def model_of() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, num_labels=2, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config).double().eval()


def warps_of() -> WarpLayers:
    warps = WarpLayers(HIDDEN, LAYERS).double()
    torch.manual_seed(1)
    for leaf in warps.parameters():
        leaf.data += 0.1 * torch.randn_like(leaf)
    return warps


def batch_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (TASKS, ROWS, LENGTH), generator=generator)
    return {SLOT: torch.arange(TASKS), "ids": ids, "y": torch.randint(2, (TASKS, ROWS), generator=generator)}


class Warped(MetaLearner):
    """Classifiers of texts, one a task, below shared warp layers."""

    direct_term = True
    meta: WarpLayers

    def costs(self, batch: Batch) -> Tensor:
        def losses(net: Any, ids: Tensor, y: Tensor) -> Tensor:
            with self.meta.active(net):
                return F.cross_entropy(net(input_ids=ids).logits, y, reduction="none")

        return self.base.each(losses, batch[SLOT], batch["ids"], batch["y"])


def by_hand(model: Any, ids: Tensor, warps: nn.ModuleList) -> Tensor:
    """Logits: the layers one after the other, a warp behind all but the last."""
    states = model.bert.embeddings(input_ids=ids)
    for number, layer in enumerate(model.bert.encoder.layer):
        out = layer(states)
        states = out if isinstance(out, Tensor) else out[0]
        states = states if number == LAYERS - 1 else F.linear(states, warps[number].weight, warps[number].bias)
    logits: Tensor = model.classifier(model.bert.pooler(states))
    return logits


def test_a_warp_stands_behind_every_layer_but_the_last() -> None:
    model, warps, ids = model_of(), warps_of(), batch_of(0)["ids"][0]
    plain = model(input_ids=ids).logits
    warps.attach(model)
    assert torch.equal(model(input_ids=ids).logits, plain)  # they do not act
    with warps.active(model):
        found = model(input_ids=ids).logits
    assert not torch.allclose(found, plain)
    torch.testing.assert_close(found, by_hand(model, ids, warps.warps))
    fresh = WarpLayers(HIDDEN, LAYERS).double()
    warps.detach(model)
    fresh.attach(model)
    with fresh.active(model):
        torch.testing.assert_close(model(input_ids=ids).logits, plain)  # they begin as the identity


class Written(nn.Module):
    """The loss of one task with warps and model as parts of one module, for functional_call."""

    def __init__(self, model: nn.Module, warps: WarpLayers):
        super().__init__()
        self.model, self.warps = model, warps

    def forward(self, ids: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(by_hand(self.model, ids, self.warps.warps), y)


@pytest.mark.parametrize("in_turn", [True, False])
def test_the_hypergradient_of_two_tasks_is_autograd_through_their_steps(in_turn: bool) -> None:
    """Two steps of SGD each, by `unroll`; the mean of what the tasks have by themselves."""
    model, warps = model_of(), warps_of()
    model.bert.embeddings.word_embeddings.padding_idx = None  # not under vmap, and every word is one here
    learner = Warped(TaskBatch(model, TASKS, in_turn=in_turn), warps)
    warps.attach(learner.base.copies)
    train, judge = [batch_of(1), batch_of(2)], batch_of(3)
    found = run_episode(
        learner.problem(SGD(RATE)),
        make_estimator("unroll"),
        learner.base_parameters(),
        learner.meta_parameters(),
        [[one] for one in train],
        [judge],
    )

    written = Written(copy.deepcopy(model), warps)
    lam = {name: leaf.detach().requires_grad_() for name, leaf in warps.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for task in range(TASKS):
        w = {name: leaf.detach().requires_grad_() for name, leaf in model.named_parameters()}

        def loss(w: dict[str, Tensor], batch: dict[str, Tensor], task: int = task) -> Tensor:
            at = {f"model.{name}": leaf for name, leaf in w.items()} | {f"warps.{k}": v for k, v in lam.items()}
            made: Tensor = functional_call(written, at, (batch["ids"][task], batch["y"][task]))
            return made

        for batch in train:
            grads = torch.autograd.grad(loss(w, batch), list(w.values()), create_graph=True)
            w = {name: leaf - RATE * grad for (name, leaf), grad in zip(w.items(), grads, strict=True)}
        total = total + loss(w, judge) / TASKS
    expected = dict(zip(lam, torch.autograd.grad(total, list(lam.values())), strict=True))
    close(found.grads, expected, 1e-9)


def test_padding_that_vmap_would_train_is_refused() -> None:
    """In torch.vmap the padding row of every task but the first has a gradient."""
    with pytest.raises(ValueError, match=r"loses an embedding's padding_idx.* set in_turn=True"):
        TaskBatch(model_of(), TASKS)


def test_what_would_pass_unwarped_is_refused() -> None:
    model, warps = model_of(), warps_of()
    with pytest.raises(ValueError, match="not in the model: attach them to it"), warps.active(model):
        pass
    warps.attach(model)
    with pytest.raises(ValueError, match="copies have none"), warps.active(copy.deepcopy(model)):
        pass
    with pytest.raises(ValueError, match="3 warp layers stand between 4 encoder layers, the model has 3: make"):
        WarpLayers(HIDDEN, 4).attach(model)
    with pytest.raises(ValueError, match="stand between encoder layers, and there is 1"):
        WarpLayers(HIDDEN, 1)
