"""Sharded base weights: N processes with a part of every weight = one process with the whole of it.

What was tried on FSDP2 before had six traps, silent ones. The cure of each, and the mutations that take it out:

1. What is gathered is computed with again, and no perturbation in place is seen. `Sharded._put` lets go of it
   (perturbed-beside-what-is-gathered).
2. `autograd.grad` at sharded parameters is None. `Sharded.gradients` makes a backward and reads `.grad`
   (gradients-asked-for-by-autograd).
3. Tied weights have a tangent in one place alone. `dual_weights` gives them one in all of them
   (tied-weights-without-a-tangent).
4. Small perturbations vanish in 16 bits. `Sharded` and the trainer refuse these (fewer-bits-taken, bf16-on-shards).
5. A lam that is sharded with the base, or reduced by nobody. `shard_base_only` leaves it out, `Processes.all_reduce`
   sums it (task-sharded-as-one, lam-reduced-by-nobody).
6. DTensors know no dual numbers and no `functional_call`. Gathered weights are made dual, and `weights.at(w)` puts
   weights into the module (forward-mode-of-dtensors, swapped-in-beside-shards).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from metaxl_evo.bilevel import AdamW, BilevelProblem, Hypergradient, Tree, hypergradient, shards, stop_gradient, tree
from metaxl_evo.bilevel.base_weights import Sharded
from metaxl_evo.bilevel.passes import Counts
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
    "exact one_step": ("one_step", {"engine": "jvp"}),
    "exact sama": ("sama", {"engine": "jvp"}),
    "exact greedy": ("greedy", {"engine": "jvp"}),
}
RULES = {"AdamW": AdamW(0.1, weight_decay=0.1), "clipped": AdamW(0.1, max_grad_norm=0.05)}


class Net(nn.Module):
    """Layers of nine rows, which no two or four processes share evenly, and of one, which most have nothing of.

    Two layers have one weight.
    """

    def __init__(self, severed: Callable[[Tensor], Tensor] = stop_gradient) -> None:
        super().__init__()
        self.severed = severed
        self.first, self.second, self.gain = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 1)
        self.again, self.last = nn.Linear(9, 9), nn.Linear(9, CLASSES)
        self.again.weight = self.second.weight

    def forward(self, x: Tensor, mix: Tensor | None = None, reads: Tensor | None = None) -> Tensor:
        """`reads` are the rows that read `mix`."""
        hidden = torch.tanh(self.first(x))
        if reads is not None and len(reads):
            read = hidden[reads]
            hidden = hidden.index_copy(0, reads, read + torch.tanh(self.severed(read) @ mix))
        hidden = torch.tanh(self.again(torch.tanh(self.second(hidden))))
        found: Tensor = self.last(hidden * self.gain(hidden).sigmoid())
        return found


def net(severed: Callable[[Tensor], Tensor] = stop_gradient) -> Net:
    torch.manual_seed(0)
    return Net(severed).double()


def meta() -> Tree:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    return {"mix": mix, "weights": torch.tensor([0.3, -0.2], dtype=torch.float64)}


def rows(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, labels, domains, and whether a row reads lam, of all processes; no row of the last of four does."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    numbers = torch.arange(ROWS)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator), numbers % 2, numbers < 6


Run = Callable[..., Tensor]  # the network at weights w


def problem(run: Run, rule: str, **fields: Any) -> BilevelProblem:
    def inner(w: Tree, lam: Tree, batch: Any) -> Tensor:
        x, labels, domains, reading = batch
        reads = reading.nonzero().flatten()
        losses = F.cross_entropy(run(w, x, lam["mix"], reads), labels, reduction="none")
        if len(reads):
            losses = losses.index_copy(0, reads, losses[reads] * lam["weights"].sigmoid()[domains[reads]])
        return losses.sum() / ROWS

    def outer(w: Tree, lam: Tree, batch: Any) -> Tensor:
        x, labels, *_ = batch
        size = lam["mix"].square().sum() * len(x) / ROWS
        return F.cross_entropy(run(w, x), labels, reduction="sum") / ROWS + 0.01 * size

    return BilevelProblem(inner, outer, RULES[rule], **fields)


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layers in (model.first, [model.second, model.again]):
        fully_shard(layers, mesh=mesh, **settings)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh, **settings)
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

    def run(w: Tree, *inputs: Tensor) -> Tensor:
        with for_this_pass(home.at(w)):
            found: Tensor = model(*inputs)
            return found

    return problem(run, rule, parts=list, weights=home, processes=Processes(dist.get_rank(), dist.get_world_size()))


class Sent(TorchDispatchMode):
    """Counts what processes say to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def of_this_process() -> dict[str, Any]:
    dist.init_process_group("gloo")
    model, found = sharded(net()), dict[str, Any]()
    parameters = dict(model.named_parameters())
    start = tree.clone(parameters)
    for rule in RULES:
        one = on_shards(model, rule)
        for key, (name, settings) in ESTIMATORS.items():
            found[f"{key} {rule}"] = estimated(one, make_estimator(name, **settings), tree.detach(parameters), mine())
    found["sent"] = {}
    for key in SENT:  # once more: the tests that come first are made
        name, settings = ESTIMATORS[key]
        with Sent() as sent:
            again = estimated(one, make_estimator(name, **settings), tree.detach(parameters), mine())
        found["sent"][key] = sent.counts, again.counts
    now = shards.local(parameters)
    assert all(torch.equal(now[name], leaf) for name, leaf in shards.local(start).items())  # to the last bit
    assert all(parameter.grad is None for parameter in parameters.values())
    return found


