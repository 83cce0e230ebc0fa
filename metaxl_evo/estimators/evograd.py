"""EvoGrad: an evolutionary inner step, differentiated by first-order passes only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from metaxl_evo.bilevel import gate, tree
from metaxl_evo.bilevel.batched import at_once
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, Cut, InnerStep, Response
from metaxl_evo.bilevel.replay import Inputs
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.base import Estimator
from metaxl_evo.estimators.noise import NOISES, Perturbations
from metaxl_evo.messages import unknown

TOGETHER = 2**23  # numbers of the copies that one pass evaluates
BF16_ROUNDING = 2**-8  # of a number, relative to it
ONE_HOT = 1.1  # effective copies below this: one copy has more than 95 % of the weight


@dataclass(frozen=True)
class EvoGrad(Estimator):
    """value = w + sum_k w_k eps_k, w = softmax(-l / temperature), l_k = L_T(w + eps_k, lam) (Bohdal 2021, eq. 3-5).

    vjp(v) = sum_k a_k d_lam l_k with a_k = -(w_k / temperature) (s_k - sum_j w_j s_j), s_k = <v, eps_k>. One forward a
    copy yields its loss and its lambda-gradient; noise is regenerated from seeds and one graph is alive at a time, so
    the memory is a constant plus `copies` gradients of the size of lam. Where only the suffix of a cut is
    perturbed, the encoder runs once for all copies and a single backward reaches lam.

    Args:
        copies: number of perturbed copies K, at least 2.
        sigma: size of the perturbation.
        temperature: of the softmax over the copies' losses.
        noise: `sign` (sigma times a fair sign, the published code) or `gaussian` (the paper's text).
        antithetic: copies come in pairs +eps, -eps.
        parameters: a regular expression on parameter names; only those that it finds are perturbed (default: all).
        share_randomness: one dropout mask for all copies; False draws one a copy.
        share_meta_inputs: replay the meta network's stop-gradient inputs at the unperturbed weights.

    The published code's choices (ondrejbohdal/evograd, MetaXL): copies 2, sigma 1e-3, temperature 0.05, noise sign,
    parameters `classifier`, share_randomness False, share_meta_inputs False, with dropout on in the meta passes and
    the order lookahead. It sums w_k (w + eps_k); here it is w + sum w_k eps_k, the same number with two to three
    digits more in float32.

    Raises:
        ValueError: for values out of range, an unknown noise, or a pattern that finds no parameter.
    """

    citation = "Bohdal et al., EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization, 2021"
    exact = "in expectation"
    stochastic = True
    takes_shards = True
    evaluated_at = "previous"  # where the base step's own forward has left its activations

    copies: int = 2
    sigma: float = 1e-3
    temperature: float = 0.05
    noise: Literal["sign", "gaussian"] = "sign"
    antithetic: bool = False
    parameters: str | None = None
    share_randomness: bool = True
    share_meta_inputs: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.copies, bool) or not isinstance(self.copies, int) or self.copies < 2:
            raise ValueError(f"evograd: copies must be an integer of at least 2, not {self.copies}")
        for field in ("sigma", "temperature"):
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"evograd: {field} must be a positive number, not {value}")
        if self.noise not in NOISES:
            raise ValueError(unknown("evograd noise", str(self.noise), NOISES))
        if self.antithetic and self.copies % 2:
            raise ValueError(f"evograd: antithetic copies come in pairs, copies={self.copies} is odd")
        if self.parameters is not None:
            try:
                re.compile(self.parameters)
            except re.error as error:
                raise ValueError(
                    f"evograd: parameters={self.parameters!r} is not a regular expression: {error}"
                ) from None

    def check(self, problem: BilevelProblem, w: Tree, lam: Tree) -> None:
        super().check(problem, w, lam)
        self._perturbed(w)

    def prepare(self, passes: PassContext, w: Tree, lam: Tree, batch: Any) -> None:
        self._require_sigma(passes, w)
        self._require_loss(passes, w, lam, batch)

    def _require_loss(self, passes: PassContext, w: Tree, lam: Tree, batch: Any) -> None:
        if self.share_meta_inputs:  # live ones are the published code's own choice
            gate.require(passes, w, lam, batch, self._perturbed(w))

    def _require_sigma(self, passes: PassContext, w: Tree) -> None:
        if passes.precision != "bf16":
            return
        moved = {name: w[name] for name in self._perturbed(w)}
        least = BF16_ROUNDING * tree.norm(moved) / tree.size(moved) ** 0.5
        if self.sigma < least:
            raise ValueError(
                f"evograd's perturbations of size {self.sigma:g} drown in the rounding of bf16, {least:.1g} of "
                "weights of this size: raise sigma (and temperature with it), or set meta_precision: float32"
            )

    def respond(self, passes: PassContext, step: InnerStep, state: None, diagnostics: dict[str, float]) -> Response:
        w, names, cut = step.w, self._perturbed(step.w), passes.problem.cut
        noise = Perturbations(
            {name: w[name] for name in w if name in names},
            passes.seed,
            copies=self.copies,
            kind=self.noise,
            sigma=self.sigma,
            antithetic=self.antithetic,
            rows=passes.problem.rows,
            injected=passes.noise,
        )
        self._require_loss(passes, w, step.lam, step.batch)
        shared = cut is not None and self.share_randomness and names <= cut.names
        copies = _SharedPass(passes, step, noise, cut) if shared and cut else _FullPasses(self, passes, step, noise)
        weights = torch.softmax(-copies.losses / self.temperature, dim=0)
        numbers = torch.stack([1 / weights.square().sum(), copies.losses.std() / self.temperature]).tolist()
        diagnostics["effective_copies"], diagnostics["loss_spread"] = numbers

        def vjp(v: Tree) -> Tree:
            along = passes.all_reduce_one(noise.along(v))
            return copies.pull_back(-(weights / self.temperature) * (along - (weights * along).sum()))

        return Response(noise.combined(w, weights), vjp, wrt=sorted(names))

    def advise(self, gradient: Tree, diagnostics: dict[str, float]) -> str | None:
        """Adds `noise_scale` = sigma |g| / temperature, to first order the deviation of the copies' scaled losses."""
        pattern = self.parameters or ""
        perturbed = {name: leaf for name, leaf in gradient.items() if re.search(pattern, name)}  # there may be none
        diagnostics["noise_scale"] = self.sigma * tree.norm(perturbed) / self.temperature
        effective = diagnostics["effective_copies"]
        if effective >= ONE_HOT:
            return None
        return (
            f"evograd's weights went one-hot ({effective:.2f} effective copies of {self.copies}), "
            "which leaves next to no hypergradient: raise temperature or lower sigma until noise_scale = sigma |g| / "
            f"temperature is below 1 (it is {diagnostics['noise_scale']:.2g})"
        )

    def _perturbed(self, w: Tree) -> frozenset[str]:
        if self.parameters is None:
            return frozenset(w)
        names = frozenset(name for name in w if re.search(self.parameters, name))
        if not names:
            examples = ", ".join(list(w)[:2] + list(w)[-2:])
            raise ValueError(
                f"evograd: parameters={self.parameters!r} finds none of the base parameters, such as {examples}"
            )
        return names


class _FullPasses:
    """One whole forward a copy, which yields its loss and its lambda-gradient; the K gradients are kept."""

    def __init__(self, config: EvoGrad, passes: PassContext, step: InnerStep, noise: Perturbations) -> None:
        w, lam, batch = step.w, step.lam, step.batch

        def copies(inputs: Inputs) -> list[tuple[Tensor, Tree]]:
            found = []
            for k in range(noise.copies):
                stream = 0 if config.share_randomness else k + 1
                loss, _, gradient = passes.inner_grad(
                    noise.perturbed(w, k), lam, batch, wrt_lam=lam, inputs=inputs, stream=stream
                )
                found.append((loss.double(), gradient))
            return found

        names = config._perturbed(w)
        found = (
            gate.perturbed(passes, w, lam, batch, copies, names) if config.share_meta_inputs else copies(Inputs.LIVE)
        )
        self.losses = passes.all_reduce_one(torch.stack([loss for loss, _ in found]))
        self.gradients = [gradient for _, gradient in found]
        self.lam = lam

    def pull_back(self, coefficients: Tensor) -> Tree:
        """sum_k a_k d_lam l_k."""
        total = tree.zeros_like(self.lam)
        for coefficient, gradient in zip(coefficients.tolist(), self.gradients, strict=True):
            total = tree.add(total, gradient, coefficient)
        return total


class _SharedPass:
    """One pass of what no copy perturbs; the copies are evaluations of the suffix, one backward reaches lam.

    As many copies as fit `TOGETHER` are evaluated in one pass. One graph at a time: that of a single part waits for
    the cotangent (with all losses, where one pass made them), those of several are made anew.
    """

    def __init__(self, passes: PassContext, step: InnerStep, noise: Perturbations, cut: Cut) -> None:
        self.passes, self.step, self.noise, self.cut = passes, step, noise, cut
        self.lam, self.w = tree.leaves(step.lam, step.lam), tree.detach(step.w)
        parts = passes.parts(step.batch)
        self.below = [passes.prefix(step.w, index, part) for index, part in parts]
        self.hidden: list[Tensor] = []
        self.graph: Tensor | None = None
        losses = torch.zeros(noise.copies, dtype=torch.float64, device=next(iter(step.lam.values())).device)
        for index, part in parts:
            with passes.scope(index):
                hidden = self._hidden(index, part)
                together = self._together(hidden)
                with torch.set_grad_enabled(len(parts) == len(together) == 1):
                    found = torch.cat([self._losses(copies, hidden, index, part) for copies in together])
            self.graph = found if found.requires_grad else None
            losses += found.detach()
            self.hidden.append(hidden if len(parts) == 1 else hidden.detach())
        self.losses = passes.all_reduce_one(losses)

    def pull_back(self, coefficients: Tensor) -> Tree:
        """Accumulate sum_k a_k d l_k / d hidden, then one backward to lam, a part at a time."""
        total = tree.zeros_like(self.lam)
        for index, part in self.passes.parts(self.step.batch):
            with self.passes.scope(index):
                if self.graph is not None:
                    return self._to_lam(self.graph, coefficients.to(self.graph.dtype))
                leaf = self.hidden[index].detach().requires_grad_()
                cotangent = torch.zeros_like(leaf)
                for copies in self._together(leaf):
                    losses = self._losses(copies, leaf, index, part)
                    weights = coefficients[copies.start : copies.stop].to(losses.dtype)
                    cotangent += torch.autograd.grad(losses, leaf, weights)[0]
                self.passes.reseed(index)
                hidden = self.hidden[index] if len(self.hidden) == 1 else self._hidden(index, part)
                if hidden.requires_grad:
                    total = tree.add(total, self._to_lam(hidden, cotangent))
        return total

    def _to_lam(self, output: Tensor, cotangent: Tensor) -> Tree:
        self.passes.counts.backwards += 1
        found = torch.autograd.grad(
            output, list(self.lam.values()), cotangent, allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.lam, found, strict=True))

    def _hidden(self, index: int, part: Any) -> Tensor:
        below = self.below[index]
        if below is None:
            self.passes.counts.forwards += 1
        else:
            self.passes.counts.suffixes += 1
        return self.cut.hidden(self.w, self.lam, below, part)

    def _together(self, hidden: Tensor) -> list[range]:
        """The copies that are evaluated in one pass, each for as large as its weights and the hidden states."""
        batched, each = self.passes.problem.facts.batched, hidden.numel() + tree.size(self.noise.like)
        size = max(1, TOGETHER // max(1, each)) if batched is not False else 1
        copies = range(self.noise.copies)
        return [copies[first : first + size] for first in range(0, len(copies), size)]

    def _losses(self, copies: range, hidden: Tensor, index: int, part: Any) -> Tensor:
        """The losses of some copies, (copies,)."""
        self.passes.counts.suffixes += len(copies)
        return at_once(
            lambda leaves, hidden: self.cut.loss({**self.w, **leaves}, hidden, part),
            self.noise.points(self.w, copies),
            hidden,
            partial(self.passes.reseed, index),
            self.passes.problem.facts,
        )
