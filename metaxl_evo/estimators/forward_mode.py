"""Forward mode (FMD; with windows FDS): carry the derivative of the weights with respect to lam along the episode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import BilevelProblem, InnerStep, Response
from metaxl_evo.bilevel.products import LAM, W, otherwise, require_forward_ad
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import UpdateRule
from metaxl_evo.bilevel.update_state import trees
from metaxl_evo.estimators.base import EpisodeEstimator, Exactness

# The state: Z of the weights ("w") and of each tensor of the optimiser's state, by its key there.
Columns = dict[str, Tree]


@dataclass(frozen=True)
class ForwardMode(EpisodeEstimator):
    """value = w_t, vjp(v) = Z_t^T v with Z_t = dw_t/dlam = A_t Z_{t-1} + B_t, at any time and for any update rule.

    Each inner step takes, for every entry of lam (a column of Z), one forward-over-reverse product through the inner
    gradient, and the tangent of the optimiser's own step, of its weights and of its state. Memory is one copy of the
    weights and of the optimiser's tensors a column, whatever the length of the episode: for a lam of at most 64
    numbers. Hypergradients are sums over the steps at true scale (the published FDS code divides by the steps of a
    window, and may leave some out).

    Args:
        windows: FDS. The rule's `Windowed` hyperparameters are vectors of so many values, which the losses do not
            read: a number for all of them, or one by name. The column of a window that is still to come is zero and
            costs nothing: a step takes (index of its window + 1) products a schedule.
        clamp: bound on the entries of the inner gradient's tangents (H Z, for the optimiser's own numbers); FDS uses
            1 where a run may diverge, and then the estimate is no derivative. The bound of the gradient itself (3) is
            the update rule's `max_grad_value`.

    Sources: Franceschi et al., ICML 2017 (FMD); Micaelli & Storkey, NeurIPS 2021 (FDS: sharing, stabilisers).

    Raises:
        ValueError: for values out of range, or a problem that does not fit `windows`.
    """

    citation = "Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter Optimization, ICML 2017"
    second_order = True
    remembers = "base"
    needs_state_before = True
    max_meta_size = 64
    tunes_optimizer = True

    windows: int | Mapping[str, int] | None = None
    clamp: float | None = None

    def __post_init__(self) -> None:
        given = self.windows.values() if isinstance(self.windows, Mapping) else [self.windows]
        if self.windows is not None and not all(type(one) is int and one >= 1 for one in given):
            raise ValueError(f"forward_mode: windows must be an integer of at least 1, not {self.windows}")
        if self.clamp is not None and not (self.clamp > 0 and math.isfinite(self.clamp)):
            raise ValueError(f"forward_mode: clamp must be a positive number, not {self.clamp}")

    @property
    def exact(self) -> Exactness:
        return "always" if self.clamp is None else "never"

    @property
    def learns_initial(self) -> bool:
        return self.windows is None

    def check(self, problem: BilevelProblem, w: Tree, lam: Tree) -> None:
        super().check(problem, w, lam)
        if self.windows is not None:
            self._check_windows(problem.update, lam)

    def _check_windows(self, rule: UpdateRule, lam: Tree) -> None:
        sizes = {hyper.name: lam[hyper.name].numel() for hyper in rule.windowed}
        wanted = self.windows if isinstance(self.windows, Mapping) else dict.fromkeys(sizes, self.windows)
        if not sizes or sizes != wanted:
            raise ValueError(
                f"forward_mode: windows={self.windows} asks for Windowed hyperparameters of so many values, and the "
                f"update rule reads {sizes or 'none'}: change windows, or leave it out"
            )

    def init(self, problem: BilevelProblem, w: Tree, lam: Tree, previous: Any = None) -> Columns:
        def columns(like: Tree) -> Tree:
            return tree.tree_map(lambda leaf: leaf.detach().new_zeros((tree.size(lam), *leaf.shape)), like)

        of_state = {key: columns(held) for key, held in trees(problem.update.init(w)).items()}
        return {"w": columns(w) if problem.initial is None else problem.initial.columns(w)} | of_state

    def observe(self, passes: PassContext, step: InnerStep, state: Columns) -> Columns:
        assert step.made is not None
        assert step.update_state is not None
        rule, before, lam = passes.problem.update, step.update_state, tree.detach(step.lam)
        held = before | {"w": tree.detach(step.w)}
        point = {key: {name: held[key][name] for name in columns} for key, columns in state.items()}

        def move(point: Columns, grad: Tree, lam: Tree) -> Columns:
            w, update_state = rule(point["w"], before | point, grad, lam)
            after = update_state | {"w": w}
            return {key: after[key] for key in point}

        self.prepare(passes, step.w, step.lam, step.batch)
        units, after = _units(lam), {key: tree.clone(columns) for key, columns in state.items()}
        for j in self._active(rule, lam, before["step"]):
            unit, tangent = _column(units, j), {key: _column(columns, j) for key, columns in state.items()}
            bent = self._gradient_tangent(passes, step, tangent["w"], unit)
            grad = tree.detach(step.made.grad)
            moved = torch.func.jvp(move, (point, grad, lam), (tangent, {n: bent[n] for n in grad}, unit))[1]
            for key, column in moved.items():
                for name, leaf in column.items():
                    after[key][name][j] = leaf
        return after

    def prepare(self, passes: PassContext, w: Tree, lam: Tree, batch: Any) -> None:
        with otherwise("forward_mode", "use unroll"):
            require_forward_ad(passes, w, lam, batch, (LAM, W))

    def end_episode(self, passes: PassContext, step: InnerStep, state: Columns) -> None:
        """Nothing: in a Trainer the next episode starts from weights that do not depend on lam."""

    def _active(self, rule: UpdateRule, lam: Tree, step: int) -> list[int]:
        """The columns that are not known to stay zero in this step: with `windows`, those of windows that began."""
        began = {hyper.name: hyper.window(lam, step) for hyper in rule.windowed} if self.windows else {}
        entries = [(name, index) for name, leaf in lam.items() for index in range(leaf.numel())]
        return [j for j, (name, index) in enumerate(entries) if index <= began.get(name, index)]

    def _gradient_tangent(self, passes: PassContext, step: InnerStep, z: Tree, unit: Tree) -> Tree:
        """The tangent of the inner gradient along (z, unit), the sum of those of the parts of all processes."""
        point, gradient = (tree.detach(step.w), tree.detach(step.lam)), torch.func.grad(passes.problem.inner_loss)
        total = tree.zeros_like(step.w)
        for index, part in passes.parts(step.batch):
            with passes.scope(index, second_order=True), otherwise("forward_mode", "use unroll"):
                tangent = torch.func.jvp(lambda w, lam, part=part: gradient(w, lam, part), point, (z, unit))[1]
            passes.counts.jvps += 1
            total = tree.add(total, tree.detach(tangent))
        total = passes.all_reduce(total)
        limit = self.clamp
        return total if limit is None else tree.tree_map(lambda leaf: leaf.clamp(-limit, limit), total)

    def _answer(self, passes: PassContext, step: InnerStep, state: Columns, diagnostics: dict[str, float]) -> Response:
        assert step.made is not None
        passes.problem.update.check_state(step.made.update_state)
        diagnostics["tangent_norm"] = tree.norm(state["w"])
        lam = step.lam

        def vjp(v: Tree) -> Tree:
            along = torch.stack([tree.dot(_column(state["w"], j), v) for j in range(tree.size(lam))])
            pieces = along.split([leaf.numel() for leaf in lam.values()])
            return {n: x.reshape(leaf.shape).to(leaf) for (n, leaf), x in zip(lam.items(), pieces, strict=True)}

        return Response(step.current, vjp)


def _units(lam: Tree) -> Tree:
    """The unit vectors of lam, along a leading axis."""
    sizes = [leaf.numel() for leaf in lam.values()]
    rows = torch.eye(sum(sizes)).split(sizes, dim=1)
    return {n: x.reshape(-1, *leaf.shape).to(leaf) for (n, leaf), x in zip(lam.items(), rows, strict=True)}


def _column(columns: Tree, j: int) -> Tree:
    return tree.tree_map(lambda leaf: leaf[j], columns)
