"""`weight-tags`: weights of sentences and of words, against closed forms and by what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from metaxl_evo.bilevel import SGD, hypergradient
from metaxl_evo.cli import main
from metaxl_evo.estimators import OneStep
from metaxl_evo.models.weighers import WeightTable, load_weigher
from metaxl_evo.training.cli import SettingsError
from metaxl_evo.weighting.selection import SmallLossText
from metaxl_evo.weighting.weighted_text import WeightedText
from tests.weighting.small import base_of, batch_of

RUN = (
    *("--max_steps", "3", "--meta_size", "20", "--train_size", "60", "--eval_size", "30", "--noise_rate", "0.5"),
    *("--per_device_train_batch_size", "8", "--use_cpu", "true", "--report_to", "none", "--logging_steps", "1"),
    *("--save_strategy", "no"),
)
TOKENS = 32  # that have a label in `batch_of`
STEP = 0.3


def numbered(head: str) -> dict[str, Tensor]:
    """Each labelled token has its number in the last batch column, the others that of nobody."""
    batch = batch_of(head)
    labelled = batch["labels"] != -100
    return batch | {"number": torch.where(labelled, labelled.flatten().cumsum(0).view_as(labelled) - 1, -100)}


def table_of(logits: Tensor, head: str = "tagging", **further: Any) -> WeightedText:
    table = WeightTable(len(logits))
    made = WeightedText(base_of(head), table, reads="number", tokens=True, per_token=True, **further).double().eval()
    with torch.no_grad():
        table.logits.copy_(logits)
    return made


def slopes(module: WeightedText, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.base_parameters().values()), retain_graph=True))


def test_words_of_weight_one_train_as_without_weights_bit_by_bit() -> None:
    one, off = table_of(torch.full((TOKENS,), 100.0)), table_of(torch.zeros(TOKENS), weighted=False)
    losses = [module.mean_inner_loss(numbered("tagging")) for module in (one, off)]
    assert torch.equal(*losses)
    assert all(map(torch.equal, slopes(one, losses[0]), slopes(off, losses[1])))


@pytest.mark.parametrize("engine", ["double_backward", "jvp"])
def test_the_hypergradient_of_a_words_weight_in_closed_form(engine: str) -> None:
    """Of one step of SGD: - step sigmoid'(lam_i) / N <slope of l_i, slope of the outer loss behind the step>."""
    logits = torch.linspace(-2, 2, TOKENS).double()
    module, batch, judge = table_of(logits), numbered("tagging"), batch_of("tagging", 5)
    weights = logits.sigmoid()
    losses = module.losses(batch, tokens=True)
    each = [slopes(module, loss) for loss in losses]
    parameters = list(module.base_parameters().values())
    before = [one.detach().clone() for one in parameters]
    with torch.no_grad():
        for place, one in enumerate(parameters):
            one -= STEP * sum(weight * slope[place] for weight, slope in zip(weights, each, strict=True)) / TOKENS
    outer = slopes(module, module.mean_outer_loss(judge))
    with torch.no_grad():
        for one, old in zip(parameters, before, strict=True):
            one.copy_(old)
    along = torch.stack([sum((a * b).sum() for a, b in zip(slope, outer, strict=True)) for slope in each])
    expected = -STEP * weights * (1 - weights) / TOKENS * along
    w, lam = module.base_parameters(), module.meta_parameters()
    (found,) = hypergradient(
        module.problem(SGD(STEP)), OneStep(engine=engine), w, lam, [batch], [judge]
    ).grads.values()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_a_causal_models_token_has_the_number_of_its_prediction() -> None:
    """The number stands where the token is predicted from, and so the state that is read."""
    module, batch = table_of(torch.linspace(-2, 2, 30), "causal"), batch_of("causal")
    batch["number"] = torch.arange(6)[:, None] + torch.arange(7)  # row + place
    _, weights = module.weighed(batch)
    places = (batch["labels"][:, 1:] != -100).nonzero().sum(1)
    torch.testing.assert_close(weights, torch.linspace(-2, 2, 30).double().sigmoid()[places])


def test_a_number_of_rows_is_refused_where_words_are_weighed() -> None:
    with pytest.raises(ValueError, match=r"number must be of each token, \(6, 7\), not \(6,\)"):
        table_of(torch.zeros(TOKENS)).weighed(batch_of("tagging"))


def test_small_losses_of_sentences_are_those_of_all_their_words() -> None:
    """Rows picked by numpy: the mean loss of the tokens of the three of least mean loss."""
    module = SmallLossText(base_of("tagging"), WeightTable(6), reads="number", weighted=False, tokens=True).eval()
    module.left_out = 0.5
    batch = batch_of("tagging")
    losses, rows = module.losses(batch, tokens=True).detach(), module.token_rows(batch)
    means = [losses[rows == row].mean().item() for row in range(6)]
    kept = np.isin(rows.numpy(), np.argsort(means)[:3])
    assert module.mean_inner_loss(batch).item() == pytest.approx(losses.numpy()[kept].mean())


@pytest.mark.parametrize(
    ("weigher", "per_token"), [("each", True), ("loss", False), ("hidden", True), ("loss", True), ("each", False)]
)
def test_a_run_leaves_what_its_weigher_says(weigher: str, per_token: bool, tmp_path: Path) -> None:
    options = ["--weigher", weigher, "--per_token", str(per_token), "--meta_learning_rate", "0.1"]
    assert main(["weight-tags", *RUN, *options, "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    table = pd.read_csv(tmp_path / "run/weights.csv", keep_default_na=False)
    facts, wrong = results["run"]["weights"], table["wrong"].to_numpy()
    assert facts["auc"] == pytest.approx(roc_auc_score(~wrong, table["weight"]))
    assert facts["mean"] == pytest.approx(table["weight"].mean())
    if per_token:
        assert wrong.sum() == results["run"]["wrong_tags"]
        assert (table["tag"][wrong] != "O").any()
    else:
        assert len(table) == 60
    seen = load_weigher(tmp_path / "run/weigher")
    if weigher == "each":
        assert sorted(seen.weights().tolist()) == pytest.approx(table["weight"].tolist())  # type: ignore[operator]
        assert table["weight"].nunique() > 1
    assert [step for step, _ in results["run"]["weights_over_time"]["wrong"]] == [1, 2, 3]
    assert results["run"]["sentences_cut_off"] == {"train": 0, "clean": 0, "test": 0}
    assert {"f1", "precision", "recall"} <= results["test"].keys()


def test_methods_without_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for method, further in (("small_loss", ["--drop_rate", "0.3"]), ("union", ["--max_length", "8"])):
        out = str(tmp_path / method)
        assert main(["weight-tags", *RUN, "--method", method, *further, "--output_dir", out]) == 0
        assert not (tmp_path / method / "weights.csv").exists()
    assert "% of the clean sentences are cut off: max_length is 8" in caplog.text


def test_a_checkpoint_is_chosen_by_a_score(tmp_path: Path) -> None:
    out = str(tmp_path / "none")
    with pytest.raises(SettingsError, match="unknown metric_for_best_model 'accuracy': Valid: f1, precision"):
        main(["weight-tags", *RUN, "--metric_for_best_model", "accuracy", "--output_dir", out])
