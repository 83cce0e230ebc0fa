"""Update rules of the inner problem as differentiable maps: SGD with momentum, Adam, AdamW; gradient clipping.

A rule maps (w, state, grad, lam) to (w', state'), with torch.optim's own algebra, so that autograd can run through
it. For the one-step estimators it also gives the pullback (du/dg)^T v in closed form, where w' = D w - u(g): no
graph, one product a leaf. A hyperparameter is a number, a mapping from parameter name to number (optimiser groups),
or the *name of an entry of lam* (a learned learning rate, momentum or weight decay; as `Windowed` a learned schedule),
which is then pulled back here and not through a mixed product.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.tree import Tree


@dataclass(frozen=True)
class Windowed:
    """A hyperparameter that is a vector of lam, shared over windows of contiguous steps: a learned schedule.

    Args:
        name: the entry of lam, a vector of W values.
        steps: length of the episode; its step t (`state["step"]`, from 0) reads value floor(t W / steps), any later
            step the last one.

    Source: Micaelli & Storkey, NeurIPS 2021 (forward-mode differentiation with hyperparameter sharing).

    Raises:
        ValueError: for a number of steps below 1; where lam[name] is no vector.
    """

    name: str
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Windowed({self.name!r}): steps must be at least 1, not {self.steps}")

    def window(self, lam: Mapping[str, Tensor], step: int) -> int:
        """The index of the value that acts at a step."""
        values = lam[self.name]
        if values.dim() != 1:
            raise ValueError(f"lam[{self.name!r}] is of shape {[*values.shape]}: give a vector, one value a window")
        return min(step * len(values) // self.steps, len(values) - 1)


Hyper = float | str | Windowed | Mapping[str, float]
UpdateState = dict[str, Any]  # {"step": int, "exp_avg": Tree, ...}

_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by (norm + 1e-6)


def _value(hyper: Hyper, name: str, lam: Mapping[str, Tensor]) -> float | Tensor:
    """The hyperparameter that acts on parameter `name`; `lam` as it acts at the step."""
    if isinstance(hyper, (str, Windowed)):
        return lam[_entry(hyper)]
    return hyper[name] if isinstance(hyper, Mapping) else hyper


def _entry(hyper: str | Windowed) -> str:
    return hyper if isinstance(hyper, str) else hyper.name


def _is_zero(hyper: Hyper) -> bool:
    if isinstance(hyper, (str, Windowed)):
        return False
    return not any(hyper.values()) if isinstance(hyper, Mapping) else hyper == 0


@dataclass(frozen=True)
class UpdateRule(ABC):
    """One optimiser step as a map; subclasses are torch.optim's algorithms.

    First `max_grad_value` clamps the gradient's entries, as `torch.nn.utils.clip_grad_value_` does, then
    `max_grad_norm` clips its global norm, as `torch.nn.utils.clip_grad_norm_` does.
    """

    lr: Hyper
    weight_decay: Hyper = 0.0
    max_grad_norm: float | None = None
    max_grad_value: float | None = None

    @abstractmethod
    def init(self, w: Tree) -> UpdateState:
        """The state before the first step."""

    @abstractmethod
    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]: ...

    @abstractmethod
    def _du_dg(self, name: str, v: Tensor, w: Tensor, grad: Tensor, state: UpdateState, lam: Tree) -> Tensor:
        """(du/dg)^T v of one leaf behind the clipping, a fresh tensor."""

    def __call__(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        """The next weights and state; differentiable in w, the state's tensors, grad and lam."""
        return self._step(w, state, self._clip(grad), self._acting(lam, state["step"]))

    def grad_vjp(self, v: Tree, w: Tree, grad: Tree, state: UpdateState, lam: Tree) -> Tree:
        """(du/dg)^T v for w' = D w - u(g), with the derivative of the clamp and of the clip factor.

        Leaf by leaf, so that v and the result are never both whole: `v` is emptied on the way.

        Args:
            v: cotangent on w'.
            w: weights before the step (coupled weight decay needs them).
            grad: the gradient of the step, before clipping.
            state: the optimiser state *after* the step.
            lam: meta parameters, read where a hyperparameter is one of them.
        """
        clamped, lam = self._clamp(grad), self._acting(lam, state["step"] - 1)
        factor, norm = self._clip_factor(clamped)
        pulled = {}
        for name in list(v):
            clipped = clamped[name] * factor if norm else clamped[name]
            pulled[name] = self._du_dg(name, v.pop(name), w[name], clipped, state, lam)
        if norm:  # f (u - n/(n + eps) ghat <ghat, u>)
            along = tree.dot(pulled, clamped).item() / (norm * (norm + _CLIP_EPS))
            for name, u in pulled.items():
                u.sub_(clamped[name], alpha=along).mul_(factor)
        if self.max_grad_value is not None:
            for name, u in pulled.items():
                u.masked_fill_(grad[name].abs() > self.max_grad_value, 0.0)
        return pulled

    def lam_vjp(self, v: Tree, w: Tree, state: UpdateState | None, grad: Tree, lam: Tree) -> Tree:
        """Pull a cotangent on w' back to the entries of `lam` that are the rule's hyperparameters; zeros elsewhere."""
        pulled = tree.zeros_like(lam)
        names = sorted(self.tunes & lam.keys())
        if not names:
            return pulled
        leaves = tree.leaves(lam, names)
        with torch.enable_grad():
            after, _ = self(tree.detach(w), state if state is not None else self.init(w), tree.detach(grad), leaves)
            value = torch.stack([(after[name] * v[name]).sum() for name in v])
            found = torch.autograd.grad(value.sum(), [leaves[name] for name in names], materialize_grads=True)
        return pulled | dict(zip(names, found, strict=True))

    @property
    def tunes(self) -> frozenset[str]:
        """Names of the entries of lam that are this rule's hyperparameters."""
        return frozenset(_entry(value) for value in vars(self).values() if isinstance(value, (str, Windowed)))

    @property
    def windowed(self) -> tuple[Windowed, ...]:
        """The hyperparameters that are schedules."""
        return tuple(value for value in vars(self).values() if isinstance(value, Windowed))

    def acting(self, lam: Tree, step: int) -> dict[str, float]:
        """The values, at a step, of the hyperparameters that are entries of lam, by the rule's own names for them."""
        now = self._acting(lam, step)
        return {
            field: float(now[_entry(hyper)])
            for field, hyper in vars(self).items()
            if isinstance(hyper, (str, Windowed))
        }

    def _acting(self, lam: Tree, step: int) -> Tree:
        """`lam` with the one value of each schedule that acts at a step."""
        return {**lam, **{hyper.name: lam[hyper.name][hyper.window(lam, step)] for hyper in self.windowed}}

    def _clamp(self, grad: Tree) -> Tree:
        limit = self.max_grad_value
        return grad if limit is None else tree.tree_map(lambda g: g.clamp(-limit, limit), grad)

    def _clip_factor(self, grad: Tree) -> tuple[float, float | None]:
        """The factor that clips `grad`, and the norm that it depends on (None where nothing is clipped)."""
        if self.max_grad_norm is None:
            return 1.0, None
        norm = tree.norm(grad)
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
        if _is_zero(self.weight_decay):
            return grad
        return {name: g + _value(self.weight_decay, name, lam) * w[name] for name, g in grad.items()}


