"""Update rules of the inner problem as differentiable maps: SGD with momentum, Adam, AdamW; gradient clipping.

A rule maps (w, state, grad, lam) to (w', state'), with torch.optim's own algebra, so that autograd can run through
it. For the one-step estimators it also gives the pullback (du/dg)^T v in closed form, where w' = D w - u(g): no
graph, one product a leaf. A hyperparameter is a number, a mapping from parameter name to number (optimiser groups),
or the *name of an entry of lam* (a learned learning rate, momentum or weight decay), which is then pulled back here
and not through a mixed product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.tree import Tree

Hyper = float | str | Mapping[str, float]
UpdateState = dict[str, Any]  # {"step": int, "exp_avg": Tree, ...}

_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by (norm + 1e-6)


def _value(hyper: Hyper, name: str, lam: Mapping[str, Tensor]) -> float | Tensor:
    """The hyperparameter that acts on parameter `name`."""
    if isinstance(hyper, str):
        return lam[hyper]
    return hyper[name] if isinstance(hyper, Mapping) else hyper


def _is_zero(hyper: Hyper) -> bool:
    if isinstance(hyper, str):
        return False
    return not any(hyper.values()) if isinstance(hyper, Mapping) else hyper == 0


@dataclass(frozen=True)
class UpdateRule(ABC):
    """One optimiser step as a map; subclasses are torch.optim's algorithms.

    `max_grad_norm` clips the gradient's global norm first, as `torch.nn.utils.clip_grad_norm_` does.
    """

    lr: Hyper
    weight_decay: Hyper = 0.0
    max_grad_norm: float | None = None

    @abstractmethod
    def init(self, w: Tree) -> UpdateState:
        """The state before the first step."""

    @abstractmethod
    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]: ...

    @abstractmethod
    def _du_dg(self, v: Tree, w: Tree, grad: Tree, state: UpdateState, lam: Tree) -> Tree: ...

    def __call__(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        """The next weights and state; differentiable in w, the state's tensors, grad and lam."""
        return self._step(w, state, self._clip(grad), lam)

    def grad_vjp(self, v: Tree, w: Tree, grad: Tree, state: UpdateState, lam: Tree) -> Tree:
        """(du/dg)^T v for w' = D w - u(g), with the clip factor's derivative.

        Args:
            v: cotangent on w'.
            w: weights before the step (coupled weight decay needs them).
            grad: the gradient of the step, before clipping.
            state: the optimiser state *after* the step.
            lam: meta parameters, read where a hyperparameter is one of them.
        """
        factor, norm = self._clip_factor(grad)
        pulled = self._du_dg(v, w, tree.scale(grad, factor) if norm else grad, state, lam)
        if not norm:
            return pulled
        along = tree.dot(pulled, grad).item() / (norm * (norm + _CLIP_EPS))  # f (u - n/(n + eps) ghat <ghat, u>)
        return tree.tree_map(lambda u, g: u.sub(g, alpha=along).mul_(factor), pulled, grad)

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
        return frozenset(value for value in vars(self).values() if isinstance(value, str))

    def _clip_factor(self, grad: Tree) -> tuple[float, float | None]:
        """The factor that clips `grad`, and the norm that it depends on (None where nothing is clipped)."""
        if self.max_grad_norm is None:
            return 1.0, None
        norm = tree.norm(grad)
        if norm + _CLIP_EPS <= self.max_grad_norm:
            return 1.0, None
        return self.max_grad_norm / (norm + _CLIP_EPS), norm

    def _clip(self, grad: Tree) -> Tree:
        """The clipped gradient, differentiable where `grad` is."""
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

    momentum: float | str = 0.0
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

    def _du_dg(self, v: Tree, w: Tree, grad: Tree, state: UpdateState, lam: Tree) -> Tree:
        damp = 0.0 if state["step"] <= 1 else self.dampening
        factor: dict[str, float | Tensor] = {}
        for name in v:
            keep: float | Tensor = 1.0
            if not _is_zero(self.momentum):
                keep = 1 - damp
                if self.nesterov:
                    keep = 1 + _value(self.momentum, name, lam) * keep
            factor[name] = _value(self.lr, name, lam) * keep
        return {name: factor[name] * leaf for name, leaf in v.items()}


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

    def _du_dg(self, v: Tree, w: Tree, grad: Tree, state: UpdateState, lam: Tree) -> Tree:
        """lr/c1 [(1-b1)/Dn - m (1-b2) g / (c2 r Dn^2)], r = sqrt(s/c2), Dn = r + eps, at the moments after the step.

        Coordinates that never had a gradient (s = 0: unused embedding rows) give 0: the training loss does not depend
        on them, and their true factor, of size lr/eps, would only swamp the direction of a finite difference.
        """
        (b1, b2), step = self.betas, state["step"]
        c1, c2 = 1 - b1**step, 1 - b2**step
        pulled = {}
        for name, g in self._adaptive_grad(w, grad, lam).items():
            root = (state["exp_avg_sq"][name] / c2).sqrt_()
            denominator = root + self.eps
            bend = (state["exp_avg"][name] * g).mul_((1 - b2) / c2).div_(root).div_(denominator)
            slope = bend.neg_().add_(1 - b1).div_(denominator).mul_(v[name]).mul_(_value(self.lr, name, lam) / c1)
            pulled[name] = slope.masked_fill_(root == 0, 0.0)
        return pulled

    def _adaptive_grad(self, w: Tree, grad: Tree, lam: Tree) -> Tree:
        """The gradient that enters the moments."""
        return self._decayed(w, grad, lam)


@dataclass(frozen=True)
class AdamW(Adam):
    """torch.optim.AdamW: Adam with decoupled weight decay, w <- (1 - lr * wd) w first."""

    def _step(self, w: Tree, state: UpdateState, grad: Tree, lam: Tree) -> tuple[Tree, UpdateState]:
        if not _is_zero(self.weight_decay):
            lr, decay = self.lr, self.weight_decay
            w = {n: leaf * (1 - _value(lr, n, lam) * _value(decay, n, lam)) for n, leaf in w.items()}
        return self._moments_step(w, state, grad, lam)

    def _adaptive_grad(self, w: Tree, grad: Tree, lam: Tree) -> Tree:
        return grad


def _safe_sqrt(x: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0 (autograd's own is infinite, and infinity times zero is NaN)."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def from_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], max_grad_norm: float | None = None
) -> tuple[UpdateRule, UpdateState]:
    """Read the rule and the current state off a torch optimiser (the state's tensors are shared, not copied).

    Args:
        optimizer: SGD, Adam or AdamW (fused and foreach variants included).
        names: the name of each base parameter.
        max_grad_norm: clipping that is applied before the optimiser sees the gradient.

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
        if shared("dampening"):
            raise ValueError("torch's SGD keeps no step count, which dampening needs: set dampening=0")
        rule: UpdateRule = SGD(**common, momentum=shared("momentum"), nesterov=shared("nesterov"))
        buffers = {n: s["momentum_buffer"] for n, s in held.items() if s.get("momentum_buffer") is not None}
        state: UpdateState = {"step": 1 if buffers else 0, "momentum_buffer": _with_zeros(buffers, names)}
    else:
        assert issubclass(cls, Adam)
        rule = cls(**common, betas=tuple(shared("betas")), eps=shared("eps"))
        steps = [int(s["step"]) for s in held.values() if "step" in s]
        state = {"step": max(steps, default=0)}
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
