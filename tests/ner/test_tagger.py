"""The tagger's two losses against ones written out by hand, row by row, without padding, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import XLMRobertaXLConfig, XLMRobertaXLForTokenClassification

from metaxl_evo.bilevel import SGD, Tree, hypergradient
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.estimators import EvoGrad, OneStep
from metaxl_evo.models.bilevel_module import TOTALS, Batch
from metaxl_evo.ner.tagger import IGNORED, TARGET, CrossLingualTagger
from tests.training.tiny import (
    HIDDEN,
    LABELS,
    NO_DROPOUT,
    PAD,
    collate,
    different,
    random_rows,
    tiny_base,
    tiny_tagger,
)


def exact_tagger(**settings: Any) -> CrossLingualTagger:
    return tiny_tagger(torch.float64, dropout=False, **settings)


def batch_of(count: int, language: int | list[int], seed: int = 1) -> Batch:
    return collate(list(random_rows(count, seed=seed, language=language)))


def perturbed(tree: Tree, seed: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    return {name: leaf.detach() + 0.1 * torch.randn(leaf.shape, generator=generator) for name, leaf in tree.items()}


# By hand


def sentences(batch: Batch) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Token ids, labels and language of each row, the padding cut off."""
    for ids, mask, labels, language in zip(
        *(batch[k] for k in ("input_ids", "attention_mask", "labels", "language")), strict=True
    ):
        yield ids[mask.bool()], labels[mask.bool()], int(language)


def row_loss(tagger: CrossLingualTagger, ids: Tensor, labels: Tensor, network: nn.Module | None, layer: int) -> Tensor:
    """Summed cross-entropy of one sentence, whose states after encoder layer `layer` pass through `network`."""
    model: Any = tagger.base
    hidden = model.roberta.embeddings(ids[None])
    for number, module in enumerate(model.roberta.encoder.layer, start=1):
        hidden = module(hidden, None)
        if number == layer and network is not None:
            hidden = hidden + network(hidden.detach(), None)
    scores = hidden @ model.classifier.weight.T + model.classifier.bias
    log_probabilities = scores[0] - scores[0].logsumexp(-1, keepdim=True)
    labelled = (labels != IGNORED).nonzero().squeeze(1)
    return -log_probabilities[labelled, labels[labelled]].sum()


def loss_by_hand(
    tagger: CrossLingualTagger, batch: Batch, weights: tuple[float, float] = (1.0, 1.0), transform: bool = True
) -> Tensor:
    """w_s * mean over source tokens + w_t * mean over target tokens; a source row's loss is mixed over the layers."""
    sums, counts = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)], [0, 0]
    for ids, labels, language in sentences(batch):
        of_target = language == TARGET
        if of_target or not transform:
            loss = row_loss(tagger, ids, labels, None, 0)
        else:
            logits = tagger.meta.mixing_logits
            mixing = torch.ones(1) if logits is None else logits[language].exp() / logits[language].exp().sum()
            nets: Any = tagger.meta.nets[language]
            loss = sum(
                weight * row_loss(tagger, ids, labels, net, layer)
                for weight, net, layer in zip(mixing, nets, tagger.meta.layers, strict=True)
            )
        sums[of_target] = sums[of_target] + loss
        counts[of_target] += int((labels != IGNORED).sum())
    return sum((w * s / c for w, s, c in zip(weights, sums, counts, strict=True) if c), start=sums[0] * 0)


