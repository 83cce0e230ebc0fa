"""A meta-batch of tasks as one inner problem: their weights are stacked, and the inner loss adds up over them.

Then a step of SGD or Adam is a step of each task by itself, what an estimator pulls back is the sum over the tasks,
and neither it nor the trainer has to know of tasks. Whatever is a norm of all weights together is of all tasks
together: docs/task_distributions.md says what.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaxl_evo.bilevel.problem import Examples
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.models.norms import running_statistics
from metaxl_evo.models.parameters import places_of, swapped

SLOT = "slot"  # batch key: which of the stacked weights are those of a task, (tasks,)
TASK = "task"  # batch key of held-out tasks: their numbers, (tasks,)


class TaskBatch(nn.Module):
    """Copies of a network, one a task, with their weights stacked: leaves (tasks, ...).

    Args:
        network: at the weights from which all tasks begin.
        tasks: their number.
        in_turn: evaluate one task after the other, where torch.vmap cannot take the network.

    Attributes:
        start: the network from which the next tasks begin; no parameter of it is trained.

    Raises:
        ValueError: for running statistics, which tasks would share, and embeddings with padding that vmap would train.
    """

    def __init__(self, network: nn.Module, tasks: int, *, in_turn: bool = False):
        super().__init__()
        if any(map(running_statistics, network.modules())):
            raise ValueError(
                "a batch norm with running statistics would mix those of all tasks: make it with "
                "track_running_stats=False"
            )
        embeddings = [one for one in network.modules() if isinstance(one, nn.Embedding) and one.weight.requires_grad]
        if not in_turn and any(one.padding_idx is not None for one in embeddings):
            raise ValueError(
                "torch.vmap loses an embedding's padding_idx, so that padding would be learned in all tasks but the "
                "first: set in_turn=True, or padding_idx to None"
            )
        self.in_turn = in_turn
        self.copies, self.start = copy.deepcopy(network), copy.deepcopy(network).requires_grad_(False)
        self._places = places_of(self.copies)
        for name, leaf in self._stacked(tasks).items():
            wanted = self._places[name][0][0]._parameters[self._places[name][0][1]].requires_grad
            for owner, key in self._places[name]:
                owner._parameters[key] = nn.Parameter(leaf, requires_grad=wanted)

    @property
    def tasks(self) -> int:
        """How many the weights are of, where others are swapped in as well."""
        return len(next(iter(self.weights().values())))

    def weights(self) -> Tree:
        """Those of all tasks by their names in the network, (tasks, ...)."""
        return {name: owner._parameters[key] for name, ((owner, key), *_) in self._places.items()}

    def each(self, function: Callable[..., Tensor], slots: Tensor, *inputs: Tensor) -> Tensor:
        """`function(network, *inputs)` of each task, at its weights and its own part of the inputs, stacked.

        Args:
            slots: (n,) the tasks.
            inputs: (n, ...) each.
        """
        weights = {name: leaf[slots] for name, leaf in self.weights().items()}

        def one(weights: Tree, *inputs: Tensor) -> Tensor:
            with swapped(self._places, weights):
                return function(self.copies, *inputs)

        if self.in_turn:
            numbers = range(len(slots))
            return torch.stack([one({k: v[i] for k, v in weights.items()}, *(x[i] for x in inputs)) for i in numbers])
        found: Tensor = torch.func.vmap(one, randomness="different")(weights, *inputs)
        return found

    def spread(self, weights: Tree) -> Tree:
        """The weights of one network as those of all tasks, by their names in this module."""
        return {f"copies.{name}": leaf.expand(self.tasks, *leaf.shape) for name, leaf in weights.items()}

    def begun(self, tasks: int) -> Tree:
        """Fresh weights of so many tasks, which `at` takes."""
        return {name: leaf.requires_grad_() for name, leaf in self._stacked(tasks).items()}

    def at(self, weights: Tree) -> Any:
        """A context in which the copies are at these weights, (tasks, ...) each."""
        return swapped(self._places, weights)

    def begin_from(self, weights: Tree) -> None:
        """Have `start` at the first of the stacked weights, by their names in this module."""
        for name, leaf in self.start.named_parameters():
            if f"copies.{name}" in weights:
                leaf.data.copy_(weights[f"copies.{name}"][0])

    def _stacked(self, tasks: int) -> Tree:
        return {name: leaf.detach().expand(tasks, *leaf.shape).clone() for name, leaf in self.start.named_parameters()}


class MetaLearner(BilevelModule):
    """Tasks with base weights of their own, and meta parameters that they share.

    A batch holds the rows that each of n tasks has in one step: tensors (n, rows, ...), and `slot` (n,), whose weights
    are theirs. The inner loss is the sum over all tasks of each one's mean over its rows, the outer loss the mean over
    the tasks. In evaluation a batch holds whole tasks, which the forward adapts to.

    Attributes:
        make_optimizer: base parameters -> the optimiser of a held-out task, as of one in training.
    """

    base: TaskBatch
    make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None

    @abstractmethod
    def costs(self, batch: Batch) -> Tensor:
        """The losses of the rows of each task at its weights, (n, rows)."""

    def train_costs(self, batch: Batch) -> Tensor:
        """The same of rows that train, where they are not weighed alike."""
        return self.costs(batch)

    def measures(self, batch: Batch) -> dict[str, Tensor]:
        """What is measured of tasks that were adapted to, on rows that did not train: numbers (n,) by name."""
        return {"cost": self.costs(batch).mean(1)}

    def inner_loss(self, batch: Batch) -> Tensor:
        return self.base.tasks * self.train_costs(batch).mean(1)

    def outer_loss(self, batch: Batch) -> Tensor:
        return self.costs(batch).mean(1)

    def counts(self, batch: Batch) -> int:
        return len(batch[SLOT])

    @property
    def tasks(self) -> int:
        return self.base.tasks

    def pooled(self, w: Tree) -> Tree:
        return {name: leaf.mean(0, keepdim=True).expand_as(leaf) for name, leaf in w.items()}

    def begin_from(self, start: Tree) -> None:
        self.base.begin_from(start)

    def examples(self, processes: Processes) -> Examples:
        """Row i of every task is one example: each task draws of its own rows, with the same numbers."""
        return Examples(
            size=lambda window: _rows(_parts(window)[0]),
            take=lambda window, numbers: [_mapped(part, lambda rows: rows[:, numbers]) for part in _parts(window)],
            concat=lambda windows: [_joined(parts) for parts in zip(*map(_parts, windows), strict=True)],
        )

    def forward(self, **batch: Any) -> Any:
        return super().forward(**batch) if self.training else self.adapted(batch)

    def adapted(self, batch: Batch) -> dict[str, Tensor]:
        """The outer `loss` and the `measures` of held-out tasks, each adapted with the meta parameters as they are.

        Args:
            batch: `task` (n,), `train` with tensors (n, steps, rows, ...) and `judge` with tensors (n, rows, ...).
        """
        assert self.make_optimizer is not None
        slots = torch.arange(len(batch[TASK]), device=batch[TASK].device)
        weights = self.base.begun(len(slots))
        optimizer = self.make_optimizer(weights.values())
        with self.base.at(weights):
            self.train()
            for step in range(next(iter(batch["train"].values())).shape[1]):
                with torch.enable_grad():
                    rows = {name: held[:, step] for name, held in batch["train"].items()}
                    loss = self.inner_loss({SLOT: slots, **rows}).mean()
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for leaf, gradient in zip(weights.values(), found, strict=True):
                    leaf.grad = gradient
                optimizer.step()
            self.eval()
            with torch.no_grad():
                judge = {SLOT: slots, **batch["judge"]}
                return {"loss": self.outer_loss(judge).mean(), **self.measures(judge)}


def _parts(window: Any) -> Sequence[Batch]:
    return window if isinstance(window, (list, tuple)) else [window]


def _is_of_rows(value: Any) -> bool:
    """Whether a tensor is (tasks, rows, ...), and not of tasks alone."""
    return isinstance(value, Tensor) and value.dim() > 1


def _rows(part: Batch) -> int:
    return next(value.shape[1] for value in part.values() if _is_of_rows(value))


def _mapped(part: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    return {key: function(value) if _is_of_rows(value) else value for key, value in part.items()}


def _joined(parts: Sequence[Batch]) -> Batch:
    joined = {key: torch.cat([part[key] for part in parts], 1) for key, one in parts[0].items() if _is_of_rows(one)}
    return {**parts[0], **joined}
