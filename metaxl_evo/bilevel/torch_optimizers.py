"""The update rule of a torch optimiser, and its state, read off it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaxl_evo.bilevel import hyper
from metaxl_evo.bilevel.hyper import Hyper
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import SGD, Adam, AdamW, UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState, counted


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
        steps: how many steps it has made (default: as many as the parameter with the most; SGD keeps no count).

    Raises:
        ValueError: for an optimiser, or an option of one, that has no rule here.
    """
    cls = optimizer_rule(optimizer)
    groups = _groups(optimizer, names)
    common = {
        "lr": groups.by_name("lr"),
        "weight_decay": groups.by_name("weight_decay"),
        "max_grad_norm": max_grad_norm,
    }
    held = {name: optimizer.state.get(p, {}) for p, name in names.items()}
    if cls is SGD:
        return _sgd(common, groups, held, names, steps)
    assert issubclass(cls, Adam)
    return _adam(cls, common, groups, held, names, steps)


@dataclass(frozen=True)
class _Groups:
    """The parameter groups with base parameters, and the names of these."""

    groups: Sequence[tuple[Mapping[str, Any], Sequence[str]]]

    def by_name(self, key: str) -> Hyper:
        """A hyperparameter: one number, or one by parameter name where groups differ."""
        values = {name: float(group[key]) for group, names in self.groups for name in names}
        return values if len(set(values.values())) > 1 else next(iter(values.values()))

    def shared(self, key: str) -> Any:
        """An option that all groups share.

        Raises:
            ValueError: where they do not.
        """
        values = {group[key] for group, _ in self.groups}
        if len(values) > 1:
            raise ValueError(f"parameter groups differ in {key!r} ({sorted(values)}): give every group the same value")
        return values.pop()


def _groups(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> _Groups:
    held_here = {p for group in optimizer.param_groups for p in group["params"]}
    strangers = [name for p, name in names.items() if p not in held_here]
    if strangers or not names:
        raise ValueError(f"the optimizer does not hold the base parameters {strangers}: name only those that it steps")
    groups = [(group, [names[p] for p in group["params"] if p in names]) for group in optimizer.param_groups]
    return _Groups([(group, held) for group, held in groups if held])


def _sgd(
    common: Mapping[str, Any],
    groups: _Groups,
    held: Mapping[str, Mapping[str, Any]],
    names: Mapping[Tensor, str],
    steps: int | None,
) -> tuple[UpdateRule, UpdateState]:
    dampening, momentum = groups.shared("dampening"), groups.by_name("momentum")
    if dampening and steps is None:
        raise ValueError("torch's SGD keeps no step count, which dampening needs: give steps, or set dampening=0")
    rule = SGD(**common, momentum=momentum, dampening=dampening, nesterov=groups.shared("nesterov"))
    with_buffer = {p: n for p, n in names.items() if not hyper.is_zero(momentum, n)}
    found = {n: held[n]["momentum_buffer"] for n in with_buffer.values() if _has(held[n], "momentum_buffer")}
    step = int(bool(found)) if steps is None else steps
    missed = {n: step for n in with_buffer.values() if n not in found}  # no buffer: no step yet
    if step and missed and dampening:
        raise ValueError(
            f"{min(missed)!r} had no gradient in a step, and torch's SGD does not tell when it gets its first "
            "one, which dampening spares: set dampening=0, or leave out the parameters that are not used"
        )
    return rule, counted(step, missed) | {"momentum_buffer": _with_zeros(found, with_buffer)}


def _adam(
    cls: type[Adam],
    common: Mapping[str, Any],
    groups: _Groups,
    held: Mapping[str, Mapping[str, Any]],
    names: Mapping[Tensor, str],
    steps: int | None,
) -> tuple[UpdateRule, UpdateState]:
    rule = cls(**common, betas=tuple(groups.shared("betas")), eps=groups.shared("eps"))
    made = dict.fromkeys(held, 0) | _counted({n: s["step"] for n, s in held.items() if _has(s, "step")})
    step = max(made.values()) if steps is None else steps
    missed = {n: step - count for n, count in made.items()}
    moments = {
        key: _with_zeros({n: s[key] for n, s in held.items() if _has(s, key)}, names)
        for key in ("exp_avg", "exp_avg_sq")
    }
    return rule, counted(step, missed) | moments


def _counted(steps: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of steps, which a fused optimiser keeps on the device: asked for once."""
    if not steps:
        return {}
    counts = torch.stack([torch.as_tensor(step) for step in steps.values()]).tolist()
    return dict(zip(steps, map(int, counts), strict=True))


def _has(held: Mapping[str, Any], key: str) -> bool:
    return held.get(key) is not None


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
