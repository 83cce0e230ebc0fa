"""Every committed config parses and makes its estimators; the paper's constants are the paper's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import XLMRobertaConfig

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.estimators import ESTIMATORS
from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.plan import Run, plan_runs
from metaxl_evo.experiments.study import Study
from metaxl_evo.experiments.task import Task
from metaxl_evo.long_horizon.sinusoid_task import SinusoidTask
from metaxl_evo.ner.arguments import METHODS, NerArguments, NerTrainingArguments
from metaxl_evo.ner.task import NerTask
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.parser import parse_arguments
from metaxl_evo.training.schedules import steps_of
from metaxl_evo.weighting.mix_task import MixTextTask
from metaxl_evo.weighting.schedule_text_task import ScheduleTextTask
from metaxl_evo.weighting.tag_task import WeightTagsTask
from metaxl_evo.weighting.weight_task import WeightTextTask
from tests.vision_tasks.small import PERTURBED, random_images
from vision_tasks.fewshot_task import FewShotTask
from vision_tasks.hyper_cleaning_task import HyperCleaningTask
from vision_tasks.many_shot_task import ManyShotTask
from vision_tasks.noisy_labels_task import NoisyLabelsTask
from vision_tasks.rotation_task import RotationTask
from vision_tasks.schedule_task import ScheduleData, ScheduleTask

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDER = CONFIGS / "ner"
BACKBONES: dict[str, dict[str, Any]] = {  # what differs from metaxl_one_step
    "afroxlmr_base": {
        "model_name_or_path": "Davlan/afro-xlmr-base",
        "target_languages": ["sw", "ig", "rw"],
        "learning_rate": 5e-5,
    },
    "glot500_base": {"model_name_or_path": "cis-lmu/glot500-base", "learning_rate": 2e-5, "max_length": 256},
    "mdeberta_v3_base": {"model_name_or_path": "microsoft/mdeberta-v3-base", "learning_rate": 5e-5},
    "mmbert_base": {"model_name_or_path": "jhu-clsp/mmBERT-base"},
    "mmbert_small": {"model_name_or_path": "jhu-clsp/mmBERT-small"},
    "mt5_base_encoder": {"model_name_or_path": "google/mt5-base", "learning_rate": 1e-4},
    "xlm_v_base": {"model_name_or_path": "facebook/xlm-v-base", "learning_rate": 2e-5},
    "xlmr_large": {
        "model_name_or_path": "FacebookAI/xlm-roberta-large",
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 6,
        "per_device_meta_batch_size": 6,
        "gradient_accumulation_steps": 2,
    },
}
NAMES = [
    *BACKBONES,
    "joint_training_paper",
    "metaxl_evograd",
    "metaxl_evograd_paper",
    "metaxl_one_step",
    "metaxl_one_step_lora",
    "quickstart",
    "wikiann_cpu",
    "wikiann_cpu_unroll",
]
HUB = {"model_name_or_path": "FacebookAI/xlm-roberta-base", "dataset": "unimelb-nlp/wikiann"}
TARGETS = ["qu", "cdo", "ilo", "xmf", "mhr", "mi", "tk", "gn"]

# Bohdal et al., NeurIPS 2021, section 4.5 and the published code
PAPER: dict[str, Any] = {
    **HUB,
    "source_languages": ["en"],
    "target_languages": TARGETS,
    "method": "metaxl",
    "train_size": 5000,
    "target_train_size": 100,
    "sample_seed": 42,
    "max_length": 200,
    "eval_max_length": 512,
    "rtn_layers": [12],
    "rtn_kind": "gated_tied",
    "rtn_bottleneck": 384,
    "select": "dev",
    "num_train_epochs": 20,
    "per_device_train_batch_size": 12,
    "per_device_meta_batch_size": 12,
    "gradient_accumulation_steps": 1,
    "meta_portion": 0.5,
    "seed": 11,
    "optimizer_class": "Adam",
    "learning_rate": 3e-5,
    "weight_decay": 5e-4,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 10,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "estimator": "evograd",
    "meta_order": "lookahead",
    "meta_dropout": True,
    "meta_optim": "Adam",
    "meta_learning_rate": 1e-6,
    "meta_weight_decay": 5e-4,
    "meta_adam_epsilon": 1e-8,
    "meta_lr_scheduler_type": "linear",
    "meta_warmup_steps": 0.1,
    "meta_max_grad_norm": None,
    "meta_every": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "f1",
}
PAPER_ESTIMATOR = {
    "copies": 2,
    "sigma": 1e-3,
    "temperature": 0.05,
    "noise": "sign",
    "antithetic": False,
    "parameters": "^classifier",
    "share_randomness": False,
    "share_meta_inputs": False,
}
SHARED = ("train_size", "target_train_size", "num_train_epochs", "per_device_train_batch_size", "learning_rate")
EXPECTED: dict[str, dict[str, Any]] = {
    "metaxl_evograd_paper": PAPER,
    "joint_training_paper": {
        **{key: PAPER[key] for key in (*SHARED, "seed", "optimizer_class", "weight_decay", "lr_scheduler_type")},
        **{key: PAPER[key] for key in ("warmup_steps", "per_device_meta_batch_size", "target_languages")},
        **HUB,
        "method": "joint_training",
        "max_grad_norm": 0,
    },
    **{
        name: {
            **{key: PAPER[key] for key in (*SHARED, "max_grad_norm", "warmup_steps", "target_languages", "method")},
            **HUB,
            "meta_portion": 0.5,
            "meta_order": "after_step",
            "meta_weight_decay": 0.0,
            "meta_dropout": False,
            "meta_learning_rate": 1e-3,
            "estimator": estimator,
        }
        for name, estimator in (("metaxl_evograd", "evograd"), ("metaxl_one_step", "one_step"))
    },
    "metaxl_one_step_lora": {  # Hu et al., ICLR 2022, table 9 (RoBERTa base)
        **{key: PAPER[key] for key in ("train_size", "target_train_size", "num_train_epochs")},
        **HUB,
        "target_languages": TARGETS,
        "estimator": "one_step",
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": ["query", "value"],
        "learning_rate": 5e-4,
        "meta_learning_rate": 1e-3,
        "load_best_model_at_end": True,
    },
    **BACKBONES,
    "quickstart": {"model_name_or_path": "synthetic", "dataset": "synthetic", "use_cpu": True},
    "wikiann_cpu": {"target_languages": ["sw", "ig", "rw"], "target_train_size": 100, "use_cpu": True},
    "wikiann_cpu_unroll": {"target_languages": ["sw"], "estimator": "unroll", "episode_length": 20, "use_cpu": True},
}


def parsed(task: Task[Any, Any], file: str, *options: str) -> tuple[RunsArguments, Any, MetaTrainingArguments]:
    given = ["--config", str(CONFIGS / f"{file}.yaml"), "--use_cpu", "true", *options]
    return parse_arguments((RunsArguments, task.settings, task.training), given)


@cache
def read(name: str, *options: str) -> tuple[NerArguments, NerTrainingArguments]:
    return parsed(NerTask(), f"ner/{name}", *options)[1:]


def constants(settings: tuple[Any, ...], names: Iterable[str]) -> dict[str, Any]:
    found = {key: next(getattr(one, key) for one in settings if hasattr(one, key)) for key in names}
    return {key: getattr(value, "value", value) for key, value in found.items()}


def test_the_configs_are_these() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(NAMES)
    assert EXPECTED.keys() == set(NAMES)
    assert len(PAPER) == 40


@pytest.mark.parametrize("name", NAMES)
def test_every_config_makes_its_estimator_and_takes_every_method(name: str) -> None:
    ner, args = read(name)
    assert type(args.make_estimator()) is ESTIMATORS[args.estimator]
    assert ner.method in METHODS
    further = {"weighted": ("--source_weights", "loss")}
    taken = [read(name, "--method", method, *further.get(method, ()))[0].method for method in METHODS]
    assert taken == list(METHODS)
    assert "../" not in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_constants(name: str) -> None:
    assert constants(read(name), EXPECTED[name]) == EXPECTED[name]


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_differs_from_the_recommended_config_in_nothing_else(name: str) -> None:
    names = [field.name for one in read(name) for field in fields(one)]
    found, base = (constants(read(one), names) for one in (name, "metaxl_one_step"))
    assert {key for key in names if found[key] != base[key]} == BACKBONES[name].keys()


def test_the_papers_estimator_and_schedule() -> None:
    ner, args = read("metaxl_evograd_paper")
    estimator = args.make_estimator()
    assert {key: getattr(estimator, key) for key in PAPER_ESTIMATOR} == PAPER_ESTIMATOR
    assert vars(estimator).keys() == PAPER_ESTIMATOR.keys()
    assert ner.train_size is not None
    steps = steps_of(args.num_train_epochs, ner.train_size, args.per_device_train_batch_size, 1)
    assert steps == 20 * 417


# Benchmarks ----------------------------------------------------------------------------------------------------------

BENCHMARKS = {
    "fewshot": "fewshot",
    "horizon": "regression",
    "memory": "regression",
    "peers": "peers",
    "rotation": "rotation",
    "rtn_base": "tagger",
    "rtn_bf16": "tagger",
    "rtn_lora": "tagger",
    "rtn_mini": "tagger",
    "rtn_tiny": "tagger",
    "toy": "regression",
    "weight_net": "weight_net",
    "weight_net_scaling": "weight_net",
    "weight_net_scaling_cpu": "weight_net",
}
CHOSEN = (  # estimators of their own
    *("memory", "peers", "rtn_base", "rtn_bf16", "rtn_lora", "rtn_mini"),
    *("weight_net_scaling", "weight_net_scaling_cpu"),
)


def benchmark(name: str) -> BenchmarkArguments:
    given = ["--config", str(CONFIGS / f"benchmark/{name}.yaml"), "--output_dir", "unused"]
    return parse_arguments((BenchmarkArguments,), given)[0]


def test_the_benchmarks_are_these() -> None:
    assert sorted(path.stem for path in (CONFIGS / "benchmark").iterdir()) == sorted(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_parses_and_makes_its_estimators(name: str) -> None:
    settings = benchmark(name)
    assert settings.problem == BENCHMARKS[name]
    assert all(isinstance(row.make(), ESTIMATORS[row.estimator]) for row in settings.rows())
    assert settings.variants.keys() <= set(settings.estimators)
    if name not in CHOSEN:
        assert settings.estimators == list(ESTIMATORS), "every registered estimator, those to come as well"


def test_the_shape_of_xlmr_base() -> None:
    settings = benchmark("rtn_base")
    config = XLMRobertaConfig(**settings.model)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (12, 768, 250002)
    assert (config.intermediate_size, config.num_attention_heads, config.max_position_embeddings) == (3072, 12, 514)
    assert settings.model == benchmark("rtn_bf16").model == benchmark("peers").case("XLM-R base shape").model
    assert (settings.rtn_layer, settings.length) == ([12, 6], 64)
    assert settings.training == {"per_device_train_batch_size": 12, "per_device_meta_batch_size": 12}
    assert settings.orders == ["after_step", "lookahead"]
    found = {(row.estimator, *row.settings.values()) for row in settings.rows()}
    assert found >= {("one_step", engine) for engine in ("finite_difference", "jvp", "double_backward")}
    assert found >= {("evograd", 2), ("evograd", 8), ("evograd", 2, "^classifier"), ("evograd", 64, "^classifier")}


def test_the_scaling_study_of_the_paper() -> None:
    """Bohdal et al., NeurIPS 2021, section 4.6: width x1 to x5, 301 to 30,001 parameters, number of copies."""
    settings = benchmark("weight_net_scaling")
    assert (settings.backbone, settings.blocks, settings.image_size, settings.image_channels) == (
        "resnet32",
        None,
        32,
        3,
    )
    assert settings.sizes() == [(1, 100), (1, 1000), (1, 10_000), (2, 100), (3, 100), (4, 100), (5, 100)]
    assert settings.orders == ["lookahead"]
    assert settings.training["per_device_train_batch_size"] == settings.training["per_device_meta_batch_size"] == 100
    found = {(row.estimator, *row.settings.values()) for row in settings.rows()}
    assert found == {("one_step", engine) for engine in ("finite_difference", "jvp", "double_backward")} | {
        ("evograd", copies) for copies in (2, 4, 8, 10)
    }


def test_the_scaling_study_in_small_is_the_same_study() -> None:
    full, small = benchmark("weight_net_scaling"), benchmark("weight_net_scaling_cpu")
    assert set(small.sizes()) < set(full.sizes())
    sizes = {"use_cpu", "per_device_train_batch_size", "per_device_meta_batch_size"}
    rest = [{key: value for key, value in one.training.items() if key not in sizes} for one in (full, small)]
    assert rest[0] == rest[1]


# Images --------------------------------------------------------------------------------------------------------------

CLEANING: dict[str, tuple[str, ...]] = {
    "baseline": ("none",),
    "one_step": ("one_step",),
    "neumann": ("neumann", "terms 5", "step 0.1"),
    "greedy": ("greedy", "decay 0.9"),
}
VISION: dict[str, tuple[Any, dict[str, tuple[str, ...]]]] = {  # task, runs: estimator, its fields
    "hyper_cleaning_cpu": (HyperCleaningTask(), CLEANING),
    "hyper_cleaning_paper": (HyperCleaningTask(), CLEANING),
    "noisy_labels_cpu": (
        NoisyLabelsTask(),
        {
            "baseline": ("none",),
            "one_step": ("one_step",),
            "evograd_2": ("evograd", "copies 2", "share_meta_inputs True"),
            "evograd_8": ("evograd", "copies 8", "share_meta_inputs True"),
            "evograd_2_live": ("evograd", "copies 2", "share_meta_inputs False"),
        },
    ),
    "noisy_labels_paper": (
        NoisyLabelsTask(),
        {"baseline": ("none",), "evograd": ("evograd", "copies 2", "share_meta_inputs False")},
    ),
    "rotation_cpu": (
        RotationTask(),
        {
            "baseline": ("none",),
            "one_step": ("one_step",),
            "evograd_2": ("evograd", "copies 2"),
            "evograd_10": ("evograd", "copies 10"),
        },
    ),
    "rotation_paper": (RotationTask(), {"baseline": ("none",), "evograd": ("evograd", "copies 2")}),
}
ELSEWHERE = ("fewshot", "illustration")  # configs with tests of their own
EVOGRAD = {"copies": 2, "sigma": 1e-3, "temperature": 0.05, "noise": "sign", "antithetic": False, "parameters": None}
IMAGE_PAPERS: dict[str, dict[str, Any]] = {
    "hyper_cleaning_paper": {  # ICLR 2025 submission 6297
        "data": "ylecun/mnist",
        "flip_rate": 0.5,
        "train_size": 1000,
        "validation_size": None,
        "seeds": [0, 1, 2, 3, 4],
        "max_steps": 200 * 10,
        "episode_length": 10,
        "meta_every": 10,
        "per_device_train_batch_size": 1000,
        "per_device_meta_batch_size": 10_000,
        "optimizer_class": "SGD",
        "optimizer_kwargs": {"momentum": 0.9},
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "meta_optim": "Adam",
        "meta_learning_rate": 0.1,
        "meta_lr_scheduler_type": "constant",
    },
    "rotation_paper": {  # Bohdal et al., NeurIPS 2021, section 4.2 and the published notebook
        "data": "ylecun/mnist",
        "backbone": "lenet",
        "degrees": 30,
        "train_size": 40_000,
        "meta_size": 10_000,
        "image_mean": [0.1307],
        "image_std": [0.3081],
        "seeds": [1, 23, 345, 4567, 56789],
        "num_train_epochs": 5,
        "per_device_train_batch_size": 128,
        "per_device_meta_batch_size": 128,
        "gradient_accumulation_steps": 1,
        "optimizer_class": "Adam",
        "learning_rate": 1e-3,
        "weight_decay": 0,
        "lr_scheduler_type": "constant",
        "lr_milestones": None,
        "warmup_steps": 0,
        "max_grad_norm": 0,
        "meta_optim": "Adam",
        "meta_learning_rate": 1e-2,
        "meta_weight_decay": 0,
        "meta_adam_epsilon": 1e-8,
        "meta_lr_scheduler_type": "constant",
        "meta_warmup_steps": 0,
        "meta_max_grad_norm": None,
        "meta_order": "after_step",
        "meta_every": 1,
        "meta_portion": 1,
        "estimator": "evograd",
    },
    "noisy_labels_paper": {  # section 4.4 and the published code
        "data": "uoft-cs/cifar10",
        "backbone": "resnet32",
        "width": 1,
        "weight_net_hidden": 100,
        "weight_normalisation": "sum",
        "noise": "flip2",
        "noise_rate": 0.4,
        "train_size": None,
        "meta_size": 1000,
        "meta_data": None,
        "image_size": None,
        "augmentation": "pad_crop_flip",
        "num_train_epochs": 60,
        "per_device_train_batch_size": 100,
        "per_device_meta_batch_size": 100,
        "gradient_accumulation_steps": 1,
        "optimizer_class": "SGD",
        "optimizer_kwargs": {"momentum": 0.9, "nesterov": True},
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "lr_scheduler_type": "constant",
        "lr_milestone_factor": 0.1,
        "warmup_steps": 0,
        "max_grad_norm": 0,
        "meta_optim": "SGD",
        "meta_optim_kwargs": {"momentum": 0.9, "nesterov": True},
        "meta_learning_rate": 1e-3,
        "meta_weight_decay": 5e-4,
        "meta_lr_scheduler_type": "constant",
        "meta_max_grad_norm": None,
        "meta_order": "lookahead",
        "meta_every": 1,
        "meta_portion": 1,
        "estimator": "evograd",
    },
}


@cache
def read_vision(name: str) -> tuple[RunsArguments, Any, MetaTrainingArguments]:
    return parsed(VISION[name][0], f"vision/{name}")


def planned(task: Task[Any, Any], name: str, folder: Path) -> list[Run[Any]]:
    return plan_runs(task, *parsed(task, f"vision/{name}", "--output_dir", str(folder)))


def test_the_vision_configs_are_these() -> None:
    found = [path.stem for path in (CONFIGS / "vision").iterdir()]
    assert sorted(name for name in found if not name.startswith(ELSEWHERE)) == sorted(VISION)
    assert len(VISION) == 6
    assert [len(one) for one in IMAGE_PAPERS.values()] == [17, 30, 34]


@pytest.mark.parametrize("name", VISION)
def test_every_vision_config_plans_its_runs(name: str, tmp_path: Path) -> None:
    task, expected = VISION[name]
    which, settings, _ = read_vision(name)
    runs = planned(task, name, tmp_path)
    assert len(runs) == len(expected) * len(which.seeds or ())
    assert len({run.folder for run in runs}) == len(runs)
    assert next(iter(expected)) == "baseline"  # of the others
    for run in runs:
        kind, *held = expected[run.name]
        estimator = run.args.make_estimator()
        assert (estimator is None) == (kind == "none") == (not task.learns(run.settings))
        assert estimator is None or type(estimator) is ESTIMATORS[kind]
        for key, value in (one.split() for one in held):
            assert str(getattr(estimator, key)) == value
        assert (run.args.seed, run.args.meta_portion, run.args.max_grad_norm) == (run.seed, 1, 0)
    text = (CONFIGS / f"vision/{name}.yaml").read_text(encoding="utf-8")
    assert "../" not in text
    assert (settings.data == "synthetic") == name.endswith("_cpu")  # real images come by the command line


@pytest.mark.parametrize("name", IMAGE_PAPERS)
def test_the_constants_of_the_image_papers(name: str) -> None:
    assert constants(read_vision(name), IMAGE_PAPERS[name]) == IMAGE_PAPERS[name]


@pytest.mark.parametrize("name", IMAGE_PAPERS)
def test_the_image_papers_estimator(name: str, tmp_path: Path) -> None:
    for run in planned(VISION[name][0], name, tmp_path):
        if run.name == "evograd":
            estimator = run.args.make_estimator()
            assert {key: getattr(estimator, key) for key in EVOGRAD} == EVOGRAD


def test_the_noisy_labels_papers_schedule_and_pixels() -> None:
    """Drops at epochs 40 and 50 of 490 steps each; pixel statistics in 1/255."""
    which, settings, args = read_vision("noisy_labels_paper")
    steps = steps_of(args.num_train_epochs, 50_000 - settings.meta_size, args.per_device_train_batch_size, 1)
    assert steps == 60 * 490
    assert [round(share * steps) for share in args.lr_milestones or ()] == [40 * 490, 50 * 490]
    assert settings.image_mean == pytest.approx([125.3 / 255, 123.0 / 255, 113.9 / 255], abs=5e-6)
    assert settings.image_std == pytest.approx([63.0 / 255, 62.1 / 255, 66.7 / 255], abs=5e-6)
    assert len(which.seeds or ()) == 5


# Weighting ---------------------------------------------------------------------------------------------------------

WEIGHTING: dict[str, tuple[Task[Any, Any], dict[str, str]]] = {  # task, runs: estimator
    "mix_text_brown": (MixTextTask(), {"union": "none", "uniform": "none", "one_step": "one_step"}),
    "mix_text_cpu": (MixTextTask(), {"union": "none", "uniform": "none", "one_step": "one_step"}),
    "schedule_text_cpu": (ScheduleTextTask(), {"fds": "forward_mode", "random_search": "none"}),
    "weight_tags_cpu": (
        WeightTagsTask(),
        {"plain": "none", "union": "none", "clean_only": "none", "sentences": "one_step", "words": "one_step"},
    ),
    "weight_text_cpu": (
        WeightTextTask(),
        {
            "plain": "none",
            "union": "none",
            "clean_only": "none",
            "one_step": "one_step",
            "one_step_each": "one_step",
        },
    ),
}


def test_the_weighting_configs_are_these() -> None:
    assert sorted(path.stem for path in (CONFIGS / "weighting").iterdir()) == sorted(WEIGHTING)


@pytest.mark.parametrize("name", WEIGHTING)
def test_every_weighting_config_plans_its_runs(name: str, tmp_path: Path) -> None:
    task, expected = WEIGHTING[name]
    parts = parsed(task, f"weighting/{name}", "--output_dir", str(tmp_path))
    runs = plan_runs(task, *parts)
    found = {run.name: run.args.estimator if task.learns(run.settings) else "none" for run in runs}
    assert found == expected
    assert len(runs) == 3 * len(expected)


# Few-shot learning ---------------------------------------------------------------------------------------------------

FEWSHOT = {  # runs: method, estimator
    "fewshot_cpu": {
        "none": ("none", "none"),
        "fixed": ("fixed", "none"),
        "none_seen": ("none", "none"),
        "fixed_seen": ("fixed", "none"),
        "evograd": ("learned", "evograd"),
        "one_step": ("learned", "one_step"),
    },
    "fewshot_paper": {"none": ("none", "none"), "fixed": ("fixed", "none"), "evograd": ("learned", "evograd")},
    "fewshot_pretrain_paper": {"run": ("pretrain", "none")},
}
FEWSHOT_PAPER: dict[str, Any] = {  # Bohdal et al., NeurIPS 2021, section 4.3, and the published code
    "domains": [
        "miniImagenet",
        "cars",
        "places?images_per_class=200",
        "plantae?largest_classes=200&images_per_class=600",
    ],
    "unseen_domain": "cub",
    "backbone": "resnet10",
    "width": 64,
    "head": "relation",
    "n_way": 5,
    "n_shot": 5,
    "n_query": 16,
    "test_n_query": 15,
    "test_episodes": 1000,
    "episodes_per_epoch": 100,
    "baseline_episodes": "all",
    "aux_domain": "miniImagenet",
    "aux_images": 16,
    "ft_gamma": 0.3,
    "ft_beta": 0.5,
    "image_size": 224,
    "channels": 3,
    "crop_scale": [0.08, 1.0],
    "jitter": 0.4,
    "flips": True,
    "num_train_epochs": 400,
    "per_device_train_batch_size": 1,
    "per_device_meta_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "optimizer_class": "Adam",
    "learning_rate": 1e-3,
    "weight_decay": 0,
    "adam_epsilon": 1e-8,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "meta_optim": "Adam",
    "meta_learning_rate": 1e-3,
    "meta_weight_decay": 1e-8,
    "meta_adam_epsilon": 1e-8,
    "meta_lr_scheduler_type": "constant",
    "meta_max_grad_norm": None,
    "meta_order": "after_step",
    "meta_every": 1,
    "estimator": "evograd",
}
WARM_UP = {
    "num_train_epochs": 400,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "optimizer_class": "Adam",
}


def read_fewshot(name: str, *options: str) -> tuple[RunsArguments, Any, MetaTrainingArguments]:
    return parsed(FewShotTask(), f"vision/{name}", *options)


def test_the_fewshot_configs_are_these() -> None:
    assert sorted(path.stem for path in (CONFIGS / "vision").glob("fewshot*")) == sorted(FEWSHOT)
    assert len(FEWSHOT_PAPER) == 41


@pytest.mark.parametrize("name", FEWSHOT)
def test_every_fewshot_config_plans_its_runs(name: str, tmp_path: Path) -> None:
    which, settings, _ = read_fewshot(name)
    runs = planned(FewShotTask(), name, tmp_path)
    assert {run.name: (run.settings.method, run.args.estimator) for run in runs} == FEWSHOT[name]
    assert len(runs) == len(FEWSHOT[name]) * len(which.seeds or [0])
    assert {run.args.meta_portion for run in runs} == {1}
    assert settings.data == "synthetic"  # real images come by the command line
    assert "../" not in (CONFIGS / f"vision/{name}.yaml").read_text(encoding="utf-8")


def test_the_constants_of_the_fewshot_paper() -> None:
    assert constants(read_fewshot("fewshot_paper"), FEWSHOT_PAPER) == FEWSHOT_PAPER


def test_the_fewshot_papers_estimator_and_warm_up(tmp_path: Path) -> None:
    *baselines, evograd = planned(FewShotTask(), "fewshot_paper", tmp_path)
    estimator = evograd.args.make_estimator()
    assert {key: getattr(estimator, key) for key in EVOGRAD} == EVOGRAD | {"parameters": PERTURBED}
    small = read_fewshot("fewshot_cpu")[0].runs
    assert small["evograd"]["estimator_kwargs"] == {"parameters": PERTURBED}
    assert [run.settings.aux_domain for run in (*baselines, evograd)] == [None, None, "miniImagenet"]
    _, warm, args = read_fewshot("fewshot_pretrain_paper")
    learned = evograd.settings
    assert (warm.backbone, warm.width, warm.image_size) == (learned.backbone, learned.width, learned.image_size)
    assert {key: getattr(args, key) for key in WARM_UP} == WARM_UP


def test_the_other_rows_of_the_fewshot_paper() -> None:
    """The commands that the header of the config gives."""
    seen = ["miniImagenet", "cub", *FEWSHOT_PAPER["domains"][2:]]
    given = ["--unseen_domain", "cars", "--domains", json.dumps(seen), "--n_shot", "1", "--backbone", "resnet34"]
    which, settings, _ = read_fewshot("fewshot_paper", *given, "--runs.t1_t2.estimator", "one_step")
    assert (settings.unseen_domain, settings.domains, settings.n_shot) == ("cars", seen, 1)
    assert list(which.runs) == ["none", "fixed", "evograd", "t1_t2"]


# Schedules -----------------------------------------------------------------------------------------------------------

FDS: dict[str, Any] = {  # Micaelli and Storkey, NeurIPS 2021, as its published code has them
    "data": "uoft-cs/cifar10",
    "backbone": "wrn_16_1",
    "image_mean": [0.4914, 0.4822, 0.4465],
    "image_std": [0.2023, 0.1994, 0.2010],
    "augmentation": "pad_crop_flip",
    "validation_share": 0.05,
    "outer_steps": 10,
    "n_momentum": 1,
    "n_wd": 1,
    **dict.fromkeys(("initial_lr", "initial_momentum", "initial_wd"), 0),
    "out_of_bounds": "allow",
    "retrain_steps": 50 * (50_000 // 256),
    "per_device_train_batch_size": 256,
    "estimator": "forward_mode",
    "max_grad_value": 3,
    "max_grad_norm": 0,
    "optimizer_class": "SGD",
    "meta_optim": "SignHalving",
    "meta_learning_rate": 0.1,
    "meta_lr_scheduler_type": "constant",
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "fds_figure1": FDS
    | {
        "n_lr": 7,
        "inner_steps": 7 * 265,  # 10 epochs are 1,850
        "seeds": [0],
        "estimator_kwargs": {"clamp": 1},
        "meta_learning_rates": {"weight_decay": 3e-4},
    },
    "fds_figure4": FDS
    | {
        "n_lr": 5,
        "inner_steps": 50 * (47_500 // 256),
        "seeds": [1],
        "estimator_kwargs": {"clamp": 100},
        "meta_learning_rates": {"momentum": 0.3, "weight_decay": 4e-4},
    },
    "fds_cpu": {"data": "synthetic", "inner_steps": 1000, "outer_steps": 4, "seeds": [0, 1, 2]},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedules_of_fds(name: str, tmp_path: Path) -> None:
    """The constants; every run is planned, and fits the episode."""
    task, given = ScheduleTask(), ("--output_dir", str(tmp_path))
    read = parsed(task, f"long_horizon/{name}", *given)
    assert constants(read, SCHEDULES[name]) == SCHEDULES[name]
    data = ScheduleData(random_images(200), random_images(20))
    for run in plan_runs(task, *read):
        estimator = {"fds": "forward_mode", "greedy": "one_step"}.get(run.name, "none")
        fitted = task.fit_arguments(run.settings, run.args, data)
        assert fitted.estimator == estimator
        assert fitted.episode_length == run.settings.inner_steps
        assert fitted.max_steps % fitted.episode_length == 0
        assert (run.name == "fds") == (fitted.max_steps == run.settings.inner_steps * run.settings.outer_steps)


# Studies -------------------------------------------------------------------------------------------------------------

STUDIES = {  # cases, seeds, runs, the first of which is a baseline
    "fewshot_cpu": ([""], 3, 6),
    "hyper_cleaning_cpu": ([""], 3, 4),
    "many_shot_cpu": ([""], 3, 5),
    "mix_text_brown": ([""], 3, 6),
    "ner_cpu": (["sw", "mt", "ig"], 3, 4),
    "noisy_labels_cpu": (["0", "0.2", "0.4"], 3, 5),
    "pos_cpu": (["ha", "ig", "rw", "sw"], 3, 4),
    "quickstart": (["beru", "celu"], 2, 3),
    "rotation_cpu": ([""], 3, 4),
    "rotation_paper": ([""], 5, 3),
    "sentiment_cpu": (["ha", "ig", "rw", "sw"], 3, 4),
    "rtn_horizon_cpu": (["sw"], 3, 3),
    "rtn_weights_sw": (["sw"], 3, 5),
    "sinusoid_paper": ([""], 5, 5),
    "schedule_cpu": ([""], 3, 3),
    "sources_mt": (["mt"], 3, 7),
    "weight_tags_distant": ([""], 3, 5),
    "weight_text_polarity": (["0", "0.4"], 3, 8),
}


def test_the_studies_are_these() -> None:
    assert sorted(path.stem for path in (CONFIGS / "study").iterdir()) == sorted(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_plans_its_runs(name: str, tmp_path: Path) -> None:
    study = Study(
        ["--config", str(CONFIGS / f"study/{name}.yaml"), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    )
    cases, seeds, runs = STUDIES[name]
    assert list(dict.fromkeys(run.case for run in study.runs)) == cases
    assert len(study.runs) == len(cases) * seeds * runs
    baselines = study.arguments.baselines or [study.runs[0].name]
    expected = "first_order" if name in ("many_shot_cpu", "sinusoid_paper") else "none"  # tasks need their episodes
    assert {run.args.estimator for run in study.runs if run.name in baselines} == {expected}
    assert not list(tmp_path.iterdir())


# Distributions of tasks ----------------------------------------------------------------------------------------------

COLUMNS = ("first_order", "one_step", "drmad", "neumann", "hyperdistill")
HYPERDISTILL: dict[str, Any] = {  # Lee et al., ICLR 2022, section 5 and appendices
    "episode_reset": "reptile",
    "episode_reptile_rate": 1.0,
    "optimizer_class": "SGD",
    "optimizer_kwargs": {"momentum": 0.9},
    "max_grad_norm": 0,
    "lr_scheduler_type": "constant",
    "meta_lr_scheduler_type": "linear",
}
MANY_SHOT: dict[str, Any] = {
    **HYPERDISTILL, "n_way": 10, "images_per_class": 500, "batch_images": 100, "test_images": 2500, "meta_batch": 4,
    "test_tasks": 500, "num_train_epochs": 1000, "episode_length": 100, "learning_rate": 0.01, "conv_channels": 32,
    "meta_optim": "SGD", "meta_optim_kwargs": {"momentum": 0.9}, "meta_learning_rate": 0.001, "flip_rate": 0.0,
}  # fmt: skip
CIFAR100: dict[str, Any] = {
    "train_classes": 50, "validation_classes": 20, "test_classes": 30, "image_size": 32, "conv_layers": 3,
}  # fmt: skip
TASK_PAPERS: dict[str, tuple[Task[Any, Any], tuple[str, ...], dict[str, Any]]] = {
    "sinusoid_paper": (SinusoidTask(), COLUMNS, {
        **HYPERDISTILL, "meta_batch": 10, "shots": 10, "hidden": 100, "test_tasks": 1000, "num_train_epochs": 30,
        "episode_length": 30, "learning_rate": 0.01, "meta_optim": "Adam", "meta_learning_rate": 1e-3,
    }),
    "anil_tinyimagenet_paper": (ManyShotTask(), COLUMNS, {
        **MANY_SHOT, "train_classes": 100, "validation_classes": 40, "test_classes": 60, "image_size": 64,
        "conv_layers": 4, "learner": "anil",
    }),
    "warpgrad_cifar100_paper": (ManyShotTask(), COLUMNS, {**MANY_SHOT, **CIFAR100, "learner": "warpgrad"}),
    "weight_net_cifar100_paper": (ManyShotTask(), COLUMNS[1:], {
        **MANY_SHOT, **CIFAR100, "learner": "weight_net", "flip_rate": 0.4, "learning_rate": 0.1,
        "meta_learning_rate": 0.01, "weight_net_hidden": 200,
    }),
    "many_shot_cpu": (ManyShotTask(), COLUMNS, {"n_way": 5, "conv_channels": 16, "episode_length": 50}),
}  # fmt: skip


@pytest.mark.parametrize("name", TASK_PAPERS)
def test_the_distributions_of_tasks(name: str) -> None:
    """Every run makes its estimator, and the constants are the paper's; neumann's step is the inner learning rate."""
    task, columns, expected = TASK_PAPERS[name]
    which, *settings = parsed(task, f"long_horizon/{name}", "--output_dir", "unused")
    assert constants(settings, expected) == expected
    runs = plan_runs(task, which, *settings)
    assert tuple(dict.fromkeys(run.args.estimator for run in runs)) == columns
    for run in runs:
        estimator = run.args.make_estimator()
        assert getattr(estimator, "step", run.args.learning_rate) == run.args.learning_rate
        assert (run.args.meta_last is None) == (run.args.estimator != "neumann")


def test_the_constants_of_few_shot_omniglot() -> None:
    """ICLR 2025 submission 6297; every class of a task has one image that trains, and ten that judge."""
    expected = {
        "learner": "alternating", "conv_layers": 3, "conv_channels": 32, "image_size": 28, "n_way": 5, "shots": 1,
        "images_per_class": 11, "batch_images": 5, "judge_images": 50, "learning_rate": 0.1, "max_grad_norm": 0,
        "optimizer_class": "SGD", "optimizer_kwargs": {"momentum": 0.9}, "episode_length": 5, "meta_every": 5,
        "num_train_epochs": 2000, "meta_optim": "Adam", "meta_learning_rate": 1e-3,
    }  # fmt: skip
    which, *settings = parsed(ManyShotTask(), "long_horizon/omniglot_paper", "--output_dir", "unused")
    assert constants(settings, expected) == expected
    made = {run.name: run.args.make_estimator() for run in plan_runs(ManyShotTask(), which, *settings)}
    assert list(made) == ["first_order", "one_step", "neumann", "greedy"]
    assert (made["neumann"].terms, made["neumann"].step, made["greedy"].decay) == (2, 0.1, 0.9)


def test_the_constants_of_one_long_training() -> None:
    """HyperDistill, appendix H: half of CIFAR-10 judges."""
    expected = {
        "meta_size": 25_000, "noise_rate": 0.4, "weight_net_hidden": 200, "max_steps": 10_000, "learning_rate": 0.01,
        "optimizer_class": "SGD", "optimizer_kwargs": {"momentum": 0.9}, "meta_learning_rate": 0.01,
        "meta_optim": "SGD", "meta_optim_kwargs": {"momentum": 0.9},
    }  # fmt: skip
    which, *settings = parsed(NoisyLabelsTask(), "long_horizon/one_training_cifar10_paper", "--output_dir", "unused")
    assert constants(settings, expected) == expected
    made = {run.name: run.args for run in plan_runs(NoisyLabelsTask(), which, *settings)}
    assert list(made) == ["one_step", "neumann", "hyperdistill"]
    neumann, hyperdistill = made["neumann"].make_estimator(), made["hyperdistill"].make_estimator()
    assert (neumann.terms, made["neumann"].meta_every, hyperdistill.decay) == (5, 5, 0.9)
