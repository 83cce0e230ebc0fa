"""The few-shot experiment: its domains and episodes, pairs that stay in step, pre-training, scores, resuming."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate
from transformers import TrainerCallback

from metaxl_evo.bilevel import tree
from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.plan import plan_runs
from metaxl_evo.experiments.statistics import interval
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.test_resume import assert_same_run, resumed
from tests.training.tiny import base_weights, different, meta_weights, tiny_arguments
from tests.vision_tasks.small import random_images
from vision_tasks.augmentation import EvaluationTransform
from vision_tasks.domains import name_of, read_domain
from vision_tasks.feature_transform import FeatureTransform
from vision_tasks.fewshot import CrossDomainFewShot, FewShotModel
from vision_tasks.fewshot_arguments import METHODS, EpisodicTrainingArguments, FewShotArguments
from vision_tasks.fewshot_episodes import Auxiliary, Domain, Episodes
from vision_tasks.fewshot_task import (
    FewShotData,
    FewShotTask,
    epochs_of,
    evaluation,
    located,
    sizes_of,
    train_transform,
)
from vision_tasks.pretraining import ClassifierRows, EncoderPretraining, load_encoder
from vision_tasks.symbols import LOOKS

TINY: dict[str, Any] = {
    "width": 2,
    "image_size": 16,
    "channels": 1,
    "n_way": 3,
    "n_shot": 2,
    "n_query": 2,
    "test_n_query": 3,
    "test_episodes": 4,
    "val_episodes": 3,
    "episodes_per_epoch": 3,
    "aux_domain": "ink",
    "aux_images": 4,
}
ESTIMATES: dict[str, dict[str, Any]] = {
    "evograd": {"estimator": "evograd", "estimator_kwargs": {"sigma": 0.01, "copies": 2}},
    "one_step": {"estimator": "one_step", "estimator_kwargs": {"engine": "finite_difference"}},
    "none": {"estimator": "none"},
}


def settings_of(**fields: Any) -> FewShotArguments:
    return FewShotArguments(**TINY | fields)


def arguments(folder: Path, **fields: Any) -> MetaTrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "per_device_meta_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "meta_portion": 1.0,
        "meta_learning_rate": 1e-2,
        **ESTIMATES["one_step"],
    }
    return tiny_arguments(folder, **defaults | fields)


@pytest.fixture(scope="module")
def task() -> FewShotTask:
    """Which keeps the generated domains."""
    return FewShotTask()


def data_of(task: FewShotTask, settings: FewShotArguments) -> FewShotData:
    return task.load(settings, cast(Any, None))  # the settings say it all


def trainer_of(
    task: FewShotTask, folder: Path, settings: FewShotArguments | None = None, **fields: Any
) -> MetaTrainer:
    settings, args = settings or settings_of(), arguments(folder, **fields)
    torch.manual_seed(0)
    return task.build_trainer(settings, args, task.load(settings, args))


# Domains


def test_generated_domains_take_the_place_of_those_that_are_named(task: FewShotTask) -> None:
    named = {"domains": ["/absent/a", "b/c?name=mini", "d.npz", "omniglot"], "unseen_domain": "e"}
    settings = settings_of(aux_domain="mini", **named)
    data = data_of(task, settings)
    assert [one.name for one in data.seen] == list(LOOKS)[:4]
    assert data.unseen.name == list(LOOKS)[4]
    assert data.aux is data.seen[1]
    assert data_of(task, settings).seen[0] is data.seen[0]  # read once


def write_domains(folder: Path) -> Path:
    """A packed file of 10 classes, two of Omniglot's alphabets, and a folder of images with splits; 8 x 8 pixels."""
    folder.mkdir()
    images = {"train": random_images(60, classes=10), "test": random_images(40, seed=1, classes=10)}
    arrays = {f"x_{part}": one.images for part, one in images.items()}
    np.savez(folder / "packed.npz", **arrays, **{f"y_{part}": one.labels for part, one in images.items()})
    (folder / "letters").mkdir()
    with zipfile.ZipFile(folder / "letters/small.zip", "w") as file:
        for number, picture in enumerate(random_images(96, seed=2).images[..., 0]):
            alphabet, character = ("Greek", "Latin")[number % 2], number // 2 % 8
            with file.open(f"small/{alphabet}/character{character:02}/{number}.png", "w") as entry:
                Image.fromarray(picture).save(entry, "PNG")
    for split in ("base", "val", "novel"):
        for label in "abc":
            (folder / f"photos/{split}/{split}_{label}").mkdir(parents=True)
            for number, picture in enumerate(random_images(6, seed=3, channels=3).images):
                Image.fromarray(picture).save(folder / f"photos/{split}/{split}_{label}/{number}.png")
    return folder