@dataclass(frozen=True)
class SGD(UpdateRule):
    """torch.optim.SGD: momentum, dampening, Nesterov, coupled L2."""

    momentum: float | str | Windowed = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def init(self, w: Tree) -> UpdateState:
        return {"step": 0, "momentum_buffer": {} if _is_zero(self.momentum) else tree.zeros_like(w)}

    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        grad = self._decayed(w, grad, lam)
        after: UpdateState = {"step": state["step"] + 1, "momentum_buffer": {}}
        if not _is_zero(self.momentum):
            damp = 0.0 if state["step"] == 0 else self.dampening
            momentum = {name: _value(self.momentum, name, lam) for name in grad}
            buffer = {n: momentum[n] * state["momentum_buffer"][n] + (1 - damp) * g for n, g in grad.items()}
            after["momentum_buffer"] = buffer
            grad = {n: g + momentum[n] * buffer[n] for n, g in grad.items()} if self.nesterov else buffer
        return {name: w[name] - _value(self.lr, name, lam) * g for name, g in grad.items()}, after

    def _du_dg(self, name: str, v: Tensor, w: Tensor, grad: Tensor, state: UpdateState, lam: Tree) -> Tensor:
        keep: float | Tensor = 1.0
        if not _is_zero(self.momentum):
            keep = 1.0 if state["step"] <= 1 else 1 - self.dampening
            if self.nesterov:
                keep = 1 + _value(self.momentum, name, lam) * keep
        return _value(self.lr, name, lam) * keep * v