@cache
def alone() -> dict[str, Hypergradient]:
    """By the exact engine, where there is one."""
    model = net()
    w = tree.detach(dict(model.named_parameters()))

    def run(w: Tree, *inputs: Tensor) -> Tensor:
        found: Tensor = functional_call(model, w, inputs)
        return found

    found = {}
    for rule in RULES:
        one = problem(run, rule, parts=list)
        for key, (name, settings) in ESTIMATORS.items():
            exact = settings | {"engine": "double_backward"} if {"radius", "engine"} & settings.keys() else settings
            found[f"{key} {rule}"] = estimated(one, make_estimator(name, **exact), w, slice(None))
    return found


SENT = {"one_step": 4, "evograd": 5, "greedy": 5, "exact one_step": 2}  # and their forwards, the step's own among them
GROUPS, PLACES = 3, 10  # of layers that gather together; of parameters, tied ones in each of their layers


def check_what_is_sent(found: dict[str, tuple[Counter[str], Counts]]) -> None:
    """All groups are gathered in a forward, again in a backward but for the root, and summed behind it."""
    for key, forwards in SENT.items():
        sent, counts = found[key]
        assert counts.forwards == forwards
        passes, back = forwards + counts.jvps, counts.backwards + counts.jvps
        assert sent["_allgather_base_"] == GROUPS * passes + (GROUPS - 1) * back, key
        assert sent["_reduce_scatter_base_"] == GROUPS * counts.backwards, key
        assert sent["all_gather_into_tensor"] == PLACES * counts.jvps, key  # of tangents, tensor by tensor
        assert sent["allreduce_"] <= 10, key  # norms, of clipping too, losses, and the hypergradient


@pytest.mark.parametrize("count", [2, 4])
def test_sharded_weights_give_the_hypergradient_of_one_process(count: int) -> None:
    ranks = on_processes(count, of_this_process)
    for rank in ranks:
        check_what_is_sent(rank.pop("sent"))
    assert len(ranks[0]) == len(alone()) == 2 * len(ESTIMATORS) == 28
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


ENGINES: dict[str, dict[str, Any]] = {"finite_difference": FINE, "jvp": {"engine": "jvp"}}


def refusal(model: nn.Module, settings: dict[str, Any]) -> str:
    estimator = make_estimator("one_step", **settings)
    try:
        estimated(on_shards(model, "AdamW"), estimator, dict(model.named_parameters()), mine())
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "none"


def of_refused() -> dict[str, str]:
    """What is out of the graph by other means than `stop_gradient`; a backward that sums nothing; fewer bits."""
    dist.init_process_group("gloo")
    found = {
        f"{how} {engine}": refusal(sharded(net(severed)), settings)
        for how, severed in SEVERED.items()
        for engine, settings in ENGINES.items()
    }
    alone = sharded(net())
    alone.set_requires_gradient_sync(False)
    low = [MixedPrecisionPolicy(**{which: torch.bfloat16}) for which in ("param_dtype", "reduce_dtype")]
    found |= {f"bf16 {number}": refusal(sharded(net(), mp_policy=one), FINE) for number, one in enumerate(low)}
    return found | {"no sync": refusal(alone, FINE)}


def test_what_would_be_wrong_is_refused_on_all_processes() -> None:
    for found in on_processes(2, of_refused):
        assert len(found) == 7
        for key, message in found.items():
            if key.startswith("bf16"):
                assert re.search(r"computes with torch.bfloat16 .* leave mp_policy out$", message), key
            elif key == "no sync":
                assert "summed no gradient: leave no_sync" in message
            else:
                assert re.search(r"inner loss is not its slope: .* stop_gradient\(x\)", message), key
