"""The frame of the image experiments: which runs a command makes, how they are compared, and resumed bit by bit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import torch

from metaxl_evo.estimators import EvoGrad, OneStep
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.test_resume import assert_same_run, resumed
from tests.training.tiny import base_weights, different, meta_weights, tiny_arguments
from tests.vision_tasks.small import pack, random_images
from vision_tasks.arguments import VisionArguments
from vision_tasks.classification import pixel_statistics
from vision_tasks.experiment import Run, check_experiment, plan, run_experiment, summarise, table
from vision_tasks.images import ImageRows, ImageSet
from vision_tasks.noisy_labels_task import NoisyLabelsArguments, NoisyLabelsTask, weights_of
from vision_tasks.rotation_task import RotationArguments, RotationTask

RUNS = {
    "base": {"method": "baseline"},
    "evo": {"estimator": "evograd", "estimator_kwargs": {"copies": 4}, "learning_rate": 0.25},
    "plain_evo": {"estimator": "evograd"},
    "as-it-is": {},
}
T_OF_THREE = 4.302653  # two-sided, 95 %, two degrees of freedom


def arguments(folder: Path, **fields: Any) -> MetaTrainingArguments:
    settings: dict[str, Any] = {
        "estimator": "one_step",
        "estimator_kwargs": {"engine": "double_backward"},
        "meta_portion": 1.0,
    }
    return tiny_arguments(folder, **settings | fields)


def planned(folder: Path, *, seeds: list[int] | None = None, runs: Any = None, **fields: Any) -> list[Run[Any]]:
    settings = NoisyLabelsArguments(runs=runs or {}, seeds=seeds, noise_rate=0.3)
    return plan(NoisyLabelsTask(), settings, arguments(folder, **fields))


# Which runs


def test_every_run_with_every_seed_in_a_folder_of_its_own(tmp_path: Path) -> None:
    runs = planned(tmp_path, runs=RUNS, seeds=[7, 2])
    assert [(run.seed, run.name) for run in runs] == [(seed, name) for seed in (7, 2) for name in RUNS]
    assert all(run.folder == tmp_path / run.name / str(run.seed) for run in runs)
    assert all(Path(run.args.output_dir) == run.folder for run in runs)
    assert len({run.folder for run in runs}) == 8
    assert [(run.args.seed, run.args.meta_seed) for run in runs] == [(7, 7)] * 4 + [(2, 2)] * 4
    assert [run.args.hub_model_id for run in runs[:2]] == [f"{tmp_path.name}-base-7", f"{tmp_path.name}-evo-7"]
    assert [run.args.hub_model_id for run in planned(tmp_path, runs=RUNS, hub_model_id="me/x")][
        -1
    ] == "me/x-as-it-is-3"
    assert not list(tmp_path.iterdir())


def test_what_a_run_says_wins_over_the_rest(tmp_path: Path) -> None:
    base, evo, plain, as_it_is = planned(tmp_path, runs=RUNS)
    assert base.args.make_estimator() is None
    assert base.args.estimator_kwargs is None
    assert evo.args.make_estimator() == EvoGrad(copies=4)
    assert plain.args.make_estimator() == EvoGrad()  # not of the engine that the config chose for another
    assert as_it_is.args.make_estimator() == OneStep(engine="double_backward")
    assert [run.args.learning_rate for run in (base, evo, plain)] == [1e-3, 0.25, 1e-3]
    assert [run.settings.method for run in (base, evo)] == ["baseline", "meta_weight_net"]
    assert all(run.settings.noise_rate == 0.3 for run in (base, evo, plain, as_it_is))
    own = planned(tmp_path, runs={"a": {"noise_rate": 0.1, "meta_seed": 9, "max_steps": 8}, "b": {}})
    assert [(run.settings.noise_rate, run.args.meta_seed, run.args.max_steps) for run in own] == [
        (0.1, 9, 8),
        (0.3, 3, 3),
    ]


def test_a_single_run_has_the_output_folder(tmp_path: Path) -> None:
    for settings in ({}, {"seeds": [5]}, {"runs": {"evo": RUNS["evo"]}}):
        (run,) = planned(tmp_path, **settings)
        assert run.folder == tmp_path
        assert run.args.hub_model_id is None
        assert run.seed == (5 if "seeds" in settings else 3)
        assert run.name == ("evo" if "runs" in settings else "run")
    two = planned(tmp_path, seeds=[1, 2])
    assert [run.folder for run in two] == [tmp_path / "run/1", tmp_path / "run/2"]


def test_a_meta_seed_of_its_own_stays(tmp_path: Path) -> None:
    runs = planned(tmp_path, seeds=[1, 2], meta_seed=40)
    assert [(run.args.seed, run.args.meta_seed) for run in runs] == [(1, 40), (2, 40)]


def test_the_launch_and_how_batches_are_made_stay(tmp_path: Path) -> None:
    given = {"dispatch_batches": False, "even_batches": False}
    (run,) = planned(tmp_path, accelerator_config=given)
    found = run.args.accelerator_config.to_dict()
    assert found.items() >= given.items()
    assert {"lr_scheduler_type": "constant"}.items() <= asdict(
        planned(tmp_path, lr_scheduler_type="constant")[0].args
    ).items()


def test_what_a_run_was_made_with(tmp_path: Path) -> None:
    found = planned(tmp_path, runs=RUNS, seeds=[7, 2])[1].all_settings()
    expected = {
        "noise_rate": 0.3,
        "estimator": "evograd",
        "estimator_kwargs": {"copies": 4},
        "seed": 7,
        "meta_seed": 7,
    }
    assert found.items() >= (expected | {"learning_rate": 0.25, "backbone": "resnet32"}).items()
    assert not found.keys() & {"runs", "seeds", "check"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"runs": {"a": {"estimatr": 1}}}, "unknown setting of run a 'estimatr': did you mean 'estimator'"),
    ({"runs": {"a": {"seed": 1}}}, "unknown setting of run a 'seed'"),
    ({"runs": {"a": {"output_dir": "x"}}}, "unknown setting of run a 'output_dir'"),
    ({"runs": {"a": {"runs": {}}}}, "unknown setting of run a 'runs'"),
    ({"runs": {"a": 3}}, "runs: a must be a mapping of settings, as in {}, not 3"),
    ({"runs": {"../a": {}}}, "runs: '../a' names a folder: use letters, digits, - and _"),
    ({"runs": {"": {}}}, "runs: '' names a folder"),
    ({"runs": {"a": {"method": "basline"}}}, "unknown method 'basline': did you mean 'baseline'"),
    ({"runs": {"a": {"train_size": "few"}}}, "run a: train_size: expected an integer, found 'few'"),
    ({"runs": {"a": {"meta_size": 0.5}}}, "run a: meta_size: expected an integer, found '0.5'"),
    ({"runs": {"a": {"meta_size": None}}}, "run a: meta_size: null is no value of it"),
    ({"runs": {"a": {"noise_rate": "much"}}}, "run a: noise_rate: expected a number, found 'much'"),
    ({"runs": {"a": {"learning_rate": "fast"}}}, "run a: learning_rate: expected a number, found 'fast'"),
    ({"runs": {"a": {"image_mean": "grey"}}}, "run a: image_mean: expected a number, found 'grey'"),
    ({"runs": {"a": {"seeds": [1]}}}, "unknown setting of run a 'seeds'"),
    ({"runs": {"a": {"estimator": "evogard"}}}, "unknown estimator 'evogard': did you mean 'evograd'"),
    ({"runs": {"a": {"estimator": "sama", "estimator_kwargs": {"copies": 2}}}}, "unknown field of sama 'copies'"),
    ({"seeds": []}, r"seeds must be different whole numbers of at least 0, below 2\*\*32, not \[\]"),
    ({"seeds": [1, 1]}, r"seeds must be different whole numbers of at least 0, below 2\*\*32, not \[1, 1\]"),
    ({"seeds": [0, -1]}, "seeds must be different whole numbers"),
    ({"seeds": [2**32]}, "seeds must be different whole numbers"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_runs_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        plan(NoisyLabelsTask(), NoisyLabelsArguments(**settings), arguments(tmp_path))


def test_a_runs_settings_are_those_of_its_task() -> None:
    assert RotationArguments(runs={"a": {"degrees": 10, "meta_order": "lookahead"}})
    for task, key in ((RotationArguments, "noise"), (NoisyLabelsArguments, "degrees"), (VisionArguments, "method")):
        with pytest.raises(ValueError, match=f"unknown setting of run a '{key}'"):
            task(runs={"a": {key: 1}})


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (RotationArguments, {"method": "rotate"}, "unknown method 'rotate': .*Valid: rotation, baseline"),
        (RotationArguments, {"backbone": "vgg"}, "unknown backbone 'vgg': Valid: lenet, convnet, resnet32"),
        (RotationArguments, {"degrees": 200}, "degrees must be between -180 and 180, not 200"),
        (RotationArguments, {"degrees": float("nan")}, "degrees must be between -180 and 180, not nan"),
        (RotationArguments, {"meta_size": 0}, "meta_size must be a whole number of at least 1"),
        (
            NoisyLabelsArguments,
            {"noise": "flop"},
            "unknown noise 'flop': did you mean 'flip'.* Valid: unif, flip, flip2",
        ),
        (NoisyLabelsArguments, {"noise_rate": 1.0}, "noise_rate must be at least 0 and below 1, not 1.0"),
        (NoisyLabelsArguments, {"noise_rate": float("nan")}, "noise_rate must be at least 0 and below 1, not nan"),
        (NoisyLabelsArguments, {"augmentation": "flip"}, "unknown augmentation 'flip': .*Valid: none, pad_crop_flip"),
        (NoisyLabelsArguments, {"weight_normalisation": "max"}, "unknown weight_normalisation 'max'"),
        (
            NoisyLabelsArguments,
            {"width": 2, "backbone": "lenet"},
            "width multiplies the channels of resnet32; lenet has",
        ),
        (NoisyLabelsArguments, {"weight_net_hidden": True}, "weight_net_hidden must be a whole number"),
        (NoisyLabelsArguments, {"image_size": 2**31}, r"image_size must be a whole number of .* below 2\*\*31"),
    ],
)
def test_settings_that_cannot_be(task: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**settings)


# Comparison


def result(accuracy: float, degrees: float, seconds: float = 10.0) -> dict[str, Any]:
    return {"test": {"accuracy": accuracy, "degrees": degrees}, "run": {"train_seconds": seconds, "steps": 3}}


BASE, EVO = [0.5, 0.7, 0.6], [0.62, 0.81, 0.73]
RESULTS = {
    **{("base", seed): result(value, 0.0) for seed, value in zip((1, 2, 5), BASE, strict=True)},
    **{("evo", seed): result(value, 30 + seed, 20.0 + seed) for seed, value in zip((1, 2, 5), EVO, strict=True)},
}


def test_the_summary_of_several_seeds(tmp_path: Path) -> None:
    settings = RotationArguments(runs={"base": {}, "evo": {}}, seeds=[1, 2, 5])
    found = summarise(RotationTask(), RESULTS, settings, arguments(tmp_path))
    assert list(found) == ["test", "differences", "seeds", "settings", "run"]
    assert found["seeds"] == [1, 2, 5]
    assert found["test"]["evo"]["accuracy"]["values"] == EVO
    assert found["test"]["base"]["accuracy"] == {
        "mean": pytest.approx(0.6),
        "std": pytest.approx(0.1),
        "values": BASE,
    }
    assert found["test"]["evo"]["degrees"]["std"] == pytest.approx(sqrt(13 / 3))  # of 31, 32, 35
    gained = [0.12, 0.11, 0.13]
    half = T_OF_THREE * stdev(gained) / sqrt(3)
    assert found["differences"] == {
        "evo": {
            "mean": pytest.approx(0.12),
            "low": pytest.approx(0.12 - half, rel=1e-6),
            "high": pytest.approx(0.12 + half, rel=1e-6),
            "reading": "better",
        }
    }
    assert found["run"]["evo"]["5"]["train_seconds"] == 25
    assert found["settings"]["runs"] == {"base": {}, "evo": {}}
    assert found["settings"]["estimator"] == "one_step"


def test_the_summary_of_one_seed_is_plain_json(tmp_path: Path) -> None:
    """An interval of a single difference has no bounds, and JSON has no infinity."""
    results = {key: held for key, held in RESULTS.items() if key[1] == 2}
    found = summarise(RotationTask(), results, RotationArguments(runs={"base": {}, "evo": {}}), arguments(tmp_path))
    assert found["differences"]["evo"] == {
        "mean": pytest.approx(0.11),
        "low": None,
        "high": None,
        "reading": "one value",
    }
    assert found["test"]["evo"]["accuracy"]["std"] == 0
    json.dumps(found, allow_nan=False, default=str)


def test_the_table(tmp_path: Path) -> None:
    task, settings = RotationTask(), RotationArguments(runs={"base": {}, "evo": {}}, seeds=[1, 2, 5])
    assert table(task.shown[::2], summarise(task, RESULTS, settings, arguments(tmp_path))).splitlines() == [
        "| run | accuracy | degrees | accuracy over base | 95 % interval | reading |",
        "|---|---:|---:|---:|---:|---:|",
        "| base | 0.600 ± 0.100 | 0.000 ± 0.000 |  |  |  |",
        "| evo | 0.720 ± 0.095 | 32.667 ± 2.082 | +0.120 | +0.095 to +0.145 | better |",
    ]
    one = summarise(task, {key: held for key, held in RESULTS.items() if key[1] == 2}, settings, arguments(tmp_path))
    assert table(["accuracy"], one).endswith("| evo | 0.810 ± 0.000 | +0.110 |  | one value |")
    assert "| base | 0.700 ± 0.000 | -0.110 |  | one value |" in table(["accuracy"], one, "evo")


# Data


def test_the_judges_are_the_last_images_askew(tmp_path: Path) -> None:
    """As the paper's, with images between that nobody sees."""
    file = pack(tmp_path / "a.npz")
    data = RotationTask().load(RotationArguments(data=str(file), meta_size=10, train_size=20, degrees=90), 0)
    images, test = random_images(40, seed=1, classes=10), random_images(20, seed=2, classes=10)
    assert np.array_equal(data.train.images, images.images[:20])
    assert np.array_equal(data.meta.images, np.rot90(images.images[30:], 1, (1, 2)))
    assert data.meta.labels.tolist() == images.labels[30:].tolist()
    assert np.array_equal(data.upright.images, test.images)
    assert np.array_equal(data.test.images, np.rot90(test.images, 1, (1, 2)))
    whole = RotationTask().load(RotationArguments(data=str(file), meta_size=10, degrees=90), 0)
    assert np.array_equal(whole.train.images, images.images[:30])
    for size in (40, 50):
        with pytest.raises(ValueError, match=rf"train has 40 images: meta_size {size} leaves none to train on: lower"):
            RotationTask().load(RotationArguments(data=str(file), meta_size=size), 0)
    with pytest.raises(ValueError, match="class '5' has 0 images"):
        RotationTask().load(RotationArguments(data=str(file), meta_size=10, train_size=5), 0)