REAL: dict[str, Any] = {
    "domains": ["packed.npz?classes=whole", "letters?alphabets=Greek&name=greek", "photos"],
    "unseen_domain": "letters?alphabets=Latin&name=latin&classes=whole",
    "aux_domain": "photos",
}


def test_paths_start_from_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_domains(tmp_path / "data")
    settings = settings_of(data=str(folder), **REAL)
    data = data_of(FewShotTask(), settings)
    assert [one.name for one in data.seen] == ["packed", "greek", "photos"]
    assert [len(one.labels) for one in (*data.seen, data.unseen)] == [100, 48, 54, 48]
    assert data.aux is data.seen[2]
    assert [data.seen[2].classes[c] for c in data.seen[2].split("novel")] == ["novel_a", "novel_b", "novel_c"]
    assert all(one.startswith("Latin") for one in data.unseen.classes)
    others = {"domains": [f"{folder}/packed.npz"], "unseen_domain": "organisation/name?classes=whole"}
    absolute = settings_of(data=str(tmp_path), **others, aux_domain=None)
    assert located(absolute) == [f"{folder}/packed.npz", "organisation/name?classes=whole"]
    monkeypatch.chdir(folder)
    assert located(settings_of(data=".", **REAL))[0] == "packed.npz?classes=whole"


def test_training_on_files(tmp_path: Path) -> None:
    settings = settings_of(data=str(write_domains(tmp_path / "data")), channels=3, jitter=0.2, **REAL)
    task = FewShotTask()
    run = task.build_trainer(settings, arguments(tmp_path / "out", max_steps=1), data_of(task, settings))
    run.train()
    model = cast(FewShotModel, run.model.base)
    assert model.config.aux_classes == 3
    assert task.score(run, settings, data_of(task, settings))["interval"] > 0


def test_the_real_images(shared: Path, tmp_path: Path) -> None:
    """A step on digits and letters, tested on clothes."""
    files: dict[str, Any] = {
        "data": str(shared / "data/images"),
        "domains": ["mnist_8k_2k.npz?classes=whole&name=digits", "omniglot"],
        "unseen_domain": "fashion_mnist_8k_2k.npz?classes=whole&name=clothes",
    }
    settings, task = settings_of(**files, aux_domain="omniglot", width=4, image_size=28, n_way=5), FewShotTask()
    data = data_of(task, settings)
    assert [(one.name, len(one.classes)) for one in data.seen] == [("digits", 10), ("omniglot", 242)]
    run = task.build_trainer(settings, arguments(tmp_path, **ESTIMATES["evograd"], max_steps=1), data)
    start = meta_weights(run)
    run.train()
    assert set(different(meta_weights(run), start)) == set(start)
    assert 0 <= task.score(run, settings, data)["accuracy"] <= 1


# Episodes


def test_what_each_method_trains_on(task: FewShotTask, tmp_path: Path) -> None:
    fields = ESTIMATES["none"] | {"per_device_train_batch_size": 2}
    made = {method: trainer_of(task, tmp_path, settings_of(method=method), **fields) for method in METHODS}
    roles = {method: getattr(run.train_dataset, "role", None) for method, run in made.items()}
    assert roles == {"learned": "seen", "fixed": "all", "none": "all", "pretrain": None}
    assert {method for method, run in made.items() if run.meta_dataset is not None} == {"learned"}
    learned = cast(Any, made["learned"])
    assert (learned.meta_dataset.role, learned.meta_dataset.aux) == ("unseen", None)
    assert learned.train_dataset.aux.domain is learned.train_dataset.domains[0]
    assert {method: run.model.method for method, run in made.items()} == {
        "learned": "learned",
        "fixed": "fixed",
        "none": "none",
        "pretrain": "none",
    }
    assert len({tuple(base_weights(run)["encoder.embedder.embedder.convolution.weight"].flatten().tolist())
                for run in made.values()}) == 1  # fmt: skip


