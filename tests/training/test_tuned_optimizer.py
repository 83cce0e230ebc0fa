"""Numbers of the base optimiser as meta parameters: a learned rate, decay and momentum in the MetaTrainer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from metaxl_evo.bilevel import SGD, Windowed, run_episode
from metaxl_evo.estimators import make_estimator
from metaxl_evo.models.bilevel_module import Batch, BilevelModule, totals_of
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.tiny import ORDERS, close, logged, meta_weights, minus, stack

STEPS = 6


class Numbers(nn.Module):
    """A schedule of three rates, a momentum and a decay."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64))
        self.momentum = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.decay = nn.Parameter(torch.tensor(0.01, dtype=torch.float64))


class Regression(BilevelModule):
    """A linear regression whose optimiser is learned."""

    tuned_optimizer: ClassVar = {"lr": Windowed("rates", STEPS), "momentum": "momentum", "weight_decay": "decay"}
    tuned_ranges: ClassVar = dict.fromkeys(tuned_optimizer, (-math.inf, math.inf))  # steps are compared as they are

    def inner_loss(self, batch: Batch) -> Tensor:
        errors = torch.tanh(self.base(batch["x"])).squeeze(1) - batch["y"]
        return errors.square().sum() / totals_of(self, batch)["rows"]

    outer_loss = inner_loss

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"rows": len(batch["y"])}


class Recorder(TrainerCallback):
    """The optimiser's numbers at every step, and the meta parameters after it."""

    def __init__(self) -> None:
        self.numbers: list[dict[str, float]] = []
        self.windows: list[Any] = []
        self.trainer: Any = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        group = self.trainer.optimizer.optimizer.param_groups[0]
        self.numbers.append({key: group[key] for key in ("lr", "momentum", "weight_decay")})
        self.windows.append(self.trainer.window)


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return [{"x": one, "y": torch.sin(one.sum())} for one in x]


def trainer_of(folder: Path, recorder: Recorder | None = None, model: Any = None, **fields: Any) -> MetaTrainer:
    torch.manual_seed(0)
    model = model or Regression(nn.Linear(4, 1).double(), Numbers())
    settings: dict[str, Any] = {
        "estimator": "forward_mode", "estimator_kwargs": {"windows": 3}, "max_steps": STEPS, "optim": "sgd",
        "episode_length": STEPS, "episode_reset": "restart", "meta_optim": "SGD", "meta_learning_rate": 1.0,
        "meta_every": STEPS, "meta_lr_scheduler_type": "constant", "meta_portion": 1.0, "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4, "per_device_meta_batch_size": 8, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "optim_args": "momentum=0.9", "meta_history": False,
    }  # fmt: skip
    trainer = MetaTrainer(
        model,
        MetaTrainingArguments(str(folder), **{**settings, **fields}),
        train_dataset=rows(24, 1),
        meta_dataset=rows(8, 2),
        data_collator=stack,
        callbacks=[] if recorder is None else [recorder],
    )
    if recorder is not None:
        recorder.trainer = trainer
    return trainer


