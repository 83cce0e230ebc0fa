"""Two meta parameters and many valleys: short horizons beside the exact hypergradient (ICLR 2025 submission 6297)."""

import sys

import torch

from metaxl_evo import BilevelProblem, make_estimator, run_episode
from metaxl_evo.bilevel import SGD

CURVATURE = torch.tensor([1.0, 0.5], dtype=torch.float64)


def inner(w, lam, batch):
    return (CURVATURE * (w["w"] - lam["a"]).square()).sum() / 2


def outer(w, lam, batch):
    return (w["w"].square() + 10 * w["w"].sin().square()).sum()


def descend(name, horizon, outer_steps=10):
    """The outer losses at the ends of episodes that all begin at (2, 2)."""
    problem, estimator = BilevelProblem(inner, outer, SGD(lr=0.1)), make_estimator(name)
    start, lam = ({key: torch.full((2,), at, dtype=torch.float64)} for key, at in (("w", 2.0), ("a", 1.0)))
    losses = []
    for _ in range(outer_steps):
        found = run_episode(problem, estimator, start, lam, [None] * horizon, None)
        losses.append(float(found.outer_loss))
        lam = {"a": lam["a"] - 0.1 * found.grads["a"]}
    return losses


curves = {(T, name): descend(name, T) for T in (5, 10, 20) for name in ("one_step", "greedy", "unroll")}
for (horizon, name), losses in curves.items():
    print(f"T = {horizon}, {name}: outer loss {losses[0]:.4f} -> {losses[-1]:.4f}")
if sys.argv[1:]:  # the name of a picture
    import pandas as pd

    table = pd.DataFrame({f"T = {horizon}, {name}": losses for (horizon, name), losses in curves.items()})
    table.plot(xlabel="outer step", ylabel="outer loss").figure.savefig(sys.argv[1])
