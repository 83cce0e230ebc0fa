"""Live diagnostics: their numbers against autograd written out, their warnings, and that they change nothing."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metaxl_evo.bilevel import PassContext, Tree
from metaxl_evo.bilevel.hypergradients import Hypergradient, estimate, look_ahead
from metaxl_evo.bilevel.problem import InnerStep
from metaxl_evo.estimators import ESTIMATORS, EvoGrad, OneStep, make_estimator
from metaxl_evo.ner.tagger import CrossLingualTagger
from metaxl_evo.training import diagnostics as diagnostics_module
from metaxl_evo.training import meta_level
from metaxl_evo.training.diagnostics import (
    IN_A_ROW,
    Diagnostics,
    Exact,
    epsilon_advice,
    exact_estimator,
    weight_decay_advice,
)
from metaxl_evo.training.sign_halving import SignHalving
from metaxl_evo.training.trainer import MetaTrainer
from tests.estimators.problems import quadratic
from tests.training.test_trainer import ORDERS, ByHand, minus, recorded_run, same
from tests.training.test_tuned_optimizer import trainer_of
from tests.training.tiny import PAD, SHALLOW, final_state, logged, tiny_tagger, tiny_trainer

NUMBERS = ("meta_cosine_to_exact", "meta_norm_by_exact")


def flat(leaves: Tree) -> Tensor:
    return torch.cat([leaf.detach().double().flatten() for _, leaf in sorted(leaves.items())])


# Numbers


@pytest.mark.parametrize(
    ("name", "fields", "order"),
    [
        ("one_step", {"engine": "double_backward"}, "after_step"),
        ("one_step", {"engine": "double_backward"}, "lookahead"),
        ("one_step", {"engine": "finite_difference", "radius": 1.0}, "lookahead"),
        ("sama", {}, "after_step"),  # needs the gradient, but not the weights before the step
        ("evograd", {"sigma": 0.05, "parameters": "^classifier"}, "after_step"),  # the weights, but not the gradient
        ("neumann", {"terms": 1}, "after_step"),  # neither
    ],
)
def test_the_numbers_are_those_of_the_real_step_written_out(
    tmp_path: Path, name: str, fields: dict[str, Any], order: str
) -> None:
    limit = 0.3  # clips every step
    recorder = recorded_run(
        tmp_path,
        estimator=name,
        estimator_kwargs=fields,
        meta_order=order,
        meta_diagnostics_every=2,
        max_grad_norm=limit,
        weight_decay=0.1,
        learning_rate=1e-2,
    )
    by_hand, cosines, ratios, scales = ByHand(), [], [], []
    for record in recorder.steps[1::2]:
        exact, _ = by_hand.through_the_step("adamw", record, limit)
        found, exact = flat(minus(record["lam"], record["after"]["lam"])), flat(exact)
        cosines.append(float(found @ exact / (found.norm() * exact.norm())))
        ratios.append(float(found.norm() / exact.norm()))
        w = {key: leaf.detach().requires_grad_() for key, leaf in record["w"].items()}
        lam = {key: leaf.detach() for key, leaf in record["lam"].items()}
        gradient = torch.autograd.grad(by_hand.inner(w, lam, record["window"][0]), list(w.values()), allow_unused=True)
        head = {key: g for key, g in zip(w, gradient, strict=True) if key.startswith("classifier") and g is not None}
        scales.append(0.05 * float(flat(head).norm()) / 0.05)
    assert logged(recorder.trainer, "meta_cosine_to_exact") == pytest.approx(cosines, rel=1e-6, abs=1e-8)
    assert logged(recorder.trainer, "meta_norm_by_exact") == pytest.approx(ratios, rel=1e-6)
    assert logged(recorder.trainer, "meta_noise_scale") == (
        pytest.approx(scales, rel=1e-9) if name == "evograd" else []
    )
    assert len(cosines) == 2
    if name == "one_step" and fields["engine"] == "double_backward":
        assert cosines == pytest.approx([1, 1], abs=1e-12)
    else:
        assert max(abs(1 - ratio) for ratio in ratios) > 1e-3


@pytest.mark.parametrize("order", ORDERS)
def test_they_are_taken_at_multiples_with_a_meta_step(tmp_path: Path, order: str) -> None:
    trainer = tiny_trainer(
        tmp_path, max_steps=7, meta_every=2, meta_diagnostics_every=3, meta_order=order, estimator="evograd"
    )
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if NUMBERS[0] in entry] == [6]
    trainer = tiny_trainer(tmp_path, max_steps=4, warmup_steps=2, meta_diagnostics_every=1, meta_order=order)
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if NUMBERS[0] in entry]
    assert steps == [2, 3, 4]  # the first learning rate is zero


def test_tiny_hypergradients_have_true_cosines() -> None:
    a, b = (torch.tensor(values) * 1e-12 for values in ([3.0, 4.0], [4.0, 3.0]))
    assert float(torch.cosine_similarity(a, b, dim=0)) < 1e-6  # the trap
    result = Hypergradient({"x": a}, torch.tensor(0.0))
    Diagnostics(OneStep(), 1).compare(result, Exact({"x": b}, {}))
    assert result.diagnostics["cosine_to_exact"] == pytest.approx(24 / 25, rel=1e-6)
    assert result.diagnostics["norm_by_exact"] == pytest.approx(1, rel=1e-6)


def test_nothing_of_the_step_is_taken_over_and_its_gradient_outlives_the_estimate() -> None:
    toy = quadratic(torch.float64)
    passes = PassContext(toy.problem)
    step = look_ahead(passes, InnerStep(toy.w, toy.lam, toy.train))
    assert step.made is not None
    gradient, counts = dict(step.made.grad), passes.counts.as_dict()
    exact = Diagnostics(OneStep(), 1).take_exact(passes, step)
    assert step.made.grad.keys() == gradient.keys()
    assert passes.counts.as_dict() == counts
    found = estimate(passes, OneStep(), step, None).grads
    assert not hasattr(step.made, "grad")
    torch.testing.assert_close(exact.gradient, gradient, rtol=0, atol=0)
    torch.testing.assert_close(exact.grads, found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_says_nothing_about_an_engine(message: str) -> None:
    """On several processes one of which ran out, the others would go on with another engine, and all would wait."""

    def exhausted(w: Tree, lam: Tree, batch: Any) -> Tensor:
        raise RuntimeError(message)

    toy = quadratic(torch.float64)
    step = look_ahead(PassContext(toy.problem), InnerStep(toy.w, toy.lam, toy.train))
    diagnostics = Diagnostics(OneStep(), 1)
    with pytest.raises(RuntimeError, match="memory"):
        diagnostics.take_exact(PassContext(replace(toy.problem, inner_loss=exhausted)), step)
    assert diagnostics.exact.second_order
    assert not diagnostics.warned


@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward", "finite_difference"])
def test_the_exact_engine_is_another_than_the_estimators(engine: Any) -> None:
    beside = exact_estimator(OneStep(engine))
    assert beside.second_order
    assert beside.engine != engine
    assert beside.engine == ("double_backward" if engine in ("auto", "jvp") else "jvp")


def test_evograds_noise_scale_is_the_spread_of_its_losses() -> None:
    """sigma |g| / temperature is, to first order, the deviation of l_k / temperature."""
    gradient = {"a": torch.tensor([3.0, 0.0], dtype=torch.float64), "b": torch.tensor([4.0], dtype=torch.float64)}
    numbers = {"effective_copies": 2.0}
    assert EvoGrad(sigma=1e-3, temperature=0.05).advise(gradient, numbers) is None
    assert numbers["noise_scale"] == pytest.approx(1e-3 * 5 / 0.05, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(100_000, 3, generator=generator, dtype=torch.float64)
    losses = noise @ torch.cat(list(gradient.values()))
    assert float(losses.std() / 0.05) == pytest.approx(numbers["noise_scale"], rel=0.01)
    EvoGrad(sigma=1e-3, temperature=0.05, parameters="b").advise(gradient, numbers)
    assert numbers["noise_scale"] == pytest.approx(1e-3 * 4 / 0.05, rel=1e-12)


# What they leave alone

SGD_EPISODES = {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.0, "episode_length": 2}
RUNS: dict[str, dict[str, Any]] = {
    "one_step": {},
    "evograd of all weights": {"estimator": "evograd"},
    "evograd": {"estimator_kwargs": {"parameters": "^classifier", "copies": 4}},
    "sama": {},
    "neumann": {"estimator_kwargs": {"terms": 1}},
    "conjugate_gradient": {"estimator_kwargs": {"iterations": 1, "damping": 1.0}},
    "unroll": SGD_EPISODES,
    "drmad": SGD_EPISODES,
    "greedy": {},
    "hyperdistill": {"estimator_kwargs": {"scale": "one"}},
}
RUNS_IN_ORDER = [  # one order each, with dropout and without
    (name, ORDERS[index % 2 if make_estimator(fields.get("estimator", name)).online else 0], index // 2 % 2 == 1)
    for index, (name, fields) in enumerate(RUNS.items())
]
OTHER_TASKS = {"first_order", "forward_mode"}  # which do not serve a tagger


def test_every_estimator_is_among_them() -> None:
    assert {fields.get("estimator", name) for name, fields in RUNS.items()} | OTHER_TASKS == ESTIMATORS.keys()


@pytest.mark.parametrize(("name", "order", "dropout"), RUNS_IN_ORDER)
def test_they_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, order: str, dropout: bool
) -> None:
    found: list[Any] = []
    for every in (0, 2):
        passes: list[Any] = []

        def spy(context: Any, *args: Any, seen: list[Any] = passes) -> Any:
            result = estimate(context, *args)
            seen.append((context.seed, result.counts.as_dict()))
            return result

        monkeypatch.setattr(meta_level, "estimate", spy)
        settings = {"max_steps": 3, "meta_order": order, "meta_diagnostics_every": every, "estimator": name}
        settings |= {"meta_dropout": dropout, "meta_learning_rate": 0.1}
        trainer = tiny_trainer(tmp_path, tagger=tiny_tagger(dropout=dropout, base=SHALLOW), **settings | RUNS[name])
        trainer.train()
        found.append({**final_state(trainer), "passes": passes, "loss": logged(trainer, "meta_loss")})
    off, on = found
    assert {key: same(on[key], off[key]) for key in off} == dict.fromkeys(off, True)
    assert off["passes"]
    assert logged(trainer, NUMBERS[0])


@pytest.mark.parametrize(("name", "fields"), [("forward_mode", {"windows": 3}), ("unroll", {}), ("one_step", {})])
def test_they_change_nothing_of_a_learned_optimiser(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    found = []
    for every in (0, 6):
        trainer = trainer_of(
            tmp_path,
            estimator=name,
            estimator_kwargs=fields,
            meta_every=1 if name == "unroll" else 6,
            meta_diagnostics_every=every,
            logging_steps=1,
        )
        trainer.train()
        found.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    assert same(*found)
    (cosine,) = logged(trainer, NUMBERS[0])
    assert (cosine == pytest.approx(1, abs=1e-12)) == (name == "one_step")


# Where the task can be differentiated once


class Once(torch.autograd.Function):
    """The identity, with one derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class OnceDifferentiable(CrossLingualTagger):
    """Its losses claim that they can be differentiated twice, and cannot."""

    def inner_loss(self, batch: Any) -> dict[str, Tensor]:
        return {name: Once.apply(losses) for name, losses in super().inner_loss(batch).items()}