def test_baselines_on_the_very_episodes_of_the_learned_transform(task: FewShotTask, tmp_path: Path) -> None:
    learned = trainer_of(task, tmp_path).train_dataset
    settings = settings_of(method="none", baseline_episodes="seen")
    baseline = trainer_of(task, tmp_path, settings, **ESTIMATES["none"]).train_dataset
    for epoch in (0, 1):
        for rows in (learned, baseline):
            rows.set_epoch(epoch)
        first, second = learned[1], baseline[1]
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_tests_are_the_same_for_every_method_and_another_for_each_seed(task: FewShotTask, tmp_path: Path) -> None:
    settings = settings_of()
    data = data_of(task, settings)

    def support(seed: int, split: str = "novel", **fields: Any) -> Tensor:
        return evaluation(settings_of(**fields), arguments(tmp_path, seed=seed), data, split)[0]["support"]

    assert torch.equal(support(1), support(1, method="none"))
    assert not torch.equal(support(1), support(2))
    assert not torch.equal(support(1), support(1, "val"))
    episodes = evaluation(settings, arguments(tmp_path), data, "novel")
    assert (len(episodes), episodes.split, [one.name for one in episodes.domains]) == (4, "novel", ["sand"])
    assert episodes[0]["query"].shape == (3, 3, 1, 16, 16)
    held = evaluation(settings, arguments(tmp_path), data, "val")
    assert (len(held), held.split, len(held.domains)) == (3, "val", 3)


def test_augmentation_is_as_it_is_set() -> None:
    transform = train_transform(settings_of(crop_scale=[0.5, 0.75], jitter=0.1, flips=False))
    assert (transform.size, transform.channels, transform.scale) == (16, 1, (0.5, 0.75))
    assert (transform.jitter, transform.flips) == (0.1, False)


class Pairs(TrainerCallback):
    """The domains of every step: of the episodes that were trained on, and of those that judged."""

    def __init__(self, run: MetaTrainer):
        self.run, self.seen = run, list[tuple[set[str], set[str]]]()
        self.drawn: tuple[list[str], list[str]] = ([], [])
        for number, episodes in enumerate((run.train_dataset, run.meta_dataset)):
            episodes.domain_of = self._noting(episodes.domain_of, self.drawn[number])

    def _noting(self, domain_of: Callable[[int], Domain], names: list[str]) -> Callable[[int], Domain]:
        def noted(index: int) -> Domain:
            names.append(domain_of(index).name)
            return domain_of(index)

        return noted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append((set(self.drawn[0]), set(self.drawn[1])))
        for names in self.drawn:
            names.clear()


