"""Hypergradients in a loop of one's own, without a Trainer: a weight for each of eight noise levels, learned."""

import torch

from metaxl_evo import BilevelProblem, hypergradient, make_estimator
from metaxl_evo.bilevel import SGD

generator = torch.Generator().manual_seed(0)
truth = torch.randn(5, generator=generator)
level = torch.arange(64) % 8  # of the noise in each train example
x, x_val = torch.randn(64, 5, generator=generator), torch.randn(64, 5, generator=generator)
y = x @ truth + 0.4 * level * torch.randn(64, generator=generator)
y_val = x_val @ truth


def inner(w, lam, batch):
    return (lam["logits"].softmax(0)[level] * (x @ w["w"] - y).square()).mean() * 8


def outer(w, lam, batch):
    return (x_val @ w["w"] - y_val).square().mean()


problem, estimator = BilevelProblem(inner, outer, SGD(lr=0.02)), make_estimator("one_step")
w, lam = {"w": torch.zeros(5)}, {"logits": torch.zeros(8)}
for step in range(300):
    found = hypergradient(problem, estimator, w, lam, None, None)  # the batches go to the losses as they are
    lam["logits"] = lam["logits"] - 3.0 * found.grads["logits"]
    leaf = w["w"].clone().requires_grad_()
    w = {"w": w["w"] - 0.02 * torch.autograd.grad(inner({"w": leaf}, lam, None), leaf)[0]}
    if step in (0, 299):
        print(f"step {step}: outer loss {float(found.outer_loss):.4f}")
print("weights by noise level:", [round(float(weight), 2) for weight in 8 * lam["logits"].softmax(0)])
