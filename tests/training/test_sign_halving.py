"""FDS's sign-based meta optimiser: a sequence computed by hand, its groups and schedule, resuming, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metaxl_evo.training.optimizers import optimizer_named
from metaxl_evo.training.sign_halving import SignHalving
from tests.training.tiny import meta_weights, tiny_arguments, tiny_trainer


def numbers(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def move(optimizer: SignHalving, p: Tensor, *gradient: float) -> list[float]:
    p.grad = torch.tensor(gradient, dtype=p.dtype)
    optimizer.step()
    return p.tolist()


# (hypergradients, values after the step) of two coordinates that start at 0 and 1 with steps of 0.1, by hand. Flips
# halve the first one's step in lines 3, 5, 7 (a zero stands between the signs of line 9), and in line 10 to 0.00625,
# below 0.05 * 0.15, which ends it; those of lines 2 and 3 halve the second one's to 0.025, below 0.05 * 0.95.
SEQUENCE = [
    ((-3.0, 1e-9), (0.1, 0.9)),
    ((-1e-7, -5.0), (0.2, 0.95)),
    ((2.0, 7.0), (0.15, 0.95)),
    ((1.0, 7.0), (0.1, 0.95)),
    ((-1.0, -7.0), (0.125, 0.95)),
    ((-1.0, 7.0), (0.15, 0.95)),
    ((1.0, 7.0), (0.1375, 0.95)),
    ((0.0, 7.0), (0.1375, 0.95)),
    ((-1.0, 7.0), (0.15, 0.95)),
    ((1.0, 7.0), (0.15, 0.95)),
    ((1.0, 7.0), (0.15, 0.95)),
]


def test_the_sequence_computed_by_hand() -> None:
    p = numbers(0.0, 1.0)
    optimizer = SignHalving([p], lr=0.1)
    converged = []
    for gradient, expected in SEQUENCE:
        assert move(optimizer, p, *gradient) == pytest.approx(expected, rel=1e-14)
        converged.append(optimizer.converged)
    assert converged == [False] * 9 + [True, True]


@pytest.mark.parametrize("at", [0, 1, 2, 5, 9])
def test_resumed_from_a_file_it_goes_on_as_before(tmp_path: Path, at: int) -> None:
    p = numbers(0.0, 1.0)
    optimizer = SignHalving([p], lr=0.1)
    for gradient, _ in SEQUENCE[:at]:
        move(optimizer, p, *gradient)
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = torch.nn.Parameter(saved["p"])
    resumed = SignHalving([again], lr=7.0, factor=0.9, floor=0.0)
    resumed.load_state_dict(saved["optimizer"])
    for gradient, expected in SEQUENCE[at:]:
        assert move(resumed, again, *gradient) == pytest.approx(expected, rel=1e-14)
    assert resumed.converged


def test_groups_have_their_own_first_step() -> None:
    rates, decay = numbers(0.0, 0.0), numbers(0.0)
    optimizer = SignHalving([{"params": [rates], "lr": 0.1}, {"params": [decay], "factor": 0.1}], lr=3e-4)
    for sign in (-1.0, -1.0, 1.0):
        rates.grad, decay.grad = sign * torch.ones_like(rates), sign * torch.ones_like(decay)
        optimizer.step()
    assert rates.tolist() == pytest.approx([0.15, 0.15], rel=1e-14)
    assert decay.tolist() == pytest.approx([6e-4 - 3e-5], rel=1e-12)
    assert not optimizer.converged


def test_a_schedule_scales_every_step() -> None:
    p = numbers(0.0, 0.0)
    optimizer = SignHalving([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.5][step])
    for gradient, expected in (((-1.0, -1.0), [0.1, 0.1]), ((-1.0, 1.0), [0.15, 0.075])):
        assert move(optimizer, p, *gradient) == pytest.approx(expected, rel=1e-14)
        scheduler.step()


def test_weight_decay_enters_before_the_sign() -> None:
    p = numbers(2.0, 2.0, -2.0)
    optimizer = SignHalving([p], lr=0.5, weight_decay=0.1)
    assert move(optimizer, p, -0.19, -0.21, 0.19) == [1.5, 2.5, -1.5]


def test_a_parameter_without_a_hypergradient_stays_and_has_not_converged() -> None:
    p, other = numbers(1.0), numbers(0.0)
    optimizer = SignHalving([p, other], lr=0.01)
    move(optimizer, p, 1.0)
    assert (p.item(), other.item()) == (1.0, 0.0)  # the first is below the floor from the start
    assert not optimizer.converged


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -0.1}, "lr must be at least 0, not -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0"),
        ({"floor": -1}, "floor must be at least 0"),
        ({"factor": 0.0}, "factor must be above 0 and at most 1"),
        ({"factor": 1.5}, "factor must be above 0 and at most 1"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^SignHalving: {said}"):
        SignHalving([numbers(0.0)], **settings)


# By its name in a configuration --------------------------------------------------------------------------------------


def test_it_is_a_meta_optimiser_beside_those_of_torch(tmp_path: Path) -> None:
    assert optimizer_named("SignHalving", "meta_optim") is SignHalving
    assert tiny_arguments(tmp_path, meta_optim="SignHalving").meta_optim == "SignHalving"
    for near in ("SignHalfing", "sign"):
        with pytest.raises(ValueError, match=r"unknown meta_optim.*Valid: SignHalving, .*AdamW"):
            optimizer_named(near, "meta_optim")


def test_the_trainer_moves_every_meta_parameter_by_the_step(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"meta_learning_rate": 0.01, "meta_lr_scheduler_type": "constant"}
    trainer = tiny_trainer(tmp_path, meta_optim="SignHalving", max_steps=1, **settings)
    before = meta_weights(trainer)
    trainer.train()
    assert type(trainer.meta_optimizer) is SignHalving
    moved = torch.cat([(x - before[n]).flatten() for n, x in meta_weights(trainer).items()])
    small = torch.cat([x.flatten().abs() for x in before.values()]) < 0.01 / 0.05
    assert moved[small].abs().tolist() == pytest.approx([0.01] * int(small.sum()), rel=1e-5)
    assert not moved[~small].any()
    assert {bool(x > 0) for x in moved[small]} == {True, False}
