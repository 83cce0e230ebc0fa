"""Sharded base weights: N processes with a part of every weight = one process with the whole of it, trap by trap."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn import functional as F

from metaxl_evo.bilevel import AdamW, BilevelProblem, Hypergradient, Tree, hypergradient, shards, stop_gradient, tree
from metaxl_evo.bilevel.base_weights import Sharded
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.bilevel.replay import for_this_pass
from metaxl_evo.estimators import Estimator, make_estimator
from tests.processes import on_processes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROWS, CLASSES = 8, 3
FINE = {"engine": "finite_difference", "radius": 1e-4}
ESTIMATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "one_step": ("one_step", FINE),
    "auto": ("one_step", {"radius": 1e-4}),
    "sama": ("sama", FINE),
    "evograd": ("evograd", {"copies": 3, "sigma": 0.05}),
    "gaussian evograd": ("evograd", {"copies": 4, "sigma": 0.05, "noise": "gaussian", "antithetic": True}),
    "evograd of some": ("evograd", {"copies": 3, "sigma": 0.05, "parameters": "^last"}),
    "first_order": ("first_order", {}),
    "greedy": ("greedy", FINE),
    "hyperdistill": ("hyperdistill", FINE | {"scale": "one"}),
    "neumann": ("neumann", FINE | {"terms": 3}),
    "conjugate_gradient": ("conjugate_gradient", FINE | {"iterations": 3}),
}
RULES = {"AdamW": AdamW(0.1, weight_decay=0.1), "clipped": AdamW(0.1, max_grad_norm=0.05)}


class Net(nn.Module):
    """Layers of nine rows, which no two or four processes share evenly, and of one, which most have nothing of."""

    def __init__(self, severed: Callable[[Tensor], Tensor] = stop_gradient) -> None:
        super().__init__()
        self.severed = severed
        self.first, self.second, self.gain = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 1)
        self.last = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor, mix: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if mix is not None:
            hidden = hidden + torch.tanh(self.severed(hidden) @ mix)
        hidden = torch.tanh(self.second(hidden))
        found: Tensor = self.last(hidden * self.gain(hidden).sigmoid())
        return found


def net(severed: Callable[[Tensor], Tensor] = stop_gradient) -> Net:
    torch.manual_seed(0)
    return Net(severed).double()


def meta() -> Tree:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    return {"mix": mix, "weights": torch.tensor([0.3, -0.2], dtype=torch.float64)}


def rows(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and domains of all processes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator), torch.arange(ROWS) % 2


Run = Callable[..., Tensor]  # the network at weights w


def problem(run: Run, rule: str, **fields: Any) -> BilevelProblem:
    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        x, labels, domains = batch
        losses = F.cross_entropy(run(w, x, lam["mix"]), labels, reduction="none")
        return (losses * lam["weights"].sigmoid()[domains]).sum() / ROWS

    def outer(w: Tree, lam: Tree, batch: Any) -> Tensor:
        x, labels, _ = batch
        size = lam["mix"].square().sum() * len(x) / ROWS
        return F.cross_entropy(run(w, x), labels, reduction="sum") / ROWS + 0.01 * size

    return BilevelProblem(inner, outer, RULES[rule], **fields)


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh, **settings)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    return model


def estimated(one: BilevelProblem, estimator: Estimator, w: Tree, of: slice) -> Hypergradient:
    train, val = ([tuple(x[of] for x in rows(seed))] for seed in (2, 3))
    generator = torch.Generator().manual_seed(4)
    return hypergradient(one, estimator, w, meta(), train, val, generator=generator)


def mine() -> slice:
    """The rows of this process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return slice(rank * ROWS // size, (rank + 1) * ROWS // size)


def on_shards(model: nn.Module, rule: str) -> BilevelProblem:
    home = Sharded(model, dict(model.named_parameters()))

    def run(w: Tree, x: Tensor, mix: Tensor | None = None) -> Tensor:
        with for_this_pass(home.at(w)):
            found: Tensor = model(x, mix)
            return found

    return problem(run, rule, parts=list, weights=home, processes=Processes(dist.get_rank(), dist.get_world_size()))


def of_this_process() -> dict[str, Any]:
    dist.init_process_group("gloo")
    model, found = sharded(net()), {}
    parameters = dict(model.named_parameters())
    start = tree.clone(parameters)
    for rule in RULES:
        one = on_shards(model, rule)
        for key, (name, settings) in ESTIMATORS.items():
            found[f"{key} {rule}"] = estimated(one, make_estimator(name, **settings), tree.detach(parameters), mine())
    now = shards.local(parameters)
    assert all(torch.equal(now[name], leaf) for name, leaf in shards.local(start).items())  # to the last bit
    assert all(parameter.grad is None for parameter in parameters.values())
    return found


@cache
def alone() -> dict[str, Hypergradient]:
    """By the exact engine, where there is one."""
    model = net()
    w = tree.detach(dict(model.named_parameters()))

    def run(w: Tree, x: Tensor, mix: Tensor | None = None) -> Tensor:
        found: Tensor = functional_call(model, w, (x, mix))
        return found

    found = {}
    for rule in RULES:
        one = problem(run, rule, parts=list)
        for key, (name, settings) in ESTIMATORS.items():
            exact = settings | {"engine": "double_backward"} if "radius" in settings else settings
            found[f"{key} {rule}"] = estimated(one, make_estimator(name, **exact), w, slice(None))
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_sharded_weights_give_the_hypergradient_of_one_process(count: int) -> None:
    ranks = on_processes(count, of_this_process)
    assert len(ranks[0]) == len(alone()) == 2 * len(ESTIMATORS) == 22
    for key, one in alone().items():
        found = ranks[0][key]
        size = tree.norm(one.grads)
        error = tree.norm(tree.add(found.grads, one.grads, -1.0)) / size
        print(f"{key}: {error:.1e}")
        assert size > 1e-6
        assert error < (1e-6 if "radius" in ESTIMATORS[key.rpartition(" ")[0]][1] else 1e-12), key
        assert float(found.outer_loss) == pytest.approx(float(one.outer_loss), rel=1e-12)
        for other in ranks[1:]:
            assert all(torch.equal(other[key].grads[name], leaf) for name, leaf in found.grads.items()), key


SEVERED: dict[str, Callable[[Tensor], Tensor]] = {"detach": Tensor.detach, "data": lambda x: x.data}


def of_severed_losses() -> dict[str, Any]:
    """What is out of the graph by other means than `stop_gradient`; and a backward that sums nothing."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    estimator = make_estimator("one_step", **FINE)
    for how, severed in SEVERED.items():
        model = sharded(net(severed))
        try:
            found[how] = estimated(on_shards(model, "AdamW"), estimator, dict(model.named_parameters()), mine())
        except ValueError as error:
            found[how] = str(error)
    model = sharded(net())
    model.set_requires_gradient_sync(False)
    try:
        estimated(on_shards(model, "AdamW"), estimator, dict(model.named_parameters()), mine())
    except RuntimeError as error:
        found["no sync"] = str(error)
    return found


def test_values_out_of_the_graph_are_refused_on_all_processes() -> None:
    for found in on_processes(2, of_severed_losses):
        for how in SEVERED:
            assert re.search(r"inner loss is not its slope: .* stop_gradient\(x\)", found[how])
        assert "summed no gradient: leave no_sync" in found["no sync"]
