"""2N steps are N steps, a checkpoint and N steps, bit by bit: both levels, every estimator, one process and two."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from metaxl_evo.estimators import ESTIMATORS, make_estimator
from metaxl_evo.training.arguments import EPISODE_RESETS
from metaxl_evo.training.checkpoint import META_STATE
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import on_processes
from tests.training.test_episodes import DRIVEN, INSTANCES, OPTIMIZERS, trainer_of
from tests.training.test_trainer import exploding
from tests.training.tiny import (
    ESTIMATES,
    SHALLOW,
    base_weights,
    different,
    final_state,
    logged,
    meta_weights,
    random_rows,
    reseal,
    same,
    tiny_tagger,
    tiny_trainer,
)

LOGGED = ("loss", "grad_norm", "learning_rate", "meta_loss", "meta_grad_norm", "meta_learning_rate", "eval_loss")


class Drawing(TrainerCallback):
    """Something else that draws random numbers of all three kinds."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002


def resumed(trainer: MetaTrainer, checkpoint: Path | None) -> MetaTrainer:
    """Train with drawing going on beside; the random state that resume finds must not matter."""
    trainer.add_callback(Drawing())
    if checkpoint is not None:
        torch.rand(9), np.random.rand(9), random.random()  # noqa: NPY002
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def run(folder: Path, *, resume: Path | None = None, **fields: Any) -> MetaTrainer:
    """A tagger."""
    settings: dict[str, Any] = {
        "save_strategy": "steps",
        "tagger": tiny_tagger(base=SHALLOW, **fields.pop("task", {})),
    }
    trainer = {"eval_dataset": random_rows(6, seed=9, language=None)}
    return resumed(tiny_trainer(folder, **settings | fields, trainer=trainer), resume)


def run_regression(folder: Path, resume: Path | None = None, **fields: Any) -> MetaTrainer:
    """The small regression that every estimator serves."""
    settings: dict[str, Any] = {"save_strategy": "steps", "meta_optim": "Adam", "meta_learning_rate": 0.01}
    return resumed(trainer_of(folder, **settings | fields), resume)


def assert_same_run(again: MetaTrainer, whole: MetaTrainer) -> None:
    expected, found = final_state(whole), final_state(again)
    assert {key: same(found[key], expected[key]) for key in expected} == dict.fromkeys(expected, True)
    for key in LOGGED:
        assert logged(again, key) == logged(whole, key), key
    assert len(logged(whole, "loss")) == whole.state.max_steps


# Every estimator


