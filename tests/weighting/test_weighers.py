"""Weights in closed form, their diagnoses by scipy, and what is saved comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import pearsonr

from metaxl_evo.models.weighers import NORMALISATIONS, WeightTable, load_weigher, normalised
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.training.weight_watch import Watch, advice

LOGITS = np.array([-1.5, 0.0, 2.0, 0.3], np.float32)


def table(form: str, floor: float = 0.0) -> WeightTable:
    made = WeightTable(len(LOGITS), form, floor)
    made.load_state_dict({"logits": torch.tensor(LOGITS)})
    return made


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize(("form", "raw"), [("sigmoid", expit(LOGITS)), ("softmax", 4 * softmax(LOGITS))])
def test_weights_of_numbers(form: str, raw: np.ndarray, floor: float) -> None:
    weigher, numbers = table(form, floor), torch.tensor([2, 2, 0])
    expected = floor + (1 - floor) * raw
    np.testing.assert_allclose(weigher(numbers).detach(), expected[[2, 2, 0]], rtol=1e-6)
    np.testing.assert_allclose(weigher.mixture().detach(), expected / expected.sum(), rtol=1e-6)
    assert expected.min() >= floor
    assert form == "sigmoid" or np.isclose(expected.mean(), 1)


def test_a_network_of_several_numbers_above_a_floor() -> None:
    net = WeightNet(hidden=5, inputs=3, floor=0.4)
    seen = torch.randn(6, 3)
    hidden, out = net.hidden, net.out
    raw = expit((torch.relu(seen @ hidden.weight.T + hidden.bias) @ out.weight.T + out.bias).detach().numpy()[:, 0])
    np.testing.assert_allclose(net(seen).detach(), 0.4 + 0.6 * raw, rtol=1e-6)


def test_weights_of_a_micro_batch_by_pandas() -> None:
    """And Euler's rule: what all weights of a label gain alike changes nothing."""
    weights = torch.tensor([0.1, 0.4, 0.2, 0.9, 0.3], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, 0, 2, 0, 1])
    series = pd.Series(weights.detach().numpy())
    by_label = series / series.groupby(labels.numpy()).transform("mean")
    for how, expected in (("mean", series), ("sum", series / series.mean()), ("label", by_label)):
        np.testing.assert_allclose(normalised(weights, how, labels).detach(), expected, rtol=1e-12)
        assert torch.equal(normalised(0 * weights, how, labels), 0 * weights)
    slope = torch.autograd.grad((normalised(weights, "label", labels) * torch.arange(5).double() ** 2).sum(), weights)[
        0
    ]
    gains = pd.Series((slope * weights).detach().numpy())
    np.testing.assert_allclose(gains.groupby(labels.numpy()).sum(), 0, atol=1e-12)
    assert gains.abs().max() > 0.1
    assert set(NORMALISATIONS) == {"mean", "sum", "label"}


@pytest.mark.parametrize("made", [table("softmax", 0.1), table("sigmoid"), WeightNet(4, 2, 0.3), WeightNet(5)])
def test_what_is_saved_comes_back(made: WeightTable | WeightNet, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path)
    back = load_weigher(tmp_path)
    assert type(back) is type(made)
    assert back.floor == made.floor
    assert all(torch.equal(one, back.state_dict()[name]) for name, one in made.state_dict().items())
    if isinstance(made, WeightTable):
        assert torch.equal(back.weights(), made.weights())  # type: ignore[operator]
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json does not describe a metaxl_weight_net"):
        load_weigher(tmp_path)


def test_what_is_watched_is_what_numpy_makes_of_it() -> None:
    """In three micro-batches, of which the second has nothing of the second domain."""
    generator = np.random.default_rng(0)
    weights, losses = generator.random(30), generator.exponential(size=30)
    domains = np.concatenate([generator.integers(2, size=10), np.zeros(10, int), generator.integers(2, size=10)])
    watch = Watch(["news", "tales"])
    for part in np.split(np.arange(30), 3):
        watch.note(*(torch.tensor(one[part]) for one in (weights, losses, domains)))
    found = watch.take()
    assert found["weights/mean"] == pytest.approx(weights.mean())
    assert found["weights/std"] == pytest.approx(weights.std())
    assert found["weights/effective"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / 30)
    assert found["weights/loss_correlation"] == pytest.approx(pearsonr(weights, losses).statistic)
    assert found["domain_loss/news"] == pytest.approx(losses[domains == 0].mean())
    assert found["domain_loss/tales"] == pytest.approx(losses[domains == 1].mean())
    assert found["domain_weight/tales"] == pytest.approx(weights[domains == 1].mean())
    assert found["domain_share/tales"] == pytest.approx(weights[domains == 1].sum() / weights.sum())
    watch.note(torch.ones(3), torch.ones(3), torch.zeros(3, dtype=torch.long))
    assert "domain_loss/tales" not in watch.take()  # absent, not zero
    watch.note(torch.zeros(3), torch.ones(3), torch.zeros(3, dtype=torch.long))
    assert not any(name.startswith("domain_share") for name in watch.take())  # of no weight at all
    assert watch.take() == {}


@pytest.mark.parametrize(
    ("weights", "losses", "kinds"),
    [
        ([0.3, 0.6, 0.9], [2.0, 1.0, 0.5], []),
        ([0.3, 0.6, 0.9], [0.5, 1.0, 2.0], ["uphill"]),
        ([1e-4, 1e-3, 2e-3], [2.0, 1.0, 0.5], ["collapsed"]),
        ([1.0] + 40 * [0.011], [0.1] + 40 * [1.0], ["few"]),
        ([0.995, 0.999, 0.998], [0.5, 1.0, 2.0], ["saturated"]),
        (4 * [1.0], [0.5, 1.0, 2.0, 3.0], ["saturated"]),
        ([2.2, 0.5, 0.3], [0.2, 1.0, 2.0], []),  # of a mixture
    ],
)
def test_advice(weights: list[float], losses: list[float], kinds: list[str]) -> None:
    watch = Watch()
    watch.note(torch.tensor(weights), torch.tensor(losses))
    assert [kind for kind, _ in advice(watch.take())] == kinds


def test_relative_weights_are_not_at_one() -> None:
    """They are 1 on average by construction, and all begin alike."""
    watch = Watch(floor=0.3, relative=True)
    watch.note(torch.ones(4), torch.tensor([0.5, 1.0, 2.0, 3.0]))
    facts = watch.take()
    assert "weights/at_one" not in facts
    assert list(advice(facts)) == []
    watch.note(torch.tensor([0.2, 0.2, 1.8, 1.8]), torch.tensor([0.5, 1.0, 2.0, 3.0]))
    assert watch.take()["weights/at_floor"] == 0


def test_nearly_equal_weights_that_grow_with_the_loss_are_trouble_of_the_loss_alone() -> None:
    watch = Watch()
    watch.note(torch.tensor([0.971, 0.972, 0.975]), torch.tensor([0.5, 1.0, 2.0]))
    facts = watch.take()
    assert [kind for kind, _ in advice(facts, of_loss=True)] == ["drift"]
    assert list(advice(facts)) == []
