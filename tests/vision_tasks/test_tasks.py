"""The image tasks: their settings and data, what is learned of noisy labels, and resuming bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.plan import plan_runs
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.test_resume import assert_same_run, resumed
from tests.training.tiny import base_weights, different, meta_weights
from tests.vision_tasks.small import TRAINING, arguments, pack, random_images
from vision_tasks.classification import pixel_statistics
from vision_tasks.images import ImageRows, ImageSet
from vision_tasks.noisy_labels_task import NoisyLabelsArguments, NoisyLabelsData, NoisyLabelsTask, weights_of
from vision_tasks.rotation_task import RotationArguments, RotationData, RotationTask


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (RotationArguments, {"method": "rotate"}, "unknown method 'rotate': .*Valid: rotation, baseline"),
        (RotationArguments, {"backbone": "vgg"}, "unknown backbone 'vgg': Valid: lenet, convnet, resnet32"),
        (NoisyLabelsArguments, {"weight_net_hidden": True}, "weight_net_hidden must be a whole number"),
        (NoisyLabelsArguments, {"method": "frozen_weight_net"}, "weight_net_name_or_path goes with method: frozen_w"),
        (NoisyLabelsArguments, {"image_size": 2**31}, r"image_size must be a whole number of .* below 2\*\*31"),
    ],
)
def test_settings_that_cannot_be(task: type, settings: dict[str, Any], message: str) -> None:
    """Others are refused in the tests of the scripts."""
    with pytest.raises(ValueError, match=message):
        task(**settings)


# Data


def turned(file: Path, **settings: Any) -> RotationData:
    settings = {"data": str(file), "meta_size": 10, **settings}
    return RotationTask().load(RotationArguments(**settings), arguments(file.parent))


def noisy(file: Path, *, seed: int = 3, **settings: Any) -> NoisyLabelsData:
    settings = {"data": str(file), "image_size": 4, **settings}
    return NoisyLabelsTask().load(NoisyLabelsArguments(**settings), arguments(file.parent, seed=seed))


def test_the_judges_are_the_last_images_askew(tmp_path: Path) -> None:
    """As the paper's, with images between that nobody sees."""
    file = pack(tmp_path / "a.npz")
    data = turned(file, train_size=20, degrees=90)
    images, test = random_images(40, seed=1, classes=10), random_images(20, seed=2, classes=10)
    assert np.array_equal(data.train.images, images.images[:20])
    assert np.array_equal(data.meta.images, np.rot90(images.images[30:], 1, (1, 2)))
    assert data.meta.labels.tolist() == images.labels[30:].tolist()
    assert np.array_equal(data.upright.images, test.images)
    assert np.array_equal(data.test.images, np.rot90(test.images, 1, (1, 2)))
    whole = turned(file, degrees=90)
    assert np.array_equal(whole.train.images, images.images[:30])
    for size in (40, 50):
        with pytest.raises(ValueError, match=rf"train has 40 images: meta_size {size} leaves none to train on: lower"):
            turned(file, meta_size=size)
    with pytest.raises(ValueError, match="class '5' has 0 images"):
        turned(file, train_size=5)