def once_differentiable_tagger() -> CrossLingualTagger:
    tagger = tiny_tagger(torch.float64, dropout=False, base=SHALLOW)
    return OnceDifferentiable(tagger.base, tagger.meta, pad_token_id=PAD)


@pytest.mark.parametrize(("how", "order"), [("claimed", "after_step"), ("checkpointing", "lookahead")])
def test_finite_differences_stand_in_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, order: str
) -> None:
    fields: dict[str, Any] = {"estimator": "evograd", "max_steps": 2, "meta_order": order}
    values = []
    for stands_in in (True, False):
        trainer = tiny_trainer(
            tmp_path,
            tagger=once_differentiable_tagger()
            if stands_in and how == "claimed"
            else tiny_tagger(torch.float64, dropout=False, base=SHALLOW),
            activation_checkpointing=stands_in and how == "checkpointing",
            meta_diagnostics_every=1,
            **fields,
        )
        with caplog.at_level(logging.WARNING, logger=diagnostics_module.__name__):
            trainer.train()
        values.append([logged(trainer, key) for key in NUMBERS])
    assert [len(series) for series in values[0]] == [2, 2]
    for approximate, exact in zip(*values, strict=True):
        assert approximate == pytest.approx(exact, rel=1e-2)
        assert approximate != exact
    said = [r.getMessage() for r in caplog.records if r.name == diagnostics_module.__name__]
    assert len(said) == 1
    assert said[0].startswith("the diagnostics compare with finite differences, not exactly: ")


