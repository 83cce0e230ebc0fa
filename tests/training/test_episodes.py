"""Every estimator in the MetaTrainer: when it answers, over which steps, from where; and bit-exact resume."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from metaxl_evo.bilevel import SGD, Tree, run_episode, tree
from metaxl_evo.bilevel.update import AdamW, UpdateRule
from metaxl_evo.estimators import ESTIMATORS, make_estimator
from metaxl_evo.models.bilevel_module import Batch, BilevelModule, totals_of
from metaxl_evo.training.arguments import EPISODE_RESETS
from metaxl_evo.training.episodes import Episodes
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.tiny import (
    ORDERS,
    base_weights,
    close,
    different,
    logged,
    meta_weights,
    minus,
    same,
    stack,
    tiny_arguments,
)

DECAY = 0.1


class Weighting(BilevelModule):
    """A small regression whose rows the meta network weighs; the outer loss also keeps that network small."""

    meta: nn.Linear
    direct_term = True

    def inner_loss(self, batch: Batch) -> Tensor:
        errors = (self.base(batch["x"]).squeeze(1) - batch["y"]).square()
        return (errors * self.meta(batch["x"]).squeeze(1).sigmoid()).sum() / totals_of(self, batch)["rows"]

    def outer_loss(self, batch: Batch) -> Tensor:
        errors = (self.base(batch["x"]).squeeze(1) - batch["y"]).square()
        return (errors + DECAY * self.meta.weight.square().sum()).sum() / totals_of(self, batch)["rows"]

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"rows": len(batch["y"])}

    def save_meta(self, folder: str | Path) -> None:
        torch.save(self.state_dict(), Path(folder) / "weights.pt")

    def load_meta(self, folder: str | Path) -> None:
        self.load_state_dict(torch.load(Path(folder) / "weights.pt", weights_only=True))

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save_meta(folder)

    load_pretrained = load_meta


def inner_by_hand(w: Tree, lam: Tree, window: list[Batch]) -> Tensor:
    return torch.cat([errors(w, b) * torch.sigmoid(b["x"] @ lam["weight"][0] + lam["bias"]) for b in window]).mean()


def outer_by_hand(w: Tree, lam: Tree, window: list[Batch]) -> Tensor:
    return torch.cat([errors(w, b) for b in window]).mean() + DECAY * lam["weight"].square().sum()


def errors(w: Tree, batch: Batch) -> Tensor:
    hidden = torch.tanh(batch["x"] @ w["0.weight"].T + w["0.bias"])
    return ((hidden @ w["2.weight"].T + w["2.bias"]).squeeze(1) - batch["y"]) ** 2


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return [{"x": one, "y": torch.sin(2 * one.sum()) + 1} for one in x]


class Watch(TrainerCallback):
    """Both levels around each base step, the optimiser's state and numbers where its forward runs, its batches."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.steps: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append({"before": self._levels()})

    def at_forward(self, module: nn.Module, inputs: Any) -> None:
        if module.training and "at" not in self.steps[-1]:  # meta passes run in evaluation mode
            optimizer = self.trainer.optimizer.optimizer
            names = {p: name for name, p in self.trainer.model.base.named_parameters()}
            state = {names[p]: copy.deepcopy(held) for p, held in optimizer.state.items()}
            self.steps[-1] |= {"at": self._levels(), "state": state, "lr": optimizer.param_groups[0]["lr"]}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps[-1] |= {"after": self._levels(), "window": self.trainer.window}

    @property
    def moves(self) -> list[bool]:
        """Whether the meta parameters moved with each base step."""
        return [bool(different(step["before"]["lam"], step["after"]["lam"])) for step in self.steps]

    def moved(self, step: int) -> Tree:
        """The hypergradient: the meta optimiser is SGD at rate 1."""
        return minus(self.steps[step]["before"]["lam"], self.steps[step]["after"]["lam"])

    def _levels(self) -> dict[str, Tree]:
        return {"w": base_weights(self.trainer), "lam": meta_weights(self.trainer)}


