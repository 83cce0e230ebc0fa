"""Weighted losses of every head: a weight of one is the plain loss, and hypergradients are those of other engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaxl_evo.bilevel import SGD, hypergradient, tree
from metaxl_evo.estimators import OneStep
from metaxl_evo.models.losses import set_totals
from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.weighting.weighted_text import WeightedText
from tests.weighting.small import HEADS, ROWS, base_of, batch_of, module_of


def slopes(module: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.base_parameters().values())))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_a_weight_of_one_is_the_task_without_weights_bit_by_bit(head: str, lora: bool) -> None:
    """sigmoid(100) is 1; losses, gradients, and the loss that transformers takes of the same head."""
    one, off = module_of(head, logit=100.0, lora=lora), module_of(head, weighted=False, lora=lora)
    batch = batch_of(head)
    losses = [module.mean_inner_loss(batch) for module in (one, off)]
    assert torch.equal(*losses)
    assert all(map(torch.equal, slopes(one, losses[0]), slopes(off, losses[1])))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(
        losses[0], base_of(head, lora).eval()(**inputs).loss, rtol=1e-6, atol=0.0, check_dtype=False
    )


@pytest.mark.parametrize("head", HEADS)
def test_a_domain_absent_from_a_micro_batch_is_not_a_zero(head: str) -> None:
    """Of 4 + 2 rows, the second part without the first domain: as 6 rows at once."""
    whole, generator = batch_of(head), torch.Generator().manual_seed(3)
    whole["number"] = torch.tensor([0, 1, 0, 1, 1, 1])
    module = module_of(head)
    with torch.no_grad():
        module.meta.logits.copy_(torch.randn(ROWS, generator=generator))  # type: ignore[operator, union-attr]
    parts = [{name: one[rows] for name, one in whole.items()} for rows in (slice(4), slice(4, None))]
    set_totals(module, parts, ("items",))
    together = slopes(module, module.mean_inner_loss(whole))
    apart = [slopes(module, module.mean_inner_loss(part)) for part in parts]
    for expected, *found in zip(together, *apart, strict=True):
        torch.testing.assert_close(sum(found), expected, rtol=1e-11, atol=1e-14)


def test_tokens_of_a_label_are_divided_by_their_mean() -> None:
    module, batch = module_of("tagging", "loss", per_token=True, normalisation="label"), batch_of("tagging")
    losses, weights = module.weighed(batch)
    labels = batch["labels"][batch["labels"] != -100]
    means = torch.stack([weights[labels == label].mean() for label in range(3)])
    torch.testing.assert_close(module.inner_loss(batch), weights / means[labels] * losses)


def test_weights_of_a_label_are_divided_by_their_mean() -> None:
    """Labels 0, 1, 2, 0, 1, 2: rows i and i + 3 share 2; what is watched are these weights."""
    module, batch = module_of("rows", normalisation="label"), batch_of("rows")
    with torch.no_grad():
        module.meta.logits.copy_(torch.linspace(-2, 2, ROWS))  # type: ignore[operator, union-attr]
    losses, weights = module.weighed(batch)
    pairs = weights.view(2, 3)
    torch.testing.assert_close(module.inner_loss(batch), (2 * pairs / pairs.sum(0)).flatten() * losses)
    module.train()(**batch)
    assert module.watch.take()["weights/mean"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"unknown weight_normalisation 'max': .*Valid: sum, mean, label"):
        module_of("rows", normalisation="max")


@pytest.mark.parametrize("head", HEADS)
def test_the_weights_of_rows_multiply_their_tokens(head: str) -> None:
    """The mean of w_row l_token, written out."""
    module, batch = module_of(head), batch_of(head)
    with torch.no_grad():
        module.meta.logits.copy_(torch.arange(ROWS) - 2.0)  # type: ignore[operator, union-attr]
    logits = module.base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels, weights = batch["labels"], (batch["number"].double() - 2).sigmoid()
    if head == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    if head != "rows":
        weights, labels = weights[:, None].expand_as(labels)[labels != -100], labels[labels != -100]
        logits = logits[(batch["labels"][:, 1:] if head == "causal" else batch["labels"]) != -100]
    expected = (weights * F.cross_entropy(logits, labels, reduction="none")).mean()
    torch.testing.assert_close(module.mean_inner_loss(batch), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("head", ["tagging", "causal"])
def test_the_hidden_state_that_is_read(head: str, per_token: bool) -> None:
    """That which predicts a token; of all tokens of a row their mean."""
    module, batch = module_of(head, "hidden", per_token=per_token), batch_of(head)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = module.base(**inputs, output_hidden_states=True).hidden_states[-1]  # (B, T, H)
    real = [row[: int(mask.sum())] for row, mask in zip(states, batch["attention_mask"], strict=True)]
    items = [row[: len(row) - (head == "causal")] for row in real]
    means = [row.mean(0, keepdim=True).expand(len(kept), -1) for row, kept in zip(real, items, strict=True)]
    expected = torch.cat(items if per_token else means)
    _, weights = module.weighed(batch)
    torch.testing.assert_close(weights, module.meta(expected), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(
    ("head", "reads", "per_token", "lora"),
    [
        ("rows", "loss", False, False),
        ("rows", "hidden", False, True),
        ("rows", "columns", False, False),
        ("tagging", "loss", True, True),
        ("tagging", "hidden", False, False),
        ("causal", "loss", False, True),
        ("causal", "hidden", True, False),
        ("causal", "number", False, False),
    ],
)
def test_engines_agree_on_the_hypergradient(head: str, reads: str, per_token: bool, lora: bool) -> None:
    """Finite differences have a detached input replayed: they are off by 0.001, else by 1."""
    module = module_of(head, reads, per_token=per_token, lora=lora)
    problem, w, lam = module.problem(SGD(0.3)), module.base_parameters(), module.meta_parameters()
    judge = batch_of(head, 5)
    found = [
        hypergradient(problem, OneStep(**settings), w, lam, [batch_of(head)], [judge]).grads  # type: ignore[arg-type]
        for settings in (
            {"engine": "double_backward"},
            {"engine": "jvp"},
            {"engine": "finite_difference", "radius": 1e-4},
        )
    ]
    assert tree.norm(found[0]) > 0
    for other, tolerance in zip(found[1:], (1e-10, 1e-2), strict=True):
        assert tree.norm(tree.add(other, found[0], -1.0)) < tolerance * tree.norm(found[0])


@pytest.mark.parametrize(
    ("reads", "further", "line"),
    [
        ("entropy", {}, "unknown reads 'entropy'"),
        ("loss", {"reads": "number"}, "a WeightNet cannot read number"),
        ("columns", {"per_token": True}, "a token has no columns of its own"),
    ],
)
def test_what_there_is_not_to_read(reads: str, further: dict[str, Any], line: str) -> None:
    meta = WeightTable(ROWS) if reads == "number" else WeightNet()
    with pytest.raises(ValueError, match=line):
        WeightedText(base_of("tagging"), meta, tokens=True, **{"reads": reads, **further})