def test_what_finite_differences_cannot_either_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no derivative at all")

    monkeypatch.setattr(diagnostics_module, "estimate", broken)
    with pytest.raises(RuntimeError, match="no derivative at all"):
        tiny_trainer(tmp_path, meta_diagnostics_every=1).train()


def test_an_optimiser_without_a_rule_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, estimator="evograd", optim="rmsprop", meta_diagnostics_every=1)
    with pytest.raises(ValueError, match=r"RMSprop has no rule: .*, or leave meta_diagnostics_every at 0") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert trainer.state.global_step == 0


# Warnings


def stepped(cls: Any, h: float, lam: float, *, zeros: int = 0, steps: int = 1, **settings: Any) -> tuple[Any, ...]:
    """An optimiser after steps at lam (four entries, then zeros of h): itself, lam before the last step, lam."""
    parameter = torch.nn.Parameter(torch.full((4 + zeros,), lam, dtype=torch.float64))
    optimizer = cls([parameter], lr=1e-3, **settings)
    for _ in range(steps):
        before = parameter.detach().clone()
        parameter.grad = torch.tensor([h] * 4 + [0.0] * zeros, dtype=torch.float64)
        optimizer.step()
    return optimizer, {"x": before}, {"x": parameter}


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, SignHalving])
@pytest.mark.parametrize("h", [1e-12, 1.0])
def test_coupled_decay_is_compared_with_the_hypergradient(cls: Any, h: float) -> None:
    assert weight_decay_advice(*stepped(cls, h, 0.5, weight_decay=1.9 * h)) is None
    advice = weight_decay_advice(*stepped(cls, h, 0.5, weight_decay=2.1 * h))
    assert advice is not None
    assert advice.startswith("meta_weight_decay swamps the hypergradient")
    assert f"{1.05 * 2 * h:.1e}, that of the hypergradient {2 * h:.1e}" in advice
    assert advice.endswith("set meta_weight_decay to 0, or meta_optim to AdamW")
    assert weight_decay_advice(*stepped(cls, 0.0, 0.5, weight_decay=0.0)) is None


