"""BilevelModule: weights swapped by pointer, frozen passes, the parameters of the two levels, files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from metaxl_evo.bilevel import SGD, hypergradient
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.estimators import (
    ESTIMATORS,
    ConjugateGradient,
    DrMAD,
    Estimator,
    EvoGrad,
    FirstOrder,
    ForwardMode,
    Greedy,
    HyperDistill,
    Neumann,
    OneStep,
    Sama,
    Unroll,
)
from metaxl_evo.models.bilevel_module import TOTALS, Batch, BilevelModule, totals_of
from metaxl_evo.models.parameters import places_of, swapped
from tests.training.tiny import NO_DROPOUT, collate, different, random_rows, tiny_base, tiny_tagger


class Weighted(BilevelModule):
    """Regression through batch norm and dropout; the meta network weighs the rows of the inner loss."""

    def inner_loss(self, batch: Batch) -> Tensor:
        errors = (self.base(batch["x"]) - batch["y"]).square() * self.meta(batch["x"]).sigmoid()
        return errors.sum() / totals_of(self, batch)["rows"]

    def outer_loss(self, batch: Batch) -> Tensor:
        return (self.base(batch["x"]) - batch["y"]).square().sum() / totals_of(self, batch)["rows"]

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"rows": len(batch["x"])}

    def save_meta(self, folder: str | Path) -> None:
        raise NotImplementedError

    def load_meta(self, folder: str | Path) -> None:
        raise NotImplementedError


def weighted(dtype: torch.dtype = torch.float32) -> Weighted:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
    return Weighted(base.to(dtype), nn.Linear(4, 1).to(dtype))


def batch_of(rows: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 4, generator=generator, dtype=dtype),
        "y": torch.randn(rows, 1, generator=generator, dtype=dtype),
    }


def moved(tree: dict[str, Tensor], by: float = 0.1) -> dict[str, Tensor]:
    return {name: leaf.detach() + by for name, leaf in tree.items()}


def pointers(module: nn.Module) -> list[int]:
    return [id(tensor) for owner in module.modules() for tensor in owner._parameters.values()]


# Swapping


class Tied(nn.Module):
    """Two layers with one weight, as input and output embeddings have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("make", [Tied, lambda: nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), lambda: tiny_base()])
def test_swapped_is_functional_call(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make().eval()
    x: Any = torch.randint(5, 90, (2, 6)) if hasattr(module, "config") else torch.randn(3, 5)
    before, values = pointers(module), moved(dict(module.named_parameters()))
    with swapped(places_of(module), values):
        found = module(x)
    expected = functional_call(module, values, (x,))
    found, expected = (getattr(out, "logits", out) for out in (found, expected))
    assert torch.equal(found, expected)
    assert pointers(module) == before
    assert not torch.equal(found, getattr(module(x), "logits", module(x)))


def test_tied_weights_stay_tied_and_their_gradients_add_up() -> None:
    torch.manual_seed(0)
    module, x = Tied().double(), torch.randn(3, 5, dtype=torch.float64)
    leaves = {
        name: leaf.detach().clone().requires_grad_() for name, leaf in moved(dict(module.named_parameters())).items()
    }
    with swapped(places_of(module), leaves):
        assert module.first.weight is module.second.weight
        found = torch.autograd.grad(module(x).square().sum(), leaves["first.weight"])[0]
    weight = leaves["first.weight"]
    by_hand = torch.tanh(x @ weight.T + leaves["first.bias"]) @ weight.T + leaves["second.bias"]
    torch.testing.assert_close(found, torch.autograd.grad(by_hand.square().sum(), weight)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [Tied, lambda: nn.Linear(5, 5)])
def test_swaps_nest(make: Callable[[], nn.Module]) -> None:
    module, x = make(), torch.randn(3, 5)
    before = pointers(module)
    first = moved(dict(module.named_parameters()), 0.1)
    name = next(iter(first))
    second = {name: first[name] + 1.0}
    with swapped(places_of(module), first):
        outer = module(x)
        with swapped(places_of(module), second):
            assert torch.equal(module(x), functional_call(module, first | second, (x,)))
        assert torch.equal(module(x), outer)
    assert pointers(module) == before


def test_swaps_end_with_an_exception() -> None:
    module = Tied()
    before = pointers(module)
    with pytest.raises(KeyError, match="inside"), swapped(places_of(module), moved(dict(module.named_parameters()))):
        raise KeyError("inside")
    assert pointers(module) == before


def test_an_unknown_name_is_refused_and_nothing_is_swapped() -> None:
    module = Tied()
    before = pointers(module)
    with (
        pytest.raises(ValueError, match=r"no parameter 'third.weight'"),
        swapped(places_of(module), {"first.weight": torch.zeros(5, 5), "third.weight": torch.zeros(1)}),
    ):
        pass
    assert pointers(module) == before


class Checkpointed(Weighted):
    """Its base is recomputed in the backward."""

    def inner_loss(self, batch: Batch) -> Tensor:
        prediction = checkpoint(self.base, batch["x"], use_reentrant=False)
        errors = (prediction - batch["y"]).square() * self.meta(batch["x"]).sigmoid()
        return errors.sum() / totals_of(self, batch)["rows"]


def test_a_recomputing_backward_sees_the_swapped_weights() -> None:
    batch = batch_of(5)
    gradients = []
    for cls in (Weighted, Checkpointed):
        plain = weighted()
        module = cls(plain.base, plain.meta)
        w = moved(module.base_parameters())
        passes = PassContext(module.problem(SGD(0.1)))
        gradients.append(passes.inner_grad(w, module.meta_parameters(), [batch], wrt_w=w)[1])
    assert different(*gradients) == []
    assert any(bool(leaf.any()) for leaf in gradients[0].values())


# Frozen passes


def snapshot(module: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in module.state_dict().items()},
        "pointers": pointers(module),
        "buffers": [id(buffer) for buffer in module.buffers()],
        "modes": [child.training for child in module.modules()],
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        "random": torch.random.get_rng_state(),
    }


