"""EvoGrad: an evolutionary inner step, differentiated by first-order passes only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from metaxl_evo.bilevel import gate, tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, Response
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.base import Estimator
from metaxl_evo.estimators.copies import FullPasses, SharedPass
from metaxl_evo.estimators.named import found_by, require_pattern
from metaxl_evo.estimators.noise import NOISES, Perturbations
from metaxl_evo.messages import unknown

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
        require_pattern("evograd", self.parameters)

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

    def respond(self, passes: PassContext, step: InnerStep, state: None, diagnostics: dict[str, Any]) -> Response:
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
        copies = SharedPass(passes, step, noise, cut) if shared and cut else self._full_passes(passes, step, noise)
        weights = torch.softmax(-copies.losses / self.temperature, dim=0)
        diagnostics["effective_copies"] = weights.dot(weights).reciprocal()
        diagnostics["loss_spread"] = copies.losses.std() / self.temperature

        def vjp(v: Tree) -> Tree:
            along = passes.all_reduce_one(noise.along(v))
            return copies.pull_back(-(weights / self.temperature) * (along - (weights * along).sum()))

        return Response(noise.combined(w, weights), vjp, wrt=sorted(names))

    def _full_passes(self, passes: PassContext, step: InnerStep, noise: Perturbations) -> FullPasses:
        shares = {"share_randomness": self.share_randomness, "share_meta_inputs": self.share_meta_inputs}
        return FullPasses(passes, step, noise, **shares)

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
        return frozenset(found_by("evograd", self.parameters, w))