def gradients(loss: Tensor, tagger: CrossLingualTagger) -> Tree:
    named = {**tagger.base_parameters(), **tagger.meta_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "one layer": ({}, [0, TARGET]),
    "last layer": ({"layers": [2]}, [0, TARGET]),
    "two layers": ({"layers": [1, 2]}, [0, TARGET, 0]),
    "three languages": ({"languages": ["a", "b", "c"]}, [2, TARGET, 0, 1]),
    "two layers, two languages": ({"layers": [2, 1], "languages": ["a", "b"]}, [1, TARGET, 0]),
    "attention network": ({"layers": [1, 2], "kind": "transformer"}, [0, 0, TARGET]),
    "source rows only": ({"layers": [1, 2]}, [0]),
    "target rows only": ({"layers": [1, 2]}, [TARGET]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_inner_loss_and_its_gradients_are_those_by_hand(name: str) -> None:
    settings, languages = CASES[name]
    tagger, batch = exact_tagger(**settings).train(), batch_of(6, languages)
    tagger.meta.requires_grad_(True)
    found, expected = tagger.mean_inner_loss(batch), loss_by_hand(tagger, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    by_hand, gradient = gradients(expected, tagger), gradients(found, tagger)
    for key, leaf in by_hand.items():
        torch.testing.assert_close(gradient[key], leaf, rtol=1e-9, atol=1e-12, msg=key)
    moves = {key for key in tagger.meta_parameters() if bool(by_hand[key].any())}
    assert moves if 0 in languages else not moves
    assert ("mixing_logits" in moves) == (len(settings.get("layers", [1])) > 1 and 0 in languages)


def test_the_weights_of_the_two_means() -> None:
    tagger = exact_tagger(source_weight=0.25, target_weight=3.0)
    batch = batch_of(6, [0, TARGET])
    expected = loss_by_hand(tagger, batch, (0.25, 3.0))
    torch.testing.assert_close(tagger.mean_inner_loss(batch), expected, rtol=1e-12, atol=1e-12)


def test_without_the_transform_source_rows_stay_as_they_are() -> None:
    tagger = exact_tagger(transform=False, layers=[1, 2])
    batch = batch_of(6, [0, TARGET])
    expected = loss_by_hand(tagger, batch, transform=False)
    torch.testing.assert_close(tagger.mean_inner_loss(batch), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", [[1], [1, 2]])
def test_micro_batches_under_the_windows_totals_add_up(layers: list[int]) -> None:
    tagger, batch = exact_tagger(layers=layers), batch_of(7, [0, TARGET, TARGET])
    totals = {key: torch.tensor(count) for key, count in tagger.counts(batch).items()}
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 7))]
    assert tagger.counts(parts[0]) != tagger.counts(parts[1])
    found = sum(tagger.mean_inner_loss({**part, TOTALS: totals}) for part in parts)
    torch.testing.assert_close(found, tagger.mean_inner_loss(batch), rtol=1e-12, atol=1e-12)
    of_target = torch.full_like(batch["language"], TARGET)
    totals = {"target": totals["source"] + totals["target"]}
    judged = [{**part, "language": of_target[: len(part["labels"])], TOTALS: totals} for part in parts]
    outer, whole = sum(map(tagger.mean_outer_loss, judged)), tagger.mean_outer_loss({**batch, "language": of_target})
    torch.testing.assert_close(outer, whole, rtol=1e-12, atol=1e-12)


def test_rows_without_labels_cost_nothing() -> None:
    tagger, batch = exact_tagger(), batch_of(3, [0, TARGET])
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    assert tagger.counts(batch) == {"source": 0, "target": 0}
    assert tagger.mean_inner_loss(batch).item() == 0.0
    assert tagger.mean_outer_loss(batch).item() == 0.0


def test_the_outer_loss_is_the_plain_models() -> None:
    tagger, batch = exact_tagger(), batch_of(5, TARGET, seed=3)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    expected = tagger.base(**inputs).loss
    torch.testing.assert_close(tagger.mean_outer_loss(batch), expected, rtol=1e-12, atol=1e-12)
    before = tagger.mean_outer_loss(batch)
    for parameter in tagger.meta.parameters():
        parameter.data.normal_()
    assert torch.equal(tagger.mean_outer_loss(batch), before)


def test_counts_are_the_labelled_tokens_of_either_side() -> None:
    batch = {
        "labels": torch.tensor([[IGNORED, 1, 2], [0, IGNORED, IGNORED], [IGNORED, 3, IGNORED], [4, 4, 4]]),
        "language": torch.tensor([0, TARGET, 1, TARGET]),
    }
    assert tiny_tagger().counts(batch) == {"source": 3, "target": 4}


def test_the_means_divide_by_exact_counts_under_autocast() -> None:
    tagger, batch = tiny_tagger(dropout=False), batch_of(6, [0, TARGET])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tagger.base(batch["input_ids"]).logits.dtype == torch.bfloat16
        one, many = (
            tagger.mean_inner_loss({**batch, TOTALS: {"source": torch.tensor(n), "target": torch.tensor(n)}})
            for n in (1, 711)
        )
    torch.testing.assert_close(one / 711, many, rtol=1e-6, atol=0.0)  # 1/711 in bfloat16 is off by 1e-3


# The cut


class Whole(CrossLingualTagger):
    """A tagger that does not know its head, as for models with another one."""

    _has_plain_head = False  # type: ignore[assignment]


def whole(tagger: CrossLingualTagger) -> CrossLingualTagger:
    return Whole(tagger.base, tagger.meta, pad_token_id=PAD)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("layers", [[1], [2], [1, 2]])
def test_encoder_and_head_apart_are_the_whole_model(layers: list[int], dropout: bool) -> None:
    tagger, batch = tiny_tagger(dropout=dropout, layers=layers).train(), batch_of(6, [0, TARGET])
    losses = []
    for module in (tagger, whole(tagger).train()):
        torch.manual_seed(5)
        losses.append(module.mean_inner_loss(batch))
    assert torch.equal(*losses)
    assert different(gradients_of_base(losses[0], tagger), gradients_of_base(losses[1], tagger)) == []


def gradients_of_base(loss: Tensor, tagger: CrossLingualTagger) -> Tree:
    named = tagger.base_parameters()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True), strict=True))