@pytest.mark.parametrize("h", [1e-6, 1.0])
def test_decoupled_decay_is_compared_with_the_rest_of_the_step(h: float) -> None:
    """AdamW's first step is lr in every entry, whatever h; its decay is lr wd lam."""
    settings: dict[str, Any] = {"eps": 1e-15}
    assert weight_decay_advice(*stepped(torch.optim.AdamW, h, 0.5, weight_decay=1.9, **settings)) is None
    advice = weight_decay_advice(*stepped(torch.optim.AdamW, h, 0.5, weight_decay=2.1, **settings))
    assert advice is not None
    assert "that of the rest of the step 2.0e-03" in advice
    assert advice.endswith("set meta_weight_decay to 0")


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
@pytest.mark.parametrize("zeros", [0, 40])
def test_eps_is_compared_with_the_usual_entry(cls: Any, zeros: int) -> None:
    def advice(eps: float, steps: int = 1) -> str | None:
        optimizer, _, lam = stepped(cls, -1e-9, 0.5, zeros=zeros, steps=steps, eps=eps, weight_decay=0.0)
        return epsilon_advice(optimizer, lam)

    assert advice(0.9e-9) is None
    found = advice(1.1e-9, steps=7)
    assert found is not None
    assert found.startswith("meta_adam_epsilon (1e-09) swamps the hypergradient, whose entries are about 1e-09")
    assert found.endswith("set meta_adam_epsilon to 1e-12 or less")


def test_adams_denominators_remember_larger_hypergradients() -> None:
    for cls, swamped in ((torch.optim.Adam, False), (torch.optim.RMSprop, True)):
        optimizer, _, lam = stepped(cls, 1e-3, 0.5, steps=20, eps=1e-8)
        lam["x"].grad = torch.full_like(lam["x"], 1e-9)
        optimizer.step()
        assert (epsilon_advice(optimizer, lam) is not None) == swamped


def test_optimisers_without_eps_and_hypergradients_of_zero_have_no_eps_advice() -> None:
    for cls, h, settings in ((torch.optim.SGD, 1e-12, {}), (torch.optim.Adam, 0.0, {"eps": 1.0})):
        optimizer, _, lam = stepped(cls, h, 0.5, **settings)
        assert epsilon_advice(optimizer, lam) is None