def trainer_of(
    folder: Path, watch: Watch | None = None, *, dropout: float = 0.0, train_rows: int = 20, **fields: Any
) -> MetaTrainer:
    """SGD with momentum, 4 + 9 rows a step, the meta parameters moved by minus the hypergradient."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    if dropout:
        base.append(nn.Dropout(dropout))
    settings: dict[str, Any] = {
        "optim": "sgd",
        "optim_args": "momentum=0.5",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "meta_optim": "SGD",
        "meta_learning_rate": 1.0,
        "meta_lr_scheduler_type": "constant",
        "meta_portion": 1.0,
        "per_device_meta_batch_size": 9,  # all: every step is judged by the same rows, as in run_episode
    }
    trainer = MetaTrainer(
        Weighting(base, nn.Linear(3, 1).double()),
        tiny_arguments(folder, **settings | fields),
        train_dataset=rows(train_rows, 1),
        meta_dataset=rows(9, 2),
        data_collator=stack,
        callbacks=[] if watch is None else [watch],
    )
    if watch is not None:
        watch.trainer = trainer
        trainer.model.base.register_forward_pre_hook(watch.at_forward)
    return trainer


def watched(folder: Path, **fields: Any) -> Watch:
    watch = Watch()
    trainer_of(folder, watch, **fields).train()
    return watch


# Who answers when

DRIVEN: dict[str, tuple[dict[str, Any], ...]] = {
    "first_order": ({},),
    "one_step": ({"engine": "double_backward"}, {"engine": "finite_difference"}),
    "evograd": ({"sigma": 0.05},),
    "sama": ({},),
    "neumann": ({"engine": "jvp", "step": 0.1},),
    "conjugate_gradient": ({"engine": "jvp", "damping": 1.0},),
    "unroll": ({}, {"horizon": 2}),
    "drmad": ({},),
    "forward_mode": ({},),
    "greedy": ({},),
    "hyperdistill": ({"scale": "fixed"}, {"fit_every": 2}),
}
INSTANCES = [(name, settings) for name, all_settings in DRIVEN.items() for settings in all_settings]


def test_every_estimator_is_among_the_instances() -> None:
    assert DRIVEN.keys() == ESTIMATORS.keys()
    assert len(INSTANCES) == 14


@pytest.mark.parametrize(
    ("name", "settings", "order", "reset"),
    [
        (*one, order, EPISODE_RESETS[(index + shift) % 3])
        for index, one in enumerate(INSTANCES)
        for shift, order in enumerate(ORDERS[: 2 if make_estimator(one[0], **one[1]).online else 1])
    ],
)
def test_every_estimator_answers_in_its_turn(
    tmp_path: Path, name: str, settings: dict[str, Any], order: str, reset: str
) -> None:
    """Episodes of four steps: every other step an online one, the last one an offline one."""
    online = make_estimator(name, **settings).online
    watch = watched(
        tmp_path, estimator=name, estimator_kwargs=settings, meta_order=order, meta_every=2 if online else 1,
        max_steps=8, episode_length=4, episode_reset=reset, episode_reptile_rate=0.5,
    )  # fmt: skip
    expected = [False, True] * 4 if online else [False, False, False, True] * 2
    if settings.get("fit_every"):
        expected[:4] = [False] * 4  # an episode of its own
    assert watch.moves == expected
    assert all(bool(leaf.isfinite().all()) for step in watch.steps for leaf in step["after"]["lam"].values())


def test_steps_that_are_made_again_teach_the_same(tmp_path: Path) -> None:
    def lam(folder: str, **fields: Any) -> Tree:
        steps = watched(tmp_path / folder, estimator="unroll", max_steps=12, episode_length=6, **fields).steps
        found: Tree = steps[-1]["after"]["lam"]
        return found

    kept, again = lam("kept"), lam("again", estimator_kwargs={"recompute": True})
    assert tree.norm(tree.add(again, kept, -1.0)) <= 1e-12 * tree.norm(kept)
    with pytest.raises(ValueError, match=r"recompute: true makes base steps again.*draws dropout masks of its own"):
        lam("masked", dropout=0.5, estimator_kwargs={"recompute": True})


def test_answers_and_ends(tmp_path: Path) -> None:
    def table(name: str, **fields: Any) -> tuple[list[int], list[int]]:
        args = tiny_arguments(tmp_path, estimator=name, **fields)
        episodes = Episodes(args.make_estimator(), args)  # type: ignore[arg-type]
        return [t for t in range(12) if episodes.answers(t)], [t for t in range(12) if episodes.ends(t)]

    assert table("one_step") == ([*range(12)], [])
    assert table("one_step", meta_every=5) == ([4, 9], [])
    assert table("one_step", meta_every=5, episode_length=4) == ([4, 9], [3, 7, 11])
    assert table("one_step", meta_last=2, episode_length=5) == ([3, 4, 8, 9], [4, 9])
    assert table("one_step", meta_last=3, meta_every=2, episode_length=6) == ([3, 5, 9, 11], [5, 11])
    assert table("unroll", episode_length=4) == ([3, 7, 11], [3, 7, 11])
    assert table("unroll", episode_length=1) == ([*range(12)], [*range(12)])
    assert table("unroll", estimator_kwargs={"horizon": 2}) == ([*range(12)], [])


# What it answers


def by_hand(watch: Watch, first: int, last: int, *, order: str = "after_step", limit: float = 0.0) -> Tree:
    """The derivative of the outer loss behind the steps with respect to one shift of lam in all of them.

    SGD with momentum 0.5 from the recorded point. What `lookahead` judges is a step with the lam from before it.
    """
    steps = watch.steps[first : last + 1]
    lams = [step["at"]["lam"] for step in steps]
    if order == "lookahead":
        lams[-1] = steps[-1]["before"]["lam"]
    shift = {name: torch.zeros_like(leaf, requires_grad=True) for name, leaf in lams[0].items()}
    w = {name: leaf.clone().requires_grad_() for name, leaf in steps[0]["at"]["w"].items()}
    buffers = {name: steps[0]["state"].get(name, {}).get("momentum_buffer", 0.0) for name in w}
    for step, lam in zip(steps, lams, strict=True):
        lam = {name: leaf + shift[name] for name, leaf in lam.items()}
        loss = inner_by_hand(w, lam, step["window"][0])
        grads = dict(zip(w, torch.autograd.grad(loss, list(w.values()), create_graph=True), strict=True))
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        factor = limit / (norm + 1e-6) if limit and norm > limit else 1.0
        buffers = {name: 0.5 * buffers[name] + factor * g for name, g in grads.items()}
        w = {name: leaf - step["lr"] * buffers[name] for name, leaf in w.items()}
    judged = outer_by_hand(w, lam, steps[-1]["window"][1])
    return dict(zip(shift, torch.autograd.grad(judged, list(shift.values())), strict=True))


@pytest.mark.parametrize("limit", [0.0, 0.3], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(("name", "every"), [("unroll", 1), ("forward_mode", 3)])
def test_an_episode_is_differentiated_through_all_of_its_steps(
    tmp_path: Path, name: str, every: int, limit: float
) -> None:
    """Under a schedule with warm-up and momentum that the second episode inherits."""
    watch = watched(
        tmp_path, estimator=name, episode_length=3, meta_every=every, max_steps=6, max_grad_norm=limit,
        lr_scheduler_type="linear", warmup_steps=1,
    )  # fmt: skip
    assert len({step["lr"] for step in watch.steps}) == 6
    assert watch.moves == [False, False, True] * 2
    for end in (2, 5):
        close(watch.moved(end), by_hand(watch, end - 2, end, limit=limit), 1e-9)
    if limit:
        norms = [float(norm) for norm in logged(watch.trainer, "grad_norm")]
        assert min(norms) > limit


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "settings", "horizon"),
    [
        ("one_step", {"engine": "double_backward"}, 1),
        ("unroll", {"horizon": 1}, 1),
        ("unroll", {"horizon": 3}, 3),
        ("forward_mode", {}, 99),
    ],
)
def test_an_online_one_is_differentiated_through_the_last_steps(
    tmp_path: Path, name: str, settings: dict[str, Any], horizon: int, order: str
) -> None:
    """lam moves from step to step; each keeps the one it was made with."""
    watch = watched(tmp_path, estimator=name, estimator_kwargs=settings, meta_order=order, max_steps=6)
    for last in range(6):
        close(watch.moved(last), by_hand(watch, max(0, last - horizon + 1), last, order=order), 1e-9)


OPTIMIZERS: dict[str, tuple[dict[str, Any], UpdateRule]] = {
    "momentum": ({}, SGD(0.1, momentum=0.5)),
    "adamw": (
        {"optimizer_class": "AdamW", "learning_rate": 0.05, "weight_decay": 0.1},
        AdamW(0.05, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize(
    ("name", "settings", "optimizer", "reset"),
    [
        *(("unroll", {}, "momentum", reset) for reset in EPISODE_RESETS),
        ("unroll", {}, "adamw", "restart"),
        ("drmad", {}, "momentum", "reptile"),
        ("forward_mode", {}, "adamw", "restart"),
        *(("greedy", {"decay": 0.7}, "adamw", reset) for reset in EPISODE_RESETS),
        ("greedy", {"decay": 0.7}, "momentum", "restart"),
        ("hyperdistill", {"scale": "fixed", "decay": 0.5, "theta": 1.3}, "momentum", "restart"),
        ("hyperdistill", {"scale": "one"}, "adamw", "reptile"),
    ],
)
def test_an_episode_is_that_of_run_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any], optimizer: str, reset: str
) -> None:
    """From the weights and over the batches of each episode that begins with a fresh optimiser."""
    monkeypatch.setattr(BilevelModule, "examples", lambda *of: None)  # they would be drawn by another seed
    fields, rule = OPTIMIZERS[optimizer]
    estimator = make_estimator(name, **settings)
    watch = watched(
        tmp_path, estimator=name, estimator_kwargs=settings, meta_every=3 if estimator.online else 1, max_steps=9,
        episode_length=3, episode_reset=reset, episode_reptile_rate=0.5, **fields,
    )  # fmt: skip
    for start in (0,) if reset == "continue" else (0, 3, 6):
        steps = watch.steps[start : start + 3]
        problem = replace(watch.trainer.model.problem(rule), examples=None)
        expected = run_episode(
            problem, estimator, steps[0]["at"]["w"], steps[0]["at"]["lam"],
            [step["window"][0] for step in steps], steps[-1]["window"][1],
        )  # fmt: skip
        close(watch.moved(start + 2), expected.grads, 1e-9)
        assert expected.w is not None
        close(steps[-1]["after"]["w"], expected.w, 1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_hyperdistill_fits_in_an_episode_that_leaves_lam_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """Every other episode; what it learns is used in the next one."""
    monkeypatch.setattr(BilevelModule, "examples", lambda *of: None)  # they would be drawn by another seed
    settings = {"decay": 0.9, "fit_every": 2}
    watch = watched(
        tmp_path, estimator="hyperdistill", estimator_kwargs=settings, meta_every=3, meta_order=order, max_steps=12,
        episode_length=3, episode_reset="restart",
    )  # fmt: skip
    assert watch.moves == [*[False] * 5, True] * 2
    thetas = []
    for start in (0, 6):
        fit, used = watch.steps[start : start + 3], watch.steps[start + 3 : start + 6]
        problem = replace(watch.trainer.model.problem(SGD(0.1, momentum=0.5)), examples=None)

        def episode(steps: list[dict[str, Any]], problem: Any = problem, **fields: Any) -> Any:
            return run_episode(
                problem, make_estimator("hyperdistill", **settings | fields), steps[0]["at"]["w"],
                steps[0]["before"]["lam"], [step["window"][0] for step in steps], steps[-1]["window"][1],
            )  # fmt: skip

        theta = episode(fit).diagnostics["theta"]
        close(watch.moved(start + 5), episode(used, scale="fixed", theta=theta).grads, 1e-9)
        thetas.append(theta)
    assert logged(watch.trainer, "meta_theta") == pytest.approx(thetas, rel=1e-9)
    assert thetas[0] != pytest.approx(thetas[1], rel=1e-3)
    assert 1.0 not in thetas  # the default, before any fit


@pytest.mark.parametrize("order", ORDERS)
def test_greedy_keeps_the_terms_of_the_steps_without_a_meta_step(tmp_path: Path, order: str) -> None:
    """With decay 1, its answer every third step is the sum of the terms that one_step has along the same run."""
    shared: dict[str, Any] = {"meta_order": order, "meta_learning_rate": 1e-9, "max_steps": 6}
    summed = watched(tmp_path, estimator="greedy", estimator_kwargs={"decay": 1.0}, meta_every=3, **shared)
    terms = watched(tmp_path, **shared)
    direct = {"weight": 2 * DECAY * summed.steps[0]["before"]["lam"]["weight"], "bias": torch.zeros(1)}
    for step in (2, 5):
        parts = [minus(terms.moved(index), {n: 1e-9 * x for n, x in direct.items()}) for index in range(step + 1)]
        expected = {name: sum(part[name] for part in parts) + 1e-9 * direct[name] for name in direct}
        close(summed.moved(step), expected, 1e-5)  # lam moves by some 1e-9, rounded at 1e-16


# Where the base goes


@pytest.mark.parametrize("fields", [fields for fields, _ in OPTIMIZERS.values()], ids=OPTIMIZERS)
@pytest.mark.parametrize("name", ["one_step", "unroll"])
def test_where_an_episode_begins(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    for reset in EPISODE_RESETS:
        watch = watched(
            tmp_path, estimator=name, max_steps=9, episode_length=3, episode_reset=reset, episode_reptile_rate=0.25,
            **fields,
        )  # fmt: skip
        start = watch.steps[0]["at"]["w"]
        for index, step in enumerate(watch.steps):
            reached = watch.steps[index - 1]["after"]["w"] if index else start
            if index in (3, 6) and reset == "restart":
                assert same(step["at"]["w"], start)
            elif index in (3, 6) and reset == "reptile":
                start = {key: leaf + 0.25 * (reached[key] - leaf) for key, leaf in start.items()}
                close(step["at"]["w"], start, 1e-14)
            elif index in (3, 6) and reset == "fomaml":
                w = {key: leaf.clone().requires_grad_() for key, leaf in reached.items()}
                judged = outer_by_hand(w, watch.steps[index - 1]["after"]["lam"], watch.steps[index - 1]["window"][1])
                slopes = torch.autograd.grad(judged, list(w.values()))
                start = {key: start[key] - 0.25 * slope for key, slope in zip(w, slopes, strict=True)}
                close(step["at"]["w"], start, 1e-14)
            else:
                assert same(step["at"]["w"], reached)
            fresh = index == 0 or (index in (3, 6) and reset != "continue")
            assert (step["state"] == {}) == fresh
            assert different(step["after"]["w"], step["at"]["w"])


def test_what_is_saved_after_an_episode_is_where_it_went(tmp_path: Path) -> None:
    watch = watched(
        tmp_path, estimator="unroll", max_steps=4, episode_length=2, episode_reset="restart", save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    assert same(watch.steps[2]["at"]["w"], watch.steps[0]["at"]["w"])
    for step in (2, 4):
        saved = torch.load(tmp_path / f"checkpoint-{step}" / "weights.pt", weights_only=True)
        reached = watch.steps[step - 1]["after"]["w"]
        assert same({name: saved[f"base.{name}"] for name in reached}, reached)


def test_training_twice_starts_the_episodes_anew(tmp_path: Path) -> None:
    """No trajectory of the first training is in the second, and restart is back to the second's own start."""
    trainer = trainer_of(tmp_path, estimator="unroll", estimator_kwargs={"horizon": 5})
    for _ in range(2):
        trainer.train()
        assert logged(trainer, "meta_horizon") == [1, 2, 3]
    watch = Watch()
    trainer = trainer_of(tmp_path, watch, episode_length=2, episode_reset="restart")
    for _ in range(2):
        watch.steps.clear()
        trainer.train()
        assert same(watch.steps[2]["at"]["w"], watch.steps[0]["at"]["w"])


