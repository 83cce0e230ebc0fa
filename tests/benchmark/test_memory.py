"""The memory counter against allocations that are known."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from metaxl_evo.benchmark.memory import PeakMemory, live_tensors

KIB = 256  # float32 numbers


class AllocatesInBackward(torch.autograd.Function):
    """x -> x, with a buffer of 64 KiB in the backward that nothing keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        torch.zeros(64 * KIB).add_(1)
        return gradient.clone()


def test_freed_storages_are_given_back_and_views_cost_nothing() -> None:
    with PeakMemory() as memory:
        first = torch.zeros(10 * KIB)
        first.view(10, KIB).t().add_(1)
        assert (memory.live, memory.peak) == (10 * 1024, 10 * 1024)
        del first
        assert memory.live == 0
        second = torch.zeros(4 * KIB, dtype=torch.float64)
        third = second[:KIB].clone()
        assert memory.live == 8 * 1024 + 2 * 1024
        del second
        assert memory.live == 2 * 1024
        del third
    assert (memory.live, memory.peak) == (0, 10 * 1024)


def test_resident_tensors_count_once_and_until_they_are_freed() -> None:
    resident = torch.zeros(8 * KIB)
    with PeakMemory([resident, resident.view(8, KIB)]) as memory:
        resident.mul_(2)
        assert memory.peak == 8 * 1024
        del resident
        torch.zeros(2 * KIB)
    assert (memory.live, memory.peak) == (0, 8 * 1024)


def test_backward_and_its_temporaries_are_seen() -> None:
    x = torch.ones(KIB, requires_grad=True)
    with PeakMemory([x]) as memory:
        loss = AllocatesInBackward.apply(x).sum()
        before = memory.peak
        loss.backward()
    assert before < 2 * 1024
    assert 64 * 1024 < memory.peak < 69 * 1024
    assert x.grad is not None
    assert memory.live == x.nbytes + x.grad.nbytes + loss.nbytes


def test_products_of_torch_func_are_seen() -> None:
    point = torch.ones(KIB)

    def loss(x: Tensor) -> Tensor:
        return (x.expand(32, KIB) * 1.5).square().sum()  # 32 KiB, several times

    with PeakMemory() as memory:
        torch.func.jvp(torch.func.grad(loss), (point,), (point,))
    assert memory.peak > 4 * 32 * 1024, "the square's input and its gradient, each with its tangent"
    assert memory.live < 32 * 1024


def test_an_adam_step_makes_two_moments() -> None:
    weight = torch.nn.Parameter(torch.ones(16 * KIB))
    weight.grad = torch.ones(16 * KIB)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    with PeakMemory([weight, weight.grad]) as memory:
        optimizer.step()
    assert 4 * 16 * 1024 <= memory.live < 4 * 16 * 1024 + 64
    assert memory.peak < 4 * 16 * 1024 + 64


def live(size: int) -> int:
    """How many live storages there are of this unusual size."""
    return len({tensor.untyped_storage().data_ptr() for tensor in live_tensors() if tensor.numel() == size})


def test_live_tensors_knows_gradients_that_autograd_alone_holds() -> None:
    leaf = torch.ones(7777, requires_grad=True)
    assert live(7777) == 1
    (2 * leaf).sum().backward()
    assert live(7777) == 2


def test_live_tensors_forgets_garbage_in_cycles() -> None:
    cycle: list[Any] = [torch.ones(8888)]
    cycle.append(cycle)
    assert live(8888) == 1
    gc.disable()
    try:
        del cycle
        assert live(8888) == 0
    finally:
        gc.enable()


def test_live_tensors_are_those_that_hold_memory() -> None:
    """A compilation leaves fake ones behind, with symbols for sizes; a sparse one holds its parts."""
    fake = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(6, 11))
    sparse = torch.ones(9999).to_sparse()
    assert not any(tensor is fake or tensor is sparse for tensor in live_tensors())
    assert live(9999) == 2  # its values, its indices
    with PeakMemory(live_tensors()) as memory:
        start = memory.live
        more = torch.ones(9999).to_sparse()
    assert type(start) is int
    assert memory.live - start == 9999 * (4 + 8)
    del more