def test_a_number_that_a_long_tail_does_not_reach_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of 3 images a class are kept 3, 2, 2, 2 and six times 1: 3 * 3 ** (-c / 9), rounded down."""
    noisy(pack(tmp_path / "a.npz"), meta_size=10, imbalance_factor=3, train_size=30)
    assert "train_size is 30, there are only 15 images: taking all" in caplog.text


def test_both_methods_of_a_seed_train_on_the_same_labels(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz")
    found = [
        noisy(file, seed=seed, meta_size=10, method=method)
        for method, seed in (("baseline", 3), ("meta_weight_net", 3), ("baseline", 4))
    ]
    assert np.array_equal(found[0].noisy.train.labels, found[1].noisy.train.labels)
    assert np.array_equal(found[0].noisy.meta.images, found[1].noisy.meta.images)
    assert not np.array_equal(found[0].noisy.meta.images, found[2].noisy.meta.images)
    assert found[0].test.side == found[0].noisy.train.side == found[0].noisy.meta.side == 4
    assert np.array_equal(found[0].test.labels, random_images(20, seed=2, classes=10).labels)  # clean


def test_clean_data_of_the_users_own(tmp_path: Path) -> None:
    train = pack(tmp_path / "a.npz")
    own = pack(tmp_path / "b.npz", x_train=random_images(40, seed=5, classes=10).images)
    found = noisy(train, meta_data=str(own))
    assert len(found.noisy.meta) == len(found.noisy.train) == 40
    assert found.noisy.known
    assert not noisy(train, meta_data=str(own), noise_rate=0).noisy.known
    with pytest.raises(ValueError, match="the meta set overlaps the training set: 40 train images are in"):
        noisy(train, meta_data=str(train))


def test_pixel_statistics() -> None:
    images = random_images(5, channels=3)
    mean, std = pixel_statistics(images, None, None)
    floats = images.images.reshape(-1, 3) / 255
    assert mean == pytest.approx(floats.mean(0).tolist(), rel=1e-12)
    assert std == pytest.approx(floats.std(0).tolist(), rel=1e-12)
    assert pixel_statistics(images, [0.1, 0.2, 0.3], None) == ([0.1, 0.2, 0.3], std)
    blank = ImageSet(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64), ("a",), "blanks")
    for given, message in (
        ((images, [0.5], None), "image_mean has 1 numbers, the images 3 channels: one each"),
        ((images, None, [1.0, 1.0, 0.0]), "image_std must be above 0, not"),
        ((images, None, [1.0, float("nan"), 1.0]), "image_std must be finite numbers"),
        ((images, [0.0, float("inf"), 0.0], None), "image_mean must be finite numbers"),
        ((blank, None, None), r"image_std must be above 0, not \[0.0\]: are all pixels of blanks alike"),
    ):
        with pytest.raises(ValueError, match=message):
            pixel_statistics(*given)


# Trainings

NOISY: dict[str, Any] = {"backbone": "resnet32", "augmentation": "pad_crop_flip", "meta_size": 10, "noise_rate": 0.3}


def trainer_of(folder: Path, file: Path, **fields: Any) -> MetaTrainer:
    """The real task on 30 noisy images, four batches an epoch, and 10 judges, two draws a pass."""
    task, settings = NoisyLabelsTask(), NoisyLabelsArguments(data=str(file), **NOISY)
    torch.manual_seed(0)
    args = arguments(folder, **TRAINING | fields)
    return task.build_trainer(settings, args, task.load(settings, arguments(folder)))


@pytest.mark.parametrize(
    ("at", "workers", "estimator", "accumulation"),
    [(3, 1, "one_step", 1), (2, 0, "evograd", 2)],
)
def test_augmented_noisy_labels_resume_bit_by_bit(
    tmp_path: Path, at: int, workers: int, estimator: str, accumulation: int
) -> None:
    """Cut off within an epoch and at its end; batch norm, momentum and the judges' passes go on as they were."""
    fields: dict[str, Any] = {
        "max_steps": at + 2,
        "save_strategy": "steps",
        "save_steps": at,
        "dataloader_num_workers": workers,
        "estimator": estimator,
        "estimator_kwargs": {"copies": 2} if estimator == "evograd" else None,
        "gradient_accumulation_steps": accumulation,
    }
    file = pack(tmp_path / "a.npz")
    whole = resumed(trainer_of(tmp_path / "whole", file, **fields), None)
    again = resumed(trainer_of(tmp_path / "again", file, **fields), tmp_path / f"whole/checkpoint-{at}")
    assert_same_run(again, whole)
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    start = trainer_of(tmp_path, file)
    assert different(base_weights(whole), base_weights(start))
    assert different(meta_weights(whole), meta_weights(start))
    assert whole.train_dataset.epoch == (at + 1) * accumulation // 4 > 0  # the last images are not the first
    assert isinstance(whole.train_dataset, ImageRows)


