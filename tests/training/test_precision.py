"""bf16 training: the base step runs under autocast, the meta passes in float32: accelerate patches the forward
alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny import base_weights, logged, meta_weights, tiny_tagger, tiny_trainer


def dtypes_seen(
    folder: Path, **fields: Any
) -> tuple[set[torch.dtype], set[torch.dtype], dict[str, Tensor], list[float]]:
    """Logit dtypes in base steps and in meta passes, the RTN after one lookahead step, and the logged meta losses."""
    base, meta = set[torch.dtype](), set[torch.dtype]()
    tagger = tiny_tagger(dropout=False)
    classifier = tagger.base.get_submodule("classifier")
    owned = classifier.weight

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        in_place = module._parameters["weight"] is owned  # a meta pass swaps other tensors in
        (base if in_place else meta).add(output.dtype)

    classifier.register_forward_hook(watch)
    trainer = tiny_trainer(folder, tagger=tagger, meta_order="lookahead", meta_optim="SGD", max_steps=1, **fields)
    trainer.train()
    return base, meta, meta_weights(trainer), logged(trainer, "meta_loss")


@pytest.mark.parametrize("kwargs", [{"engine": "jvp"}, {"engine": "finite_difference"}], ids=str)
def test_meta_passes_stay_in_float32(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    plain = dtypes_seen(tmp_path / "fp32", estimator_kwargs=kwargs)
    mixed = dtypes_seen(tmp_path / "bf16", estimator_kwargs=kwargs, bf16=True)
    assert plain[:2] == ({torch.float32}, {torch.float32})
    assert mixed[:2] == ({torch.bfloat16}, {torch.float32})
    assert mixed[3] == plain[3]  # at the same weights the meta loss is the same number
    for name, value in plain[2].items():
        torch.testing.assert_close(mixed[2][name], value, rtol=0, atol=0)


def test_weights_stay_in_float32(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, bf16=True, max_steps=2, estimator="evograd")
    trainer.train()
    for weights in (base_weights(trainer), meta_weights(trainer)):
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())
