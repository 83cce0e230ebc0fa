"""Settings that only a library can judge: refused before anything is trained, and by nothing that arguments build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from metaxl_evo.training.dry_run import refuse_unusable
from tests.training.tiny import tiny_arguments, tiny_trainer

NEGATIVE = {"momentum": -1}
UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "meta optimiser": (
        {"meta_optim": "SGD", "meta_optim_kwargs": NEGATIVE},
        r"meta_optim SGD, meta_optim_kwargs {'momentum': -1}: cannot be used \(Invalid momentum value: -1\)",
    ),
    "base optimiser": (
        {"optimizer_class": "SGD", "optimizer_kwargs": NEGATIVE},
        r"optimizer_class SGD, optimizer_kwargs {'momentum': -1}: cannot be used \(Invalid momentum value: -1\)",
    ),
    "meta optimiser, together": (
        {"meta_optim": "SGD", "meta_optim_kwargs": {"nesterov": True}},
        r"meta_optim SGD, meta_optim_kwargs .*: cannot be used \(Nesterov momentum requires a momentum",
    ),
    "base optimiser, together": (
        {"optimizer_class": "SGD", "optimizer_kwargs": {"nesterov": True}},
        r"optimizer_class SGD, optimizer_kwargs .*: cannot be used \(Nesterov momentum requires a momentum",
    ),
    "the library's optimiser": ({"optim": "sgd", "optim_args": "x"}, "optim sgd, optim_args x: cannot be used"),
    "schedule": (
        {"lr_scheduler_kwargs": {"a": 1}},
        r"lr_scheduler_type linear, lr_scheduler_kwargs {'a': 1}: cannot be used",
    ),
    "kind of schedule": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "lr_scheduler_type cosine_with_min_lr: cannot be used",
    ),
    "report": ({"report_to": "x"}, r"report_to \['x'\]: cannot be used \(x is not supported"),
    "compilation": (
        {"torch_compile_backend": "x", "estimator": "none"},
        "torch_compile_backend x: cannot be used",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_trainer_refuses_them_when_it_is_made(tmp_path: Path, case: str) -> None:
    settings, message = UNUSABLE[case]
    args = tiny_arguments(tmp_path, **settings)
    for refused in (lambda: refuse_unusable(args), lambda: tiny_trainer(tmp_path, **settings)):
        with pytest.raises(ValueError, match=f"^{message}") as error:
            refused()
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_arguments_build_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("arguments build")

    monkeypatch.setattr(torch, "compile", built)
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", built)
    monkeypatch.setattr("transformers.integrations.TensorBoardCallback.__init__", built)
    tiny_arguments(tmp_path, report_to="tensorboard", torch_compile_backend="eager", optimizer_class="SGD")
