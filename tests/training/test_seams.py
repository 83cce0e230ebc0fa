"""What others do around the steps of a training: hooks, data loaders, estimates, models made anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from transformers import TrainerCallback
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

from metaxl_evo.bilevel import tree
from metaxl_evo.estimators import EvoGrad, OneStep
from metaxl_evo.ner.tagger import CrossLingualTagger
from metaxl_evo.training.base_optimizer import may_step_in_two
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.tiny import (
    ESTIMATES,
    SHALLOW,
    base_weights,
    close,
    collate,
    different,
    final_state,
    meta_weights,
    minus,
    random_rows,
    same,
    tiny_arguments,
    tiny_base,
    tiny_tagger,
    tiny_trainer,
)

# One call of the optimiser a base step


class Counting(torch.optim.Optimizer):
    """SGD whose rate falls with the steps of its group, as schedule-free optimisers and Prodigy count them."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 0.1, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / group["k"])


def test_an_optimiser_that_counts_for_itself_is_called_once_a_step(tmp_path: Path) -> None:
    tagger = tiny_tagger()
    optimizer = Counting(tagger.base.parameters())
    settings: dict[str, Any] = {"max_steps": 5, **ESTIMATES["evograd_head"]}
    tiny_trainer(tmp_path, tagger=tagger, trainer={"optimizers": (optimizer, None)}, **settings).train()
    assert [group["k"] for group in optimizer.param_groups] == [5]


@pytest.mark.parametrize("whose", ["its own", "of all optimisers"])
def test_step_hooks_see_one_step_and_change_nothing(tmp_path: Path, whose: str) -> None:
    """The numbers are those of the embeddings stepped ahead, bit for bit."""
    seen: list[int] = []

    class Hooks(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if whose == "its own":
                kwargs["optimizer"].optimizer.register_step_post_hook(lambda *_: seen.append(1))

    def run(**trainer: Any) -> dict[str, Any]:
        made = tiny_trainer(tmp_path, tagger=tiny_tagger(dropout=False), trainer=trainer, max_steps=4)
        made.train()
        return final_state(made)

    plain = run()
    handles = []
    if whose == "of all optimisers":
        base_size = sum(1 for _ in tiny_base().parameters())

        def note(optimizer: Any, *_: Any) -> None:
            seen.extend([1] * (sum(len(group["params"]) for group in optimizer.param_groups) == base_size))

        handles = [torch_optimizer.register_optimizer_step_post_hook(note)]
    try:
        assert same(run(callbacks=[Hooks()]), plain)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 4


def test_which_optimisers_may_step_in_two() -> None:
    weight = [nn.Parameter(torch.zeros(1))]

    class Own(torch.optim.AdamW):
        pass

    assert all(may_step_in_two(cls(weight)) for cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))
    assert not any(may_step_in_two(cls(weight)) for cls in (Own, torch.optim.RMSprop, torch.optim.NAdam))


# Whoever asks for data loaders


class Curious(TrainerCallback):
    def __init__(self) -> None:
        self.trainer: Any = None
        self.estimates: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.get_train_dataloader()
        self.estimates.append(self.trainer.estimate(OneStep()).grads)


@pytest.mark.parametrize("length", [None, 2])
def test_a_data_loader_for_others_moves_nothing(tmp_path: Path, length: int | None) -> None:
    settings = {"estimator": "greedy", "episode_length": length, "max_steps": 6}
    plain = tiny_trainer(tmp_path, **settings)
    plain.train()
    curious = Curious()
    curious.trainer = tiny_trainer(tmp_path, trainer={"callbacks": [curious]}, **settings)
    curious.trainer.train()
    assert same(final_state(curious.trainer), final_state(plain))


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 1), (2, 0)])
def test_an_estimate_before_the_training_is_that_of_its_first_step(
    tmp_path: Path, accumulation: int, workers: int
) -> None:
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "constant",
        "dataloader_num_workers": workers,
    }
    plain = tiny_trainer(tmp_path, **settings)
    plain.train()
    curious = Curious()
    trainer = curious.trainer = tiny_trainer(tmp_path, trainer={"callbacks": [curious]}, **settings)
    before = trainer.estimate(OneStep()).grads
    again = trainer.estimate(OneStep()).grads
    assert trainer.optimizer is None
    trainer.train()
    assert any(leaf.any() for leaf in before.values())
    assert same(before, curious.estimates[0])
    assert same(before, again)
    assert same(final_state(trainer), final_state(plain))


def test_an_estimator_can_be_asked_for_by_hand(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, optim="rmsprop", **ESTIMATES["evograd_head"])
    assert any(leaf.any() for leaf in trainer.estimate(EvoGrad()).grads.values())
    with pytest.raises(ValueError, match="RMSprop has no rule"):
        trainer.estimate(OneStep())