def assert_unchanged(module: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(module)
    assert different(before["values"], after["values"]) == []
    for key in ("pointers", "buffers", "modes"):
        assert before[key] == after[key], key
    for name, gradient in before["gradients"].items():
        assert (gradient is None) == (after["gradients"][name] is None)
        assert gradient is None or torch.equal(gradient, after["gradients"][name])
    assert torch.equal(before["random"], after["random"])


ALL = [
    *(OneStep(engine=engine) for engine in ("double_backward", "jvp", "finite_difference")),  # type: ignore[arg-type]
    EvoGrad(),
    EvoGrad(parameters="^3", share_randomness=False),
    Sama(),
    Neumann(),
    ConjugateGradient(engine="finite_difference"),
    Unroll(),
    Unroll(horizon=1),
    DrMAD(),
    ForwardMode(),
    Greedy(),
    HyperDistill(),
    HyperDistill(engine="finite_difference", scale="fixed"),
]


def test_all_estimators_are_among_the_instances() -> None:
    assert {type(estimator) for estimator in ALL} == set(ESTIMATORS.values()) - {FirstOrder}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_a_meta_step_leaves_the_module_as_it_was(estimator: Estimator, dropout: bool) -> None:
    module = weighted().train()
    module.base[2].eval()  # a part that the user keeps in evaluation mode
    module.inner_loss(batch_of(5)).backward()
    before = snapshot(module)
    problem = module.problem(SGD(0.1), dropout=dropout)
    result = hypergradient(
        problem, estimator, module.base_parameters(), module.meta_parameters(), [batch_of(5)], [batch_of(4, 2)]
    )
    assert any(bool(leaf.any()) for leaf in result.grads.values())
    assert_unchanged(module, before)


class Counting(nn.Module):
    """Writes into a buffer in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * (1 + 0 * self.calls)


def test_what_a_pass_writes_into_a_buffer_is_thrown_away() -> None:
    plain = weighted()
    module = Weighted(nn.Sequential(*plain.base, Counting()), plain.meta).train()
    module(**batch_of(5))
    before = snapshot(module)
    hypergradient(
        module.problem(SGD(0.1)),
        OneStep(engine="double_backward"),
        module.base_parameters(),
        module.meta_parameters(),
        [batch_of(5)],
        [batch_of(4, 2)],
    )
    assert_unchanged(module, before)
    assert module.base[-1].calls.item() == 1


def test_a_meta_step_that_fails_leaves_the_module_as_it_was() -> None:
    module = weighted().train()
    before = snapshot(module)
    with pytest.raises(RuntimeError):
        hypergradient(
            module.problem(SGD(0.1)),
            OneStep(),
            module.base_parameters(),
            module.meta_parameters(),
            [batch_of(5)],
            [{"x": torch.zeros(2, 9), "y": torch.zeros(2, 1)}],
        )
    assert_unchanged(module, before)


def test_meta_passes_use_batch_statistics_but_no_dropout() -> None:
    module, batch = weighted(torch.float64).train(), batch_of(5, dtype=torch.float64)
    passes = PassContext(module.problem(SGD(0.1)))
    found = passes.inner_value(module.base_parameters(), module.meta_parameters(), [batch])
    first, norm, _, last = module.base
    hidden = first(batch["x"])
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
    expected = ((last(hidden) - batch["y"]).square() * module.meta(batch["x"]).sigmoid()).mean()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


def test_a_norm_that_the_user_froze_uses_its_running_statistics() -> None:
    module, batch = weighted(torch.float64).train(), batch_of(5, dtype=torch.float64)
    module(**batch_of(9, 7, dtype=torch.float64))
    module.base[1].eval()
    passes = PassContext(module.problem(SGD(0.1)))
    found = passes.inner_value(module.base_parameters(), module.meta_parameters(), [batch])
    assert torch.equal(found, module.eval().inner_loss(batch).detach())


def test_dropout_in_meta_passes_is_an_option_and_shared() -> None:
    module, batch = weighted().train(), batch_of(50)
    values = []
    for dropout in (False, True, True):
        passes = PassContext(module.problem(SGD(0.1), dropout=dropout), seed=4)
        values.append(passes.inner_value(module.base_parameters(), module.meta_parameters(), [batch]))
    assert values[0] != values[1]
    assert values[1] == values[2]


# The two levels


def test_meta_parameters_are_not_trained_by_the_base_backward() -> None:
    module = weighted().train()
    module(**batch_of(5))["loss"].backward()
    assert all(parameter.grad is None for parameter in module.meta.parameters())
    assert all(parameter.grad is not None for parameter in module.base.parameters())
    assert [p.requires_grad for p in module.meta.parameters()] == [False, False]


def test_frozen_base_parameters_are_constants_of_the_problem() -> None:
    module = weighted()
    module.base[0].requires_grad_(False)
    assert set(module.base_parameters()) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert set(module.meta_parameters()) == {"weight", "bias"}


def test_the_forward_is_the_inner_loss_in_training_and_the_base_in_evaluation() -> None:
    tagger = tiny_tagger(dropout=False)
    batch = collate(list(random_rows(4, seed=1, language=[0, -1])))
    assert torch.equal(tagger.train()(**batch)["loss"], tagger.mean_inner_loss(batch))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(tagger.eval()(**inputs).logits, tagger.base(**inputs).logits)
    assert tagger.config is tagger.base.config


def test_totals_are_the_windows_where_they_are_set() -> None:
    module, batch = weighted(), batch_of(5)
    assert totals_of(module, batch) == {"rows": 5}
    assert totals_of(module, {**batch, TOTALS: {"rows": 12}}) == {"rows": 12}


def test_micro_batches_add_up_to_the_batch() -> None:
    module = weighted(torch.float64).eval()  # batch statistics would differ
    batch = batch_of(6, dtype=torch.float64)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 6))]
    for part in parts:
        part[TOTALS] = {"rows": 6}
    results = [
        hypergradient(
            module.problem(SGD(0.1)), OneStep(), module.base_parameters(), module.meta_parameters(), train, [batch]
        )
        for train in ([batch], parts)
    ]
    for name, leaf in results[0].grads.items():
        torch.testing.assert_close(leaf, results[1].grads[name], rtol=1e-10, atol=1e-14)


def test_rows_of_one_shape_are_joined_and_others_refused() -> None:
    joined = weighted().join(batch_of(1), batch_of(2))
    assert torch.equal(joined["x"], torch.cat([batch_of(1)["x"], batch_of(2)["x"]]))
    longer = {"x": torch.ones(1, 5), "y": torch.ones(1, 1)}
    with pytest.raises(ValueError, match=r"Weighted cannot join rows whose 'x' differ in shape.*set meta_portion"):
        weighted().join(batch_of(1), longer)


def test_second_order_obstacles() -> None:
    assert weighted().second_order_obstacle is None
    tagger = tiny_tagger()
    for kernel in ("sdpa", "eager"):
        tagger.base.set_attn_implementation(kernel)
        assert tagger.second_order_obstacle is None
        assert tagger.problem(SGD(0.1)).second_order
    tagger.base.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in str(tagger.second_order_obstacle)
    tagger = tiny_tagger()
    tagger.activation_checkpointing_enable()
    assert "activation_checkpointing" in str(tagger.second_order_obstacle)
    problem = tagger.problem(SGD(0.1))
    assert not problem.second_order
    assert problem.cut is None  # its backward would leave the pass that holds the weights


# Files


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "garbage":
        file.write_bytes(b"no weights" * 9)
    elif how == "incomplete":
        weights = load_file(file)
        weights.pop(sorted(weights)[0])
        save_file(weights, file, metadata={"format": "pt"})
    elif how == "other sizes":
        save_file({k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in load_file(file).items()}, file, {"format": "pt"})


def test_weights_of_both_levels_come_back_bitwise(tmp_path: Path) -> None:
    tagger = tiny_tagger()
    for parameter in tagger.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tagger.save_pretrained(tmp_path)
    fresh = tiny_tagger()
    assert different(dict(tagger.state_dict()), dict(fresh.state_dict()))
    state = torch.random.get_rng_state()
    held = pointers(fresh)
    fresh.load_pretrained(tmp_path)
    assert different(dict(tagger.state_dict()), dict(fresh.state_dict())) == []
    assert pointers(fresh) == held  # an optimiser holds them already
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(parameter.requires_grad for parameter in fresh.meta.parameters())


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "garbage", "incomplete", "other sizes"])
@pytest.mark.parametrize("name", ["model.safetensors", "rtn/model.safetensors"])
def test_damaged_weights_are_named_in_one_line(tmp_path: Path, name: str, how: str) -> None:
    tiny_tagger().save_pretrained(tmp_path)
    damage(tmp_path / name, how)
    with pytest.raises(ValueError, match=f"{tmp_path / name} ") as error:
        tiny_tagger().load_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    tagger = tiny_tagger(base={"num_labels": 7})
    tagger.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"].keys() == {str(n) for n in range(7)}
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read") as error:
        tiny_tagger(base=NO_DROPOUT).load_pretrained(tmp_path)
    assert "\n" not in str(error.value)