def test_the_cut_of_the_problem_is_the_inner_loss() -> None:
    tagger, batch = exact_tagger(), batch_of(6, [0, TARGET])
    problem = tagger.problem(SGD(0.1))
    assert problem.cut is not None
    assert problem.cut.names == {"classifier.weight", "classifier.bias"}
    w, lam = perturbed(tagger.base_parameters(), 1), perturbed(tagger.meta_parameters(), 2)
    passes = PassContext(problem)
    below = passes.prefix(w, 0, batch)
    with passes.scope(0):
        hidden = problem.cut.hidden(w, lam, below, batch)
    assert hidden.shape == (*batch["input_ids"].shape, HIDDEN)
    with passes.scope(0):
        found = problem.cut.loss(w, hidden, batch)
    with passes.scope(0):
        assert torch.equal(found, problem.inner_loss(w, lam, batch))


def test_there_is_no_cut_where_the_suffix_would_read_meta_parameters() -> None:
    assert tiny_tagger(layers=[1, 2]).cut() is None
    assert tiny_tagger(layers=[1, 2], transform=False).cut() is not None
    assert whole(tiny_tagger()).cut() is None


def test_what_is_below_the_transform_is_shared_where_nothing_is_above_it() -> None:
    """XLM-R XL has a norm behind its last layer, which a transform after that layer does not see."""
    base = XLMRobertaXLForTokenClassification(
        XLMRobertaXLConfig(**{**tiny_base(**NO_DROPOUT).config.to_dict(), "architectures": None})
    ).double()
    extra = CrossLingualTagger(base, exact_tagger(layers=[2]).meta, pad_token_id=PAD)
    for tagger, shared in [(exact_tagger(layers=[2]), True), (exact_tagger(layers=[1]), False), (extra, False)]:
        problem, batch = tagger.train().problem(SGD(0.1)), batch_of(6, [0, TARGET])
        w, lam = tagger.base_parameters(), tagger.meta_parameters()
        assert problem.cut is not None
        assert (problem.cut.prefix is not None) == shared
        recorded = PassContext(problem)
        with recorded.recording(0):
            tagger.mean_inner_loss(batch)
        for passes in (recorded, PassContext(problem)):
            below = passes.prefix(w, 0, batch)
            with passes.scope(0):
                found = problem.cut.loss(w, problem.cut.hidden(w, lam, below, batch), batch)
                expected = problem.inner_loss(w, lam, batch)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", [[2], [1, 2]])