# A learning rate of zero


def test_at_a_rate_of_zero_only_the_end_of_an_episode_answers(tmp_path: Path) -> None:
    """A step of length zero leaves the direct term alone."""
    warm: dict[str, Any] = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "episode_length": 1}
    offline = watched(tmp_path, estimator="unroll", **warm)
    assert [step["lr"] for step in offline.steps] == [0.0, 0.1, 0.1]
    assert offline.moves == [True, True, True]
    lam = offline.steps[0]["before"]["lam"]
    close(offline.moved(0), {"weight": 2 * DECAY * lam["weight"], "bias": torch.zeros_like(lam["bias"])}, 1e-14)
    for name in ("one_step", "evograd", "greedy", "forward_mode"):
        assert watched(tmp_path, estimator=name, **warm).moves == [False, True, True]


# Refusals

UNSAVED: list[tuple[str, dict[str, Any]]] = [
    ("unroll", {"save_strategy": "epoch"}),
    ("drmad", {"save_strategy": "steps", "save_steps": 3}),
    ("drmad", {"save_strategy": "steps", "save_steps": 0.5}),
    ("hyperdistill", {"save_strategy": "steps", "save_steps": 1}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("unroll", {}, "'unroll' answers at the end of an episode: set episode_length"),
    ("drmad", {"episode_length": 2, "meta_order": "lookahead"}, "when the step has been made: set meta_order: after"),
    ("unroll", {"episode_length": 2, "meta_every": 2}, "leave meta_every at 1, episode_length says how often"),
    ("one_step", {"episode_reset": "restart"}, "episode_reset: restart needs episode_length"),
    ("greedy", {"episode_reset": "reptile"}, "episode_reset: reptile needs episode_length"),
    ("unroll", {"estimator_kwargs": {"horizon": 2}, "save_strategy": "epoch"}, "keeps the last steps of the run"),
    *((name, {"episode_length": 2, **fields}, "steps and save_steps to a multiple of episode_length")
      for name, fields in UNSAVED),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_what_could_not_answer_or_not_be_resumed_is_refused(
    tmp_path: Path, name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        trainer_of(tmp_path, estimator=name, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("unroll", {"episode_length": 2, "save_strategy": "steps", "save_steps": 4}),
        ("unroll", {"estimator_kwargs": {"horizon": 2}, "save_strategy": "no"}),
        ("forward_mode", {"episode_length": 2, "save_strategy": "steps", "save_steps": 3}),
        ("hyperdistill", {"estimator_kwargs": {"scale": "one"}, "episode_length": 2, "save_strategy": "epoch"}),
    ],
)
def test_what_can_be_resumed_is_not_refused(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    trainer_of(tmp_path, estimator=name, **fields)
