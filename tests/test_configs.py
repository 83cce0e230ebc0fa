"""Every committed config parses and makes its estimators; the paper's constants are the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import XLMRobertaConfig

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.estimators import ESTIMATORS
from metaxl_evo.ner.arguments import METHODS, NerArguments, steps_of
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.cli import parse_arguments

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDER = CONFIGS / "ner"
NAMES = [
    "joint_training_paper",
    "metaxl_evograd",
    "metaxl_evograd_paper",
    "metaxl_one_step",
    "metaxl_one_step_lora",
    "quickstart",
    "wikiann_cpu",
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
    "quickstart": {"model_name_or_path": "synthetic", "dataset": "synthetic", "use_cpu": True},
    "wikiann_cpu": {"target_languages": ["sw", "ig", "rw"], "target_train_size": 100, "use_cpu": True},
}


def read(name: str, *options: str) -> tuple[NerArguments, MetaTrainingArguments]:
    given = ["--config", str(FOLDER / f"{name}.yaml"), "--use_cpu", "true", *options]
    return parse_arguments((NerArguments, MetaTrainingArguments), given)


def value(name: str, key: str) -> Any:
    found = next(getattr(one, key) for one in read(name) if hasattr(one, key))
    return getattr(found, "value", found)


def test_the_configs_are_these() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == NAMES
    assert sorted(EXPECTED) == NAMES
    assert len(PAPER) == 40


@pytest.mark.parametrize("name", NAMES)
def test_every_config_parses_and_makes_its_estimator(name: str) -> None:
    ner, args = read(name)
    assert type(args.make_estimator()) is ESTIMATORS[args.estimator]
    assert ner.method in METHODS
    assert "../" not in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_config_takes_every_method(name: str, method: str) -> None:
    assert read(name, "--method", method)[0].method == method


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, row in EXPECTED.items() for key in row])
def test_the_constants(name: str, key: str) -> None:
    assert value(name, key) == EXPECTED[name][key]


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
    "horizon": "regression",
    "peers": "peers",
    "rtn_base": "tagger",
    "rtn_lora": "tagger",
    "rtn_tiny": "tagger",
    "toy": "regression",
    "weight_net": "weight_net",
}


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
    if name not in ("peers", "rtn_base", "rtn_lora"):
        assert settings.estimators == list(ESTIMATORS), "every registered estimator, those to come as well"


def test_the_shape_of_xlmr_base() -> None:
    settings = benchmark("rtn_base")
    config = XLMRobertaConfig(**settings.model)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (12, 768, 250002)
    assert (config.intermediate_size, config.num_attention_heads, config.max_position_embeddings) == (3072, 12, 514)
    assert (settings.rtn_layer, settings.length) == ([12, 6], 64)
    assert settings.training == {"per_device_train_batch_size": 12, "per_device_meta_batch_size": 12}
    assert settings.orders == ["after_step", "lookahead"]
    found = {(row.estimator, *row.settings.values()) for row in settings.rows()}
    assert found >= {("one_step", engine) for engine in ("finite_difference", "jvp", "double_backward")}
    assert found >= {("evograd", 2), ("evograd", 8), ("evograd", 2, "^classifier"), ("evograd", 64, "^classifier")}