def settings_of(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the estimator needs; where it answers at the ends of episodes they are short enough for several."""
    estimator = make_estimator(name, **settings)
    return {
        "estimator": name,
        "estimator_kwargs": settings,
        "episode_length": 2 if estimator.remembers == "trajectory" else 3,
        **OPTIMIZERS["momentum" if estimator.needs_sgd else "adamw"][0],
    }


REMEMBERING = ("greedy", "hyperdistill", "forward_mode")  # across the steps of an episode
RESETS = [
    (name, settings, reset)
    for index, (name, settings) in enumerate(INSTANCES)
    for reset in (EPISODE_RESETS if name in REMEMBERING else EPISODE_RESETS[index % 3 :][:1])
]


@pytest.mark.parametrize(
    ("name", "settings", "reset"),
    RESETS,
    ids=[f"{name}-{'-'.join(map(str, settings.values()))}-{reset}" for name, settings, reset in RESETS],
)
def test_every_estimator_resumes_bit_by_bit(tmp_path: Path, name: str, settings: dict[str, Any], reset: str) -> None:
    """Two of three steps of the second epoch are still to come, within an episode but for a trajectory; dropout is on.

    An epoch is two steps of two micro-batches and one of one.
    """
    fields: dict[str, Any] = {
        **settings_of(name, settings),
        "episode_reset": reset,
        "episode_reptile_rate": 0.5,
        "gradient_accumulation_steps": 2,
        "dropout": 0.3,
        "max_steps": 8,
        "save_steps": 4,
    }
    whole = run_regression(tmp_path / "whole", **fields)
    again = run_regression(tmp_path / "again", tmp_path / "whole" / "checkpoint-4", **fields)
    assert_same_run(again, whole)
    assert different(meta_weights(whole), meta_weights(trainer_of(tmp_path)))
    assert logged(whole, "epoch")[3] == pytest.approx(1.4)  # in batches: 2 of 5
    assert len(logged(again, "meta_loss")) >= 2


def test_every_estimator_is_among_them() -> None:
    assert DRIVEN.keys() == ESTIMATORS.keys()
    assert len(INSTANCES) == 14
    assert {reset for *_, reset in RESETS} == set(EPISODE_RESETS)
    assert len(RESETS) == 26


# The tagger

RESUMED: dict[str, dict[str, Any]] = {  # other engines and estimators remember nothing between its steps
    "jvp": ESTIMATES["jvp"],
    "none": {"estimator": "none"},
    "lookahead": {"meta_order": "lookahead"},
    "meta dropout, own masks": {
        "estimator": "evograd",
        "meta_dropout": True,
        "estimator_kwargs": {"share_randomness": False, "antithetic": True},
    },
    "every other step": {"meta_every": 2, "meta_optim": "Adam", "meta_warmup_steps": 3},
    "coupled L2": {"optimizer_class": "Adam", "weight_decay": 0.1, "warmup_steps": 2},
    "drops": {"lr_scheduler_type": "constant", "lr_milestones": [0.375, 0.5, 0.75], "warmup_steps": 2},
    "momentum": {
        "optimizer_class": "SGD",
        "optimizer_kwargs": {"momentum": 0.9, "nesterov": True},
        "meta_optim": "SGD",
        "meta_optim_kwargs": {"momentum": 0.9},
    },
    "sign halving": {"meta_optim": "SignHalving", "meta_learning_rate": 0.1},
    "diagnostics": {"meta_diagnostics_every": 3, **ESTIMATES["evograd"]},
    "float64": {"task": {"dtype": torch.float64}},
    "weights of sources": {"task": {"languages": ["a", "b"], "reads": "language"}, "meta_learning_rate": 0.1},
    "weights alone": {"task": {"languages": ["a", "b"], "reads": "loss", "transform": False}},
    "best model": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 4,
    },
    "trajectory": {"estimator": "unroll", "episode_length": 2, "episode_reset": "reptile"},
}
CUTS = [*((name, 2, 4) for name in RESUMED), ("jvp", 1, 6), ("jvp", 2, 6)]


@pytest.mark.parametrize(("name", "accumulation", "at"), CUTS)
def test_a_tagger_resumes_bit_by_bit(tmp_path: Path, name: str, accumulation: int, at: int) -> None:
    """24 rows are 6 steps an epoch, 3 with two micro-batches: `at` is within an epoch, and at the end of one."""
    settings: dict[str, Any] = {
        "max_steps": at + 2,
        "gradient_accumulation_steps": accumulation,
        "save_steps": at,
        **RESUMED[name],
    }
    whole = run(tmp_path / "whole", **settings)
    again = run(tmp_path / "again", resume=tmp_path / "whole" / f"checkpoint-{at}", **settings)
    assert_same_run(again, whole)
    start = tiny_trainer(tmp_path, tagger=tiny_tagger(base=SHALLOW, **settings.get("task", {})))
    assert different(base_weights(whole), base_weights(start))
    assert (name == "none") == (not different(meta_weights(whole), meta_weights(start)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["jvp", "evograd"])
def test_a_tagger_resumes_bit_by_bit_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, name: str
) -> None:
    """Kernels that add in any order are replaced by others, or refused."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    settings: dict[str, Any] = {"use_cpu": False, "full_determinism": True, "max_steps": 8, "save_steps": 4}
    whole = run(tmp_path / "whole", **settings | RESUMED[name])
    again = run(tmp_path / "again", resume=tmp_path / "whole" / "checkpoint-4", **settings | RESUMED[name])
    assert whole.args.device.type == "cuda"
    assert_same_run(again, whole)


def test_latest_and_true_go_on_bit_by_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_steps=6, save_steps=2)
    for wanted in ("latest", True):
        folder = tmp_path / str(wanted)
        for step in (2, 4):
            shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        tagger = tiny_tagger(base=SHALLOW)
        trainer = tiny_trainer(folder, tagger=tagger, max_steps=6, save_steps=2, save_strategy="steps")
        trainer.add_callback(Drawing())
        trainer.train(resume_from_checkpoint=wanted)
        assert same(final_state(trainer), final_state(whole))
        assert trainer._initial_global_step == 4
    assert run(tmp_path / "anew", resume=Path("latest"), max_steps=6)._initial_global_step == 0


def test_the_best_checkpoint_gives_both_levels(tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.2])
    trainer = best_of(tmp_path, scores)
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-2"
    saved = load_file(best / "model.safetensors")
    assert different(base_weights(trainer), {name: saved[name] for name in base_weights(trainer)}) == []
    assert different(meta_weights(trainer), load_file(best / "rtn" / "model.safetensors")) == []


def test_a_damaged_best_checkpoint_is_one_line(tmp_path: Path) -> None:
    def scores() -> Iterator[float]:
        yield from (0.1, 0.9)
        file = tmp_path / "checkpoint-2" / "rtn" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        yield 0.2

    trainer = best_of(tmp_path, scores())
    message = r"rtn/model.safetensors is damaged .* or end with the last weights \(load_best_model_at_end: false\)"
    with pytest.raises(ValueError, match=message) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoint-3").is_dir()


def best_of(folder: Path, scores: Iterator[float]) -> MetaTrainer:
    """Three checkpoints, two of them kept, the best by `scores` loaded at the end."""
    return tiny_trainer(
        folder,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        save_total_limit=1,
        trainer={
            "eval_dataset": random_rows(4, seed=9, language=None),
            "compute_metrics": lambda prediction: {"score": next(scores)},
        },
    )


# The controls: an altered state shows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, max_steps=4, save_steps=2)
    return folder


