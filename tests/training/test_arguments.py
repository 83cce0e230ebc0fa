"""The arguments of both levels: what they refuse, in one line each, and how they read."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from metaxl_evo.estimators import ESTIMATORS, EvoGrad, OneStep, make_estimator
from metaxl_evo.training.arguments import META_SCHEDULES, MetaTrainingArguments
from metaxl_evo.training.optimizers import optimizer_named
from metaxl_evo.training.parser import parse_arguments
from tests.training.tiny import tiny_arguments, tiny_trainer

NUMBER, COUNT = "must be a number of at least 0", "must be a whole number of at least 1"
BAD = {
    **dict.fromkeys(
        [
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "adam_epsilon",
            "meta_learning_rate",
            "meta_weight_decay",
            "meta_adam_epsilon",
            "meta_warmup_steps",
        ],
        ([-1, -1e-9, float("nan"), float("inf"), "1e-3", True], NUMBER),
    ),
    **dict.fromkeys(
        [
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "per_device_meta_batch_size",
            "gradient_accumulation_steps",
            "meta_every",
            "max_skipped_meta_steps",
        ],
        ([0, -2, 1.5, "2", True, None], COUNT),
    ),
    **dict.fromkeys(
        ["adam_beta1", "adam_beta2"], ([-0.1, 1, float("nan"), "0.9"], "must be a number of at least 0 and below 1")
    ),
    "episode_length": ([0, -2, 1.5, "2", True], COUNT),
    "episode_reptile_rate": (
        [0, -0.5, 1.5, float("nan"), "0.5", True, None],
        "must be a number above 0 and at most 1",
    ),
    "lr_milestones": (
        [[0.5, 0.5], [0.75, 0.5], [0, 0.5], [0.5, 1], [float("nan")], ["0.5"], [True], 0.5, "0.5"],
        "must be increasing numbers above 0 and below 1",
    ),
    "lr_milestone_factor": ([0, -0.1, 1.5, float("nan"), "0.1", True, None], "must be a number above 0 and at most 1"),
    "meta_diagnostics_every": ([-1, 1.5, "2", True, None], "must be a whole number of at least 0"),
    "num_train_epochs": ([0, -1, float("nan"), float("inf"), "1", None], "must be a number above 0"),
    "max_steps": ([0, -5, 1.5, "3"], "must be at least 1"),
    "label_smoothing_factor": ([0.1], "must be 0"),
    "meta_portion": ([-0.1, 1.1, float("nan"), "0.5", None], "must be a number between 0 and 1"),
    "meta_last": ([0, -1, 1.5, "2", True], "must be a whole number of at least 1"),
    "meta_max_grad_norm": ([0, -1, float("nan"), float("inf"), "1"], "must be a number above 0"),
    "max_grad_value": ([0, -1, float("nan"), float("inf"), "1"], "must be a number above 0"),
    "meta_learning_rates": ([{"lr": -1}, {"lr": "1"}, {"lr": True}], "must be names with numbers of at least 0"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (bad, _) in BAD.items() for value in bad])
def test_bad_sizes_and_rates(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} {BAD[name][1]}") as error:
        tiny_arguments(tmp_path, **{name: value})
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_numeric_field_of_this_level_is_checked() -> None:
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name: str(field.type) for field in fields(MetaTrainingArguments) if field.name not in inherited}
    assert {name for name, kind in own.items() if "int" in kind or "float" in kind} - {"meta_seed"} <= BAD.keys()


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("estimator", "evogradd", "did you mean 'evograd'"),
        ("meta_order", "before", "Valid: after_step, lookahead"),
        ("episode_reset", "reset", "Valid: continue, restart, reptile"),
        ("meta_optim", "adamw_torch", "AdamW"),
        ("meta_optim", "LBFGS", "AdamW"),
        ("optimizer_class", "Adamm", "did you mean 'Adam'"),
        ("meta_lr_scheduler_type", "lineal", "did you mean 'linear'"),
    ],
)
def test_unknown_names_list_the_valid_ones(tmp_path: Path, name: str, value: str, valid: str) -> None:
    with pytest.raises(ValueError, match=f"unknown {name} {value!r}.*Valid: ") as error:
        tiny_arguments(tmp_path, **{name: value})
    assert valid in str(error.value)


def test_an_unknown_estimator_lists_all_of_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown estimator 'x'") as error:
        tiny_arguments(tmp_path, estimator="x")
    assert all(name in str(error.value) for name in (*ESTIMATORS, "none"))


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_an_unknown_field_of_an_estimator_lists_its_fields(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="copys") as error:
        tiny_arguments(tmp_path, estimator=name, estimator_kwargs={"copys": 3})
    assert all(field.name in str(error.value) for field in fields(ESTIMATORS[name]))


def test_bad_values_of_an_estimators_fields_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="copies must be an integer of at least 2"):
        tiny_arguments(tmp_path, estimator="evograd", estimator_kwargs={"copies": 1})


@pytest.mark.parametrize("given", [{"copies": 8, "noise": "gaussian"}, '{"copies": 8, "noise": "gaussian"}'])
def test_estimator_kwargs_as_mapping_or_json(tmp_path: Path, given: Any) -> None:
    args = tiny_arguments(tmp_path, estimator="evograd", estimator_kwargs=given)
    assert args.estimator_kwargs == {"copies": 8, "noise": "gaussian"}
    assert args.make_estimator() == EvoGrad(copies=8, noise="gaussian")


@pytest.mark.parametrize("given", ["copies", '{"copies": 8', "[1]", [1], 3])
def test_estimator_kwargs_that_are_no_mapping(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ValueError, match=r"^estimator_kwargs must be a mapping") as error:
        tiny_arguments(tmp_path, estimator="evograd", estimator_kwargs=given)
    assert "\n" not in str(error.value)


def test_defaults() -> None:
    args = MetaTrainingArguments(output_dir="unused", use_cpu=True)
    assert args.make_estimator() == OneStep()
    assert (args.meta_order, args.meta_portion, args.meta_every, args.meta_weight_decay) == ("after_step", 1, 1, 0.0)
    assert args.meta_max_grad_norm is None
    assert not args.meta_dropout
    assert not args.remove_unused_columns


def test_the_meta_seed_is_the_seed_unless_given(tmp_path: Path) -> None:
    assert tiny_arguments(tmp_path, seed=7).meta_seed == 7
    assert tiny_arguments(tmp_path, seed=7, meta_seed=0).meta_seed == 0


def test_no_estimator(tmp_path: Path) -> None:
    assert tiny_arguments(tmp_path, estimator="none").make_estimator() is None


def test_the_estimator_is_made_once_from_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(name: str, **settings: Any) -> Any:
        made.append(name)
        return make_estimator(name, **settings)

    monkeypatch.setattr("metaxl_evo.training.arguments.make_estimator", counted)
    trainer = tiny_trainer(
        tmp_path, estimator="evograd", estimator_kwargs={"copies": 4}, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert made == ["evograd"]
    args = trainer.args
    assert args.make_estimator() is trainer.estimator


def test_another_estimator_of_other_settings(tmp_path: Path) -> None:
    args = tiny_arguments(tmp_path, estimator="evograd", estimator_kwargs={"copies": 4})
    args.estimator_kwargs["copies"] = 6  # type: ignore[index, call-overload]
    assert args.make_estimator() == EvoGrad(copies=6)
    other = copy.copy(args)
    other.estimator, other.estimator_kwargs = "none", None
    assert other.make_estimator() is None
    assert args.make_estimator() == EvoGrad(copies=6)


def test_another_class_of_the_name_is_another_estimator_and_none_is_pickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Redefined(EvoGrad):
        """Of a notebook: it is known to this process alone."""

    args = tiny_arguments(tmp_path, estimator="evograd")
    assert type(args.make_estimator()) is EvoGrad
    monkeypatch.setitem(ESTIMATORS, "evograd", Redefined)
    assert type(args.make_estimator()) is Redefined
    assert type(pickle.loads(pickle.dumps(args)).make_estimator()) is Redefined


def test_arguments_survive_pickling_and_to_dict(tmp_path: Path) -> None:
    args = tiny_arguments(tmp_path, estimator="evograd", estimator_kwargs={"copies": 4}, meta_max_grad_norm=1.0)
    again = pickle.loads(pickle.dumps(args))
    assert again.make_estimator() == args.make_estimator()
    assert args.to_dict()["estimator_kwargs"] == {"copies": 4}
    assert MetaTrainingArguments(**{f.name: getattr(args, f.name) for f in fields(args) if f.init}) == args


def _schedule_runs(kind: str) -> bool:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        scheduler = get_scheduler(kind, optimizer=optimizer, num_warmup_steps=1, num_training_steps=4)
        optimizer.step()
        scheduler.step()
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_schedules_are_those_that_run_without_further_settings(tmp_path: Path, kind: str) -> None:
    assert (kind in META_SCHEDULES) == _schedule_runs(kind)
    if kind in META_SCHEDULES:
        for given in (kind, SchedulerType(kind)):
            assert tiny_arguments(tmp_path, meta_lr_scheduler_type=given).meta_lr_scheduler_type == kind
    else:
        with pytest.raises(ValueError, match="Valid: linear"):
            tiny_arguments(tmp_path, meta_lr_scheduler_type=kind)


def _optimizer_steps(cls: type[torch.optim.Optimizer]) -> bool:
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, 2))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    try:
        try:
            cls(parameters, **settings, eps=1e-8).step()
        except TypeError:
            cls(parameters, **settings).step()
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def test_optimizers_are_those_that_rate_decay_and_epsilon_drive() -> None:
    every = {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert len(every) > 10
    for name, cls in every.items():
        if (
            _optimizer_steps(cls) and name != "Adafactor"
        ):  # its eps is a pair, and weight_decay defaults to another mean
            assert optimizer_named(name, "meta_optim") is cls
        else:
            with pytest.raises(ValueError, match="unknown meta_optim"):
                optimizer_named(name, "meta_optim")


# Further settings of the optimisers

SGD_SETTINGS = {"momentum": 0.9, "nesterov": True}
FURTHER = {"meta_optim_kwargs": "meta_optim", "optimizer_kwargs": "optimizer_class"}  # and what names the class
on_further = pytest.mark.parametrize("name", FURTHER)


def further(folder: Path, name: str, cls: str, given: Any) -> MetaTrainingArguments:
    return tiny_arguments(folder, **{FURTHER[name]: cls, name: given})


@on_further
@pytest.mark.parametrize("given", [SGD_SETTINGS, '{"momentum": 0.9, "nesterov": true}'], ids=["mapping", "json"])
def test_further_settings_reach_the_optimiser(tmp_path: Path, name: str, given: Any) -> None:
    args = further(tmp_path, name, "SGD", given)
    assert getattr(args, name) == SGD_SETTINGS
    make = args.make_meta_optimizer if name == "meta_optim_kwargs" else args.make_optimizer
    (group,) = make([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, True, 0)
    assert group["lr"] == (args.meta_learning_rate if name == "meta_optim_kwargs" else args.learning_rate)


def test_betas_of_the_meta_optimiser(tmp_path: Path) -> None:
    args = further(tmp_path, "meta_optim_kwargs", "Adam", {"betas": [0.5, 0.9]})
    (group,) = args.make_meta_optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert [*group["betas"]] == [0.5, 0.9]


FIELDS = {
    "meta_optim_kwargs": {"lr": "meta_learning_rate", "weight_decay": "meta_weight_decay", "eps": "meta_adam_epsilon"},
    "optimizer_kwargs": {
        "lr": "learning_rate",
        "weight_decay": "weight_decay",
        "eps": "adam_epsilon",
        "betas": "adam_beta1 and adam_beta2",
    },
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in FIELDS.items() for key in keys])
def test_further_settings_that_have_a_field_point_to_it(tmp_path: Path, name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {key} has a field of its own: set {FIELDS[name][key]} instead$"):
        further(tmp_path, name, "Adam", {key: 0.1})


@on_further
@pytest.mark.parametrize(
    ("cls", "given", "what"),
    [
        ("SGD", {"momentun": 0.9}, r"unknown setting of SGD 'momentun': did you mean 'momentum'\? Valid: momentum, "),
        ("SGD", {"eps": 0.9}, r"unknown setting of SGD 'eps': Valid: .* \(NAME '{}' drops those of a config\)"),
        ("SGD", {"params": []}, "unknown setting of SGD 'params'"),
        ("SGD", {"differentiable": True}, "unknown setting of SGD 'differentiable'"),
        ("AdamW", {"momentum": 0.9}, "unknown setting of AdamW 'momentum': Valid: (betas, )?amsgrad, "),
        ("SGD", {"momentum": "0.9"}, "NAME: momentum must be a number, not '0.9'"),
        ("SGD", {"momentum": True}, "NAME: momentum must be a number, not True"),
        ("SGD", {"momentum": float("nan")}, "NAME: momentum must be a number, not nan"),
        ("SGD", {"nesterov": "false"}, "NAME: nesterov must be true or false, not 'false'"),
        ("SGD", {"foreach": 1}, "NAME: foreach must be true or false, not 1"),
        ("SGD", "momentum", r'NAME must be a mapping, as in {"momentum": 0.9}, and \'momentum\' is not JSON'),
        ("SGD", [0.9], r'NAME must be a mapping, as in {"momentum": 0.9}, not \[0.9\]'),
    ],
)  # fmt: skip
def test_further_settings_that_cannot_be(tmp_path: Path, name: str, cls: str, given: Any, what: str) -> None:
    with pytest.raises(ValueError, match=what.replace("NAME", name)) as error:
        further(tmp_path, name, cls, given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [[0.9], [0.9, True], [0.5, 0.9, 0.9], 0.9])
def test_betas_are_as_many_as_the_class_has(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ValueError, match="meta_optim_kwargs: betas must be a list of 2 numbers, not "):
        further(tmp_path, "meta_optim_kwargs", "AdamW", {"betas": given})


def test_settings_of_a_class_that_is_not_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer_class, which is not set: set it, or use optim and optim_args"):
        tiny_arguments(tmp_path, optimizer_kwargs=SGD_SETTINGS)
    tiny_arguments(tmp_path, optimizer_kwargs={})  # which drops those of a config


# Drops of the learning rate


@pytest.mark.parametrize("given", [{}, {"lr_scheduler_type": "cosine"}, {"lr_scheduler_type": "constant_with_warmup"}])
def test_milestones_are_of_a_constant_rate(tmp_path: Path, given: dict[str, Any]) -> None:
    kind = given.get("lr_scheduler_type", "linear")
    message = f"^lr_milestones are .* not of a {kind} one: set lr_scheduler_type: constant, or leave lr_milestones"
    with pytest.raises(ValueError, match=message):
        tiny_arguments(tmp_path, lr_milestones=[0.5], **given)
    tiny_arguments(tmp_path, lr_milestones=[], **given)


# From a file and the command line


def test_lists_and_mappings_of_a_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "use_cpu: true\nreport_to: none\noptimizer_class: SGD\noptimizer_kwargs: {momentum: 0.9, nesterov: true}\n"
        "meta_optim: SGD\nmeta_optim_kwargs: {momentum: 5e-1}\nlr_scheduler_type: constant\n"
        "lr_milestones: [0.6666666666666666, 8e-1]\n"
    )

    def parsed(*given: str) -> MetaTrainingArguments:
        return parse_arguments((MetaTrainingArguments,), ["--config", str(file), *given])[0]

    args = parsed()
    assert (args.optimizer_kwargs, args.meta_optim_kwargs) == (SGD_SETTINGS, {"momentum": 0.5})
    assert args.lr_milestones == [0.6666666666666666, 0.8]
    assert parsed("--lr_milestones", "0.25,0.5").lr_milestones == [0.25, 0.5]
    assert parsed("--lr_milestones", "0.25", "0.5").lr_milestones == [0.25, 0.5]
    assert not parsed("--lr_milestones", "[]", "--lr_scheduler_type", "linear").lr_milestones
    dotted = parsed("--meta_optim_kwargs.nesterov", "true", "--optimizer_kwargs", '{"momentum": 0.8}')
    assert (dotted.meta_optim_kwargs, dotted.optimizer_kwargs) == (
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.8},
    )
    assert parsed("--meta_optim", "AdamW", "--meta_optim_kwargs", "{}").meta_optim_kwargs == {}


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown setting of MetaTrainingArguments 'meta_lr': did you mean 'meta_"):
        MetaTrainingArguments("out", meta_lr=0.1)  # type: ignore[call-arg]