def test_the_optimiser_follows_the_schedule(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer_of(tmp_path, recorder, meta_learning_rate=0.0, max_steps=2 * STEPS).train()
    assert [numbers["lr"] for numbers in recorder.numbers] == [0.02, 0.02, 0.05, 0.05, 0.1, 0.1] * 2
    assert {(numbers["momentum"], numbers["weight_decay"]) for numbers in recorder.numbers} == {(0.5, 0.01)}


@pytest.mark.parametrize("momentum", [0.5, 0.0])
@pytest.mark.parametrize(("name", "fields"), [("forward_mode", {"windows": 3}), ("unroll", {})])
def test_the_hypergradient_of_an_episode_is_that_of_the_schedule(
    tmp_path: Path, name: str, fields: dict[str, Any], momentum: float
) -> None:
    """The trainer's meta step at the end of an episode is `run_episode`'s on the same batches."""
    recorder, estimator = Recorder(), make_estimator(name, **fields)
    every = STEPS if estimator.online else 1
    trainer = trainer_of(tmp_path, recorder, estimator=name, estimator_kwargs=fields, meta_every=every)
    trainer.model.meta.momentum.data.fill_(momentum)
    start = {n: p.detach().clone() for n, p in trainer.model.base_parameters().items()}
    before = {n: p.detach().clone() for n, p in trainer.model.meta_parameters().items()}
    trainer.train()
    rule = replace(SGD(0.0), **Regression.tuned_optimizer)  # type: ignore[arg-type]
    batches = [window[0] for window in recorder.windows]
    expected = run_episode(trainer.model.problem(rule), estimator, start, before, batches, recorder.windows[-1][1])
    moved = {n: before[n] - p.detach() for n, p in trainer.model.meta_parameters().items()}
    assert all(value.abs().max() > 1e-4 for value in moved.values())
    for key, value in moved.items():
        torch.testing.assert_close(value, expected.grads[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", [0.0, 0.3])
def test_the_hypergradient_of_bounded_steps_at_rates_of_their_own(tmp_path: Path, norm: float) -> None:
    """Entries are bounded before the norm is clipped; a bounded entry has no derivative. Each kind has its rate."""
    limits = {"max_grad_value": 0.2, "max_grad_norm": norm}
    recorder, rates = Recorder(), {"rates": 2.0, "decay": 0.5}
    trainer = trainer_of(tmp_path, recorder, meta_learning_rates=rates, **limits)
    start = {n: p.detach().clone() for n, p in trainer.model.base_parameters().items()}
    before = {n: p.detach().clone() for n, p in trainer.model.meta_parameters().items()}
    trainer.train()
    found = {n: (before[n] - p.detach()) / rates.get(n, 1.0) for n, p in trainer.model.meta_parameters().items()}
    batches = [window[0] for window in recorder.windows]

    def by_hand(**limits: Any) -> Any:
        rule = replace(SGD(0.0, **limits), **Regression.tuned_optimizer)  # type: ignore[arg-type]
        last = recorder.windows[-1][1]
        return run_episode(trainer.model.problem(rule), make_estimator("unroll"), start, before, batches, last).grads

    close(found, by_hand(max_grad_value=0.2, max_grad_norm=norm or None), 1e-5 if norm else 1e-9)
    assert float((found["rates"] - by_hand()["rates"]).abs().max()) > 1e-3


def test_a_rate_of_no_meta_parameter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta parameter of meta_learning_rates 'dekay': did you mean 'decay'"):
        trainer_of(tmp_path, meta_learning_rates={"dekay": 1.0})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "fields"),
    [("one_step", {}), ("greedy", {"decay": 0.0}), ("hyperdistill", {"decay": 0.0, "scale": "one"})],
)
def test_a_local_term_is_that_of_one_unrolled_step(
    tmp_path: Path, name: str, fields: dict[str, Any], order: str
) -> None:
    """It reads the momentum buffers from before the step."""
    found = []
    for one, kwargs in ((name, fields), ("unroll", {"horizon": 1})):
        trainer = trainer_of(
            tmp_path, estimator=one, estimator_kwargs=kwargs, meta_order=order, meta_every=1, meta_learning_rate=0.01
        )
        start = meta_weights(trainer)
        trainer.train()
        found.append(minus(meta_weights(trainer), start))
    assert all(float(leaf.abs().min()) > 1e-6 for leaf in found[1].values())
    close(*found, 1e-9)


def test_a_schedule_needs_episodes_that_start_afresh(tmp_path: Path) -> None:
    for fields in ({"episode_reset": "continue"}, {"episode_length": STEPS + 1}):
        with pytest.raises(ValueError, match=f"learns a schedule of lr.*episode_length: {STEPS}.*restart"):
            trainer_of(tmp_path, **fields)


@pytest.mark.parametrize("name", ["evograd", "neumann", "conjugate_gradient", "sama"])
def test_an_estimator_that_cannot_see_the_optimiser_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"does not contain the optimiser's own"):
        trainer_of(tmp_path, estimator=name, estimator_kwargs=None, meta_every=1)


class Bounded(Regression):
    tuned_ranges: ClassVar = {"weight_decay": (0.005, 0.02)}


@pytest.mark.parametrize("sign", [1, -1])
def test_learned_numbers_stay_in_their_range(tmp_path: Path, sign: int) -> None:
    """By default not below zero, a momentum not above one either."""
    trainer = trainer_of(tmp_path, model=Bounded(nn.Linear(4, 1).double(), Numbers()), meta_learning_rate=1e3)

    def any_hypergradient(optimizer: Any, args: Any, kwargs: Any) -> None:
        for parameter in trainer.model.meta_parameters().values():
            parameter.grad = torch.full_like(parameter, float(sign))

    original = trainer.create_optimizer

    def hooked(*args: Any) -> Any:
        made = original(*args)
        assert trainer.meta_optimizer is not None
        trainer.meta_optimizer.register_step_pre_hook(any_hypergradient)
        return made

    trainer.create_optimizer = hooked  # type: ignore[method-assign]
    trainer.train()
    lam = {name: p.tolist() for name, p in trainer.model.meta_parameters().items()}
    assert lam["momentum"] == (0.0 if sign > 0 else 1.0)
    assert lam["decay"] == (0.005 if sign > 0 else 0.02)
    assert lam["rates"] == ([0.0] * 3 if sign > 0 else pytest.approx([1e3] * 3, rel=1e-3))


def test_the_log_shows_the_numbers_that_act(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = trainer_of(tmp_path, recorder, max_steps=2 * STEPS, logging_steps=1, meta_learning_rate=1e-3)
    trainer.train()
    assert len(recorder.numbers) == 2 * STEPS
    for name, logged_as in (("lr", "learning_rate"), ("momentum", "momentum"), ("weight_decay", "weight_decay")):
        assert logged(trainer, logged_as) == [numbers[name] for numbers in recorder.numbers]
        assert len(set(logged(trainer, logged_as))) > 1


class Layered(Regression):
    """A rate for each of two parameters of three."""

    tuned_optimizer: ClassVar = {"lr": {"0.weight": "first", "2.weight": "last"}, "momentum": "momentum"}


def layered(folder: Path, **fields: Any) -> MetaTrainer:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)).double()
    meta = nn.ParameterDict({"first": torch.tensor(0.02), "last": torch.tensor(0.3), "momentum": torch.tensor(0.5)})
    settings = {"estimator": "none", "estimator_kwargs": None, "logging_steps": 1, "episode_reset": "continue"}
    return trainer_of(folder, model=Layered(base, meta.double()), **{**settings, **fields})