@pytest.mark.parametrize("key", ["rows", "optimizer", "scheduler"])
def test_each_part_of_the_meta_state_matters(finished: Path, tmp_path: Path, key: str) -> None:
    checkpoint = Path(shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2"))
    state = torch.load(checkpoint / META_STATE, weights_only=True)
    if key == "rows":
        state["rows"]["drawn"] += 1
    elif key == "optimizer":
        for held in state["optimizer"]["state"].values():
            held["exp_avg"].mul_(-1.0)
    else:
        state["scheduler"]["last_epoch"] += 1
    torch.save(state, checkpoint / META_STATE)
    reseal(checkpoint)
    again = run(checkpoint.parent, resume=checkpoint, max_steps=4, save_steps=2)
    expected = load_file(finished / "checkpoint-4" / "rtn" / "model.safetensors")
    assert different(meta_weights(again), expected)
    intact = run(checkpoint.parent, resume=finished / "checkpoint-2", max_steps=4, save_steps=2)
    assert different(meta_weights(intact), expected) == []


@pytest.mark.parametrize(
    ("part", "estimator", "reset"),
    [("state", "greedy", "continue"), ("open", "greedy", "continue"), ("start", "one_step", "restart"),
     ("learned", "hyperdistill", "continue")],
)  # fmt: skip
def test_each_part_of_an_episodes_state_matters(tmp_path: Path, part: str, estimator: str, reset: str) -> None:
    fields: dict[str, Any] = {
        "estimator": estimator,
        "max_steps": 8,
        "save_steps": 4,
        "episode_length": 2 if estimator == "hyperdistill" else 3,
        "episode_reset": reset,
        "estimator_kwargs": {"fit_every": 3} if estimator == "hyperdistill" else None,
    }
    whole = run_regression(tmp_path / "whole", **fields)
    file = tmp_path / "whole" / "checkpoint-4" / META_STATE
    saved = torch.load(file, weights_only=True)
    held = saved["episodes"]
    if part == "open":
        held["open"] = False
    elif part == "learned":
        held["learned"]["theta"] *= 2
    else:
        held[part] = {name: 2 * leaf for name, leaf in held[part].items()}
    torch.save(saved, file)
    reseal(file.parent)
    again = run_regression(tmp_path / "again", file.parent, **fields)
    assert different(meta_weights(again), meta_weights(whole))


def test_skipped_meta_steps_are_counted_on(tmp_path: Path) -> None:
    """Two in a row before the checkpoint and one behind it are three in a row."""
    fields: dict[str, Any] = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_skipped_meta_steps": 3,
    }
    counts = []
    for bad, checkpoint in (((0, 2, 3), None), ((1,), str(tmp_path / "checkpoint-4"))):
        trainer = tiny_trainer(tmp_path, tagger=exploding(bad.__contains__), **fields)
        trainer.train(checkpoint)
        counts.append(trainer.skipped_meta_steps)
    assert counts == [3, 4]
    stopped = tiny_trainer(tmp_path, tagger=exploding((0,).__contains__), **fields)
    with pytest.raises(FloatingPointError, match="3 hypergradients in a row were not finite"):
        stopped.train(str(tmp_path / "checkpoint-4"))


def test_a_trajectory_that_was_cut_off_begins_a_new_episode(tmp_path: Path) -> None:
    """The checkpoint of a run's last step may be within an episode, whose remaining steps then make one."""
    fields: dict[str, Any] = {"estimator": "unroll", "episode_length": 4, "save_steps": 4}
    run_regression(tmp_path, max_steps=6, **fields)
    state = torch.load(tmp_path / "checkpoint-6" / META_STATE, weights_only=True)["episodes"]
    assert (state["open"], state["state"]) == (False, None)
    again = run_regression(tmp_path, tmp_path / "checkpoint-6", max_steps=12, **fields)
    assert logged(again, "meta_horizon") == [4, 2, 4]


# Two processes


def parts_that_differ(folder: str) -> dict[str, list[str]]:
    """On one of two ranks: every estimator in turn, whole and resumed."""
    found: dict[str, list[str]] = {}
    for name, settings in INSTANCES:
        place = Path(folder) / f"{name}-{len(found)}"
        fields: dict[str, Any] = {
            **settings_of(name, settings),
            "gradient_accumulation_steps": 2,
            "dropout": 0.3,
            "max_steps": 4,
            "save_steps": 2,
        }
        whole = run_regression(place / "whole", **fields)
        again = run_regression(place / "again", place / "whole" / "checkpoint-2", **fields)
        expected, seen = final_state(whole), final_state(again)
        found[place.name] = [key for key in expected if not same(seen[key], expected[key])]
        assert len(logged(again, "meta_loss")) >= 1
    return found


@pytest.mark.distributed
def test_two_processes_resume_bit_by_bit(tmp_path: Path) -> None:
    """Each rank with its own random state."""
    for found in on_processes(2, parts_that_differ, str(tmp_path)):
        assert len(found) == len(INSTANCES)
        assert {name: parts for name, parts in found.items() if parts} == {}
    first, second = sorted(tmp_path.glob("first_order-0/whole/checkpoint-2/rng_state_*.pth"))
    assert first.read_bytes() != second.read_bytes()
