"""One loss, gradient norm and hypergradient however a batch of eight rows is cut up; processes that stay alike."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback

from metaxl_evo.bilevel import Tree, tree
from metaxl_evo.estimators import ESTIMATORS, make_estimator
from metaxl_evo.training.synchrony import different, require_synchrony, synchronise
from metaxl_evo.training.trainer import MetaTrainer
from tests.processes import on_processes
from tests.training.test_check import checked
from tests.training.test_episodes import INSTANCES, OPTIMIZERS, trainer_of
from tests.training.test_tuned_optimizer import STEPS
from tests.training.test_tuned_optimizer import trainer_of as tuned_trainer
from tests.training.tiny import (
    ESTIMATES,
    ORDERS,
    Hypergradients,
    base_weights,
    final_state,
    logged,
    meta_weights,
    random_rows,
    same,
    tiny_tagger,
    tiny_trainer,
)

pytestmark = pytest.mark.distributed

ROWS = 8  # of an optimizer step
LAYOUTS = {"8 x 1": (1, 1), "4 x 2": (1, 2), "2 processes x 4 x 1": (2, 1), "2 processes x 2 x 2": (2, 2)}
CUT_UP = ("4 x 2", "2 processes x 2 x 2", pytest.param("2 processes x 4 x 1", marks=pytest.mark.slow))


def orders_of(index: int, name: str, settings: dict[str, Any]) -> tuple[str, ...]:
    """Those that answer online in one of the orders by turns, greedy and EvoGrad in both."""
    if not make_estimator(name, **settings).online:
        return ORDERS[:1]
    return ORDERS if name in ("greedy", "evograd") else (ORDERS[index % 2],)


REGRESSIONS = {
    f"{name} {settings} {order}": {
        "estimator": name,
        "estimator_kwargs": settings,
        "meta_order": order,
        "episode_length": 2,
        **OPTIMIZERS["momentum" if make_estimator(name, **settings).needs_sgd else "adamw"][0],
    }
    for index, (name, settings) in enumerate(INSTANCES)
    for order in orders_of(index, name, settings)
}
TAGGERS = {
    f"{name} {order}": {**ESTIMATES[name], "meta_order": order}
    for index, name in enumerate(ESTIMATES)
    for order in (ORDERS if name == "jvp" else (ORDERS[index % 2],))
}
TAGGERS["one_sided after_step"] = {
    "estimator_kwargs": {"engine": "finite_difference", "radius": 1e-4, "differences": "one_sided"}
}
SOURCES = {"languages": ("a", "b", "c")}
TAGGERS |= {
    f"weights by {reads}": {**ESTIMATES[name], "task": {"reads": reads, **SOURCES}}
    for reads, name in [("language", "jvp"), ("loss", "finite_difference"), ("hidden", "double_backward")]
}
ROUGH = ("evograd", "finite_difference")  # whose own rounding in float32 is of the order of 1e-4
LOGGED = ("loss", "grad_norm", "meta_loss", "meta_cosine_to_exact", "meta_norm_by_exact")
LEARNERS: list[tuple[str, dict[str, Any]]] = [
    ("one_step", {}),
    ("greedy", {}),
    ("hyperdistill", {"scale": "normalize"}),
    ("forward_mode", {"windows": 3}),
    ("unroll", {}),
    ("unroll", {"horizon": 2}),
]
TUNED: dict[str, dict[str, Any]] = {
    f"tuned {name} {settings} {order}": {"estimator": name, "estimator_kwargs": settings, "meta_order": order}
    for name, settings in LEARNERS
    for order in ORDERS[: 2 if make_estimator(name, **settings).online else 1]
}
DIAGNOSED: dict[str, dict[str, Any]] = {
    "diagnosed evograd": {"estimator": "evograd"},
    "diagnosed sama": {"estimator": "sama", "meta_order": "lookahead"},
}
Record = dict[str, Any]


def noted(trainer: MetaTrainer) -> Record:
    """Train, and note every hypergradient on the way."""
    noted = Hypergradients()
    trainer.add_callback(noted)
    trainer.train()
    return {
        "hypergradients": noted.grads,
        "logs": {key: logged(trainer, key) for key in LOGGED},
        "state": {name: held for name, held in final_state(trainer).items() if name != "random"},
        "weights": {**base_weights(trainer), **meta_weights(trainer)},
    }


def cut_up(processes: int, accumulation: int) -> dict[str, Any]:
    rows = ROWS // processes // accumulation
    return {
        "per_device_train_batch_size": rows,
        "per_device_meta_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
    }


def regressions(processes: int, accumulation: int) -> dict[str, Record]:
    """Every estimator; the last draw of meta rows is one row, which one process has in one micro-batch."""
    fields = {"max_steps": 4, "train_rows": 24, **cut_up(processes, accumulation)}
    with tempfile.TemporaryDirectory() as folder:
        return {key: noted(trainer_of(Path(folder), **fields | settings)) for key, settings in REGRESSIONS.items()}


def taggers(processes: int, accumulation: int, dtype: torch.dtype) -> dict[str, Record]:
    """Rows of very different numbers of tokens; the touched rows of the embeddings differ from process to process."""

    def trainer(folder: str, settings: dict[str, Any]) -> MetaTrainer:
        task = settings.get("task", {})
        settings = {key: value for key, value in settings.items() if key != "task"}
        return tiny_trainer(
            folder,
            tagger=tiny_tagger(dtype, dropout=False, **task),
            train=random_rows(24, seed=1, language=[0, 2, 2, 1] if task else 0, length=20),
            meta=random_rows(24, seed=2, length=20),
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=0.5,
            meta_optim="SGD",
            **cut_up(processes, accumulation) | settings,
        )

    cases = TAGGERS
    if dtype == torch.float32:  # whose digits a radius of 1e-4 would leave none of
        cases = {key: TAGGERS[key] for key in ("jvp after_step", "evograd lookahead", "evograd_head after_step")}
        cases["finite_difference lookahead"] = {
            "estimator_kwargs": {"engine": "finite_difference"},
            "meta_order": "lookahead",
        }

    with tempfile.TemporaryDirectory() as folder:
        return {key: noted(trainer(folder, settings)) for key, settings in cases.items()}


def tuned_and_diagnosed(processes: int, accumulation: int) -> dict[str, Record]:
    """A learned schedule, momentum and decay, whose terms every process knows whole; and live diagnostics."""
    fields = {"logging_steps": 1, "meta_learning_rate": 0.01} | cut_up(processes, accumulation)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, settings in TUNED.items():
            online = make_estimator(settings["estimator"], **settings["estimator_kwargs"]).online
            found[key] = noted(tuned_trainer(Path(folder), **fields | {"meta_every": 1} | settings))
            assert len(found[key]["hypergradients"]) == (STEPS if online else 1)
        for key, settings in DIAGNOSED.items():
            tagger, every = tiny_tagger(torch.float64, dropout=False), {"max_steps": 4, "meta_diagnostics_every": 2}
            found[key] = noted(tiny_trainer(folder, tagger=tagger, **fields | every | settings))
    return found


@cache
def records(what: Callable[..., dict[str, Record]], layout: str, *options: Any) -> list[dict[str, Record]]:
    """Of every process of a layout."""
    processes, accumulation = LAYOUTS[layout]
    if processes == 1:
        return [what(1, accumulation, *options)]
    return on_processes(processes, what, processes, accumulation, *options)


def errors(found: Iterable[Tree], expected: Iterable[Tree]) -> list[float]:
    return [tree.norm(tree.add(a, b, -1.0)) / (tree.norm(b) or 1.0) for a, b in zip(found, expected, strict=True)]


def assert_as_one(ranks: list[dict[str, Record]], one: dict[str, Record], bound: Callable[[str], float]) -> None:
    for key, expected in one.items():
        found = ranks[0][key]
        # In float32 the first alone is taken at weights that are the same, and not the same to a rounding.
        steps = 1 if next(iter(found["weights"].values())).dtype == torch.float32 else None
        worst = max(errors(found["hypergradients"][:steps], expected["hypergradients"][:steps]))
        print(f"{key}: {worst:.1e}")
        assert worst < bound(key), key
        assert max(errors([found["weights"]], [expected["weights"]])) < bound(key), key
        assert expected["hypergradients"]
        for name, values in expected["logs"].items():
            rel = max(bound(key), 3e-7)  # the Trainer adds losses in float32
            assert found["logs"][name] == pytest.approx(values, rel=rel), (key, name)
        assert len(expected["logs"]["grad_norm"]) == len(expected["logs"]["loss"])
        for other in ranks[1:]:
            assert same(other[key], found), key  # ranks agree to the last bit


def test_every_estimator_is_driven() -> None:
    assert {settings["estimator"] for settings in REGRESSIONS.values()} == ESTIMATORS.keys()
    assert (len(REGRESSIONS), len(TAGGERS)) == (16, 10)


@pytest.mark.parametrize("layout", CUT_UP)
def test_every_estimator_is_the_same_however_a_batch_is_cut_up(layout: str) -> None:
    one = records(regressions, "8 x 1")[0]
    assert_as_one(records(regressions, layout), one, lambda key: 1e-10)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param("4 x 2", torch.float64, marks=pytest.mark.slow),
        ("2 processes x 2 x 2", torch.float64),
        pytest.param("2 processes x 4 x 1", torch.float64, marks=pytest.mark.slow),
        pytest.param("2 processes x 4 x 1", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_tagger_is_the_same_however_a_batch_is_cut_up(layout: str, dtype: torch.dtype) -> None:
    def bound(key: str) -> float:
        if dtype == torch.float64:
            return 1e-10
        return 1e-4 if key.startswith(ROUGH) else 1e-6

    assert_as_one(records(taggers, layout, dtype), records(taggers, "8 x 1", dtype)[0], bound)


@pytest.mark.slow
def test_learned_optimisers_and_diagnostics_are_the_same() -> None:
    one = records(tuned_and_diagnosed, "8 x 1")[0]
    assert len(TUNED) == 11
    assert all(len(one[key]["logs"]["meta_cosine_to_exact"]) == 2 for key in DIAGNOSED)
    found = records(tuned_and_diagnosed, "2 processes x 2 x 2")
    assert_as_one(found, one, lambda key: 1e-10)


def check_here(processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found, _ = checked(Path(folder), lambda: tiny_tagger(torch.float64, dropout=False), **cut_up(processes, 1))
    return {key: value for key, value in found.items() if key not in ("seconds_per_step", "times_the_plain_step")}


def test_the_check_finds_the_same_on_two_processes() -> None:
    first, second = on_processes(2, check_here, 2)
    one = check_here(1)
    assert first == second
    assert first.keys() == one.keys()
    assert first["problems"] == first["warnings"] == one["problems"] == []
    for key, value in one.items():
        expected = pytest.approx(value, rel=1e-6) if isinstance(value, float | list) and value else value
        assert first[key] == expected, key


def run_long(steps: int) -> dict[str, Any]:
    """With dropout on, which draws other masks on every process."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in ("jvp", "finite_difference", "evograd", "evograd_head"):
            torch.manual_seed(int(PartialState(cpu=True).process_index))  # what was drawn before does not matter
            trainer = tiny_trainer(Path(folder), max_steps=steps, **cut_up(2, 1), **ESTIMATES[name])
            trainer.train()
            found[name] = {key: held for key, held in final_state(trainer).items() if key != "random"}
            found[name]["moved"] = logged(trainer, "meta_grad_norm")
        return found