HARMLESS = {"meta_weight_decay": 1e-9, "meta_adam_epsilon": 1e-12, "estimator": "evograd"}
HARMFUL: dict[str, tuple[dict[str, Any], str]] = {
    "coupled decay": ({"meta_optim": "Adam", "meta_weight_decay": 1.0}, "or meta_optim to AdamW"),
    "decoupled decay": ({"meta_weight_decay": 100.0}, "set meta_weight_decay to 0"),
    "eps": ({"meta_adam_epsilon": 1.0}, "set meta_adam_epsilon to"),
    "one-hot": ({"estimator_kwargs": {"sigma": 1.0}, "meta_weight_decay": 0.0}, "raise temperature or lower sigma"),
}


def said_in(folder: Path, caplog: pytest.LogCaptureFixture, **fields: Any) -> tuple[MetaTrainer, list[str]]:
    with caplog.at_level(logging.WARNING, logger=diagnostics_module.__name__):
        trainer = tiny_trainer(folder, tagger=tiny_tagger(base=SHALLOW), max_steps=2, **HARMLESS | fields)
        trainer.train()
    return trainer, [r.getMessage() for r in caplog.records if r.name == diagnostics_module.__name__]


@pytest.mark.parametrize(("what", "order"), list(zip(HARMFUL, ORDERS * 2, strict=True)))
def test_a_run_warns_once_of_each_with_advice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, order: str
) -> None:
    fields, advice = HARMFUL[what]
    trainer, said = said_in(tmp_path, caplog, meta_diagnostics_every=1, meta_order=order, **fields)
    assert len(said) == 1
    assert advice in said[0]
    assert "\n" not in said[0]
    assert list(trainer.meta_level.diagnostics.warned.values()) == said  # type: ignore[union-attr]
    if what == "one-hot":
        assert min(logged(trainer, "meta_noise_scale")) > 10
        assert max(logged(trainer, "meta_effective_copies")) < 1.1


def test_no_warning_without_a_reason_or_unasked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert said_in(tmp_path, caplog, meta_diagnostics_every=1)[1] == []
    for fields, _ in HARMFUL.values():
        assert said_in(tmp_path, caplog, meta_diagnostics_every=0, **fields)[1] == []


def test_evograds_weights_are_one_hot_below_a_threshold() -> None:
    gradient = {"x": torch.ones(1)}
    for effective, warned in ((1.0, True), (1.09, True), (1.11, False), (2.0, False)):
        assert (EvoGrad().advise(gradient, {"effective_copies": effective}) is not None) == warned


def compared(diagnostics: Diagnostics, estimated: float, exact: float) -> dict[str, float]:
    result = Hypergradient({"x": torch.tensor([estimated, 0.0])}, torch.tensor(0.0))
    diagnostics.compare(result, Exact({"x": torch.tensor([exact, 0.0])}, {}))
    return result.diagnostics


def test_estimates_that_go_astray_in_a_row() -> None:
    diagnostics = Diagnostics(OneStep(), 1)
    for _ in range(3):
        for _ in range(IN_A_ROW - 1):
            assert compared(diagnostics, -1.0, 2.0) == {"cosine_to_exact": -1.0, "norm_by_exact": 0.5}
        compared(diagnostics, 1.0, 2.0)
    assert diagnostics.warned == {}
    for _ in range(IN_A_ROW - 1):
        compared(diagnostics, 0.0, 2.0)
    assert diagnostics.warned == {}
    compared(diagnostics, 0.0, 2.0)
    assert "raise copies" in diagnostics.warned["astray"]


def test_an_exact_hypergradient_of_zero_is_a_warning_and_no_number() -> None:
    diagnostics = Diagnostics(OneStep(), 1)
    assert compared(diagnostics, 1.0, 0.0) == {}
    assert "the exact one-step hypergradient is zero" in diagnostics.warned["zero"]


def test_what_is_not_finite_has_no_numbers() -> None:
    diagnostics = Diagnostics(EvoGrad(), 1)
    for bad in (math.nan, math.inf):
        assert compared(diagnostics, bad, 1.0) == {}
    assert compared(Diagnostics(OneStep(), 1), 1.0, math.inf) == {}
    assert diagnostics.warned == {}
