"""The sign-based meta optimiser of FDS, whose steps halve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SignHalving(torch.optim.Optimizer):
    """Each coordinate moves by its own step against the sign of its hypergradient.

    The step shrinks whenever that sign flips; a coordinate stops where its step fell below a fraction of its own
    size. For a few numbers whose hypergradients differ by orders of magnitude: a learning rate, a momentum, a decay.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: the first step (FDS: 0.1 for learning rates, 0.1 or 0.3 for momentum, 3e-4 or 4e-4 for weight decay).
        weight_decay: times the value, added to its hypergradient before the sign is taken.
        factor: what a flip multiplies the step by.
        floor: a coordinate stops at step < floor * |value|.

    Source: Micaelli & Storkey, Gradient-based Hyperparameter Optimization Over Long Horizons, NeurIPS 2021.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self, params: Any, lr: float = 0.1, weight_decay: float = 0.0, factor: float = 0.5, floor: float = 0.05
    ):
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("floor", floor)):
            if not value >= 0:
                raise ValueError(f"SignHalving: {name} must be at least 0, not {value}")
        if not 0 < factor <= 1:
            raise ValueError(f"SignHalving: factor must be above 0 and at most 1, not {factor}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "factor": factor, "floor": floor})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every coordinate that has not stopped and has a hypergradient other than zero."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, sign = self._state(p), p.grad.add(p, alpha=group["weight_decay"]).sign()
                state["shrink"] = torch.where(sign * state["sign"] < 0, group["factor"], 1.0) * state["shrink"]
                state["sign"] = sign
                p.sub_(sign * self._steps(p, group))

    @property
    def converged(self) -> bool:
        """Whether every coordinate has stopped."""
        return not any(self._steps(p, group).any() for group in self.param_groups for p in group["params"])

    def _state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["shrink"], state["sign"] = torch.ones_like(p), torch.zeros_like(p)
        return state

    def _steps(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The step of each coordinate, 0 where it has stopped."""
        step = group["lr"] * self._state(p)["shrink"]
        return step.masked_fill(step < group["floor"] * p.detach().abs(), 0.0)