@dataclass(frozen=True)
class Adam(UpdateRule):
    """torch.optim.Adam: bias-corrected moments, coupled L2 (the decay is part of the gradient)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init(self, w: Tree) -> UpdateState:
        return {"step": 0, "exp_avg": tree.zeros_like(w), "exp_avg_sq": tree.zeros_like(w)}

    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        return self._moments_step(w, state, self._decayed(w, grad, lam), lam)

    def _moments_step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        (b1, b2), step = self.betas, state["step"] + 1
        first = {n: b1 * state["exp_avg"][n] + (1 - b1) * g for n, g in grad.items()}
        second = {n: b2 * state["exp_avg_sq"][n] + (1 - b2) * g.square() for n, g in grad.items()}
        c1, c2 = 1 - b1**step, 1 - b2**step
        after = {
            n: w[n] - _value(self.lr, n, lam) / c1 * m / (_safe_sqrt(second[n] / c2) + self.eps)
            for n, m in first.items()
        }
        return after, {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def _du_dg(self, name: str, v: Tensor, w: Tensor, grad: Tensor, state: UpdateState, lam: Tree) -> Tensor:
        """lr/c1 [(1-b1)/Dn - m (1-b2) g / (c2 r Dn^2)], r = sqrt(s/c2), Dn = r + eps, at the moments after the step.

        Coordinates that never had a gradient (s = 0: unused embedding rows) give 0: the training loss does not depend
        on them, and their true factor, of size lr/eps, would only swamp the direction of a finite difference.
        """
        (b1, b2), step = self.betas, state["step"]
        c1, root_c2 = 1 - b1**step, math.sqrt(1 - b2**step)
        root = state["exp_avg_sq"][name].sqrt()  # r sqrt(c2)
        denominator = root + self.eps * root_c2  # Dn sqrt(c2)
        unseen = root == 0
        bend = (state["exp_avg"][name] * self._adaptive_grad(name, w, grad, lam)).div_(root.mul_(denominator))
        slope = (
            bend.mul_(b2 - 1).add_(1 - b1).div_(denominator).mul_(v).mul_(_value(self.lr, name, lam) * root_c2 / c1)
        )
        return slope.masked_fill_(unseen, 0.0) if bool(unseen.any()) else slope

    def _adaptive_grad(self, name: str, w: Tensor, grad: Tensor, lam: Tree) -> Tensor:
        """The gradient that enters the moments."""
        return self._decayed({name: w}, {name: grad}, lam)[name]


@dataclass(frozen=True)
class AdamW(Adam):
    """torch.optim.AdamW: Adam with decoupled weight decay, w <- (1 - lr * wd) w first."""

    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        if not _is_zero(self.weight_decay):
            lr, decay = self.lr, self.weight_decay
            w = {n: leaf * (1 - _value(lr, n, lam) * _value(decay, n, lam)) for n, leaf in w.items()}
        return self._moments_step(w, state, grad, lam)

    def _adaptive_grad(self, name: str, w: Tensor, grad: Tensor, lam: Tree) -> Tensor:
        return grad


def _safe_sqrt(x: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0 (autograd's own is infinite, and infinity times zero is NaN)."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def from_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    max_grad_norm: float | None = None,
    *,
    steps: int | None = None,
) -> tuple[UpdateRule, UpdateState]:
    """Read the rule and the current state off a torch optimiser (the state's tensors are shared, not copied).

    Args:
        optimizer: SGD, Adam or AdamW (fused and foreach variants included).
        names: the name of each base parameter.
        max_grad_norm: clipping that is applied before the optimiser sees the gradient.
        steps: how many steps it has made, where it keeps no count itself (SGD).

    Raises:
        ValueError: for an optimiser, or an option of one, that has no rule here.
    """
    cls = optimizer_rule(optimizer)
    held_here = {p for group in optimizer.param_groups for p in group["params"]}
    strangers = [name for p, name in names.items() if p not in held_here]
    if strangers or not names:
        raise ValueError(f"the optimizer does not hold the base parameters {strangers}: name only those that it steps")
    groups = [(group, [p for p in group["params"] if p in names]) for group in optimizer.param_groups]
    groups = [(group, params) for group, params in groups if params]

    def per_name(key: str) -> Hyper:
        values = {names[p]: float(group[key]) for group, params in groups for p in params}
        return values if len(set(values.values())) > 1 else next(iter(values.values()))

    def shared(key: str) -> Any:
        values = {group[key] for group, _ in groups}
        if len(values) > 1:
            raise ValueError(f"parameter groups differ in {key!r} ({sorted(values)}): give every group the same value")
        return values.pop()

    common: dict[str, Any] = {
        "lr": per_name("lr"),
        "weight_decay": per_name("weight_decay"),
        "max_grad_norm": max_grad_norm,
    }
    held = {name: optimizer.state.get(p, {}) for p, name in names.items()}
    if cls is SGD:
        if shared("dampening") and steps is None:
            raise ValueError("torch's SGD keeps no step count, which dampening needs: give steps, or set dampening=0")
        rule: UpdateRule = SGD(
            **common, momentum=shared("momentum"), dampening=shared("dampening"), nesterov=shared("nesterov")
        )
        buffers = {n: s["momentum_buffer"] for n, s in held.items() if s.get("momentum_buffer") is not None}
        state: UpdateState = {
            "step": int(bool(buffers)) if steps is None else steps,
            "momentum_buffer": _with_zeros(buffers, names) if shared("momentum") else {},
        }
    else:
        assert issubclass(cls, Adam)
        rule = cls(**common, betas=tuple(shared("betas")), eps=shared("eps"))
        state = {"step": max((int(s["step"]) for s in held.values() if "step" in s), default=0)}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = _with_zeros({n: s[key] for n, s in held.items() if key in s}, names)
    return rule, state


def optimizer_rule(optimizer: torch.optim.Optimizer) -> type[UpdateRule]:
    """The rule class of a torch optimiser.

    Raises:
        ValueError: naming the optimisers that have one.
    """
    for kind, rule in ((torch.optim.AdamW, AdamW), (torch.optim.Adam, Adam), (torch.optim.SGD, SGD)):
        if type(optimizer) is kind:
            for group in optimizer.param_groups:
                for option in ("amsgrad", "maximize"):
                    if group.get(option):
                        raise ValueError(
                            f"{kind.__name__}({option}=True) has no differentiable rule: set {option}=False"
                        )
            decoupled = {bool(group.get("decoupled_weight_decay")) for group in optimizer.param_groups}
            if rule is Adam and True in decoupled:
                if False in decoupled:
                    raise ValueError("parameter groups differ in 'decoupled_weight_decay': give all the same value")
                return AdamW
            return rule
    raise ValueError(
        f"the estimator has to differentiate the inner optimiser, and {type(optimizer).__name__} has no rule: "
        "use torch's SGD, Adam or AdamW (optim: sgd, adamw_torch, adamw_torch_fused)"
    )


def _with_zeros(found: Tree, names: Mapping[Tensor, str]) -> Tree:
    """State tensors by name; zeros for parameters that were never stepped."""
    return {
        name: found[name] if name in found else torch.zeros_like(p, requires_grad=False) for p, name in names.items()
    }
