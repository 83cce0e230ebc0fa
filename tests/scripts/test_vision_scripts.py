"""`train_rotation` and `train_noisy_labels` end to end: folders, results, models, resuming, checking, bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification, pipeline
from transformers.utils import IMAGE_PROCESSOR_NAME

from metaxl_evo.estimators import ESTIMATORS
from metaxl_evo.experiments.run_folder import MARK
from metaxl_evo.models.weight_net import WeightNet
from scripts.train_noisy_labels import main as train_noisy_labels
from scripts.train_rotation import main as train_rotation
from tests.hub_cache import REPOSITORY, prepare_image_cache
from tests.scripts.refusals import assert_refused, config_of, contents, offline, truncate, yaml_of
from tests.scripts.runs import OF_A_RUN, OF_SEVERAL, argv, cut_off_after, keep_checkpoints, read, same, unnamed
from tests.vision_tasks.models import write_classifier
from tests.vision_tasks.small import pack, random_images
from vision_tasks.classification import PREDICTIONS
from vision_tasks.noisy_labels_figures import plot_weights
from vision_tasks.training_images import SHEET, TABLE

SCRIPTS: dict[str, Callable[..., Any]] = {"rotation": train_rotation, "noisy_labels": train_noisy_labels}
OWN = {
    "rotation": {"degrees": 90, "method": "rotation"},
    "noisy_labels": {"noise_rate": 0.3, "method": "meta_weight_net"},
}
META = {
    "rotation": ["rotation/config.json", "rotation/model.safetensors"],
    "noisy_labels": ["weight_net/config.json", "weight_net/model.safetensors"],
}
BASELINE = {"method": "baseline"}
RUNS = {"base": BASELINE, "evo": {"estimator": "evograd", "estimator_kwargs": {"copies": 2}}}
TINY: dict[str, Any] = {
    "backbone": "convnet",
    "meta_size": 10,
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "per_device_meta_batch_size": 8,
    "per_device_eval_batch_size": 20,
    "learning_rate": 1e-2,
    "meta_portion": 1,
    "logging_steps": 2,
    "save_strategy": "no",
    "meta_history": "false",
    "report_to": "none",
    "use_cpu": "true",
    "disable_tqdm": "true",
}
each_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 train and 20 test images of 8 x 8 pixels."""
    return pack(tmp_path_factory.mktemp("images") / "random.npz")


def settings_of(script: str, images: Path, output: Path, settings: Mapping[str, Any]) -> list[str]:
    given = {"data": images, "output_dir": output} | TINY | OWN[script] | settings
    return argv({key: json.dumps(value) if isinstance(value, dict) else value for key, value in given.items()})