def test_a_rate_for_each_parameter(tmp_path: Path) -> None:
    trainer = layered(tmp_path, learning_rate=0.07, lr_scheduler_type="constant", max_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.model.base_parameters().items()}
    gradients: dict[str, Tensor] = {}

    class Gradients(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients.update({n: p.grad.clone() for n, p in trainer.model.base_parameters().items()})

    trainer.add_callback(Gradients)
    trainer.train()
    rates = {"0.weight": 0.02, "2.weight": 0.3, "0.bias": 0.07}
    for name, p in trainer.model.base_parameters().items():  # the first step of SGD, decay 0
        torch.testing.assert_close(before[name] - p, rates.pop(name) * gradients[name], rtol=1e-6, atol=1e-12)
    assert not rates
    assert (logged(trainer, "learning_rate/first"), logged(trainer, "learning_rate/last")) == (
        pytest.approx([0.02]),
        pytest.approx([0.3]),
    )
    assert logged(trainer, "learning_rate") == pytest.approx([0.07])  # of 0.bias


def test_the_schedules_rate_is_logged_where_it_acts(tmp_path: Path) -> None:
    trainer = layered(tmp_path, learning_rate=0.07, max_steps=2)
    every = dict(zip(trainer.model.base_parameters(), ("first", "last", "first"), strict=True))
    vars(trainer.model)["tuned_optimizer"] = {"lr": every}
    trainer.train()
    assert logged(trainer, "learning_rate/first") == pytest.approx([0.02] * 2)
    assert logged(trainer, "learning_rate") == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "entry": ({"lr": "rate"}, r"learns lr as 'rate', which is no meta parameter"),
    "elements": ({"lr": "rates"}, r"of shape \[3\]: torch's optimisers have one number a parameter"),
    "field": ({"eps": "decay"}, r"number of .*tuned_optimizer 'eps'"),
    "parameter": ({"lr": {"wieght": "decay"}}, r"parameter of .*tuned_optimizer 'wieght'"),
    "layers of momentum": ({"momentum": {"weight": "momentum"}}, "learns momentum by parameter.*one for all"),
    "range": ({"momentum": "far"}, r"starts outside its range 0 to 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_numbers_that_cannot_be_learned_are_refused(tmp_path: Path, what: str) -> None:
    model = Regression(nn.Linear(4, 1).double(), Numbers())
    model.meta.far = nn.Parameter(torch.tensor(1.5))
    model.tuned_optimizer, message = REFUSED[what]
    model.tuned_ranges = {}
    with pytest.raises(ValueError, match=message) as error:
        trainer_of(tmp_path, model=model)
    assert "\n" not in str(error.value)


def test_an_optimiser_without_the_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learns momentum, which AdamW does not have"):
        layered(tmp_path, optim="adamw_torch").train()


def test_the_hypergradient_of_a_rate_for_each_parameter(tmp_path: Path) -> None:
    """That of one SGD step, by autograd; in the trainer's own step as in an estimate before it."""
    settings: dict[str, Any] = {
        "estimator": "one_step", "estimator_kwargs": None, "meta_every": 1, "max_steps": 1, "episode_length": None,
        "meta_learning_rate": 1e-2, "learning_rate": 0.07, "lr_scheduler_type": "constant", "weight_decay": 0.0,
    }  # fmt: skip
    trainer = layered(tmp_path, **settings)
    estimated = trainer.estimate(make_estimator("one_step")).grads
    (train,), (judge,) = trainer.window
    base, lam = trainer.model.base, {n: p.detach().clone() for n, p in trainer.model.meta_parameters().items()}
    w = {name: p.detach().clone().requires_grad_() for name, p in base.named_parameters()}
    rates = {"0.weight": lam["first"].requires_grad_(), "2.weight": lam["last"].requires_grad_(), "0.bias": 0.07}

    def loss(w: Any, batch: Any) -> Tensor:
        out = torch.func.functional_call(base, w, (batch["x"],))
        return (torch.tanh(out).squeeze(1) - batch["y"]).square().mean()

    grads = torch.autograd.grad(loss(w, train), list(w.values()))
    after = {name: w[name].detach() - rates[name] * g for name, g in zip(w, grads, strict=True)}
    expected = torch.autograd.grad(loss(after, judge), [lam["first"], lam["last"]])
    assert [float(estimated[name]) for name in ("first", "last")] == pytest.approx([float(g) for g in expected])
    trainer.train()
    moved = {name: float(lam[name].detach() - p) for name, p in trainer.model.meta_parameters().items()}
    assert [moved["first"], moved["last"]] == pytest.approx([1e-2 * float(g) for g in expected], rel=1e-6)