def test_evograd_on_the_head_reaches_every_meta_parameter(layers: list[int]) -> None:
    """With and without the shared encoder pass it is one number, mixing weights included."""
    tagger = exact_tagger(layers=layers, languages=["a", "b"])
    train, judge = batch_of(6, [0, TARGET, 1]), batch_of(5, TARGET, seed=3)
    estimator = EvoGrad(copies=4, sigma=0.1, parameters="^classifier")
    problems = [module.problem(SGD(0.1)) for module in (tagger, whole(tagger))]
    results = [
        hypergradient(problem, estimator, tagger.base_parameters(), tagger.meta_parameters(), [train], [judge]).grads
        for problem in problems
    ]
    for name, leaf in results[0].items():
        torch.testing.assert_close(leaf, results[1][name], rtol=1e-9, atol=1e-16)
        assert bool(leaf.any()), name


def test_perturbed_passes_replay_the_networks_inputs() -> None:
    """Finite differences estimate what the exact engines compute, which see the RTN's inputs as constants."""
    tagger = exact_tagger(layers=[1, 2])
    train, judge = batch_of(6, [0, TARGET]), batch_of(5, TARGET, seed=3)
    exact, estimate = (
        hypergradient(
            tagger.problem(SGD(0.1)), estimator, tagger.base_parameters(), tagger.meta_parameters(), [train], [judge]
        ).grads
        for estimator in (OneStep(engine="double_backward"), OneStep(engine="finite_difference", radius=1e-4))
    )
    for name, leaf in exact.items():
        torch.testing.assert_close(estimate[name], leaf, rtol=1e-6, atol=1e-6 * float(leaf.abs().max()), msg=name)


# Joining


@pytest.mark.parametrize(("first", "second"), [(9, 4), (4, 9), (6, 6)])
def test_joined_rows_are_padded_on_the_right(first: int, second: int) -> None:
    def rows(count: int, length: int, language: int) -> Batch:
        return {
            "input_ids": torch.full((count, length), 7),
            "attention_mask": torch.ones(count, length, dtype=torch.long),
            "labels": torch.full((count, length), 2),
            "language": torch.full((count,), language),
        }

    parts = rows(2, first, 0), rows(3, second, TARGET)
    joined = tiny_tagger().join(*parts)
    length = max(first, second)
    for key, fill in (("input_ids", PAD), ("attention_mask", 0), ("labels", IGNORED)):
        assert joined[key].shape == (5, length)
        for row, part, index in [(0, 0, 0), (1, 0, 1), (2, 1, 0), (4, 1, 2)]:
            own = parts[part][key][index]
            assert torch.equal(joined[key][row], F.pad(own, (0, length - len(own)), value=fill))
    assert joined["language"].tolist() == [0, 0, TARGET, TARGET, TARGET]


def test_a_joined_batch_has_the_losses_of_its_parts() -> None:
    tagger = exact_tagger()
    source, target = batch_of(5, 0), batch_of(3, TARGET, seed=4)
    joined = tagger.join(source, target)
    expected = tagger.mean_inner_loss(source) + tagger.mean_inner_loss(target)
    torch.testing.assert_close(tagger.mean_inner_loss(joined), expected, rtol=1e-12, atol=1e-12)
    assert tagger.counts(joined) == {
        "source": tagger.counts(source)["source"],
        "target": tagger.counts(target)["target"],
    }


# Evaluation


def test_evaluation_is_the_plain_model_whatever_the_transform() -> None:
    tagger, batch = tiny_tagger(languages=["a", "b"]).eval(), batch_of(4, [0, 1])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    plain = tiny_base().eval()(**inputs).logits
    assert plain.shape[-1] == LABELS
    assert torch.equal(tagger(**inputs).logits, plain)
    for parameter in tagger.meta.parameters():
        parameter.data.normal_()
    assert torch.equal(tagger(**inputs).logits, plain)