def train(script: str, images: Path, output: Path, **settings: Any) -> dict[str, Any]:
    return SCRIPTS[script](settings_of(script, images, output, settings))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Of each script the folder of two runs with two seeds, and what it returned; tests only read them."""
    found = {}
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp(script) / "out"
        found[script] = folder, train(script, images, folder, runs=RUNS, seeds="1,2")
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    """The saved weights of both levels."""
    held = load_file(folder / "model.safetensors")
    (net,) = (place for name in ("rotation", "weight_net") if (place := folder / name).is_dir())
    return held | {f"net.{name}": value for name, value in load_file(net / "model.safetensors").items()}


def seen_in_tests(file: Path) -> Path:
    """A file whose training images are the test images of `pack`."""
    images = random_images(20, seed=2, classes=10)
    return pack(file, x_train=images.images[..., 0], y_train=images.labels)


def with_validation(file: Path) -> Path:
    """A file of `pack` with a validation part."""
    images = random_images(20, seed=3, classes=10)
    return pack(file, x_val=images.images[..., 0], y_val=images.labels)


# What a comparison leaves


@each_script
def test_every_run_has_a_folder_of_its_own(compared: Any, script: str) -> None:
    folder, results = compared[script]
    assert read(folder) == results
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    one = [*OF_A_RUN, IMAGE_PROCESSOR_NAME, *META[script]]
    above, drawn = {*OF_SEVERAL}, set()
    if script == "noisy_labels":
        above, drawn = above | {"noise.png", "weights.png"}, {f"evo/{seed}/weights.png" for seed in (1, 2)}
        one += [TABLE, SHEET]
    assert files == above | drawn | {f"{run}/{seed}/{name}" for run in RUNS for seed in (1, 2) for name in one}
    assert not unnamed(folder / "evo/1", script)
    assert len({tuple(weights(folder / run / str(seed))["classifier.0.weight"].flatten().tolist())
                for run in RUNS for seed in (1, 2)}) == 4  # fmt: skip


@each_script
def test_the_results_of_a_comparison(compared: Any, images: Path, script: str) -> None:
    folder, results = compared[script]
    scores = {"rotation": {"accuracy", "accuracy_upright", "degrees"}, "noisy_labels": {"accuracy"}}[script]
    assert list(results["test"]) == ["base", "evo"]
    for run in RUNS:
        own = [read(folder / run / str(seed)) for seed in (1, 2)]
        assert results["test"][run].keys() == scores
        for key, held in results["test"][run].items():
            values = [one["test"][key] for one in own]
            assert held["values"] == values
            assert held["mean"] == pytest.approx(np.mean(values))
            assert held["std"] == pytest.approx(np.std(values, ddof=1))
        for seed, one in zip((1, 2), own, strict=True):
            assert list(one) == ["test", "settings", "data", "run"]
            assert results["run"][run][str(seed)] == one["run"]
            assert one["run"]["steps"] == 4
            assert one["run"]["skipped_meta_steps"] == 0
            assert one["run"]["base_parameters"] == 16 * 9 + 16 + 16 * 32 * 9 + 32 + 4 * 32 * 128 + 128 + 1290
            assert one["run"]["meta_parameters"] == {"rotation": 1, "noisy_labels": 301}[script]
            expected = {"seed": seed, "meta_seed": seed, "estimator": "none" if run == "base" else "evograd"}
            assert one["settings"].items() >= expected.items()
    (difference,) = results["differences"]
    assert (difference["run"], difference["baseline"], difference["pairs"]) == ("evo", "base", 2)
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert results["seeds"] == [1, 2]
    assert results["settings"].items() >= {"data": str(images), "max_steps": 4}.items()
    assert "seed" not in results["settings"]


@each_script
def test_classes_have_scores_of_their_own(compared: Any, images: Path, script: str) -> None:
    """Those of `pack` are equally many, so that their mean is the accuracy; the card shows them."""
    folder, _ = compared[script]
    scores = read(folder / "evo/1")["test"]
    assert list(scores["class_accuracy"]) == list("0123456789")
    assert set(scores["class_accuracy"].values()) <= {0, 0.5, 1}
    assert np.mean(list(scores["class_accuracy"].values())) == pytest.approx(scores["accuracy"])
    card = (folder / "evo/1/README.md").read_text(encoding="utf-8")
    assert "| class, the worst of 10 first | accuracy |" in card
    assert f"\n| 9 | {scores['class_accuracy']['9']:.4f} |\n" in card


def test_noise_of_the_users_own_in_image_folders(tmp_path: Path) -> None:
    """Two classes, a clean folder beside them, files named as they are found."""
    for seed, place in enumerate(("noisy/train", "noisy/test", "clean")):
        for number, pixels in enumerate(random_images(16, seed=seed, channels=3).images):
            file = tmp_path / place / ("cat", "dog")[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    fields = {"noise_rate": 0, "meta_data": tmp_path / "clean", "max_steps": 2}
    results = train("noisy_labels", tmp_path / "noisy", tmp_path / "out", **fields)
    assert list(results["test"]["class_accuracy"]) == ["cat", "dog"]
    assert (results["run"]["train_images"], results["run"]["wrong_labels"]) == (16, None)
    assert list(results["run"]["weights"]["mean"]) == ["all"]  # which are right is not known
    plot_weights(results["run"]["weights"], None, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").is_file()
    table = pd.read_csv(tmp_path / "out" / TABLE)
    assert set(table.image) == {f"train/{('cat', 'dog')[n % 2]}/{n}.png" for n in range(16)}
    assert (table.label == table.image.str.split("/").str[1]).all()
    assert table.loss.is_monotonic_decreasing
    assert table.weight.between(0, 1).all()


CHOOSING = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": "true",
    "metric_for_best_model": "loss",
}


def test_a_validation_folder_chooses_the_checkpoint(tmp_path: Path) -> None:
    """Photos of many sizes, a ViT, a long tail: the best of four steps by `val`, the others' scores in the log.

    `val` has the tail of `train` the other way round, so that learning which class is common makes it worse.
    """
    rng = np.random.default_rng(0)
    for split, counts in (("train", (60, 22)), ("val", (2, 10)), ("test", (5, 5))):
        for name, count in zip(("cat", "dog"), counts, strict=True):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (*rng.integers(10, 40, 2), 3), np.uint8) // (1 + (name == "dog"))
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{number}.jpg")
    fields = CHOOSING | {
        "model_name_or_path": write_classifier(tmp_path / "vit", "vit"),
        "noise_rate": 0,
        "meta_size": 4,
    }
    results = train("noisy_labels", tmp_path / "photos", tmp_path / "out", learning_rate=0.03, noise="flip", **fields)
    log = pd.read_csv(tmp_path / "out/history.csv").dropna(subset="eval_loss").set_index("step")
    assert len(log) == 4
    best = int(log.eval_loss.idxmin())
    assert best != 4  # so that it is a choice
    assert results["run"]["best_checkpoint"].endswith(f"checkpoint-{best}")
    assert results["dev"]["accuracy"] == pytest.approx(log.eval_accuracy[best])
    assert (results["run"]["train_images"], results["run"]["validation_images"]) == (78, 12)
    classes = results["test"]["class_accuracy"]
    assert results["test"]["shot_accuracy"] == {"medium": pytest.approx((classes["cat"] + classes["dog"]) / 2)}
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert f"| medium (20 to 100) | {results['test']['shot_accuracy']['medium']:.4f} |" in card
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    chosen = AutoModelForImageClassification.from_pretrained(results["run"]["best_checkpoint"]).state_dict()
    assert same(saved, chosen)


@each_script
def test_a_baseline_that_diverges_ends_with_advice_and_leaves_nothing(
    tmp_path: Path, images: Path, script: str
) -> None:
    given = settings_of(script, images, tmp_path / "out", BASELINE | {"learning_rate": 1e38})
    with pytest.raises(ValueError, match="weights are not finite, the training has diverged: lower"):
        SCRIPTS[script](given)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MARK]  # where the run was begun


def test_only_the_run_that_learns_turns(compared: Any) -> None:
    folder, results = compared["rotation"]
    assert results["test"]["base"]["degrees"]["values"] == [0, 0]
    assert all(value != 0 for value in results["test"]["evo"]["degrees"]["values"])
    assert [len(read(folder / run / "1")["run"]["meta_loss"]) for run in RUNS] == [0, 2]


def test_the_noise_is_that_of_the_seed(compared: Any) -> None:
    results = compared["noisy_labels"][1]["run"]
    for run in RUNS:
        for seed in ("1", "2"):
            found = results[run][seed]
            assert (found["train_images"], found["meta_images"], found["left_out"]) == (30, 10, 0)
            assert found["wrong_labels"] == results["base"][seed]["wrong_labels"]
            assert 0.05 < found["wrong_labels"] < 0.7
            assert ("weights" in found) == ("weights_over_time" in found) == (run == "evo")
    assert 0 < results["evo"]["1"]["weights"]["mean"]["right"] < 1
    assert results["evo"]["1"]["weights_over_time"].keys() == {"right", "wrong"}


@each_script
def test_what_is_left_is_a_plain_classifier(compared: Any, script: str) -> None:
    """It scores what the results say, on test images that are made ready here."""
    folder = compared[script][0] / "evo/2"
    model = AutoModelForImageClassification.from_pretrained(folder)
    test = random_images(20, seed=2, classes=10)
    turned = [np.asarray(Image.fromarray(image[..., 0]).rotate(90)) for image in test.images]
    pixels = np.stack(turned) if script == "rotation" else test.images[..., 0]
    ready = (torch.tensor(pixels)[:, None] / 255 - model.config.image_mean[0]) / model.config.image_std[0]
    with torch.no_grad():
        guesses = model(pixel_values=ready).logits.argmax(-1).numpy()
    assert (guesses == test.labels).mean() == pytest.approx(read(folder)["test"]["accuracy"])
    if script == "noisy_labels":
        held = weights(folder)
        net = WeightNet.from_pretrained(folder).state_dict()
        assert same(net, {name.removeprefix("net."): held[name] for name in held if name.startswith("net.")})
    else:
        train_part = random_images(40, seed=1, classes=10).images[:30] / 255
        assert model.config.image_mean == pytest.approx([train_part.mean()])
        assert model.config.image_std == pytest.approx([train_part.std()])


@pytest.mark.parametrize(
    ("script", "kind", "fields"),
    [
        ("noisy_labels", "resnet", {}),
        pytest.param("rotation", "dinov2", {"degrees": 0}, marks=pytest.mark.slow),
        pytest.param("noisy_labels", None, {"image_size": 4}, marks=pytest.mark.slow),
        ("rotation", None, {"degrees": 0}),
    ],
)
def test_a_pipeline_answers_as_the_test_did(
    tmp_path: Path, images: Path, script: str, kind: str | None, fields: dict[str, Any], monkeypatch: Any
) -> None:
    """A pretrained model and one of ours: on every test image as a PNG file, and by the card's own lines."""
    fields = fields | {"do_predict": "true", "max_steps": 2}
    if kind is not None:
        fields["model_name_or_path"] = write_classifier(tmp_path / "model", kind)
    results = train(script, images, tmp_path / "out", **fields)
    table = pd.read_csv(tmp_path / "out" / PREDICTIONS)
    classify = pipeline("image-classification", model=str(tmp_path / "out"))
    for row, image in zip(table.itertuples(), random_images(20, seed=2, classes=10).images, strict=True):
        Image.fromarray(image[..., 0]).save(tmp_path / "one.png")
        best = classify(str(tmp_path / "one.png"))[0]
        assert best["label"] == str(row.predicted)
        assert best["score"] == pytest.approx(row.confidence, abs=1e-4)
    assert (table.label == table.predicted).mean() == pytest.approx(results["test"]["accuracy"])
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert ("import vision_tasks.backbones" in card, "pipeline_tag" in card) == (kind is None, kind is not None)
    assert ("| `backbone` |" in card) == (kind is None)
    monkeypatch.chdir(tmp_path / "out")
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], {})


