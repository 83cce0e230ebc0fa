"""What TF32 would do to hypergradients, simulated: ten bits of the numbers that matmuls and convolutions are given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from metaxl_evo.bilevel import SGD, BilevelProblem, hypergradient, tree
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators import Estimator, EvoGrad, OneStep

pytestmark = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has others")

MATMUL, CONVOLUTION = torch.backends.cuda.matmul, torch.backends.cudnn.conv
SWITCH_OF = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), MATMUL),
    **dict.fromkeys(("convolution", "convolution_backward"), CONVOLUTION),
}


def rounded(x: Any) -> Any:
    """The float32 numbers of a tensor to ten bits of mantissa, to nearest and ties to even, as a GPU reads them."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


class TensorCores(TorchDispatchMode):
    """Computes as a GPU whose switches are those of `torch.backends` at the time of the call."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        switch = SWITCH_OF.get(func.overloadpacket.__name__)
        if switch is not None and switch.fp32_precision == "tf32":
            args = tree_map(rounded, args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _tf32() -> Iterator[None]:
    """Switched on in both, as under torch_compile."""
    before = [switch.fp32_precision for switch in (MATMUL, CONVOLUTION)]
    MATMUL.fp32_precision = CONVOLUTION.fp32_precision = "tf32"
    yield
    MATMUL.fp32_precision, CONVOLUTION.fp32_precision = before


def drawn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weighted_convnet() -> tuple[BilevelProblem, Tree, Tree]:
    """A convolution and two layers; lam weighs the sixteen training images."""
    train, judges = (
        (drawn(seed, 16, 1, 8, 8), torch.randint(4, (16,), generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 2)
    )
    w = {"conv": drawn(3, 8, 1, 3, 3, scale=0.4), "a": drawn(4, 288, 32, scale=0.08), "b": drawn(5, 32, 4, scale=0.3)}

    def costs(w: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = torch.tanh(F.conv2d(batch[0], w["conv"])).flatten(1)
        return F.cross_entropy(torch.tanh(hidden @ w["a"]) @ w["b"], batch[1], reduction="none")

    problem = BilevelProblem(
        lambda w, lam, batch: (lam["of"].sigmoid() * costs(w, train)).mean(),
        lambda w, lam, batch: costs(w, judges).mean(),
        SGD(0.1),
    )
    return problem, w, {"of": drawn(6, 16)}


def found(estimator: Estimator, precision: str) -> Tree:
    problem, w, lam = weighted_convnet()
    return hypergradient(problem, estimator, w, lam, None, None, precision=precision).grads


def error(one: Tree, expected: Tree) -> float:
    return tree.norm(tree.add(one, expected, -1.0)) / tree.norm(expected)


EXACT, DIFFERENCES = (1e-4, 1e-2), (4e-3, 0.5)
ERRORS: list[tuple[Estimator, tuple[float, float]]] = [
    (OneStep("jvp"), EXACT),
    (OneStep("double_backward"), EXACT),
    (OneStep("finite_difference", radius=0.01), DIFFERENCES),
    (EvoGrad(copies=4, temperature=0.05), DIFFERENCES),
]


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize(("estimator", "bounds"), ERRORS)
def test_float32_keeps_out_what_tf32_would_do(estimator: Estimator, bounds: tuple[float, float]) -> None:
    """Differences of two passes lose most: they are of the size of what is rounded."""
    expected = found(estimator, "float32")
    with TensorCores():
        safe, rough = (error(found(estimator, precision), expected) for precision in ("float32", "tf32"))
    print(f"{estimator}: {safe:.1e} {rough:.1e}")
    assert safe < bounds[0] / 30
    assert bounds[0] < rough < bounds[1]
    assert MATMUL.fp32_precision == CONVOLUTION.fp32_precision == "tf32"  # put back


def test_rounding_is_to_ten_bits() -> None:
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-10 - 2**-12, 0.0])
    assert rounded(x).tolist() == [1.0, 1 + 2**-10, 1.0, 1 + 2**-9, -1 - 2**-10, 0.0]