# A model made anew


def init() -> CrossLingualTagger:
    with torch.random.fork_rng():
        return tiny_tagger(dropout=False, base=SHALLOW)


def from_init(folder: Path, model_init: Any, **fields: Any) -> MetaTrainer:
    return MetaTrainer(
        None,
        tiny_arguments(folder, **fields),
        model_init=model_init,
        train_dataset=random_rows(24, seed=1, language=0),
        eval_dataset=random_rows(4, seed=5, language=None),
        meta_dataset=random_rows(12, seed=2),
        data_collator=collate,
    )


def test_a_model_of_model_init_trains_as_one_handed_over(tmp_path: Path) -> None:
    plain = tiny_trainer(tmp_path, tagger=init())
    plain.train()
    made = from_init(tmp_path, init)
    for _ in range(2):  # the second training starts anew
        made.train()
        assert different(base_weights(made), base_weights(plain)) == []
        assert different(meta_weights(made), meta_weights(plain)) == []


@pytest.mark.parametrize(
    ("model_init", "fields", "what"),
    [
        (lambda: tiny_base(), {}, "a XLMRobertaForTokenClassification as model"),
        (lambda: tiny_tagger(torch.bfloat16), {}, "bfloat16 parameters"),
        (None, {}, "a NoneType as model"),
    ],
)
def test_a_model_of_model_init_is_refused_as_one_handed_over(
    tmp_path: Path, model_init: Any, fields: dict[str, Any], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        from_init(tmp_path / "out", model_init, **fields)
    assert not (tmp_path / "out").exists()


class Listed:
    """A search backend that goes through a list of trials, as optuna's does through its own."""

    default_hp_space = None

    def ensure_available(self) -> None:
        pass

    def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> list[Any]:
        found = []
        for number, params in enumerate(kwargs["trials"][:n_trials]):
            trainer.train(trial=SimpleNamespace(number=number, params=params))
            found.append((meta_weights(trainer), BestRun("", trainer.evaluate()["eval_loss"], params)))
        return found


@pytest.mark.slow
def test_a_search_makes_the_meta_level_anew_in_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Listed)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # optuna is not there
    trials: list[dict[str, Any]] = [
        {"meta_learning_rate": 0.01, "estimator": "evograd", "estimator_kwargs": {"copies": 4}},
        {"meta_learning_rate": 0.05, "estimator": "one_step", "estimator_kwargs": {}, "meta_portion": 1.0},
        {"meta_seed": 8, "per_device_meta_batch_size": 2},
    ]
    found: Any = from_init(tmp_path, init).hyperparameter_search(
        backend="optuna", n_trials=3, hp_space=lambda trial: trial.params, trials=trials
    )
    assert len(found) == 3
    settings: dict[str, Any] = {}
    for params, (lam, _) in zip(trials, found, strict=True):
        settings |= params
        alone = from_init(tmp_path, init, **settings)
        alone.train()
        assert different(meta_weights(alone), lam) == []


def test_a_trial_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Listed)
    momentum = {"meta_optim": "SGD", "meta_optim_kwargs": {"momentum": -1}}
    for params, what in (
        ({"estimator": "nostep"}, "estimator 'nostep'"),
        ({"meta_portion": 3}, "meta_portion must"),
        (momentum, "meta_optim SGD.* cannot be used"),
    ):
        with pytest.raises(ValueError, match=what):
            from_init(tmp_path, init).hyperparameter_search(
                backend="optuna", n_trials=1, hp_space=lambda trial: trial.params, trials=[params]
            )


def test_arguments_that_were_changed_are_checked_where_a_training_starts(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, trainer={"meta_dataset": None}, estimator="none")
    trainer.args.estimator = "one_step"
    with pytest.raises(ValueError, match="needs meta rows"):
        trainer.train()


def test_a_subclass_decides_how_a_hypergradient_acts(tmp_path: Path) -> None:
    class Twice(MetaTrainer):
        def _apply(self, result: Any) -> None:
            super()._apply(replace(result, grads=tree.scale(result.grads, 2.0)))

    moves = []
    for cls in (MetaTrainer, Twice):
        tagger = tiny_tagger(torch.float64)
        trainer = tiny_trainer(tmp_path, trainer_class=cls, tagger=tagger, max_steps=1, meta_optim="SGD")
        start = meta_weights(trainer)
        trainer.train()
        moves.append(minus(meta_weights(trainer), start))
    close(moves[1], tree.scale(moves[0], 2.0), 1e-9)
