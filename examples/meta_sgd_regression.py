"""Meta-SGD on sinusoids (Li et al., 2017): beside the first weights the rate of every single weight is learned."""

import torch
from torch import nn
from torch.func import functional_call

from metaxl_evo import BilevelProblem, make_estimator, run_episode
from metaxl_evo.bilevel import SGD

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))


def loss(w, lam, batch):
    x, y = batch
    return (functional_call(net, w, (x,)) - y).square().mean()


def draw_task(rows=10):
    """A curve's rows to adapt on, and others to judge by."""
    amplitude, phase, x = 0.1 + 4.9 * torch.rand(()), 3.14 * torch.rand(()), 10 * torch.rand(2 * rows, 1) - 5
    return [(part, amplitude * torch.sin(part + phase)) for part in x.split(rows)]


initial = dict(net.named_parameters())
rates = {f"rate.{name}": torch.full_like(p, 0.03).requires_grad_() for name, p in initial.items()}
lam = initial | rates  # a rate of 0-d, or one shared by several parameters, works alike
problem = BilevelProblem(loss, loss, SGD(lr={name: f"rate.{name}" for name in initial}))
optimizer, losses = torch.optim.Adam([{"params": initial.values()}, {"params": rates.values(), "lr": 1e-3}], 5e-3), []
for step in range(1, 121):
    tasks = [draw_task() for _ in range(2)]
    found = [run_episode(problem, make_estimator("unroll"), initial, lam, [tr] * 3, judge) for tr, judge in tasks]
    for name, parameter in lam.items():
        parameter.grad = torch.stack([one.grads[name] for one in found]).mean(0)
    with torch.no_grad():
        losses += [(loss(initial, {}, judge), one.outer_loss) for (_, judge), one in zip(tasks, found, strict=True)]
    optimizer.step()
    if step % 40 == 0:
        before, after = torch.tensor(losses[-80:]).mean(0)
        print(f"step {step}: loss before adaptation {before:.2f}, after it {after:.2f}")
