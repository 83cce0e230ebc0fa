"""Weights of source rows against closed forms, and against autograd through one step that is written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaxl_evo.bilevel import SGD, hypergradient, tree
from metaxl_evo.estimators import OneStep
from metaxl_evo.models.weighers import WeightTable, give_weigher, load_weigher
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.ner.arguments import NerArguments
from metaxl_evo.ner.data import shuffled_labels
from metaxl_evo.ner.source_weights import SourceWeights, sources_table
from metaxl_evo.ner.synthetic import SyntheticFamily
from metaxl_evo.ner.tagger import IGNORED, TARGET, CrossLingualTagger
from tests.scripts.runs import TINY, train, write_data, write_model
from tests.training.tiny import PAD, collate, random_rows, tiny_tagger

LANGUAGES = ("a", "b", "c")
SHARES = (1 / 6, 2 / 6, 3 / 6)  # of `tiny_tagger`
RATE = 0.3


def weighed(reads: str, *, transform: bool = False, **settings: Any) -> CrossLingualTagger:
    given = {"languages": LANGUAGES, "reads": reads, "transform": transform}
    return tiny_tagger(torch.float64, dropout=False, **given | settings)


def batch_of(languages: list[int], seed: int = 1, rows: int = 8) -> dict[str, Any]:
    return collate(list(random_rows(rows, seed=seed, language=languages)))


def weights_by_hand(tagger: CrossLingualTagger, languages: Tensor, losses: Tensor, states: Tensor) -> Tensor:
    """Of rows (B,), from their mean losses (B,) and mean states (B, H)."""
    weigher: Any = tagger.weigher
    if isinstance(weigher, WeightTable):
        shares = torch.tensor(SHARES, dtype=torch.float64)
        mixture = (shares.log() + weigher.logits).softmax(0)
        return (mixture / shares)[languages]
    assert tagger.source_weights is not None
    seen = losses.detach()[:, None] if tagger.source_weights.reads == "loss" else states.detach()
    return torch.sigmoid(weigher.out(torch.relu(weigher.hidden(seen)))).squeeze(1)


def inner_by_hand(tagger: CrossLingualTagger, batch: dict[str, Any], w: dict[str, Tensor]) -> Tensor:
    """Untransformed: sum over source rows of weight times summed loss, by their tokens, and the mean of the target."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    out = functional_call(tagger.base, w, (), {**inputs, "output_hidden_states": True})
    labels, mask = batch["labels"], batch["attention_mask"].double()
    losses = F.cross_entropy(out.logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    counts = (labels != IGNORED).sum(1)
    states = (out.hidden_states[-1] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    source = batch["language"] != TARGET
    weights = weights_by_hand(tagger, batch["language"][source], (losses.sum(1) / counts)[source], states[source])
    target = losses[~source].sum() / counts[~source].sum()
    return (weights * losses[source].sum(1)).sum() / counts[source].sum() + target


@pytest.mark.parametrize("languages", [[0, TARGET, 2, 1], [2, TARGET]], ids=["all", "two absent"])
@pytest.mark.parametrize("reads", ["language", "loss", "hidden"])
def test_the_weighted_loss_and_one_step_are_those_by_hand(reads: str, languages: list[int]) -> None:
    """A language that is absent is no zero: the others weigh as ever. The step is w - rate * gradient, in float64."""
    tagger, batch, judge = weighed(reads), batch_of(languages), batch_of([TARGET], seed=5)
    weigher, w = (
        tagger.weigher,
        {name: leaf.detach().requires_grad_() for name, leaf in tagger.base_parameters().items()},
    )
    assert weigher is not None
    weigher.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):  # another has no second derivative
        inner = inner_by_hand(tagger, batch, w)
    torch.testing.assert_close(tagger.mean_inner_loss(batch), inner, rtol=1e-12, atol=0.0)

    slopes = torch.autograd.grad(inner, list(w.values()), create_graph=True)
    stepped = {name: leaf - RATE * slope for (name, leaf), slope in zip(w.items(), slopes, strict=True)}
    kept = {key: judge[key] for key in ("input_ids", "attention_mask", "labels")}
    outer = functional_call(tagger.base, stepped, (), kept).loss
    expected = torch.autograd.grad(outer, list(weigher.parameters()))
    weigher.requires_grad_(False)
    problem, lam = tagger.problem(SGD(RATE)), tagger.meta_parameters()
    assert list(lam) == [f"weigher.{name}" for name, _ in weigher.named_parameters()]
    for engine, tolerance in [("double_backward", 1e-9), ("jvp", 1e-9), ("finite_difference", 1e-3)]:
        estimator = OneStep(engine=engine, **({"radius": 1e-4} if engine == "finite_difference" else {}))
        found = hypergradient(problem, estimator, tagger.base_parameters(), lam, [batch], [judge]).grads
        by_hand = dict(zip(lam, expected, strict=True))
        assert tree.norm(tree.add(found, by_hand, -1.0)) < tolerance * tree.norm(by_hand), engine


@pytest.mark.parametrize("layers", [[2], [1, 2]])
@pytest.mark.parametrize("reads", ["language", "loss", "hidden"])
def test_beside_an_rtn_the_engines_agree_on_both(reads: str, layers: list[int]) -> None:
    if reads == "hidden" and len(layers) > 1:
        pytest.skip("refused by the settings")
    tagger, batch, judge = weighed(reads, transform=True, layers=layers), batch_of([0, TARGET, 1]), batch_of([TARGET])
    problem, lam = tagger.problem(SGD(RATE)), tagger.meta_parameters()
    assert {name.split(".")[0] for name in lam} == {"rtn", "weigher"}
    assert tagger.cut() is None
    exact, *others = (
        hypergradient(problem, OneStep(**settings), tagger.base_parameters(), lam, [batch], [judge]).grads
        for settings in (
            {"engine": "double_backward"},
            {"engine": "jvp"},
            {"radius": 1e-4, "engine": "finite_difference"},
        )
    )
    for part in ("rtn", "weigher"):
        mine = {name: leaf for name, leaf in exact.items() if name.startswith(part)}
        assert tree.norm(mine) > 0
        for other, tolerance in zip(others, (1e-9, 1e-2), strict=True):
            gap = {name: other[name] - leaf for name, leaf in mine.items()}
            assert tree.norm(gap) < tolerance * tree.norm(mine), part


@pytest.mark.parametrize("count", [2, 3, 5, 7, 10])
def test_weights_of_1_change_no_bit(count: int) -> None:
    languages = [chr(97 + number) for number in range(count)]
    batch = collate(list(random_rows(12, seed=1, language=[*range(count), TARGET])))
    found = []
    for reads in (None, "language"):
        tagger = tiny_tagger(dropout=False, languages=languages, reads=reads).train()
        if isinstance(tagger.weigher, WeightTable):
            nn.init.zeros_(tagger.weigher.logits)
        loss = tagger.mean_inner_loss(batch)
        found.append([loss, *torch.autograd.grad(loss, list(tagger.base_parameters().values()), allow_unused=True)])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_shares_sum_to_1_whatever_is_learned() -> None:
    """Fixed proportions p are the weights p / s; a table moves them to p e^z, and the floor is a part of v."""
    shares, wanted, z = (
        torch.tensor([0.6, 0.3, 0.1]).double(),
        torch.tensor([0.2, 0.2, 0.6]).double(),
        [0.5, -1.0, 2.0],
    )
    held = SourceWeights("language", shares.tolist(), wanted.tolist())
    torch.testing.assert_close(held.of_languages(None), wanted / shares)
    for floor in (0.0, 0.25):
        table = WeightTable(3, "softmax", floor).double()
        table.logits.data = torch.tensor(z).double()
        v = floor + (1 - floor) * 3 * table.logits.softmax(0)
        expected = wanted * v / (wanted * v).sum() / shares
        torch.testing.assert_close(held.of_languages(table), expected)
        assert float(shares @ held.of_languages(table)) == pytest.approx(1)


def test_networks_that_all_languages_share() -> None:
    """Languages are told apart by weights, though one RTN serves all: as with as many equal RTNs."""
    batch = batch_of([0, TARGET, 1, 2])
    apart = weighed("language", transform=True)
    shared = CrossLingualTagger(
        tiny_tagger(torch.float64, dropout=False).base,
        tiny_tagger(torch.float64, dropout=False).meta,
        pad_token_id=PAD,
        weigher=apart.weigher,
        source_weights=apart.source_weights,
        languages=LANGUAGES,
    )
    for net in apart.rtn.nets:  # type: ignore[union-attr]
        net.load_state_dict(shared.rtn.nets[0].state_dict())  # type: ignore[union-attr]
    torch.testing.assert_close(shared.mean_inner_loss(batch), apart.mean_inner_loss(batch), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("transform", [False, True])
def test_what_is_saved_is_read_back(tmp_path: Path, transform: bool) -> None:
    tagger, fresh = (weighed("language", transform=transform) for _ in range(2))
    tagger.save_meta(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*["rtn"] * transform, "weigher"]
    for parameter in fresh.meta.parameters():
        nn.init.zeros_(parameter)
    fresh.load_meta(tmp_path)
    for name, leaf in tagger.meta_parameters().items():
        assert torch.equal(fresh.meta_parameters()[name], leaf), name
    with pytest.raises(ValueError, match=r"holds a weigher of {'logits': \(3,\)}, here is one of {'logits': \(2,\)}"):
        give_weigher(WeightTable(2), tmp_path / "weigher")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"source_weights": "langauge"}, "source_weights 'langauge'.*did you mean 'language'"),
    "none to weigh": ({"method": "weighted", "source_weights": "none"}, "set them to language, loss, hidden"),
    "nothing learned": ({"method": "joint_training", "source_weights": "loss"}, "use weighted or metaxl"),
    "no sources": ({"method": "target_only", "source_weights": "loss"}, "use weighted or metaxl"),
    "one language": ({"source_languages": ["en"]}, "en is the one source language and has the weight 1"),
    "floor": ({"source_weights_floor": 1.0}, "source_weights_floor must be at least 0 and below 1, not 1.0"),
    "floor of none": (
        {"method": "metaxl", "source_weights": "none", "source_weights_floor": 0.1},
        "is that of learned",
    ),
    "units": ({"source_weights_units": 0}, "source_weights_units must be at least 1"),
    "several states": (
        {"method": "metaxl", "source_weights": "hidden", "rtn_layers": [1, 2]},
        "use language or loss, or one layer",
    ),
    "proportions": ({"source_proportions": "most"}, "'most' is neither union nor uniform, .* such as 0.5,0.5"),
    "too few": ({"source_proportions": "1"}, "a positive number for each of the 2 source languages"),
    "negative": ({"source_proportions": "1.5,-0.5"}, "a positive number"),
    "of one": (
        {"method": "zero_shot", "source_weights": "none", "source_languages": ["en"], "source_proportions": "uniform"},
        "source_proportions are of several",
    ),
    "shuffle": ({"shuffle": "sw"}, "shuffle: unknown source language 'sw'"),
    "shuffled": ({"shuffle": "en", "source_languages": ["en", "shuffled"]}, "the language shuffled, which there is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_cannot_be_are_refused(name: str) -> None:
    given, line = REFUSED[name]
    settings: dict[str, Any] = {"source_languages": ["en", "de"], "target_languages": ["mt"]}
    with pytest.raises(ValueError, match=line):
        NerArguments(**settings | {"method": "weighted", "source_weights": "language"} | given)


def test_shuffled_labels_are_the_same_labels_elsewhere() -> None:
    sentences = SyntheticFamily().load("aru")["train"].select_columns(["tokens", "ner_tags"])
    found, again = shuffled_labels(sentences, 3), shuffled_labels(sentences, 3)
    assert found["tokens"][:] == sentences["tokens"][:]
    assert found["ner_tags"][:] == again["ner_tags"][:] != sentences["ner_tags"][:]
    then, now = (sorted(tag for row in one["ner_tags"] for tag in row) for one in (sentences, found))
    assert then == now


def test_the_table_shows_what_is_not_known() -> None:
    facts = {"a": {"sentences": 9, "weight": 0.5, "share": None, "loss": 1.25}, "b": {"sentences": 3, "weight": 2.0}}
    facts["b"] |= {"share": 0.125, "loss": None}
    assert sources_table(facts).splitlines()[2:] == ["| b | 3 | 2 | 12.5 | - |", "| a | 9 | 0.5 | - | 1.25 |"]


def test_a_run_says_which_source_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    several = {"source_languages": "aru,celu", "shuffle": "aru", "select": "last"}
    settings = {"method": "metaxl", "source_weights": "language", **several, "meta_learning_rate": 0.1}
    results = train(model, data, tmp_path / "run", **TINY | settings)
    facts, rtn = results["run"]["sources"], tmp_path / "run/rtn/config.json"
    assert list(facts) == json.loads(rtn.read_text())["languages"] == ["aru", "celu", "shuffled"]
    assert [one["sentences"] for one in facts.values()] == [40, 16, 40]
    saved = load_weigher(tmp_path / "run/weigher")
    assert isinstance(saved, WeightTable)
    ratio = saved.weights() / saved.weights()[0]
    assert [one["weight"] / facts["aru"]["weight"] for one in facts.values()] == pytest.approx(
        ratio.tolist(), rel=1e-5
    )
    assert sum(one["share"] for one in facts.values()) == pytest.approx(1, rel=1e-5)
    assert [step for step, _ in results["run"]["source_weights_over_time"]["aru"]] == [2, 4]
    assert sources_table(facts) in capsys.readouterr().out
    assert sources_table(facts) in (tmp_path / "run/README.md").read_text()
    assert (tmp_path / "run/source_weights.png").is_file()
    alone = {"method": "weighted", "source_weights": "loss", "select": "last"}
    results = train(model, data, tmp_path / "alone", **TINY | alone)
    assert 0 < results["run"]["sources"]["aru"]["weight"] < 1
    assert "rtn_relative_change" not in results["run"]
    assert not (tmp_path / "alone/rtn").exists()
    assert load_file(tmp_path / "alone/weigher/model.safetensors")["hidden.weight"].shape == (100, 1)
    assert isinstance(load_weigher(tmp_path / "alone/weigher"), WeightNet)
    union = {**several, "method": "joint_training_equal", "source_proportions": "uniform"}
    facts = train(model, data, tmp_path / "uniform", **TINY | union)["run"]["sources"]
    assert [one["share"] for one in facts.values()] == pytest.approx([1 / 3] * 3)
