"""MAML on sinusoids (Finn et al., ICML 2017): learn first weights from which three steps fit a new curve."""

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


problem, estimator = BilevelProblem(loss, loss, SGD(lr=0.03)), make_estimator("unroll")
initial = dict(net.named_parameters())  # lam, and the first weights of every episode: a learned initialisation
optimizer = torch.optim.Adam(initial.values(), lr=5e-3)
losses = []
for step in range(1, 121):
    tasks = [draw_task() for _ in range(2)]
    found = [run_episode(problem, estimator, initial, initial, [train] * 3, judge) for train, judge in tasks]
    for name, parameter in initial.items():
        parameter.grad = torch.stack([one.grads[name] for one in found]).mean(0)
    with torch.no_grad():
        losses += [(loss(initial, {}, judge), one.outer_loss) for (_, judge), one in zip(tasks, found, strict=True)]
    optimizer.step()
    if step % 40 == 0:
        before, after = torch.tensor(losses[-80:]).mean(0)
        print(f"step {step}: loss before adaptation {before:.2f}, after it {after:.2f}")
