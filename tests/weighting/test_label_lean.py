"""What the weights of noisy texts are told, by float64 autograd through each step: docs/results/weighting.md."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import set_seed

from metaxl_evo.bilevel.update import SGD, AdamW, UpdateRule
from metaxl_evo.bilevel.update_state import map_trees
from metaxl_evo.weighting.drawn import draw_classifier
from metaxl_evo.weighting.encoding import encode
from metaxl_evo.weighting.labelled import LabelledArguments, load_labelled

STEPS, PHASE = 264, 44
RULES: dict[str, Callable[[float], UpdateRule]] = {
    "AdamW": lambda rate: AdamW(2e-3 * rate, max_grad_norm=1.0),
    "SGD": lambda rate: SGD(0.1 * rate, max_grad_norm=1.0),
}


def phases(rule_of: Callable[[float], UpdateRule]) -> list[np.ndarray]:
    """For each 44 steps of a training: slopes of the weights, their label's mean, losses, whether labels are right."""
    data = load_labelled(LabelledArguments(noise_rate=0.4), seed=0)
    set_seed(0)
    base, tokenizer = draw_classifier(data.names)
    base.double().set_attn_implementation("eager")  # has second derivatives

    def loss(w: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(functional_call(base, w, (ids,)).logits, labels, reduction="none")

    (x, y), clean = [
        (torch.tensor(encode(part["text"][:], tokenizer, 64)["input_ids"][:]), torch.tensor(part["label"][:]))
        for part in (data.train, data.meta)
    ]
    assert data.wrong is not None
    w, state, made = dict(base.named_parameters()), rule_of(0.0).init(dict(base.named_parameters())), []
    for step in range(STEPS):
        w = {name: leaf.detach().requires_grad_() for name, leaf in w.items()}
        rows, weights = torch.randperm(len(y))[:32], torch.ones(32, dtype=torch.float64, requires_grad=True)
        base.train()
        losses = loss(w, x[rows], y[rows])
        grads = torch.autograd.grad((weights * losses).mean(), list(w.values()), create_graph=True)
        w, state = rule_of(1 - step / STEPS)(w, state, dict(zip(w, grads, strict=True)), {})
        state = map_trees(lambda held: {name: leaf.detach() for name, leaf in held.items()}, state)
        base.eval()
        slopes = -torch.autograd.grad(loss(w, *clean).mean(), weights)[0]  # above 0: more of it would help
        means = torch.stack([slopes[y[rows] == label].mean() for label in y[rows]])
        made.append(torch.stack([slopes, means, losses.detach(), torch.tensor(~data.wrong[rows])]).numpy())
    return [np.concatenate(made[start : start + PHASE], axis=1) for start in range(0, STEPS, PHASE)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_at_chance_a_weight_is_told_its_label_and_little_else(name: str) -> None:
    found = []
    for slopes, means, losses, right in phases(RULES[name]):
        share, apart = (means**2).mean() / (slopes**2).mean(), slopes - means
        told = [value for one in (slopes, apart) for value in (pearsonr(one, losses)[0], roc_auc_score(right, one))]
        found.append([share, *told])
        print(name, "share {:.2f}; loss {:+.2f}, AUC {:.2f}; apart: loss {:+.2f}, AUC {:.2f}".format(*found[-1]))
    table = np.array(found)
    assert (table[:2, 0] > 0.8).all()
    assert (table[:2, 1] > 0.2).all()
    if name == "AdamW":  # the base leaves chance
        assert (table[1:, 4] > 0.65).all()
        assert (table[1:, 3] < -0.2).all()
        assert (table[:, 4] > table[:, 2]).all()
