"""`train_fewshot` end to end on generated images: folders, results, models, resuming, checking, bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from metaxl_evo.estimators import ESTIMATORS
from scripts.train_fewshot import main
from tests.scripts.refusals import assert_refused, config_of, offline, truncate, yaml_of
from tests.scripts.runs import OF_A_RUN, OF_SEVERAL, argv, cut_off_after, read, same, unnamed
from tests.vision_tasks.models import write_classifier
from tests.vision_tasks.small import pack
from vision_tasks import domains
from vision_tasks.augmentation import EvaluationTransform
from vision_tasks.domains import read_domain
from vision_tasks.feature_transform import FeatureTransform
from vision_tasks.fewshot import FewShotModel
from vision_tasks.fewshot_episodes import Episodes, EpisodeSize

CONFIGS = Path(__file__).parents[2] / "configs/vision"
RUNS = {"none": {"method": "none"}, "evo": {"estimator": "evograd", "estimator_kwargs": {"copies": 2}}}
SMALL: dict[str, Any] = {
    "width": 2,
    "image_size": 16,
    "n_way": 3,
    "n_shot": 2,
    "n_query": 2,
    "test_n_query": 3,
    "test_episodes": 4,
    "aux_images": 4,
    "max_steps": 4,
    "per_device_eval_batch_size": 4,
    "use_cpu": "true",
    "disable_tqdm": "true",
}
TINY: dict[str, Any] = SMALL | {
    "episodes_per_epoch": 3,
    "aux_domain": "ink",
    "learning_rate": 1e-2,
    "meta_learning_rate": 1e-2,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
}


def options(output: Path, settings: dict[str, Any], base: dict[str, Any] = TINY) -> list[str]:
    given = {"output_dir": output} | base | settings
    return argv({key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in given.items()})


def train(output: Path, **settings: Any) -> dict[str, Any]:
    return main(options(output, settings))


@pytest.fixture(scope="module", autouse=True)
def _drawn_once() -> Iterator[None]:
    """Every command draws its images anew; here those of the first serve all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vision_tasks.domains._synthetic", cache(domains._synthetic))
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of two runs with two seeds, and what the command returned; tests only read them."""
    folder = tmp_path_factory.mktemp("fewshot") / "out"
    return folder, train(folder, runs=RUNS, seeds="1,2")


def weights(folder: Path) -> dict[str, Tensor]:
    """The saved weights of both levels."""
    held = load_file(folder / "feature_transform/model.safetensors")
    return load_file(folder / "model.safetensors") | {f"transform.{name}": value for name, value in held.items()}


# What a comparison leaves


def test_every_run_has_a_folder_of_its_own(compared: Any) -> None:
    folder, results = compared
    assert read(folder) == results
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    one = [*OF_A_RUN, "feature_transform/config.json", "feature_transform/model.safetensors"]
    learned = ["feature_transform.png", "meta_history.csv", "meta_history.png"]
    expected = {f"{run}/{seed}/{name}" for run in RUNS for seed in (1, 2) for name in one}
    assert files == {*OF_SEVERAL} | expected | {f"evo/{seed}/{name}" for seed in (1, 2) for name in learned}
    assert not unnamed(folder / "evo/1", "fewshot")


def test_the_results_of_a_comparison(compared: Any) -> None:
    folder, results = compared
    assert list(results["test"]) == ["none", "evo"]
    for run in RUNS:
        own = [read(folder / run / str(seed)) for seed in (1, 2)]
        assert list(results["test"][run]) == ["accuracy", "interval", "low", "high"]
        for seed, one in zip((1, 2), own, strict=True):
            test = one["test"]
            assert 0 <= test["accuracy"] <= 1
            assert test["accuracy"] - test["interval"] == pytest.approx(test["low"])
            assert test["accuracy"] + test["interval"] == pytest.approx(test["high"])
            assert one["run"]["steps"] == 4
            assert one["run"]["skipped_meta_steps"] == 0
            assert one["run"]["meta_parameters"] == 2 * 2 * (1 + 2 * (2 + 4 + 8))
            assert (one["run"]["seen_domains"], one["run"]["unseen_domain"]) == (["ink", "chalk", "neon"], "sand")
            expected = {"seed": seed, "estimator": "none" if run == "none" else "evograd", "n_way": 3}
            assert one["settings"].items() >= expected.items()
            assert ("feature_transform" in one["run"]) == (run == "evo")
    assert results["run"]["evo"]["1"]["ft_relative_change"] > 0
    assert [(one["run"], one["baseline"]) for one in results["differences"]] == [("evo", "none")]


def test_what_is_left_scores_what_the_results_say(compared: Any) -> None:
    folder = compared[0] / "evo/2"
    model = FewShotModel.from_pretrained(folder).eval()
    assert model.config.aux_classes == 12
    size, transform = EpisodeSize(3, 2, 3), EvaluationTransform(16)
    rows = Episodes(
        [read_domain("synthetic:sand")], "test", size, length=4, seed=2, transform=transform, split="novel"
    )
    with torch.no_grad():
        right = [
            (model.scores(row["support"], row["query"]).argmax(-1) == row["labels"])
            for row in map(rows.__getitem__, range(4))
        ]
    assert float(torch.stack(right).double().mean()) == pytest.approx(read(folder)["test"]["accuracy"])
    transform_held = FeatureTransform.from_pretrained(folder)
    gamma = transform_held.layers["stage1_block1"].gamma
    assert bool((gamma != 0.3).all())
    assert bool((FeatureTransform.from_pretrained(compared[0] / "none/2").layers["stage1_block1"].gamma == 0.3).all())


def test_a_pretrained_encoder(tmp_path: Path) -> None:
    """Its weights are the start; the saved model, on what the saved processor makes of an image, scores the same."""
    model = write_classifier(tmp_path / "model", "resnet")
    results = train(tmp_path / "out", model_name_or_path=model, image_size=224, max_steps=2, learning_rate=0)
    left = FewShotModel.from_pretrained(tmp_path / "out").eval()
    start = AutoModel.from_pretrained(model).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in left.encoder.state_dict().items()
               if not name.endswith(("running_mean", "running_var", "num_batches_tracked")))  # fmt: skip
    assert len(left.head.state_dict()) > 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    mean, std = (torch.tensor(values)[:, None, None] for values in (left.config.image_mean, left.config.image_std))

    def seen(image: Any, generator: Any) -> Tensor:
        shown = Image.fromarray(np.asarray(image))
        return processor(images=shown, return_tensors="pt")["pixel_values"][0] * std + mean

    domain, size = read_domain("synthetic:sand"), EpisodeSize(3, 2, 3)
    rows = Episodes([domain], "test", size, length=4, seed=42, transform=seen, split="novel")
    with torch.no_grad():
        right = [(left.scores(row["support"], row["query"]).argmax(-1) == row["labels"])
                 for row in map(rows.__getitem__, range(4))]  # fmt: skip
    assert float(torch.stack(right).double().mean()) == pytest.approx(results["test"]["accuracy"])
    assert results["run"]["meta_parameters"] == 2 * (4 + 8 + 8)  # two blocks, one of them with a shortcut


def test_the_model_card(compared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(compared[0] / "evo/2")
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    card = (compared[0] / "evo/2/README.md").read_text(encoding="utf-8")
    test = read(compared[0] / "evo/2")["test"]
    assert "\n# out-evo-2\n" in card
    assert f"| accuracy | {test['accuracy']:.4f} |\n| interval | {test['interval']:.4f} |" in card
    assert "| `unseen_domain` | `synthetic:sand` |" in card
    assert ESTIMATORS["evograd"]().citation in card
    assert "Tseng et al., Cross-Domain Few-Shot Classification" in card
    assert "datasets:" not in card


def test_without_any_setting_but_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = main(options(tmp_path / "mine", {"report_to": "none"}, SMALL | {"max_steps": 1}))
    assert read(tmp_path / "mine") == results
    assert results["settings"]["per_device_train_batch_size"] == 1
    assert (results["settings"]["method"], results["settings"]["data"]) == ("learned", "synthetic")
    printed = capsys.readouterr().out.splitlines()
    assert f"models, cards and results.json: {tmp_path / 'mine'}" in printed


@pytest.mark.parametrize(
    "name", ["fewshot_cpu", pytest.param("fewshot_paper", marks=pytest.mark.slow), "fewshot_pretrain_paper"]
)
def test_every_config_runs_on_generated_images(tmp_path: Path, name: str) -> None:
    given = {"config": CONFIGS / f"{name}.yaml", "seeds": "3", "report_to": "none", "save_strategy": "no"}
    given |= {"max_steps": 1, "dataloader_num_workers": 0} | (
        {"n_way": 5, "n_shot": 1} if name == "fewshot_cpu" else {}
    )
    results = main(options(tmp_path / "out", given, SMALL))
    if name == "fewshot_pretrain_paper":
        assert results["run"]["seen_domains"] == ["ink"]
        assert results["settings"]["method"] == "pretrain"
    else:
        cpu = name == "fewshot_cpu"
        runs = [
            "none",
            "fixed",
            *(["none_seen", "fixed_seen"] if cpu else []),
            "evograd",
            *(["one_step"] if cpu else []),
        ]
        assert list(results["test"]) == runs
        assert results["run"]["evograd"]["3"]["ft_relative_change"] > 0


def test_the_warm_up_and_what_starts_from_it(tmp_path: Path) -> None:
    train(tmp_path / "warm", method="pretrain", per_device_train_batch_size=8)
    results = train(tmp_path / "out", encoder=tmp_path / "warm", method="none", max_steps=1, learning_rate=0)
    assert results["settings"]["encoder"] == str(tmp_path / "warm")
    warm, begun = (
        {name: value for name, value in weights(tmp_path / folder).items() if name.endswith("convolution.weight")}
        for folder in ("warm", "out")
    )
    assert len(warm) == 12
    assert same(warm, begun)


# Resuming and checking


@pytest.mark.slow
def test_resuming_goes_on_bit_by_bit(tmp_path: Path) -> None:
    """Cut off within the second epoch."""
    settings: dict[str, Any] = {"runs": {"evo": RUNS["evo"]}, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path / "whole", **settings, max_steps=5)
    with cut_off_after(4):
        train(tmp_path / "halves", **settings, max_steps=5)
    assert not (tmp_path / "halves/results.json").exists()
    resumed = train(tmp_path / "halves", resume_from_checkpoint="latest", **settings, max_steps=5)
    assert resumed["test"] == whole["test"]
    assert same(weights(tmp_path / "halves"), weights(tmp_path / "whole"))
    again = train(tmp_path / "halves", resume_from_checkpoint="latest", **settings, max_steps=5)
    assert again == resumed


def test_another_runs_folder_is_refused(compared: Any, no_step: None, tmp_path: Path) -> None:
    folder, _ = compared
    again = r"holds another run \(.*results.json\): choose another output_dir, or set resume_from_checkpoint: latest"
    single = r"evo holds several runs \([12]\): choose another output_dir for a single one"
    for output, runs, message in ((folder, RUNS, again), (folder / "evo", {}, single)):
        assert_refused(main, options(output, {"runs": runs}), message, folder)
    own = tmp_path / "out"
    shutil.copytree(folder / "evo/1/feature_transform", own / "feature_transform")
    assert_refused(main, options(own, {}), "out holds feature_transform, and no run to resume", own)
    changed = {"runs": RUNS, "seeds": "1,2", "resume_from_checkpoint": "latest", "unseen_domain": "synthetic:mosaic"}
    message = r"none/1/results.json was made with another unseen_domain: give the settings of that run, or another"
    assert_refused(main, options(folder, changed), message, folder)


def test_check_ends_with_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"check": "true", "max_steps": 50, "runs": {"none": RUNS["none"], "learned": {}}}
    found = train(tmp_path / "out", **fields)
    assert capsys.readouterr().out.splitlines()[-1].startswith("OK")
    assert (found["run"], found["problems"], found["planned_steps"]) == ("learned", [], 50)
    assert found["meta_cosine_to_exact"] == pytest.approx(1, abs=1e-3)
    assert found["meta_moved_a_step"] > 0
    assert not (tmp_path / "out").exists()


# Bad input


def folder_of(**arrays: Any) -> Callable[[Path], dict[str, Any]]:
    """A folder with one packed file, which is seen, beside a generated domain that is not."""

    def write(folder: Path) -> dict[str, Any]:
        pack(folder / "packed.npz", **arrays)
        names = ["packed.npz?classes=whole", "synthetic:chalk"]
        return {"data": folder, "domains": names, "aux_domain": "packed", "n_shot": 1, "n_query": 1}

    return write


def photos(*classes: str, images: int = 6) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        for label in classes:
            (folder / f"photos/{label}").mkdir(parents=True)
            for number in range(images):
                pixels = np.full((8, 8, 3), 9 * number, np.uint8)
                Image.fromarray(pixels).save(folder / f"photos/{label}/{number}.png")
        return {"data": folder, "unseen_domain": "photos"}

    return write


def cut_off(folder: Path) -> dict[str, Any]:
    given = folder_of()(folder)
    truncate(folder / "packed.npz")
    return given


def cut_off_photo(folder: Path) -> dict[str, Any]:
    """One that no training step reads, damaged behind its head."""
    given = photos(*NOVEL)(folder)
    truncate(folder / "photos/novel/c/5.png")
    return given


GENERATED = ["synthetic:ink", "synthetic:chalk"]
NOVEL = [f"novel/{label}" for label in "abc"]
BAD: list[tuple[Any, str]] = [
    ({"method": "lerned"}, "unknown method 'lerned': did you mean 'learned'"),
    ({"n_way": "five"}, "n_way: expected an integer, found 'five'"),
    ({"n_wai": 5}, "unknown option '--n_wai': did you mean '--n_way'"),
    ({"estimator": "evogard"}, "unknown estimator 'evogard'"),
    ({"estimator": "evograd", "estimator_kwargs": {"parameters": "^classifier"}}, "finds none of the base parameters"),
    ({"meta_portion": 0.5}, "cannot join meta rows to train rows: set meta_portion to 1"),
    ({"runs": {"a": {"n_way": 1}}}, "n_way must be a whole number of at least 2"),
    ({"unseen_domain": "synthetic:neon"}, "unseen_domain synthetic:neon is among the domains, as synthetic:neon"),
    ({"aux_domain": "omniglot"}, "unknown aux_domain 'omniglot': .*Valid: ink, chalk, neon"),
    ({"data": "absent.npz"}, "data must be synthetic or the folder where the domains are, absent.npz is neither"),
    ({"encoder": "absent"}, "encoder: absent is not a folder"),
    ({"do_predict": "true"}, "do_predict: an episode's classes are its own"),
    (lambda folder: {"model_name_or_path": write_classifier(folder, "vit"), "data": "synthetic"},
     "acts behind the batch norms of a ResNet's blocks .*, and ViTModel has none: give such an encoder"),
    (lambda folder: {"model_name_or_path": write_classifier(folder, "resnet"), "data": "synthetic", "image_size": 8},
     "image_size is what the model of model_name_or_path says: leave it out"),
    ({"method": "pretrain"}, "per_device_train_batch_size 1 makes a batch of one image out of 288"),
    (lambda folder: {"data": folder, "domains": ["a/b/c"], "aux_domain": "c"}, "unknown domain 'a/b/c'"),
    (lambda folder: {"data": folder, "domains": ["no-such-organisation-here/absent"], "aux_domain": "absent"},
     "neither a folder nor a reachable Hub id"),
    (folder_of(y_train=None), "packed.npz has no array 'y_train'; present: x_train, x_test, y_test"),
    (folder_of(x_train=np.zeros((40, 8, 8))), "pixels must be uint8 from 0 to 255, not float64"),
    (folder_of(y_train=np.full(40, 11), y_test=np.full(20, 11)), "packed has 1 base classes, an episode needs 3"),
    (cut_off, "packed.npz cannot be read as .npz"),
    (photos("base/a", "val/b", *NOVEL, images=4), "photos: class 'a' has 4 images, an episode needs 2 . 3: lower"),
    (photos("base/a", "val/b"), "domain photos has no novel split: it has base, val"),
    (photos("base/a", "novel/b"), "domain photos has 1 novel classes, an episode needs 3: lower n_way, or read it wi"),
    (cut_off_photo, "place/photos/novel/c/5.png cannot be read as an image .*: replace or remove it"),
    (config_of("domains: {a: b}"), r"run\.yaml:1: domains: expected a list, found a mapping"),
    (config_of("crop_scale: [1, 2]"), "crop_scale must be two increasing numbers above 0 and at most 1"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_input_is_one_line_before_any_step(
    tmp_path: Path, no_step: None, monkeypatch: pytest.MonkeyPatch, given: Any, message: str
) -> None:
    offline(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "place").mkdir()
    settings = given(tmp_path / "place") if callable(given) else given
    if "domains" not in settings and "data" in settings:
        settings |= {"domains": GENERATED}
    base = {"use_cpu": "true"} if "config" in settings else TINY
    assert_refused(main, options(tmp_path / "out", settings, base), message, tmp_path / "out")


def test_a_config_says_what_the_command_line_does(tmp_path: Path) -> None:
    lines = TINY | {"max_steps": 1, "method": "fixed", "domains": "[synthetic:ink, synthetic:neon]"}
    (tmp_path / "run.yaml").write_text(yaml_of(lines), encoding="utf-8")
    given = {"config": tmp_path / "run.yaml", "output_dir": tmp_path / "out", "unseen_domain": "synthetic:mosaic"}
    results = main(argv(given))
    assert (results["settings"]["method"], results["settings"]["estimator"]) == ("fixed", "none")
    assert results["settings"]["domains"] == ["synthetic:ink", "synthetic:neon"]
    assert "ft_relative_change" not in results["run"]


def test_the_table_of_bad_input_is_whole() -> None:
    assert len(BAD) == 27
