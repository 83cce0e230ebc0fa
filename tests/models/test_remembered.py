"""An answer is that for the numbers as they are, and goes with them."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from metaxl_evo.models.remembered import remembered


def count(first: Tensor, *others: Tensor) -> int:
    return remembered("sum", lambda: int(torch.stack([first, *others]).sum()), first, *others)


def test_an_answer_is_that_for_the_numbers_as_they_are() -> None:
    a, b = torch.tensor([1, 2]), torch.tensor([3, 4])
    assert [count(a), count(a, b), count(a), count(b)] == [3, 10, 3, 7]
    b.add_(1)
    assert [count(a, b), count(b)] == [12, 9]
    assert count(a, b.clone().zero_()) == 3


def test_it_is_asked_once_and_within_a_transform_too() -> None:
    asked, labels = list[int](), torch.tensor([0, 1, 1])

    def places() -> Tensor:
        asked.append(1)
        return labels.nonzero().squeeze(1)

    def loss(x: Tensor) -> Tensor:
        return x[remembered("places", places, labels)].square().sum()

    x = torch.tensor([1.0, 2.0, 3.0])
    (tangent,) = torch.func.jvp(torch.func.grad(loss), (x,), (torch.ones(3),))[1:]
    assert tangent.tolist() == [0, 2, 2]
    assert float(loss(x)) == 13
    assert len(asked) == 1


def test_an_answer_goes_with_the_tensor() -> None:
    a = torch.ones(3)
    gone = weakref.ref(remembered("twice", lambda: 2 * a, a))  # noqa: F821 (flake takes `del` for before)
    del a
    gc.collect()
    assert gone() is None
