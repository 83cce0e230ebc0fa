"""Toy bilevel problems with known answers; oracles of the estimator tests."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaxl_evo.bilevel import SGD, Adam, BilevelProblem, Counts, Cut, Tree, stop_gradient
from metaxl_evo.bilevel.replay import Facts, Tested
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState


@dataclass(frozen=True)
class Toy:
    """A problem at a point. `unused`: entries of lam that no loss reads; `update_state`: that before the step."""

    problem: BilevelProblem
    w: Tree
    lam: Tree
    train: Any
    val: Any
    direct: bool
    unused: frozenset[str] = frozenset()
    update_state: UpdateState | None = None

    def once(self) -> Toy:
        """The same, on losses that can be differentiated once only, and that say so."""
        return replace(self, problem=replace(once_differentiable(self.problem), second_order=False))


class OnlyOnce(torch.autograd.Function):
    """x -> x, whose backward refuses to be differentiated, backward or forward."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


def once_differentiable(problem: BilevelProblem) -> BilevelProblem:
    """The problem with every base weight behind `OnlyOnce`; its values and first derivatives stay the same."""

    def behind(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda w, *rest: OnlyOnce.apply(loss({n: OnlyOnce.apply(x) for n, x in w.items()}, *rest))

    cut = problem.cut
    if cut is not None:
        prefix = cut.prefix and behind(cut.prefix)
        cut = Cut(cut.names, behind(cut.hidden), behind(cut.loss), prefix)
    return replace(problem, inner_loss=behind(problem.inner_loss), outer_loss=behind(problem.outer_loss), cut=cut)


def _random(seed: int, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


# Section 7.1: quadratics ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """L_T = 1/2 (th - C lam - c)' A (th - C lam - c);  L_V = 1/2 (th - b)' V (th - b) + rho/2 |lam - lam0|^2."""

    A: Tensor
    C: Tensor
    c: Tensor
    V: Tensor
    b: Tensor
    lam0: Tensor
    rho: float

    @classmethod
    def make(cls, dtype: torch.dtype = torch.float64, rho: float = 0.3, m: int = 6, n: int = 4) -> Quadratic:
        root, val = _random(1, dtype, m, m), _random(2, dtype, m, m)
        eye = torch.eye(m, dtype=dtype)
        return cls(
            A=root @ root.T / m + 0.5 * eye, C=_random(3, dtype, m, n), c=_random(4, dtype, m),
            V=val @ val.T / m + 0.5 * eye, b=_random(5, dtype, m), lam0=_random(6, dtype, n), rho=rho,
        )  # fmt: skip

    def inner(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        off = w["th"] - self.C @ lam["lam"] - self.c
        return 0.5 * off @ self.A @ off

    def outer(self, w: Tree, lam: Tree, batch: Any) -> Tensor:
        off = w["th"] - self.b
        loss = 0.5 * off @ self.V @ off
        return loss + 0.5 * self.rho * (lam["lam"] - self.lam0).square().sum() if self.rho else loss

    def problem(self, update: UpdateRule) -> BilevelProblem:
        return BilevelProblem(self.inner, self.outer, update, direct_term=bool(self.rho))

    def g_val(self, th: Tensor) -> Tensor:
        return self.V @ (th - self.b)

    def direct(self, lam: Tensor) -> Tensor:
        return self.rho * (lam - self.lam0)

    def one_step(self, th: Tensor, lam: Tensor, lr: float) -> Tensor:
        """eta C' A g_V(th') + direct term, th' one SGD step from th."""
        after = th - lr * self.A @ (th - self.C @ lam - self.c)
        return lr * self.C.T @ self.A @ self.g_val(after) + self.direct(lam)

    def unrolled(self, th: Tensor, lam: Tensor, lr: float, steps: int) -> tuple[Tensor, Tensor]:
        """The weights after so many SGD steps."""
        for _ in range(steps):
            th = th - lr * self.A @ (th - self.C @ lam - self.c)
        return th, self.g_val(th)


def quadratic(dtype: torch.dtype, rho: float = 0.3, update: UpdateRule | None = None) -> Toy:
    q = Quadratic.make(dtype, rho)
    w, lam = {"th": _random(7, dtype, 6)}, {"lam": _random(8, dtype, 4)}
    return Toy(q.problem(update or SGD(lr=0.1)), w, lam, None, None, direct=bool(rho))


# Section 7.2: the one-dimensional problem of the EvoGrad paper -------------------------------------------------------


def one_dimensional(dtype: torch.dtype, x: float = -1.0, lam: float = 0.5) -> Toy:
    problem = BilevelProblem(
        inner_loss=lambda w, lam, batch: (w["x"] - 1).square() + lam["lam"] * w["x"].square(),
        outer_loss=lambda w, lam, batch: (w["x"] - 0.5).square(),
        update=SGD(lr=0.1),
        direct_term=False,
    )
    return Toy(
        problem, {"x": torch.tensor(x, dtype=dtype)}, {"lam": torch.tensor(lam, dtype=dtype)}, None, None, direct=False
    )


# Section 7.3: the golden problem -------------------------------------------------------------------------------------

GOLDEN_X = ((1.0, 0.5), (-0.5, 1.0), (0.25, -1.0), (0.75, 0.75))
GOLDEN_Y = (1.0, -0.5, 0.5, 0.25)
GOLDEN_XV = ((0.5, 1.0), (1.0, -0.25), (-0.5, 0.5))
GOLDEN_YV = (0.4, 0.8, -0.1)


def _golden_inner(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return 0.5 * (x @ w["th"] - y).square().mean() + 0.5 * (lam["lam"].exp() * w["th"].square()).sum()


def _golden_outer(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return 0.5 * (x @ w["th"] - y).square().mean() + 0.5 * 0.05 * lam["lam"].square().sum()


def golden(dtype: torch.dtype = torch.float64, update: UpdateRule | None = None) -> Toy:
    train = torch.tensor(GOLDEN_X, dtype=dtype), torch.tensor(GOLDEN_Y, dtype=dtype)
    val = torch.tensor(GOLDEN_XV, dtype=dtype), torch.tensor(GOLDEN_YV, dtype=dtype)
    w, lam = {"th": torch.tensor([0.3, -0.2], dtype=dtype)}, {"lam": torch.tensor([-1.0, 0.5], dtype=dtype)}
    return Toy(BilevelProblem(_golden_inner, _golden_outer, update or SGD(lr=0.1)), w, lam, train, val, direct=True)


# Small networks ------------------------------------------------------------------------------------------------------


def _network_weights(dtype: torch.dtype) -> tuple[Tree, Tree]:
    w = {
        "body.weight": _random(11, dtype, 2, 3, scale=0.7),
        "body.bias": _random(12, dtype, 2, scale=0.3),
        "head.weight": _random(13, dtype, 2, 2, scale=0.6),
        "head.bias": _random(14, dtype, 2, scale=0.3),
    }
    lam = {
        "net.weight": _random(15, dtype, 2, 2, scale=0.5),  # few numbers: forward mode takes a product for each
        "net.bias": _random(16, dtype, 2, scale=0.3),
        "unused": _random(17, dtype, 1),
    }
    return w, lam


def _batches(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    labels = torch.randint(0, 2, (12,), generator=torch.Generator().manual_seed(18))
    return (_random(19, dtype, 8, 3), labels[:8]), (_random(20, dtype, 4, 3), labels[8:])


def _body(w: Tree, x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, w["body.weight"], w["body.bias"]))


def _head(w: Tree, hidden: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(F.linear(hidden, w["head.weight"], w["head.bias"]), batch[1])


def _net(lam: Tree, hidden: Tensor) -> Tensor:
    return torch.tanh(F.linear(hidden, lam["net.weight"], lam["net.bias"]))


def _plain(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    return _head(w, _body(w, batch[0]), batch)


def network(dtype: torch.dtype) -> Toy:
    """A residual meta net behind a stop-gradient, Adam with an active clip, an entry of lam that nothing reads."""

    def inner(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        hidden = _body(w, batch[0])
        return _head(w, hidden + _net(lam, stop_gradient(hidden)), batch)

    w, lam = _network_weights(dtype)
    train, val = _batches(dtype)
    update = Adam(lr=0.02, weight_decay=0.01, max_grad_norm=0.2)
    state: UpdateState = {
        "step": 3,
        "exp_avg": {n: _random(30 + i, dtype, *x.shape, scale=0.02) for i, (n, x) in enumerate(w.items())},
        "exp_avg_sq": {
            n: _random(40 + i, dtype, *x.shape, scale=0.02).square() + 1e-4 for i, (n, x) in enumerate(w.items())
        },
    }
    problem = BilevelProblem(inner, _plain, update, stop_gradients=True, direct_term=False)
    return Toy(problem, w, lam, train, val, direct=False, unused=frozenset({"unused"}), update_state=state)


def cut_network(dtype: torch.dtype) -> Toy:
    """The meta net just below the head, offered as a cut; the outer loss passes through it too (a direct term)."""

    def prefix(w: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return _body(w, batch[0])

    def hidden(w: Tree, lam: Tree, below: Tensor | None, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert below is not None
        return below + _net(lam, below)

    def inner(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return _head(w, hidden(w, lam, prefix(w, batch), batch), batch)

    w, lam = _network_weights(dtype)
    train, val = _batches(dtype)
    cut = Cut(frozenset({"head.weight", "head.bias"}), hidden, _head, prefix)
    problem = BilevelProblem(inner, inner, SGD(lr=0.1, momentum=0.9), cut=cut, direct_term=True)
    return Toy(problem, w, lam, train, val, direct=True, unused=frozenset({"unused"}))


def tagger(attention: str = "eager", dtype: torch.dtype = torch.float64) -> Toy:
    """A tiny XLM-R token classifier (no dropout), a residual meta net on the last hidden states of its train rows."""
    from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification

    options: dict[str, Any] = {"num_labels": 3, "attn_implementation": attention}
    config = XLMRobertaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, pad_token_id=1, initializer_range=0.2, **options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = XLMRobertaForTokenClassification(config).eval()
        model = model.double() if dtype == torch.float64 else model
    w = {name: parameter.detach() for name, parameter in model.named_parameters()}
    lam = {
        "down": _random(61, dtype, 6, 16, scale=0.4),
        "up": _random(62, dtype, 16, 6, scale=0.4),
        "bias": _random(63, dtype, 16, scale=0.2),
    }

    def logits(w: Tree, lam: Tree | None, words: Tensor) -> Tensor:
        encoder = {name.removeprefix("roberta."): x for name, x in w.items() if name.startswith("roberta.")}
        mask = (words != 1).long()
        inputs = {"input_ids": words, "attention_mask": mask}
        hidden = torch.func.functional_call(model.roberta, encoder, (), inputs).last_hidden_state  # (B, T, H)
        if lam is not None:
            hidden = hidden + F.gelu(stop_gradient(hidden) @ lam["down"].T) @ lam["up"].T + lam["bias"]
        return F.linear(hidden, w["classifier.weight"], w["classifier.bias"])  # (B, T, labels)

    def inner(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits(w, lam, batch[0]).flatten(0, 1), batch[1].flatten())

    def outer(w: Tree, lam: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits(w, None, batch[0]).flatten(0, 1), batch[1].flatten())

    generator = torch.Generator().manual_seed(64)
    words = torch.randint(3, 30, (6, 5), generator=generator)
    words[:2, 3:] = 1
    labels = torch.where(words == 1, -100, torch.randint(0, 3, (6, 5), generator=generator))
    update = Adam(lr=1e-2, eps=1e-4, max_grad_norm=1.0)
    problem = BilevelProblem(inner, outer, update, stop_gradients=True, direct_term=False)
    return Toy(problem, w, lam, (words[:3], labels[:3]), (words[3:], labels[3:]), direct=False)


TOYS: dict[str, Callable[[torch.dtype], Toy]] = {
    "quadratic": quadratic,
    "quadratic_indirect": lambda dtype: quadratic(dtype, rho=0.0),
    "one_dimensional": one_dimensional,
    "golden": golden,
    "network": network,
    "cut_network": cut_network,
}


# Helpers -------------------------------------------------------------------------------------------------------------


class _Everything(Tested):
    """What was found to be right on all batches, for all names."""

    def covers(self, kind: Any, names: frozenset[Any]) -> bool:
        return True


def known() -> Facts:
    """All that is to be found out about a loss, so that no passes are made for it."""
    return Facts(evaluated=True, trusted=_Everything(), engine="jvp", twice=True, forward_ad=_Everything())


def counted(*written: str) -> Counts:
    """The sum of what is written as `2F 1B 3J`: forwards, backwards, double backwards (D), forward-mode products."""
    names, total = {"F": "forwards", "B": "backwards", "D": "hvps", "J": "jvps"}, Counter[str]()
    for count, letter in re.findall(r"(\d+)([FBDJ])", " ".join(written)):
        total[names[letter]] += int(count)
    return Counts(**total)


def logged(fn: Callable[..., Tensor], calls: list[Any]) -> Callable[..., Tensor]:
    """`fn`, which first notes the arguments of every call."""

    def run(*inputs: Any) -> Tensor:
        calls.append(inputs)
        return fn(*inputs)

    return run


def flat(tree: Tree) -> Tensor:
    """All leaves in one float64 vector."""
    return torch.cat([leaf.detach().double().reshape(-1) for leaf in tree.values()])


def unflat(vector: Tensor, like: Tree) -> Tree:
    pieces = vector.split([leaf.numel() for leaf in like.values()])
    return {name: piece.reshape(leaf.shape).to(leaf) for (name, leaf), piece in zip(like.items(), pieces, strict=True)}


def relative_error(found: Tree, expected: Tree) -> float:
    """|found - expected| / |expected|, over all leaves."""
    assert found.keys() == expected.keys()
    a, b = flat(found), flat(expected)
    return float((a - b).norm() / b.norm())


def numerical_error(
    found: Tree, fn: Callable[[Tree], float], at: Tree, directions: int = 2, step: float = 2e-3
) -> float:
    """How far `found` is from the gradient of the number `fn` at `at`, relative to its own size.

    Judged along random directions by central differences of fourth order: an oracle that shares nothing with autograd.
    """
    point, gradient, worst = flat(at), flat(found), 0.0
    for index in range(directions):
        direction = _random(900 + index, torch.float64, point.numel())
        direction /= direction.norm()
        at_step = {k: fn(unflat(point + k * step * direction, at)) for k in (-2, -1, 1, 2)}
        slope = (8 * (at_step[1] - at_step[-1]) - (at_step[2] - at_step[-2])) / (12 * step)
        worst = max(worst, abs(slope - float(gradient @ direction)) / float(gradient.norm()))
    return worst


def random_like(tree: Tree, seed: int) -> Tree:
    return {name: _random(seed + i, leaf.dtype, *leaf.shape) for i, (name, leaf) in enumerate(tree.items())}