def test_both_methods_of_a_seed_train_on_the_same_labels(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz")
    found = [
        NoisyLabelsTask().load(NoisyLabelsArguments(data=str(file), meta_size=10, method=method, image_size=4), seed)
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
    settings = {"data": str(train), "image_size": 4}
    found = NoisyLabelsTask().load(NoisyLabelsArguments(meta_data=str(own), **settings), 0)
    assert len(found.noisy.meta) == len(found.noisy.train) == 40
    with pytest.raises(ValueError, match="the meta set overlaps the training set: 40 train images are in"):
        NoisyLabelsTask().load(NoisyLabelsArguments(meta_data=str(train), **settings), 0)


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

TINY: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "per_device_meta_batch_size": 8,
    "per_device_eval_batch_size": 20,
    "optimizer_class": "SGD",
    "optimizer_kwargs": {"momentum": 0.9},
    "learning_rate": 0.05,
    "meta_order": "lookahead",
}
NOISY: dict[str, Any] = {"backbone": "resnet32", "augmentation": "pad_crop_flip", "meta_size": 10, "noise_rate": 0.3}


def trainer_of(folder: Path, file: Path, **fields: Any) -> MetaTrainer:
    """The real task on 30 noisy images, four batches an epoch, and 10 judges, two draws a pass."""
    task, settings = NoisyLabelsTask(), NoisyLabelsArguments(data=str(file), **NOISY)
    torch.manual_seed(0)
    return task.build_trainer(settings, arguments(folder, **TINY | fields), task.load(settings, 3))


@pytest.mark.parametrize(
    ("at", "workers", "estimator", "accumulation"),
    [(3, 1, "one_step", 1), (2, 0, "evograd", 2)],
)
def test_augmented_noisy_labels_resume_bit_by_bit(
    tmp_path: Path, at: int, workers: int, estimator: str, accumulation: int
) -> None:
    """Cut off within an epoch and at its end; batch norm, momentum and the judges' passes go on as they were."""
    fields: dict[str, Any] = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": at,
        "dataloader_num_workers": workers,
        "estimator": estimator,
        "estimator_kwargs": None,
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
    assert whole.train_dataset.epoch == (5 * accumulation) // 4  # the images of the last step are not the first's
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
    with pytest.raises(ValueError, match=r"an image of \(4, 4\) pixels cannot be padded by 4 reflected ones"):
        task.build_trainer(settings, arguments(tmp_path, **TINY), task.load(settings, 3))


def test_how_right_and_wrong_labels_are_weighted(tmp_path: Path) -> None:
    file = pack(tmp_path / "a.npz")
    task, settings = NoisyLabelsTask(), NoisyLabelsArguments(data=str(file), **NOISY)
    data = task.load(settings, 3)
    module = task.build_trainer(settings, arguments(tmp_path, **TINY), data).model.train()
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


def test_every_run_is_tried_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that comes last, and a finished one that was made with other settings."""
    file = pack(tmp_path / "a.npz")

    def experiment(runs: dict[str, Any], **fields: Any) -> Any:
        settings = RotationArguments(data=str(file), backbone="convnet", meta_size=10, runs=runs)
        return run_experiment(
            RotationTask(), settings, arguments(tmp_path / "out", **TINY | {"max_steps": 1} | fields)
        )

    done = experiment({"a": {}, "b": {"method": "baseline"}})
    assert list(done["test"]) == ["a", "b"]

    def no_step(*given: Any, **named: Any) -> Any:
        raise AssertionError("a training step was made")

    monkeypatch.setattr(MetaTrainer, "training_step", no_step)
    for runs, fields, message in (
        ({"a": {}, "c": {"estimator": "first_order"}}, {"output_dir": str(tmp_path / "new")}, "first_order keeps"),
        ({"c": {}, "b": {"method": "baseline", "weight_decay": 0.1}}, {"resume_from_checkpoint": "latest"},
         r"b/3/results.json was made with another weight_decay: give the settings of that run"),
        ({"a": {}, "b": {}}, {}, r"holds another run \(results.json\): choose another output_dir"),
        ({"a": {}, "b": {}}, {"resume_from_checkpoint": "checkpoint-3"}, "one checkpoint cannot continue several"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            experiment(runs, **fields)
    again = experiment({"a": {}, "b": {"method": "baseline"}}, resume_from_checkpoint="latest")
    assert again["test"] == done["test"]
    assert list(again["run"]) == ["a", "b"]


def test_a_check_takes_the_first_run_that_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pack(tmp_path / "a.npz")
    settings = RotationArguments(
        data=str(file), backbone="convnet", meta_size=10, runs={"a": {"method": "baseline"}, "b": {}, "c": {}}
    )
    found = check_experiment(RotationTask(), settings, arguments(tmp_path / "out", **TINY))
    assert (found["run"], found["problems"], found["meta_parameters"]) == ("b", [], 1)
    assert found["meta_cosine_to_exact"] == pytest.approx(1)
    assert capsys.readouterr().out.splitlines()[-1].startswith("OK")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out/c/3").mkdir(parents=True)
    (tmp_path / "out/c/3/config.json").write_text("{}")
    found = check_experiment(RotationTask(), settings, arguments(tmp_path / "out", **TINY))
    assert [line.endswith("set resume_from_checkpoint: latest") for line in found["problems"]] == [True]


def test_a_run_s_settings_are_read_as_those_of_a_file(tmp_path: Path) -> None:
    changes = {"train_size": "100", "image_mean": [0.5], "learning_rate": "1e-3", "lr_milestones": None, "bf16": "no"}
    (run,) = planned(tmp_path, runs={"a": changes}, lr_scheduler_type="constant", lr_milestones=[0.5])
    assert (run.settings.train_size, run.settings.image_mean) == (100, [0.5])
    assert (run.args.learning_rate, run.args.lr_milestones, run.args.bf16) == (1e-3, None, False)


def test_every_repetition_loads_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    class Spied(RotationTask):
        def load(self, settings: RotationArguments, seed: int) -> Any:
            seeds.append(seed)
            return super().load(settings, seed)

    settings = RotationArguments(data=str(pack(tmp_path / "a.npz")), backbone="convnet", meta_size=10, seeds=[4, 1])
    run_experiment(Spied(), settings, arguments(tmp_path / "out", **TINY))
    assert seeds == [4, 1, 4, 1]  # looked at before the first step, and trained on


def test_the_test_images_choose_nothing(tmp_path: Path) -> None:
    settings = RotationArguments(data=str(pack(tmp_path / "a.npz")), backbone="convnet", meta_size=10)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ValueError, match="load_best_model_at_end would choose on the test images: leave it out"):
        plan(RotationTask(), settings, arguments(tmp_path / "out", **TINY | best))


def test_several_runs_are_not_resumed_over_a_single_one(tmp_path: Path) -> None:
    settings = RotationArguments(data=str(pack(tmp_path / "a.npz")), backbone="convnet", meta_size=10)
    run_experiment(RotationTask(), settings, arguments(tmp_path / "out", **TINY))
    before = (tmp_path / "out/results.json").read_bytes()
    several = replace(settings, runs={"a": {}, "b": {}})
    args = arguments(tmp_path / "out", **TINY | {"resume_from_checkpoint": "latest"})
    with pytest.raises(ValueError, match=r"holds a single run: choose another output_dir for several$"):
        run_experiment(RotationTask(), several, args)
    assert (tmp_path / "out/results.json").read_bytes() == before
