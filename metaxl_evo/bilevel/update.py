"""Update rules of the inner problem as differentiable maps: SGD with momentum, Adam, AdamW; gradient clipping.

A rule maps (w, state, grad, lam) to (w', state'), with torch.optim's own algebra, so that autograd can run through
it. For the one-step estimators it also gives the pullback (du/dg)^T v in closed form, where w' = D w - u(g): no
graph, one product a leaf. As with torch, a parameter that `grad` lacks sits the step out: no decay, no moments, and
a step count of its own.

A hyperparameter is a number, the *name of an entry of lam* (a learned learning rate, momentum or weight decay; as
`Windowed` a learned schedule), which is then pulled back here and not through a mixed product, or a mapping from
parameter name to any of these (optimiser groups; Meta-SGD). An entry is one number or has the parameter's shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.bilevel import hyper, tree
from metaxl_evo.bilevel.hyper import Hyper
from metaxl_evo.bilevel.hyper import Windowed as Windowed
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update_state import MISSED, UpdateState, counted, map_trees, own_steps, trees

_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by (norm + 1e-6)
_SQUARE_IS_SEEN = 1e-12  # the norm of a gradient from which on a second moment is not zero, in float32


@dataclass(frozen=True)
class UpdateRule(ABC):
    """One optimiser step as a map (w, state, grad, lam) -> (w', state'); SGD, Adam and AdamW are torch.optim's.

    First `max_grad_value` clamps the gradient's entries, as `torch.nn.utils.clip_grad_value_` does, then
    `max_grad_norm` clips its global norm, as `torch.nn.utils.clip_grad_norm_` does.

    A rule of one's own is a subclass with `_step` (and `init`, unless it inherits that of SGD or Adam), in operations
    that autograd can go through. It may read any entry of lam; what it reads is learned by the estimators that
    differentiate the step (one_step, unroll, forward_mode, greedy). Meta-curvature, say, with a learned matrix::

        class MetaCurvature(SGD):
            def _step(self, w, state, grad, lam):
                return super()._step(w, state, {name: lam["M"] @ g for name, g in grad.items()}, lam)

    Args:
        lr, weight_decay: a number, the name of an entry of lam, a `Windowed` one, a tensor (which may be that very
            entry), or a mapping from parameter name to any of these.
        max_grad_norm, max_grad_value: the bounds; None for no clipping.

    Raises:
        ValueError: for an entry of lam that is a schedule in two ways.
    """

    lr: Hyper
    weight_decay: Hyper = 0.0
    max_grad_norm: float | None = None
    max_grad_value: float | None = None

    def __post_init__(self) -> None:
        ways: dict[str, hyper.Entry] = {}
        for entry in self._entries():
            if ways.setdefault(name := hyper.entry_name(entry), entry) != entry:
                raise ValueError(f"the update rule reads lam[{name!r}] as {entry!r} and as {ways[name]!r}: choose one")

    @abstractmethod
    def init(self, w: Tree) -> UpdateState:
        """The state before the first step: {"step": 0}, and by keys of one's own trees with the keys of w."""

    @abstractmethod
    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        """The next weights and state, its "step" one higher, of the parameters that have a gradient.

        Args:
            w, grad: of these parameters alone, `grad` clamped and clipped already.
            state: before the step, its trees as far as these parameters; `own_steps(state, name)` have been made.
            lam: whole; of a `Windowed` entry the one value that acts.
        """

    def _du_dg(self, v: Tree, w: Tree, grad: Tree, state: UpdateState, lam: Tree) -> Tree:
        """(du/dg)^T v of the leaves of v behind the clipping, fresh ones, in closed form; `state` is after the step.

        It is used where a class defines it itself; of all others autograd through the step gives the pullback.
        """
        raise NotImplementedError

    def check_state(self, after: UpdateState) -> None:  # noqa: B027
        """Refuse to differentiate a step whose derivative would be zero whatever lam is.

        Raises:
            ValueError: with the reason and the way out.
        """

    def __call__(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        """The next weights and state; differentiable in w, the state's tensors, grad and lam.

        A parameter that `grad` lacks stays as it is, its state too.
        """
        lam, missed, own = self._acting(lam, state["step"]), state.get(MISSED, {}), state
        moved, after = dict[str, Tensor](), {"step": state["step"] + 1}
        if grad.keys() != w.keys():
            missed = {name: missed.get(name, 0) + (name not in grad) for name in w}
            own = map_trees(lambda held: {name: held[name] for name in grad if name in held}, state)
        if grad:
            moved, after = self._step({name: w[name] for name in grad}, own, self._clip(grad), lam)
        if own is not state:
            moved = w | moved
            after |= {key: held | after.get(key, {}) for key, held in trees(state).items()}
        return moved, after | counted(after["step"], missed)

    def grad_vjp(
        self,
        v: Tree,
        w: Tree,
        grad: Tree,
        state: UpdateState,
        lam: Tree,
        *,
        before: UpdateState | None = None,
        norm: float | None = None,
    ) -> Tree:
        """(du/dg)^T v for w' = D w - u(g), with the derivative of the clamp and of the clip factor.

        Group by group, so that v and the result are never both whole: `v` is emptied on the way. Zeros for what `grad`
        lacks.

        Args:
            v: cotangent on w'.
            w: weights before the step (coupled weight decay needs them).
            grad: the gradient of the step, before clipping.
            state: the optimiser state *after* the step.
            lam: meta parameters, read where a hyperparameter is one of them.
            before: the state before the step, read for a rule that has no closed form (default: that of a first step).
            norm: of `grad`, where it is known.

        Raises:
            ValueError: where the derivative would be zero whatever lam is (`check_state`).
        """
        if not norm or norm < _SQUARE_IS_SEEN:
            self.check_state(state)
        if "_du_dg" not in vars(type(self)):  # an inherited one knows nothing of an overridden step
            return self._pulled_by_autograd(v, w, grad, before, lam)
        clamped, lam = self._clamp(grad), self._acting(lam, state["step"] - 1)
        factor, norm = self._clip_factor(clamped, norm if self.max_grad_value is None else None)
        pulled = {}
        for names in list(tree.in_groups(v)):
            cotangents, taken = {name: v.pop(name) for name in names}, {n: clamped[n] for n in names if n in grad}
            clipped = tree.scale(taken, factor) if norm else taken
            found = self._du_dg({name: cotangents[name] for name in taken}, w, clipped, state, lam) if taken else {}
            for name, cotangent in cotangents.items():
                pulled[name] = found[name] if name in found else torch.zeros_like(cotangent)
        if norm:  # f (u - n/(n + eps) ghat <ghat, u>)
            along = tree.dot(clamped, pulled).item() / (norm * (norm + _CLIP_EPS))
            held = [pulled[name] for name in clamped]
            torch._foreach_add_(held, list(clamped.values()), alpha=-along)
            torch._foreach_mul_(held, factor)
        if self.max_grad_value is not None:
            for name, leaf in grad.items():
                pulled[name].masked_fill_(leaf.abs() > self.max_grad_value, 0.0)
        return pulled

    def _pulled_by_autograd(self, v: Tree, w: Tree, grad: Tree, before: UpdateState | None, lam: Tree) -> Tree:
        leaves = tree.leaves(grad, grad)
        with torch.enable_grad():
            after, _ = self(tree.detach(w), self.init(w) if before is None else before, leaves, tree.detach(lam))
            found = _derivative(after, v, leaves)
        pulled = {n: -found[n] if n in found else torch.zeros_like(cotangent) for n, cotangent in v.items()}
        v.clear()
        return pulled

    def lam_vjp(self, v: Tree, w: Tree, state: UpdateState | None, grad: Tree, lam: Tree) -> Tree:
        """Pull a cotangent on w' back to the entries of `lam` that the rule itself reads; zeros elsewhere."""
        names = lam.keys() if self._is_ones_own else self.tunes & lam.keys()
        if not names:
            return tree.zeros_like(lam)
        leaves = tree.leaves(lam, names)
        with torch.enable_grad():
            after, _ = self(tree.detach(w), state if state is not None else self.init(w), tree.detach(grad), leaves)
            found = _derivative(after, v, {name: leaf for name, leaf in leaves.items() if name in names})
        return tree.zeros_like(lam) | found

    @property
    def _is_ones_own(self) -> bool:
        """Whether the step may read what no field names."""
        return type(self) not in (SGD, Adam, AdamW)

    @property
    def may_read_lam(self) -> bool:
        """Whether the step itself, and not only its gradient, may depend on lam."""
        return bool(self.tunes) or self._is_ones_own

    def reads(self, w: Tree, lam: Tree) -> frozenset[str]:
        """Names of the entries of lam that the step itself depends on; a rule of one's own is tried for two steps."""
        if not self._is_ones_own:
            return self.tunes
        leaves, state, grad = tree.leaves(lam, lam), self.init(w), tree.tree_map(torch.ones_like, w)
        with torch.enable_grad():
            after, state = self(w, state, grad, leaves)
            after, _ = self(after, state, grad, leaves)
            ends = [leaf.sum() for leaf in after.values() if leaf.requires_grad]
            found = torch.autograd.grad(ends, list(leaves.values()), allow_unused=True) if ends else [None] * len(lam)
        return self.tunes | {name for name, one in zip(leaves, found, strict=True) if one is not None}

    @property
    def tunes(self) -> frozenset[str]:
        """Names of the entries of lam that this rule's hyperparameters name."""
        return frozenset(map(hyper.entry_name, self._entries()))

    @property
    def windowed(self) -> tuple[Windowed, ...]:
        """The hyperparameters that are schedules, each once."""
        return tuple(dict.fromkeys(entry for entry in self._entries() if isinstance(entry, Windowed)))

    @property
    def has_tensors(self) -> bool:
        """Whether a hyperparameter is a tensor, which no name ties to lam."""
        return any(isinstance(one, Tensor) for held in vars(self).values() for one in hyper.members(held))

    def _entries(self) -> list[hyper.Entry]:
        return [entry for held in vars(self).values() for entry in hyper.entries(held)]

    def bound(self, lam: Mapping[str, Tensor]) -> UpdateRule:
        """The rule with the name of an entry of lam in the place of each tensor that is that very entry."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        now: dict[str, Any] = {name: hyper.bound(one, lam) for name, one in held.items()}
        return replace(self, **now) if any(now[name] is not held[name] for name in now) else self

    def check(self, w: Tree, lam: Tree) -> None:
        """Refuse numbers that are not there for each parameter, do not fit it, or would not be learned.

        Raises:
            ValueError: in one line.
        """
        for field in ("lr", "weight_decay", "momentum"):
            hyper.check(field, getattr(self, field, 0.0), w, lam)

    def acting(self, lam: Tree, step: int) -> dict[str, Any]:
        """The values, at a step, of the hyperparameters that are entries of lam, by the rule's own names for them.

        A number, or one by parameter name where the field is a mapping with such an entry.
        """
        now, found = self._acting(lam, step), dict[str, Any]()
        for field, held in vars(self).items():
            if isinstance(held, Mapping) and any(hyper.entries(held)):
                found[field] = {name: float(hyper.value(held, name, now)) for name in held}
            elif isinstance(held, (str, Windowed)):
                found[field] = float(hyper.value(held, "", now))
        return found

    def _acting(self, lam: Tree, step: int) -> Tree:
        """`lam` with the one value of each schedule that acts at a step."""
        return {**lam, **{one.name: lam[one.name][one.window(lam, step)] for one in self.windowed}}

    def _clamp(self, grad: Tree) -> Tree:
        limit = self.max_grad_value
        return grad if limit is None else tree.tree_map(lambda g: g.clamp(-limit, limit), grad)

    def _clip_factor(self, grad: Tree, norm: float | None = None) -> tuple[float, float | None]:
        """The factor that clips `grad`, and the norm that it depends on (None where nothing is clipped)."""
        if self.max_grad_norm is None:
            return 1.0, None
        norm = tree.norm(grad) if norm is None else norm
        if norm + _CLIP_EPS <= self.max_grad_norm:
            return 1.0, None
        return self.max_grad_norm / (norm + _CLIP_EPS), norm

    def _clip(self, grad: Tree) -> Tree:
        """The clamped and clipped gradient, differentiable where `grad` is."""
        grad = self._clamp(grad)
        _, norm = self._clip_factor(grad)
        if self.max_grad_norm is None or norm is None:
            return dict(grad)
        factor = self.max_grad_norm / (tree.dot(grad, grad).sqrt() + _CLIP_EPS)
        return tree.tree_map(lambda g: g * factor.to(g), grad)

    def _decayed(self, w: Tree, grad: Tree, lam: Tree) -> Tree:
        """Coupled L2: g + wd * w."""
        if hyper.is_zero(self.weight_decay):
            return grad
        return {name: g + hyper.value(self.weight_decay, name, lam) * w[name] for name, g in grad.items()}


def _derivative(ends: Tree, cotangent: Tree, leaves: Tree) -> Tree:
    """d <ends, cotangent> / d leaves; zeros where there is no way."""
    moved = [(end * cotangent[name]).sum() for name, end in ends.items() if name in cotangent and end.requires_grad]
    if not moved:
        return tree.zeros_like(leaves)
    found = torch.autograd.grad(torch.stack(moved).sum(), list(leaves.values()), materialize_grads=True)
    return tree.detach(dict(zip(leaves, found, strict=True)))  # materialised zeros of torch 2.8 require a gradient


@dataclass(frozen=True)
class SGD(UpdateRule):
    """torch.optim.SGD: momentum, dampening, Nesterov, coupled L2."""

    momentum: Hyper = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def init(self, w: Tree) -> UpdateState:
        return {"step": 0, "momentum_buffer": tree.zeros_like({n: w[n] for n in w if self._has_buffer(n)})}

    def _has_buffer(self, name: str) -> bool:
        return not hyper.is_zero(self.momentum, name)

    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        after: Tree = {}
        buffers: Tree = {}
        for name, g in self._decayed(w, grad, lam).items():
            if self._has_buffer(name):
                momentum = hyper.value(self.momentum, name, lam)
                damp = self.dampening if own_steps(state, name) else 0.0
                buffers[name] = momentum * state["momentum_buffer"][name] + (1 - damp) * g
                g = g + momentum * buffers[name] if self.nesterov else buffers[name]
            after[name] = w[name] - hyper.value(self.lr, name, lam) * g
        return after, {"step": state["step"] + 1, "momentum_buffer": buffers}

    def _du_dg(self, v: Tree, w: Tree, grad: Tree, state: UpdateState, lam: Tree) -> Tree:
        return _times(v, {name: self._share(name, state, lam) for name in v})

    def _share(self, name: str, state: UpdateState, lam: Tree) -> float | Tensor:
        """Of a gradient that is in its step."""
        keep: float | Tensor = 1.0
        if self._has_buffer(name):
            keep = 1.0 if own_steps(state, name) <= 1 else 1 - self.dampening
            if self.nesterov:
                keep = 1 + hyper.value(self.momentum, name, lam) * keep
        return hyper.value(self.lr, name, lam) * keep


@dataclass(frozen=True)
class Adam(UpdateRule):
    """torch.optim.Adam: bias-corrected moments, coupled L2 (the decay is part of the gradient).

    A coordinate whose second moment is 0, since it never had a gradient (unused embedding rows), is held: the
    derivative of its step is 0. The true one, of size lr/eps, is that of a step that would be made by a gradient of
    the size of eps, and would swamp everything else.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init(self, w: Tree) -> UpdateState:
        return {"step": 0, "exp_avg": tree.zeros_like(w), "exp_avg_sq": tree.zeros_like(w)}

    def check_state(self, after: UpdateState) -> None:
        if tree.norm(after.get("exp_avg_sq", {"": torch.ones(1)})) == 0:
            raise ValueError(
                f"the inner gradient is exactly zero, as it always was, and {type(self).__name__} divides by "
                "its size, so that there is no hypergradient: let the inner loss not start at zero (weights of "
                "examples above 0), or use SGD (optim: sgd) or the estimator evograd"
            )

    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        return self._moments_step(w, state, self._decayed(w, grad, lam), lam)

    def _moments_step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        b1, b2 = self.betas
        first = {n: b1 * state["exp_avg"][n] + (1 - b1) * g for n, g in grad.items()}
        second = {n: b2 * state["exp_avg_sq"][n] + (1 - b2) * g.square() for n, g in grad.items()}
        after = {}
        for n, m in first.items():
            step = own_steps(state, n) + 1
            scaled = hyper.value(self.lr, n, lam) / (1 - b1**step) * m
            after[n] = w[n] - _over_root(scaled, second[n] / (1 - b2**step), self.eps)
        return after, {"step": state["step"] + 1, "exp_avg": first, "exp_avg_sq": second}

    def _du_dg(self, v: Tree, w: Tree, grad: Tree, state: UpdateState, lam: Tree) -> Tree:
        """lr/c1 [(1-b1)/Dn - m (1-b2) g / (c2 r Dn^2)], r = sqrt(s/c2), Dn = r + eps, m and s after the step."""
        (b1, b2), steps = self.betas, {name: own_steps(state, name) for name in v}
        roots_c2 = {name: math.sqrt(1 - b2**step) for name, step in steps.items()}
        seconds = [state["exp_avg_sq"][name] for name in v]
        roots = torch._foreach_sqrt(seconds)  # r sqrt(c2)
        torch._foreach_clamp_min_(roots, torch.finfo(roots[0].dtype).tiny)
        denominators = torch._foreach_add(roots, [self.eps * root_c2 for root_c2 in roots_c2.values()])  # Dn sqrt(c2)
        entering = self._adaptive_grad({name: w[name] for name in v}, grad, lam)
        slopes = torch._foreach_mul([state["exp_avg"][name] for name in v], [entering[name] for name in v])
        torch._foreach_div_(slopes, roots)
        del roots
        torch._foreach_div_(slopes, denominators)
        torch._foreach_mul_(slopes, b2 - 1)
        torch._foreach_add_(slopes, 1 - b1)
        torch._foreach_div_(slopes, denominators)
        del denominators
        torch._foreach_mul_(slopes, torch._foreach_sign(seconds))  # 0 where there never was a gradient
        torch._foreach_mul_(slopes, list(v.values()))
        rates = {n: hyper.value(self.lr, n, lam) * roots_c2[n] / (1 - b1**step) for n, step in steps.items()}
        return _times(dict(zip(v, slopes, strict=True)), rates)

    def _adaptive_grad(self, w: Tree, grad: Tree, lam: Tree) -> Tree:
        """The gradient that enters the moments."""
        return self._decayed(w, grad, lam)


@dataclass(frozen=True)
class AdamW(Adam):
    """torch.optim.AdamW: Adam with decoupled weight decay, w <- (1 - lr * wd) w first."""

    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        if not hyper.is_zero(self.weight_decay):
            lr, decay = self.lr, self.weight_decay
            w = {n: leaf * (1 - hyper.value(lr, n, lam) * hyper.value(decay, n, lam)) for n, leaf in w.items()}
        return self._moments_step(w, state, grad, lam)

    _du_dg = Adam._du_dg

    def _adaptive_grad(self, w: Tree, grad: Tree, lam: Tree) -> Tree:
        return grad


def _times(leaves: Tree, numbers: Mapping[str, float | Tensor]) -> Tree:
    """Each leaf times its number."""
    if any(isinstance(number, Tensor) for number in numbers.values()):
        return {name: numbers[name] * leaf for name, leaf in leaves.items()}
    found = torch._foreach_mul(list(leaves.values()), [float(numbers[name]) for name in leaves])
    return dict(zip(leaves, found, strict=True))


def _over_root(m: Tensor, s: Tensor, eps: float) -> Tensor:
    """m / (sqrt(s) + eps), a constant where s = 0 (see `Adam`)."""
    seen = s > 0
    return torch.where(seen, m / (torch.where(seen, s, 1.0).sqrt() + eps), (m / eps).detach())
