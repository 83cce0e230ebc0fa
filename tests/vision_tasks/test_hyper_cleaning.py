"""One weight a training image: the hypergradient by hand, the draws, what is refused, and that flips are found."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaxl_evo.bilevel import SGD, hypergradient
from metaxl_evo.estimators import FirstOrder, OneStep
from scripts.train_hyper_cleaning import main
from tests.scripts.runs import unnamed
from tests.vision_tasks.small import batch_of, off, pack, random_images, small_convnet
from vision_tasks.backbones import BACKBONES
from vision_tasks.hyper_cleaning import (
    CleanedClassifier,
    ImageWeights,
    NumberedRows,
    flip,
    found_flips,
    make_cleaning,
)
from vision_tasks.hyper_cleaning_task import HyperCleaningArguments

IMAGES = 9
ROWS = torch.tensor([7, 0, 3, 4, 8])  # of a mini batch


def module_of(logit: float = 0.0, **settings: Any) -> CleanedClassifier:
    return CleanedClassifier(small_convnet(), ImageWeights(IMAGES, logit), **settings).double()


def train_batch() -> dict[str, Tensor]:
    return {**batch_of(5, 1), "rows": ROWS}


# The losses and their derivative


def test_a_weight_of_one_is_the_plain_loss_bit_by_bit() -> None:
    """sigmoid(100) is 1."""
    plain, weighted = module_of(weighted=False), module_of(100.0)
    assert torch.equal(weighted.mean_inner_loss(train_batch()), plain.mean_inner_loss(train_batch()))
    assert torch.equal(plain.mean_inner_loss(train_batch()), plain.mean_outer_loss(batch_of(5, 1)))
    half = module_of().mean_inner_loss(train_batch())
    torch.testing.assert_close(half, plain.mean_inner_loss(train_batch()) / 2, rtol=1e-14, atol=0.0)


def test_the_hypergradient_of_each_weight_in_closed_form() -> None:
    """d L_V(w - lr mean_i s_i g_i) / d lam_i = -lr / B s_i (1 - s_i) <g_i, grad L_V>; rows not in the batch have 0."""
    module, judge, rate = module_of(0.7), batch_of(6, 2), 0.3
    weights = list(module.base_parameters().values())

    def slope(loss: Tensor) -> Tensor:
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, weights)])

    def costs(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(module.base((images - 0.375) / 0.25).logits, labels, reduction="none")

    s, batch, expected = torch.sigmoid(torch.tensor(0.7).double()), train_batch(), torch.zeros(IMAGES).double()
    slopes = [slope(costs(batch["images"], batch["labels"])[place]) for place in range(len(ROWS))]
    step, at = sum(s * one for one in slopes) / len(ROWS), 0
    with torch.no_grad():
        for one in weights:
            one -= rate * step[at : at + one.numel()].view_as(one)
            at += one.numel()
    ahead = slope(costs(judge["images"], judge["labels"]).mean())
    for row, one in zip(ROWS, slopes, strict=True):
        expected[row] = -rate / len(ROWS) * s * (1 - s) * one @ ahead
    for settings, tolerance in (({"engine": "double_backward"}, 1e-12), ({"engine": "jvp"}, 1e-12)):
        fresh = module_of(0.7)
        problem, w, lam = fresh.problem(SGD(rate)), fresh.base_parameters(), fresh.meta_parameters()
        found = hypergradient(problem, OneStep(**settings), w, lam, [batch], [judge]).grads  # type: ignore[arg-type]
        assert off(found, {"logits": expected}) < tolerance
        with pytest.raises(ValueError, match="first_order keeps only the direct term"):
            hypergradient(problem, FirstOrder(), w, lam, [batch], [judge])


# The data


def test_labels_flip_to_every_other_class_alike() -> None:
    labels = np.arange(40_000) % 4
    flipped = flip(labels, 0.5, 4, np.random.default_rng(0))
    shares = np.bincount((flipped - labels) % 4) / len(labels)
    np.testing.assert_allclose(shares, [0.5, 1 / 6, 1 / 6, 1 / 6], atol=0.01)  # four deviations
    assert np.array_equal(flip(labels, 0.0, 4, np.random.default_rng(0)), labels)


def test_no_image_is_in_two_sets() -> None:
    images, judges = random_images(60, seed=1), random_images(40, seed=2)
    images.images[:5] = judges.images[:5]
    made = make_cleaning(images, judges, rate=0.5, train_size=24, seed=3)
    sets = [{one.tobytes() for one in part.images} for part in (made.train, made.validation, made.test)]
    assert [len(one) for one in sets] == [24, 40, 31]
    assert len(set.union(*sets)) == 95
    assert np.array_equal(made.true_labels, images.labels[made.train.ids])
    assert np.array_equal(made.test.labels, images.labels[made.test.ids])


def test_flips_found_are_counted_pair_by_pair() -> None:
    weights, flipped = np.array([0.1, 0.9, 0.5, 0.5, 0.2]), np.array([True, False, True, False, False])
    pairs = [np.sign(b - a) / 2 + 0.5 for a in weights[flipped] for b in weights[~flipped]]
    assert found_flips(weights, flipped) == {"auc": pytest.approx(np.mean(pairs)), "precision": 0.5}
    assert found_flips(weights, flipped & False) == {"auc": None, "precision": None}


def test_ids_are_one_an_image() -> None:
    images = random_images(6)
    row = NumberedRows(images)[4]
    assert (int(row["rows"]), int(row["labels"])) == (4, images.labels[4])
    for ids in ([0, 1, 2, 3, 3, 5], ["a", "b", None, "d", "e", "f"]):
        with pytest.raises(ValueError, match="1 ids are missing or there twice"):
            NumberedRows(replace(images, ids=np.array(ids, dtype=object)))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"train_size": 60}, "train_size 60 leaves none of the 60 images"),
        ({"validation_size": 41}, "validation_size is 41, and .* has 40 images for it: lower validation_size"),
        ({"test_size": 37}, "test_size is 37, and .* has 36 images"),
        ({"rate": 1.0}, "flip_rate must be at least 0 and below 1"),
        (
            {"images": random_images(60, classes=1), "judges": random_images(40, seed=2, classes=1)},
            "there is only one",
        ),
    ],
)
def test_sets_that_cannot_be_made(fields: dict[str, Any], line: str) -> None:
    settings = {"images": random_images(60, seed=1), "judges": random_images(40, seed=2), "rate": 0.5, "seed": 0}
    with pytest.raises(ValueError, match=line):
        make_cleaning(**{"train_size": 24, **settings, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", [{"flip_rate": float("nan")}, {"train_size": 0}, {"initial_logit": 11.0}])
def test_settings_that_cannot_be(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        HyperCleaningArguments(**field)


# Whole runs


def test_a_baseline_that_trains_on_is_no_baseline_of_restarts(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the baseline has no episodes"):
        main(
            [
                "--method",
                "baseline",
                "--episode_length",
                "2",
                "--episode_reset",
                "restart",
                "--output_dir",
                f"{tmp_path}",
            ]
        )


def test_weights_come_back_and_those_of_other_images_do_not(tmp_path: Path) -> None:
    module, fresh = module_of(0.3), module_of()
    module.save_meta(tmp_path)
    fresh.load_meta(tmp_path)
    assert torch.equal(fresh.meta.logits, module.meta.logits)
    with pytest.raises(ValueError, match="has weights of 9 images, here are 8: set train_size to 9"):
        CleanedClassifier(small_convnet(), ImageWeights(8)).load_meta(tmp_path)


def test_the_papers_net() -> None:
    base = BACKBONES["convnet_8"](num_labels=10)
    assert sum(one.numel() for one in base.parameters()) == 80 + 2 * 584 + 3 * 16 + 73 * 10  # with scales and shifts


SHORT: dict[str, Any] = {
    "config": "configs/vision/hyper_cleaning_cpu.yaml",
    "train_size": 100,
    "per_device_train_batch_size": 50,
    "per_device_meta_batch_size": 20,
    "seeds": "[0]",
    **dict.fromkeys(("runs.one_step", "runs.neumann", "runs.baseline"), "null"),
    "max_steps": 8,
    "episode_length": 4,
    "meta_every": 4,
    "save_strategy": "steps",
    "save_steps": 3,  # in the middle of an episode
    "disable_tqdm": "true",
}


def test_the_table_of_a_run_and_that_it_goes_on_bit_by_bit(tmp_path: Path) -> None:
    images = random_images(200, classes=10)
    data = pack(tmp_path / "images.npz", x_train=images.images[..., 0], y_train=images.labels)

    def run(name: str, **fields: Any) -> dict[str, Any]:
        settings = {**SHORT, "data": data, "output_dir": tmp_path / name, **fields}
        return main([token for key, value in settings.items() for token in (f"--{key}", str(value))])

    whole = run("whole")
    (table,) = (tmp_path / "whole").rglob("_weights.csv")
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert len(rows) == 100
    for row in rows:
        assert int(row["true_label"]) == images.labels[int(row["id"])]
        assert (row["label"] != row["true_label"]) == (row["flipped"] == "True")
    assert len({row["weight"] for row in rows}) > 50
    assert unnamed(table.parent, "hyper_cleaning") == {"checkpoint-3", "checkpoint-6", "checkpoint-8"}
    (checkpoint,) = (tmp_path / "whole").rglob("checkpoint-3")
    resumed = run("resumed", resume_from_checkpoint=checkpoint)
    assert resumed["test"] == whole["test"]
    assert resumed["run"]["weights"] == whole["run"]["weights"]