def test_train_and_meta_images_are_augmented_apart(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz")
    trainer, other = trainer_of(tmp_path, file), trainer_of(tmp_path, file, seed=4)
    seeds = [rows.seed for one in (trainer, other) for rows in (one.train_dataset, one.meta_dataset)]
    assert len(set(seeds)) == 4
    assert trainer.eval_dataset.transform is None
    assert trainer.meta_dataset.transform is trainer.train_dataset.transform is not None


def test_images_too_small_for_the_augmentation_are_refused_before_the_first_step(tmp_path: Path) -> None:
    task, settings = NoisyLabelsTask(), NoisyLabelsArguments(data=str(pack(tmp_path / "a.npz")), image_size=4, **NOISY)
    args = arguments(tmp_path, **TRAINING)
    with pytest.raises(ValueError, match=r"an image of \(4, 4\) pixels cannot be padded by 4 reflected ones"):
        task.build_trainer(settings, args, task.load(settings, args))


def test_how_right_and_wrong_labels_are_weighted(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz")
    task, settings = NoisyLabelsTask(), NoisyLabelsArguments(data=str(file), **NOISY)
    args = arguments(tmp_path, **TRAINING)
    data = task.load(settings, args)
    module = task.build_trainer(settings, args, data).model.train()
    noisy = data.noisy
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = weights_of(module, noisy, batch_size=7)
    assert module.training
    assert module.base.blocks[0].training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.eval()
    images = torch.from_numpy(noisy.train.images).permute(0, 3, 1, 2).float() / 255
    weights = module.meta(module.costs(images, torch.from_numpy(noisy.train.labels))).detach().numpy()
    wrong = noisy.train.labels != noisy.true_labels
    assert 0 < wrong.sum() < len(wrong)
    assert found["mean"]["right"] == pytest.approx(weights[~wrong].mean(), rel=1e-5)
    assert found["mean"]["wrong"] == pytest.approx(weights[wrong].mean(), rel=1e-5)
    assert found["ratio"] == pytest.approx(weights[~wrong].mean() / weights[wrong].mean(), rel=1e-5)
    assert [sum(found["histogram"][name]) for name in ("right", "wrong")] == [(~wrong).sum(), wrong.sum()]
    assert found["curve"]["loss"][-1] == 8
    assert len(found["curve"]["weight"]) == len(found["curve"]["loss"])
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "load_best_model_at_end would choose on the test images: leave it out",
        ),
        ({"meta_portion": 0.5}, "cannot join meta rows to train rows: set meta_portion to 1"),
    ],
)
def test_what_these_tasks_cannot_use(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_runs(RotationTask(), RunsArguments(), RotationArguments(), arguments(tmp_path, **TRAINING | fields))


def test_a_frozen_network_weighs_noisy_and_clean_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = WeightNet(7)
    net.save_pretrained(tmp_path / "net")
    settings = NoisyLabelsArguments(
        data=str(pack(tmp_path / "a.npz")),
        image_size=4,
        meta_size=10,
        backbone="convnet",
        method="frozen_weight_net",
        weight_net_name_or_path=str(tmp_path / "net"),
    )
    task, args = NoisyLabelsTask(), arguments(tmp_path, estimator="none", estimator_kwargs=None)
    data = task.load(settings, args)
    trainer = task.build_trainer(settings, args, data)
    labels = [row["labels"] for row in trainer.train_dataset]
    assert labels == [*data.noisy.train.labels.tolist(), *data.noisy.meta.labels.tolist()]
    trainer.train()
    assert not different(meta_weights(trainer), dict(net.named_parameters()))
    batch = trainer.data_collator([trainer.train_dataset[place] for place in (0, 1, -1)])
    module: Any = trainer.model.eval()
    costs = module.costs(batch["images"], batch["labels"])
    torch.testing.assert_close(module.inner_loss(batch), net(costs) * costs)