@pytest.mark.parametrize("steps", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_ranks_are_bit_identical_after_many_steps(steps: int) -> None:
    first, second = on_processes(2, run_long, steps)
    assert len(first) == 4
    for name, held in first.items():
        assert same(second[name], held), name
        assert len(held["moved"]) == steps
        assert min(held["moved"]) > 0


# The start


def start_apart(kind: str) -> list[Any]:
    """Models that the processes have seeded on their own, or built in other sizes."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("metaxl_evo").addHandler(handler)
    rank = PartialState(cpu=True).process_index
    tagger = tiny_tagger()
    with torch.no_grad():
        if kind == "other values":
            tagger.meta.get_parameter("nets.0.0.net.0.weight").add_(rank)
        elif kind == "other buffers":
            tagger.base.register_buffer("scale", torch.full((2,), float(rank)))
        elif kind == "other shapes":
            tagger.base.add_module("more", nn.Linear(2 + rank, 1))
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = tiny_trainer(Path(folder), tagger=tagger)
    except ValueError as error:
        return [str(error), messages, None]
    finally:
        logging.getLogger("metaxl_evo").removeHandler(handler)
    return [None, messages, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}]


STARTS: dict[str, tuple[str | None, str | None]] = {  # what is warned of, or refused
    "the same": (None, None),
    "other values": ("other values of meta.nets.0.0.net.0.weight, and 1 tensors in all", None),
    "other buffers": ("other values of base.scale, and 1 tensors in all", None),
    "other shapes": (None, r"base.more.weight is \[1, [23]\] torch.float32 here and \[1, [23]\] torch.float32 on"),
}


def all_starts() -> dict[str, list[Any]]:
    return {kind: start_apart(kind) for kind in STARTS}


def test_weights_are_those_of_the_first_process() -> None:
    ranks = on_processes(2, all_starts)
    for kind, (warning, refusal) in STARTS.items():
        for error, messages, weights in (found[kind] for found in ranks):
            if refusal is not None:
                assert re.search(refusal, error)
                continue
            assert error is None
            warned = [text for text in messages if "processes" in text]
            assert len(warned) == (warning is not None)
            assert all(warning in text for text in warned if warning)
            assert same(weights, ranks[0][kind][2])


def drift() -> str:
    rank = PartialState(cpu=True).process_index
    model = nn.Linear(3, 2)
    synchronise(model)
    require_synchrony(model, "now")
    if rank:
        with torch.no_grad():
            model.bias[1] += 1e-7 + model.bias[1].abs() * 1e-6
    try:
        require_synchrony(model, "after step 3")
    except RuntimeError as error:
        return str(error)
    return "not noticed"


def test_weights_that_drift_apart_are_noticed() -> None:
    for text in on_processes(2, drift):
        assert re.match("after step 3 the processes hold different values of bias, and of 1 tensors in all", text)


class Drift(TrainerCallback):
    """Changes a weight on one process alone, before a step."""

    trainer: MetaTrainer

    def __init__(self, step: int):
        self.step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(state.global_step)

    def _move(self, step: int) -> None:
        if step == self.step and PartialState().process_index:
            with torch.no_grad():
                self.trainer.model.get_parameter("meta.nets.0.0.net.0.weight")[0, 0] += 1


def drift_in_training() -> list[str]:
    found = []
    for step in (0, 3):
        with tempfile.TemporaryDirectory() as folder:
            callback = Drift(step)
            callback.trainer = tiny_trainer(
                folder, trainer={"callbacks": [callback]}, max_steps=4, save_strategy="steps", save_steps=4
            )
            with pytest.raises(RuntimeError) as error:
                callback.trainer.train()
            found.append(str(error.value))
    return found


def test_a_run_whose_weights_drift_apart_ends() -> None:
    for start, later in on_processes(2, drift_in_training):
        assert start.startswith("before the first step the processes hold different values of meta.nets.0.0")
        assert later.startswith("after step 4 the processes hold different values of meta.nets.0.0")


def unusual() -> list[str]:
    """Tensors that are empty, of no dimension, not contiguous, small numbers; and rows that changed places."""
    rank = PartialState(cpu=True).process_index
    model = nn.Module()
    for index, held in enumerate(
        [torch.empty(0), torch.tensor(rank), torch.tensor([True]), torch.full((2,), rank).bfloat16()]
    ):
        model.register_buffer(f"b{index}", held)
    model.register_parameter("turned", nn.Parameter((torch.arange(12.0).view(3, 4) + rank).t()))
    model.register_parameter("swapped", nn.Parameter(torch.tensor([1.0, 2.0]).roll(rank)))
    before = different(dict(model.state_dict()))
    synchronise(model)
    assert torch.equal(model.get_parameter("turned"), torch.arange(12.0).view(3, 4).t())
    assert model.get_parameter("swapped").tolist() == [1, 2]
    return [*sorted(before), *different(dict(model.state_dict()))]


def test_tensors_of_every_kind_are_compared_and_sent() -> None:
    assert on_processes(2, unusual) == [["b1", "b3", "swapped", "turned"]] * 2


# As a user starts it


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
    ],
    ids=["accelerate launch", "torchrun"],
)
def test_the_script_on_two_processes(tmp_path: Path, launcher: list[str]) -> None:
    settings = {"config": "configs/ner/quickstart.yaml", "output_dir": tmp_path / "run", "target_languages": "beru"}
    settings |= {"max_steps": 4, "save_steps": 2, "eval_steps": 2}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, *launcher, "scripts/train_ner.py", *options],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"test", "settings"} <= results.keys()
    assert done.stdout.count("models, cards and results.json") == 1  # one process reports