@each_script
def test_the_model_card(compared: Any, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compared[script][0]
    card = (folder / "evo/2/README.md").read_text(encoding="utf-8")
    results = read(folder / "evo/2")
    assert card.splitlines()[1] == "library_name: transformers"
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder / "evo/2")
    exec(code, {})
    assert str(folder) not in card
    assert "Data `random.npz`." in card
    assert "\n# out-evo-2\n" in card
    assert f"| accuracy | {results['test']['accuracy']:.4f} |" in card
    assert "| `learning_rate` | `0.01` |" in card
    assert "| `estimator_kwargs` | `{'copies': 2}` |" in card
    assert ESTIMATORS["evograd"]().citation in card
    assert {"rotation": "section 4.2", "noisy_labels": "Shu et al., Meta-Weight-Net"}[script] in card
    baseline = (folder / "base/1/README.md").read_text(encoding="utf-8")
    assert "estimator `none`" in baseline
    assert "datasets:" not in card  # a file on this machine is nothing to link to


@each_script
def test_a_single_run_and_its_words(
    tmp_path: Path, images: Path, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = train(script, images, tmp_path / "mine", max_steps=1)
    assert read(tmp_path / "mine") == results
    assert list(results) == ["test", "settings", "data", "run"]
    assert "\n# mine\n" in (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out.splitlines()
    assert f"| accuracy | {results['test']['accuracy']:.4f} |" in printed
    assert f"models, cards and results.json: {tmp_path / 'mine'}" in printed


@each_script
def test_a_run_is_the_same_whatever_was_run_before(tmp_path: Path, images: Path, compared: Any, script: str) -> None:
    torch.manual_seed(99)
    train(script, images, tmp_path / "alone", runs={"evo": RUNS["evo"]}, seeds=1)
    assert same(weights(tmp_path / "alone"), weights(compared[script][0] / "evo/1"))


def test_the_command_line_wins_over_the_file_and_a_run_over_both(tmp_path: Path, images: Path) -> None:
    lines = TINY | {"data": images, "seed": 3, "estimator_kwargs": "{radius: 0.5}", "runs": "{b: {method: baseline}}"}
    (tmp_path / "run.yaml").write_text(yaml_of(lines), encoding="utf-8")
    given = {"config": tmp_path / "run.yaml", "output_dir": tmp_path / "out", "max_steps": 1}
    results = train_rotation([*argv(given), "--runs.evo.estimator", "evograd", "--runs.one.degrees", "10"])
    assert list(results["test"]) == ["b", "evo", "one"]
    own = {run: read(tmp_path / "out" / run / "3")["settings"] for run in results["test"]}
    assert {run: held["estimator"] for run, held in own.items()} == {"b": "none", "evo": "evograd", "one": "one_step"}
    assert {run: held["estimator_kwargs"] for run, held in own.items()} == {
        "b": None,
        "evo": None,
        "one": {"radius": 0.5},
    }
    assert {run: held["degrees"] for run, held in own.items()} == {"b": 30, "evo": 30, "one": 10}
    assert all(held["max_steps"] == 1 for held in own.values())


# Resuming


@pytest.mark.parametrize("script", [pytest.param("rotation", marks=pytest.mark.slow), "noisy_labels"])
def test_resuming_keeps_what_is_done_and_goes_on_bit_by_bit(tmp_path: Path, images: Path, script: str) -> None:
    settings: dict[str, Any] = {"runs": RUNS, "seeds": "1,2", "save_strategy": "steps", "save_steps": 2}
    if script == "noisy_labels":
        settings |= {"augmentation": "pad_crop_flip"}
    whole = train(script, images, tmp_path / "whole", **settings)
    out = tmp_path / "halves"
    with cut_off_after(7):  # in the last step of the second of four runs
        train(script, images, out, **settings)
    assert not (out / "evo/1/results.json").exists()
    assert not (out / "results.json").exists()
    assert (out / "evo/1/checkpoint-2").is_dir()
    finished = contents(out / "base/1")
    resumed = train(script, images, out, resume_from_checkpoint="latest", **settings)
    assert contents(out / "base/1") == finished
    assert resumed["test"] == whole["test"]
    for run in RUNS:
        for seed in ("1", "2"):
            assert same(weights(out / run / seed), weights(tmp_path / "whole" / run / seed))
    again = train(script, images, out, resume_from_checkpoint="latest", **settings)
    assert again["test"] == whole["test"]


@each_script
def test_another_runs_folder_is_refused(
    compared: Any, images: Path, script: str, no_step: None, tmp_path: Path
) -> None:
    folder, _ = compared[script]
    main = SCRIPTS[script]
    again = r"holds another run \(.*results.json\): choose another output_dir, or set resume_from_checkpoint: latest"
    single = r"evo holds several runs \([12]\): choose another output_dir for a single one"
    for output, runs, message in ((folder, RUNS, again), (folder / "evo", {}, single)):
        assert_refused(main, settings_of(script, images, output, {"runs": runs}), message, folder)
    own = tmp_path / "out"
    shutil.copytree(folder / "base/1", own / "base/7")
    (own / "base/7/results.json").unlink()
    message = rf"{own}/base/7 holds another run \(config.json\)"
    assert_refused(main, settings_of(script, images, own, {"runs": RUNS, "seeds": "7"}), message, own)
    changed = {"runs": RUNS, "seeds": "1,2", "resume_from_checkpoint": "latest", "learning_rate": 0.5}
    message = r"base/1/results.json was made with another learning_rate: give the settings of that run, or another"
    assert_refused(main, settings_of(script, images, folder, changed), message, folder)


@each_script
def test_changed_images_are_refused(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the results of a finished run, and by what an interrupted one has left."""
    data, out, settings = pack(tmp_path / "a.npz"), tmp_path / "out", {"max_steps": 1}
    train(script, data, out, **settings)
    pack(data, x_test=random_images(20, seed=5).images[..., 0])
    monkeypatch.setattr("metaxl_evo.training.trainer.MetaTrainer.training_step", None)
    given = settings_of(script, data, out, settings | {"resume_from_checkpoint": "latest"})
    assert_refused(
        SCRIPTS[script], given, r"results.json was made with another test data(, upright data)?: give the", out
    )
    (out / "results.json").unlink()
    assert_refused(SCRIPTS[script], given, r"out was made with another test data(, upright data)?: give the data", out)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Path]:
    """Of each script an output folder with one checkpoint of a run that did not come to its end."""
    found = {}
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp(script) / "run"
        train(script, images, folder, save_strategy="steps", save_steps=2, max_steps=2)
        found[script] = keep_checkpoints(folder)
    return found


@each_script
def test_damaged_and_foreign_checkpoints_are_refused(
    tmp_path: Path, images: Path, interrupted: Any, script: str, no_step: None
) -> None:
    out = tmp_path / "run"
    for file in ("model.safetensors", "meta_state.pt", META[script][-1]):
        shutil.copytree(interrupted[script], out)
        truncate(out / "checkpoint-2" / file)
        given = settings_of(script, images, out, {"resume_from_checkpoint": "latest"})
        assert_refused(SCRIPTS[script], given, rf"checkpoint-2/{file} is damaged or truncated", out)
        shutil.rmtree(out)
    shutil.copytree(interrupted[script], out)
    other = {"rotation": {"degrees": 10}, "noisy_labels": {"noise_rate": 0.1}}[script]
    for changed in (other, {"seed": 4}, {"estimator": "evograd"}):
        given = settings_of(script, images, out, changed | {"resume_from_checkpoint": out / "checkpoint-2"})
        message = rf"checkpoint-2 was made with another .*{next(iter(changed))}"
        assert_refused(SCRIPTS[script], given, message, out)


# --check


@pytest.mark.parametrize(("script", "estimator"), [("rotation", "evograd"), ("noisy_labels", "one_step")])
def test_check_ends_with_a_verdict(
    tmp_path: Path, images: Path, script: str, estimator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"check": "true", "max_steps": 50, "meta_learning_rate": 0.1, "estimator": estimator}
    found = train(script, images, tmp_path / "out", runs={"base": BASELINE, "learned": {}}, **fields)
    assert capsys.readouterr().out.splitlines()[-1].startswith("OK")
    assert (found["run"], found["problems"], found["planned_steps"]) == ("learned", [], 50)
    assert found["second_derivatives"] == "possible"
    if estimator == "one_step":
        assert found["meta_cosine_to_exact"] == pytest.approx(1, abs=1e-4)
    assert 0 < found["meta_moved_a_step"] < found["meta_moves_at_most"]
    assert not (tmp_path / "out").exists()


# Bad input


def labels_of(**changes: int) -> np.ndarray:
    labels = np.arange(40) % 10
    for place, label in changes.items():
        labels[int(place[1:])] = label
    return labels


def npz(**arrays: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"data": pack(folder / "given.npz", **arrays)}


def text_file(folder: Path) -> dict[str, Any]:
    (folder / "given.npz").write_text("x_train")
    return {"data": folder / "given.npz"}


def cut_off(folder: Path) -> dict[str, Any]:
    truncate(pack(folder / "given.npz"))
    return {"data": folder / "given.npz"}


WIDE = {f"x_{part}": random_images(count).images[:, :, :6, 0] for part, count in (("train", 40), ("test", 20))}
HUB = r"neither a folder nor a reachable Hub id .*: use --data FILE.npz, or HF_HUB_OFFLINE=1 with a filled cache$"
OF_BOTH: list[tuple[Any, str]] = [
    ({"method": "metaxl"}, "unknown method 'metaxl': .*Valid: .*, baseline"),
    ({"backbone": "resnet"}, "unknown backbone 'resnet': did you mean 'resnet32'"),
    ({"meta_size": 0}, "meta_size must be a whole number of at least 1"),
    ({"meta_size": "ten"}, "meta_size: expected an integer, found 'ten'"),
    ({"leaning_rate": 1}, "unknown option '--leaning_rate': did you mean '--learning_rate'"),
    ({"estimator": "evogard"}, "unknown estimator 'evogard': did you mean 'evograd'"),
    ({"estimator": "first_order"}, "first_order keeps only the direct term, and this outer loss does not read"),
    ({"meta_portion": 0.5}, "cannot join meta rows to train rows: set meta_portion to 1"),
    ({"meta_order": "before"}, "unknown meta_order 'before'"),
    ({"runs": "evograd"}, "runs: expected a JSON mapping such as"),
    ({"runs": {"a": {"estimatr": "evograd"}}}, "unknown setting of run a 'estimatr': did you mean 'estimator'"),
    ({"runs": {"a": {"estimator": "evograd", "estimator_kwargs": {"copys": 4}}}}, "copys.*did you mean 'copies'"),
    ({"resume_from_checkpoint": "/absent/checkpoint-2"}, "/absent/checkpoint-2 is not a folder"),
    ({"image_std": 0}, r"image_std must be above 0, not \[0.0\]"),
    ({"image_mean": "nan"}, "image_mean must be finite numbers"),
    ({"image_mean": "0.1,0.2"}, "image_mean has 2 numbers, .*random.npz, train 1 channels: one each"),
    ({"data": "/absent/images.npz"}, "/absent/images.npz cannot be read as .npz .*No such file"),
    ({"data": "/absent/images.npz", "optim_args": "x"}, "optim_args x: cannot be used"),  # before data are read
    ({"data": "no-such-organisation-here/absent"}, HUB),
    ({"data": "mnist.py"}, "Dataset scripts are no longer supported: use .*or --data FILE.npz"),
    (
        lambda folder: {"data": folder},
        "train has no folder of images; .* holds no folder: it should hold train/CLASS/IMAGE and test/CLASS/IMAGE",
    ),
    (text_file, r"given.npz cannot be read as .npz \(File is not a zip file\): give another --data"),
    (cut_off, "given.npz cannot be read as .npz"),
    (npz(y_train=None), "given.npz has no array 'y_train'; present: x_train, x_test, y_test"),
    (npz(x_train=np.zeros((40, 8, 8))), "given.npz, train: pixels must be uint8 from 0 to 255, not float64"),
    (npz(x_test=np.zeros((20, 4, 4), np.uint8)), "a model trained on the one cannot be tested on the other"),
    (npz(**WIDE), "given.npz, train: images must be square, not 8 x 6 pixels"),
    (npz(y_train=labels_of(_0=-1)), "given.npz, train: label -1 is no class: renumber"),
    (npz(y_train=labels_of(_0=12)), "class '12' has [01] images and needs [12]"),
    (config_of("meta_lr: 1"), r"run\.yaml:1: unknown key 'meta_lr'"),
    (config_of("data: synthetic\nruns: {a: 1}"), "runs: a must be a mapping of settings, as in {}, not 1"),
    (config_of("data: synthetic\nruns: [a]"), "runs"),
]
OF_ONE: list[tuple[str, Any, str]] = [
    ("rotation", {"degrees": 181}, "degrees must be between -180 and 180, not 181"),
    ("rotation", {"degrees": "nan"}, "degrees must be between -180 and 180, not nan"),
    ("rotation", {"noise_rate": 0.2}, "unknown option '--noise_rate'"),
    ("rotation", {"meta_size": 40}, "train has 40 images: meta_size 40 leaves none to train on: lower meta_size"),
    ("rotation", {"train_size": 9}, "class '9' has 0 images and needs 1"),
    ("rotation", {"backbone": "lenet", "data": "synthetic", "meta_size": 1995}, "class '5' has 0 images and needs 1"),
    ("noisy_labels", {"noise": "flop"}, "unknown noise 'flop': did you mean 'flip'"),
    ("noisy_labels", {"noise_rate": 1}, "noise_rate must be at least 0 and below 1, not 1"),
    ("noisy_labels", {"noise_rate": "nan"}, "noise_rate must be at least 0 and below 1, not nan"),
    ("noisy_labels", {"meta_size": 15}, "meta_size must be a multiple of the 10 classes, not 15"),
    ("noisy_labels", {"meta_size": 40}, "class '0' has 4 images and needs 5: add some, or ask for fewer"),
    ("noisy_labels", {"image_size": 3}, "image_size 3 does not divide the 8 x 8 pixels of .*random.npz, train"),
    ("noisy_labels", {"image_size": 2}, "images of 2 pixels are too small for 2 layers"),
    (
        "noisy_labels",
        {"image_size": 4, "augmentation": "pad_crop_flip"},
        r"an image of \(4, 4\) pixels cannot be padded",
    ),
    ("noisy_labels", {"width": 2}, "width multiplies the channels of resnet32; convnet has none: leave it out"),
    ("noisy_labels", {"augmentation": "flip"}, "unknown augmentation 'flip'"),
    ("noisy_labels", {"weight_normalisation": "max"}, "unknown weight_normalisation 'max': .*Valid: sum, mean"),
    ("noisy_labels", {"weight_net_hidden": 0}, "weight_net_hidden must be a whole number of at least 1"),
    ("noisy_labels", {"meta_data": "/absent.npz"}, "/absent.npz cannot be read"),
    ("noisy_labels", lambda folder: {"meta_data": pack(folder / "own.npz")}, r"the training set: 40 train.*\(0, 1, "),
    (
        "noisy_labels",
        lambda folder: {"meta_data": seen_in_tests(folder / "own.npz")},
        "overlaps the test set: 20 of its",
    ),
    ("noisy_labels", npz(x_train=np.zeros((40, 8, 8), np.uint8)), "every image equals one of the meta set"),
    ("noisy_labels", npz(y_train=np.arange(40) % 2, y_test=np.arange(20) % 2), "flip2 needs more than 2 classes"),
    ("noisy_labels", {"test_split": "train"}, "test_split: train is trained on: name another"),
    ("noisy_labels", CHOOSING, "load_best_model_at_end needs a validation set, as neither the meta set nor the test"),
    (
        "noisy_labels",
        CHOOSING | {"metric_for_best_model": "f1"},
        "unknown metric_for_best_model 'f1': Valid: loss, acc",
    ),
    (
        "noisy_labels",
        CHOOSING | {"validation_size": 10, "metric_for_best_model": "accuracy", "greater_is_better": "false"},
        "greater_is_better would choose the checkpoint with the worst accuracy: leave it out",
    ),
    (
        "noisy_labels",
        lambda folder: {"validation_size": 10, "data": with_validation(folder / "given.npz")},
        "validation_size: .*given.npz, val is a validation set already: leave it out",
    ),
    ("noisy_labels", {"validation_split": "val"}, "random.npz has no array 'x_val'; present: x_train"),
    ("noisy_labels", {"imbalance_factor": 0.5}, "imbalance_factor is the largest class over the smallest, at least 1"),
    ("noisy_labels", {"imbalance_factor": 50}, "imbalance_factor 50.0 leaves no image of class '9': lower it"),
    ("rotation", {"do_eval": "true"}, "do_eval evaluates nothing by itself: set eval_strategy, or leave it out"),
    (
        "noisy_labels",
        lambda folder: {"model_name_or_path": write_classifier(folder, "vit"), "image_size": 4},
        "image_size is what the model of model_name_or_path says: leave it out, or set it to null",
    ),
    (
        "rotation",
        {"model_name_or_path": "no-such-organisation-here/absent"},
        "cannot be loaded .*a Hub id that can be",
    ),
    (
        "rotation",
        {"model_name_or_path": "absent", "image_std": 1},
        "image_std is what the model of model_name_or_path",
    ),
    ("noisy_labels", {"true_label_column": "truth"}, "random.npz has no array 'truth_train'; present: x_train"),
]
BAD = [*((list(SCRIPTS)[index % 2], *case) for index, case in enumerate(OF_BOTH)), *OF_ONE]


@pytest.mark.parametrize(("script", "given", "message"), BAD)
def test_bad_input_is_one_line_before_any_step(
    tmp_path: Path,
    images: Path,
    no_step: None,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    given: Any,
    message: str,
) -> None:
    offline(monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "place").mkdir()
    settings = given(tmp_path / "place") if callable(given) else given
    if "config" in settings:
        options = argv({"output_dir": tmp_path / "out", "use_cpu": "true"} | settings)
    else:
        options = settings_of(script, images, tmp_path / "out", settings)
    assert_refused(SCRIPTS[script], options, message, tmp_path / "out")


def test_the_table_of_bad_input_is_whole() -> None:
    assert (len(OF_BOTH), len(OF_ONE)) == (32, 36)


# The Hub


def test_the_papers_data_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST as `image` and `label`, CIFAR-100 as `img` and `fine_label`, each by its paper's config."""

    def rows(side: int, channels: int, *more: int) -> dict[str, list[Any]]:
        parts = {"train": random_images(60, classes=4, side=side, channels=channels),
                 "test": random_images(12, seed=1, classes=4, side=side, channels=channels)}  # fmt: skip
        return {
            part: [
                (Image.fromarray(image.squeeze()), int(label), *more)
                for image, label in zip(held.images, held.labels, strict=True)
            ]
            for part, held in parts.items()
        }

    names = list("abcd")
    home = tmp_path / "home"
    prepare_image_cache(home, "ylecun/mnist", "mnist", {"image": None, "label": names}, rows(28, 1))
    fine = {"img": None, "fine_label": names, "coarse_label": ["x", "y"]}
    prepare_image_cache(home, "uoft-cs/cifar100", "cifar100", fine, rows(32, 3, 0))
    offline(monkeypatch)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "datasets")
    before = {path for path in contents(home) if ".lock" not in path}
    small = {"max_steps": 2, "seeds": 1, "use_cpu": "true", "dataloader_num_workers": 0, "save_strategy": "no"}
    tiny = {"image_size": 8, "per_device_train_batch_size": 10, "per_device_meta_batch_size": 6, "meta_size": 12}
    for script, given in (
        ("rotation", {"meta_size": 20, "output_dir": tmp_path / "out/mnist"}),
        ("noisy_labels", tiny | {"data": "uoft-cs/cifar100", "output_dir": tmp_path / "out/cifar100"}),
    ):
        config = REPOSITORY / f"configs/vision/{script}_paper.yaml"
        SCRIPTS[script](argv({"config": config, "report_to": "none", "disable_tqdm": "true"} | small | given))
    for name, data in (("mnist", "ylecun/mnist"), ("cifar100", "uoft-cs/cifar100")):
        folder = tmp_path / "out" / name
        results = read(folder)
        assert list(results["test"]) == ["baseline", "evograd"]
        assert results["settings"]["data"] == data
        own = read(folder / "evograd/1")
        assert own["run"]["steps"] == 2
        assert own["settings"]["estimator_kwargs"]["copies"] == 2
        saved = json.loads((folder / "evograd/1/config.json").read_text(encoding="utf-8"))
        assert len(saved["id2label"]) == 4
        assert f"\ndatasets: {data}\n" in (folder / "evograd/1/README.md").read_text(encoding="utf-8")
    assert read(tmp_path / "out/cifar100/evograd/1")["run"]["train_images"] == 48
    assert {path for path in contents(home) if ".lock" not in path} == before