@pytest.mark.parametrize(
    ("train", "meta", "accumulation", "episodes", "steps", "resume"),
    [(1, 1, 1, 3, 6, 4), (2, 3, 2, 5, 4, None)],
)
def test_the_pair_of_an_epoch_is_one_however_batches_are_cut(
    task: FewShotTask, tmp_path: Path, train: int, meta: int, accumulation: int, episodes: int, steps: int,
    resume: int | None,
) -> None:  # fmt: skip
    settings = settings_of(episodes_per_epoch=episodes, aux_domain=None)
    fields: dict[str, Any] = {
        "per_device_train_batch_size": train,
        "per_device_meta_batch_size": meta,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "save_strategy": "steps" if resume else "no",
        "save_steps": resume or 1,
    }
    run = trainer_of(task, tmp_path / "whole", settings, **fields)
    pairs = Pairs(run)
    run.add_callback(pairs)
    run.train()
    seen = pairs.seen
    if resume:
        again = trainer_of(task, tmp_path / "again", settings, **fields)
        pairs = Pairs(again)
        again.add_callback(pairs)
        again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{resume}"))
        assert pairs.seen[-2:] == seen[-2:]
    assert len(seen) == steps
    batches = -(-episodes // train)
    epochs = [step // -(-batches // accumulation) for step in range(steps)]
    expected = {}
    for epoch in set(epochs):
        rows = Episodes(data_of(task, settings).seen, "seen", run.train_dataset.size, length=1, seed=3, transform=None)
        others = Episodes(rows.domains, "unseen", rows.size, length=1, seed=3, transform=None)
        for one in (rows, others):
            one.set_epoch(epoch)
        expected[epoch] = rows.domain_of(0).name, others.domain_of(0).name
    assert len(set(expected.values())) > 1
    for (trained, judged), epoch in zip(seen, epochs, strict=True):
        assert judged == {expected[epoch][1]}
        if trained:  # what the loader has read ahead is noted a step early
            assert trained <= set(expected[epoch][:1]) | {expected.get(epoch + 1, ("",))[0]}


def test_the_epochs_of_a_run(tmp_path: Path) -> None:
    def epochs(episodes: int, **fields: Any) -> int:
        return epochs_of(settings_of(episodes_per_epoch=episodes), arguments(tmp_path, **fields))

    assert epochs(100, max_steps=-1, num_train_epochs=2.5) == 3
    assert epochs(100, max_steps=101) == 2
    assert epochs(10, max_steps=6, per_device_train_batch_size=3, gradient_accumulation_steps=3) == 3


# Defaults, scores, descriptions


def test_batches_are_one_episode_each(tmp_path: Path) -> None:
    made = EpisodicTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (made.per_device_train_batch_size, made.per_device_meta_batch_size, made.meta_portion) == (1, 1, 1)
    which = RunsArguments(runs={"none": {"method": "none"}, "evo": {}})
    runs = plan_runs(FewShotTask(), which, settings_of(), made)
    assert {type(run.args) for run in runs} == {EpisodicTrainingArguments}
    assert [run.args.estimator for run in runs] == ["none", "one_step"]
    assert runs[1].args.per_device_meta_batch_size == 1


def test_scores_are_of_episodes(task: FewShotTask, tmp_path: Path) -> None:
    settings = settings_of()
    data, run = data_of(task, settings), trainer_of(task, tmp_path, per_device_eval_batch_size=3)
    found = task.score(run, settings, data)
    model, shares = run.model.base.eval(), []
    for row in map(evaluation(settings, run.args, data, "novel").__getitem__, range(4)):
        with torch.no_grad():
            guesses = model.scores(row["support"], row["query"]).argmax(-1)
        shares.append(float((guesses == row["labels"]).double().mean()))
    expected = interval(shares)
    assert found == pytest.approx({
        "accuracy": np.mean(shares),
        "interval": expected.high - expected.mean,
        "low": expected.low,
        "high": expected.high,
    })  # fmt: skip
    assert found["interval"] > 0


@pytest.mark.parametrize("split", ["novel", "val"])
def test_tests_are_of_images_as_they_are(task: FewShotTask, tmp_path: Path, split: str) -> None:
    settings = settings_of()
    args, data = trainer_of(task, tmp_path).args, data_of(task, settings)
    assert evaluation(settings, args, data, split).transform == EvaluationTransform(
        settings.image_size, settings.channels
    )


def test_evaluation_is_on_the_val_classes(task: FewShotTask, tmp_path: Path) -> None:
    run = trainer_of(task, tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1)
    assert run.eval_dataset.split == "val"
    run.train()
    assert [0 <= row["eval_accuracy"] <= 1 for row in run.state.log_history if "eval_accuracy" in row] == [True]
    assert trainer_of(task, tmp_path).eval_dataset is None


def test_what_became_of_the_transform(task: FewShotTask, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    settings = settings_of(ft_gamma=0.2, ft_beta=0.4)
    data, run = data_of(task, settings), trainer_of(task, tmp_path, settings, max_steps=2, logging_steps=1)
    assert meta_weights(run)["layers.stage1_block1.gamma"].unique().tolist() == [pytest.approx(0.2)]
    first = tree.clone(run.model.meta_parameters())
    assert task.describe(run, settings, data, first)["ft_relative_change"] == 0
    run.train()
    found = task.describe(run, settings, data, first)
    json.dumps(found, allow_nan=False)
    assert (found["seen_domains"], found["unseen_domain"]) == (["ink", "chalk", "neon"], "sand")
    assert [step for step, _ in found["meta_loss"]] == [1, 2]
    now = torch.cat([leaf.flatten() for leaf in meta_weights(run).values()])
    start = torch.cat([
        torch.full_like(leaf, 0.2 if name.endswith("gamma") else 0.4).flatten()
        for name, leaf in meta_weights(run).items()
    ])  # fmt: skip
    assert found["ft_relative_change"] == pytest.approx(float((now - start).norm() / start.norm()), rel=1e-5)
    assert found["ft_relative_change"] > 0
    before, after = (found["feature_transform"][when] for when in ("before", "after"))
    assert before.keys() == after.keys() == run.model.meta.channels.keys()
    assert all(value == pytest.approx(0.4) for value in before["stage4_block1_shortcut"]["beta"].values())
    sizes = F.softplus(meta_weights(run)["layers.stage2_block1.gamma"], beta=100)
    assert after["stage2_block1"]["gamma"]["median"] == pytest.approx(float(sizes.quantile(0.5)), rel=1e-5)
    assert after["stage2_block1"]["gamma"]["max"] == pytest.approx(float(sizes.max()), rel=1e-5)
    task.plot(tmp_path, {"run": found})
    assert Image.open(tmp_path / "feature_transform.png").width > 500
    fixed = settings_of(method="fixed")
    unlearned = trainer_of(task, tmp_path, fixed, **ESTIMATES["none"])
    assert list(task.describe(unlearned, fixed, data, first)) == ["seen_domains", "unseen_domain"]


def test_sizes_are_softplus() -> None:
    found = sizes_of(FeatureTransform({"a": 3}, gamma=-1.0, beta=0.0))["a"]
    assert found["gamma"] == pytest.approx(dict.fromkeys(found["gamma"], 0), abs=1e-6)
    assert found["beta"]["mean"] == pytest.approx(np.log(2) / 100)


# Resuming


@pytest.mark.parametrize(("estimator", "at", "method"), [("evograd", 3, "learned"), ("none", 2, "pretrain")])
def test_resumed_bit_by_bit(task: FewShotTask, tmp_path: Path, estimator: str, at: int, method: str) -> None:
    """Within an epoch and at its end, whatever the pair of domains, the noise and the auxiliary images are."""
    settings = settings_of(method=method)
    fields: dict[str, Any] = {"max_steps": at + 2, "save_strategy": "steps", "save_steps": at, **ESTIMATES[estimator]}
    if method == "pretrain":
        fields["per_device_train_batch_size"] = 100  # three an epoch
    whole = resumed(trainer_of(task, tmp_path / "whole", settings, **fields), None)
    again = resumed(trainer_of(task, tmp_path / "again", settings, **fields), tmp_path / f"whole/checkpoint-{at}")
    assert_same_run(again, whole)
    buffers = dict(whole.model.base.named_buffers())
    assert not different(dict(again.model.base.named_buffers()), buffers)
    assert different(base_weights(whole), base_weights(trainer_of(task, tmp_path, settings, **fields)))


# Pre-training


def test_the_warm_up_is_plain_classification(task: FewShotTask, tmp_path: Path) -> None:
    settings = settings_of(method="pretrain")
    run = trainer_of(task, tmp_path, settings, per_device_train_batch_size=6, **ESTIMATES["none"])
    rows, module = cast(Any, run.train_dataset), cast(EncoderPretraining, run.model.train())
    assert isinstance(rows, ClassifierRows)
    domain = data_of(task, settings).seen[0]
    assert len(rows) == sum(len(domain.members[label]) for label in domain.split("base")) == 12 * 24
    batch = default_collate([rows[index] for index in (0, 30, 100, 287)])
    assert batch["labels"].tolist() == [0, 1, 4, 11]
    loss = module.mean_inner_loss(batch)
    maps = module.base.encode(batch["images"]).mean((2, 3))
    torch.testing.assert_close(loss, F.cross_entropy(module.base.aux_head(maps), batch["labels"]), rtol=1e-4, atol=0)
    first = rows[5]["images"]
    assert torch.equal(first, rows[5]["images"])
    rows.set_epoch(1)
    assert not torch.equal(first, rows[5]["images"])


def test_the_warm_up_is_where_others_start(task: FewShotTask, tmp_path: Path) -> None:
    settings = settings_of(method="pretrain")
    run = trainer_of(task, tmp_path / "warm", settings, per_device_train_batch_size=4, **ESTIMATES["none"])
    start = base_weights(run)
    run.train()
    assert set(different(base_weights(run), start)) == set(start)  # the encoder and its classifier: no other head
    assert task.score(run, settings, data_of(task, settings))["accuracy"] >= 0
    run.save_model()
    begun = trainer_of(task, tmp_path, settings_of(encoder=str(tmp_path / "warm")))
    encoder = dict(run.model.base.encoder.state_dict())
    assert not different(dict(begun.model.base.encoder.state_dict()), encoder)
    fresh = base_weights(trainer_of(task, tmp_path))
    assert all(torch.equal(fresh[name], leaf) for name, leaf in base_weights(begun).items() if "encoder" not in name)


@pytest.mark.parametrize(("size", "drop", "refused"), [(1, False, True), (41, False, True), (41, True, False),
                                                       (2, False, False)])  # fmt: skip
def test_a_batch_of_one_image_is_refused(
    task: FewShotTask, tmp_path: Path, size: int, drop: bool, refused: bool
) -> None:
    settings = settings_of(method="pretrain")
    fields = ESTIMATES["none"] | {"per_device_train_batch_size": size, "dataloader_drop_last": drop}
    if refused:
        with pytest.raises(ValueError, match=f"batch_size {size} makes a batch of one image out of 288: set another"):
            trainer_of(task, tmp_path, settings, **fields)
    else:
        trainer_of(task, tmp_path, settings, **fields)


def test_encoders_that_cannot_be_taken(task: FewShotTask, tmp_path: Path) -> None:
    encoder = trainer_of(task, tmp_path).model.base.encoder
    with pytest.raises(ValueError, match="absent is not a folder: give the output folder of a few-shot run"):
        load_encoder(encoder, str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"holds no few-shot model \("):
        load_encoder(encoder, str(tmp_path))
    trainer_of(task, tmp_path, settings_of(width=3)).model.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="has embedding_size 3, the model 2: give backbone, width, channels and"):
        load_encoder(encoder, str(tmp_path / "wide"))
    encoder.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare holds no few-shot model"):
        load_encoder(encoder, str(tmp_path / "bare"))
    (tmp_path / "wide/model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"wide holds no few-shot model \("):
        load_encoder(encoder, str(tmp_path / "wide"))


# What is refused


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"method": "lerned"}, "unknown method 'lerned': did you mean 'learned'.* Valid: learned, fixed, none, pretrain"),
    ({"backbone": "resnet50"}, "unknown backbone 'resnet50': .*Valid: resnet10, resnet18, resnet34"),
    ({"head": "matching"}, "unknown head 'matching': Valid: relation, relation_mse, prototype"),
    ({"ft_noise": "per_image"}, "unknown ft_noise 'per_image': .*Valid: per_batch, per_pass"),
    ({"baseline_episodes": "unseen"}, "unknown baseline_episodes 'unseen': .*Valid: all, seen"),
    ({"n_way": 1}, "n_way must be a whole number of at least 2"),
    ({"n_shot": 0}, "n_shot must be a whole number of at least 1"),
    ({"n_query": 0}, "n_query must be"),
    ({"test_n_query": True}, "test_n_query must be"),
    ({"test_episodes": 1}, "test_episodes must be a whole number of at least 2"),
    ({"val_episodes": 0}, "val_episodes must be"),
    ({"episodes_per_epoch": 0}, "episodes_per_epoch must be"),
    ({"aux_images": 0}, "aux_images must be"),
    ({"width": 0}, "width must be"),
    ({"image_size": 0}, "image_size must be"),
    ({"channels": 2}, "channels must be 1 or 3, not 2"),
    ({"ft_gamma": float("inf")}, "ft_gamma must be a finite number, not inf"),
    ({"ft_beta": float("nan")}, "ft_beta must be a finite number"),
    ({"jitter": 1.5}, "jitter must be between 0 and 1, not 1.5"),
    ({"jitter": float("nan")}, "jitter must be between 0 and 1"),
    ({"crop_scale": [0.5]}, "crop_scale must be two increasing numbers above 0 and at most 1, not"),
    ({"crop_scale": [0.5, 0.4]}, "crop_scale must be"),
    ({"crop_scale": [0.0, 1.0]}, "crop_scale must be"),
    ({"domains": [], "aux_domain": None}, "domains are empty"),
    ({"domains": ["a?classes=half"], "aux_domain": None}, "a.classes=half: unknown classes 'half'"),
    ({"aux_domain": "sand"}, "unknown aux_domain 'sand': .*Valid: ink, chalk, neon"),
    ({"method": "pretrain", "aux_domain": None}, "classes of aux_domain: set it to one of ink, chalk, neon"),
    ({"unseen_domain": "synthetic:chalk"}, "unseen_domain synthetic:chalk is among the domains, as synthetic:chalk"),
    ({"unseen_domain": "x/chalk.npz"}, "is among the domains, as synthetic:chalk: leave it out of them"),
    ({"unseen_domain": "synthetic:ink?name=new"}, "synthetic:ink.name=new is among the domains, as synthetic:ink"),
    ({"domains": ["o?alphabets=A,B&name=a"], "aux_domain": None, "unseen_domain": "o/?alphabets=B,C"}, "is among the"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        settings_of(**settings)
    assert "\n" not in str(caught.value)


DATA: list[tuple[dict[str, Any], str]] = [
    ({"data": "absent"}, "data must be synthetic or the folder where the domains are, absent is neither"),
    ({"domains": [f"d{n}" for n in range(5)], "aux_domain": None}, "synthetic has 5 domains, 6 are asked for"),
    ({"n_way": 7}, "domain sand has 6 novel classes, an episode needs 7: lower n_way, or read it with classes=whole"),
    ({"n_shot": 12, "n_query": 13}, "domain ink: class 'symbol00' has 24 images, an episode needs 12 . 13: lower n_"),
    ({"n_shot": 12, "test_n_query": 13}, "domain sand: class 'symbol03' has 24 images, an episode needs 12 . 13"),
    ({"aux_images": 289}, "aux_images must be from 1 to 288, the base images of ink, got 289"),
    ({"domains": ["synthetic:ink"]}, "a pseudo-unseen domain needs another one beside it: give 2 seen domains or mo"),
    ({"image_mean": [0.5, 0.5]}, "image_mean has 2 numbers for images of 1 channels"),
    ({"image_std": [0.0]}, "image_std must be positive"),
    ({"encoder": "absent"}, "encoder: absent is not a folder"),
]


@pytest.mark.parametrize(("settings", "message"), DATA)
def test_data_that_cannot_serve(task: FewShotTask, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        trainer_of(task, tmp_path, settings_of(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"domains": ["pakced.npz"]},
            r"unknown domain 'pakced.npz': did you mean 'packed.npz'\? Valid: letters, pack",
        ),
        ({"unseen_domain": "cub"}, r"unknown domain 'cub': Valid: .* \(or ORGANISATION/NAME of the Hub\)"),
        ({"domains": ["photos", "packed.npz"], "n_way": 4, "aux_domain": None}, "photos has 3 base classes, an episo"),
        ({"domains": ["letters?alphabets=Gerek&name=a"], "aux_domain": None}, "'Gerek': did you mean 'Greek'"),
    ],
)
def test_folders_that_cannot_serve(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    settings = settings_of(data=str(write_domains(tmp_path / "data")), **REAL | {"aux_domain": None} | fields)
    task = FewShotTask()
    with pytest.raises(ValueError, match=message):
        task.build_trainer(settings, arguments(tmp_path / "out"), data_of(task, settings))


def test_the_tables_are_whole() -> None:
    assert (len(METHODS), len(SETTINGS), len(DATA)) == (4, 31, 10)
    names = [f"synthetic:{look}" for look in LOOKS]
    assert [name_of(one) for one in names] == [read_domain(one).name for one in names] == list(LOOKS)


def test_auxiliary_images_are_of_the_named_domain(task: FewShotTask, tmp_path: Path) -> None:
    run = trainer_of(task, tmp_path, settings_of(aux_domain="neon", aux_images=5))
    module, aux = cast(CrossDomainFewShot, run.model), cast(Auxiliary, cast(Any, run.train_dataset).aux)
    assert (aux.domain.name, aux.images, module.base.config.aux_classes) == ("neon", 5, 12)
    data = data_of(task, settings_of(aux_domain=None))
    assert data.aux is None
