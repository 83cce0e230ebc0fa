"""The pass context: what every forward and backward of one meta step shares.

One hypergradient is several passes over the same batches at neighbouring weights. Their differences are the signal, so
everything else has to stand still: dropout masks and other noise (one seed a part of the batch), the stop-gradient
inputs of the meta network (recorded once, replayed in perturbed passes), batch-norm buffers (frozen by the problem's
own `scope`). A pass restores what it changed: the global random state, the attention kernels, the weights swapped
into a module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaxl_evo.bilevel import shards, tree
from metaxl_evo.bilevel.precision import computing
from metaxl_evo.bilevel.problem import BilevelProblem, Loss
from metaxl_evo.bilevel.randomness import mix_seed, random_state, seed_all, seeded
from metaxl_evo.bilevel.replay import Inputs, Tape, plain_detaches, running
from metaxl_evo.bilevel.tree import Tree

NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")  # of the devices, the host, their libraries


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory, and says nothing about what was computed."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in NO_MEMORY)


@dataclass
class Counts:
    """Work of one hypergradient, in passes over one part of a batch.

    `forwards` and `backwards` are of whole losses, `hvps` are double backwards, `jvps` forward-mode products through a
    gradient (each of these two includes its own forward and backward), `suffixes` are evaluations of a cut's suffix,
    `reduced` are the numbers that were summed over several processes.
    """

    forwards: int = 0
    backwards: int = 0
    hvps: int = 0
    jvps: int = 0
    suffixes: int = 0
    reduced: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class PassContext:
    """Runs the passes of one meta step and counts them.

    `seed` fixes the randomness that the passes share; `noise` holds injected perturbations (for oracles), if any;
    `devices` are the CUDA devices whose random state has to be kept; `precision` is one of `PRECISIONS`.
    """

    problem: BilevelProblem
    seed: int = 0
    noise: Sequence[Tree] | None = None
    devices: Sequence[torch.device] = ()
    precision: str = "float32"
    counts: Counts = field(default_factory=Counts)
    _tapes: dict[int, Tape] = field(default_factory=dict)

    def parts(self, batch: Any, *, lam_only: bool = False) -> list[tuple[int, Any]]:
        """The numbered parts (micro-batches) whose losses add up to the loss of `batch`.

        With `lam_only`, of each the rows through which the inner loss reads lam: enough for a gradient to lam.
        """
        parts = self.problem.parts(batch)
        return list(enumerate(map(self.problem.reads_lam, parts) if lam_only else parts))

    def only_part(self, batch: Any) -> tuple[int, Any] | None:
        """The numbered part that a batch is, where it is one and all of it reads lam."""
        parts = self.problem.parts(batch)
        return (0, parts[0]) if len(parts) == 1 and self.problem.reads_lam(parts[0]) is parts[0] else None

    def elsewhere(self, seed: int | None = None) -> PassContext:
        """A context for another point, batch or step: its own recorded inputs (and seed), the same counts."""
        return replace(self, seed=self.seed if seed is None else seed, _tapes={})

    @contextmanager
    def scope(
        self, part: int, *, inputs: Inputs = Inputs.LIVE, second_order: bool = False, stream: int = 0
    ) -> Iterator[None]:
        """One pass over one part: forward and backward both belong inside.

        `second_order` confines attention to the math kernel, the only one that can be differentiated twice or in
        forward mode. `stream` other than 0 draws independent randomness.

        Raises:
            ValueError: under `torch.inference_mode`, where autograd sees nothing.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "a hypergradient needs autograd, which torch.inference_mode() switches off: call it outside of that "
                "block (torch.no_grad() is no obstacle)"
            )
        with ExitStack() as stack:
            stack.enter_context(computing(self.precision, {"cpu", *(device.type for device in self.devices)}))
            stack.enter_context(seeded(self._seed_of(part, stream), self.devices))
            stack.enter_context(self.problem.scope())
            stack.enter_context(torch.enable_grad())
            if second_order:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            with self._running(part, inputs, stack):
                yield

    @contextmanager
    def recording(self, part: int) -> Iterator[None]:
        """Record what a forward over one part hands over that is not of this context: the base step's own.

        Nothing is kept of one that draws random numbers, which are others than those that the passes share.
        """
        before = random_state(self.devices)
        with ExitStack() as stack, self._running(part, Inputs.RECORD, stack):
            yield
        if random_state(self.devices) != before:
            del self._tapes[part]

    @contextmanager
    def _running(self, part: int, inputs: Inputs, stack: ExitStack) -> Iterator[None]:
        facts, recording = self.problem.facts, inputs is Inputs.RECORD
        tape = Tape(True, facts.replay_detach) if recording else self._tapes.get(part, Tape())
        with running(inputs, tape, facts, stack):
            yield
        if recording:
            self._tapes[part] = tape

    def reseed(self, part: int) -> None:
        """Within a scope: put the shared randomness of the part back to its start."""
        seed_all(self._seed_of(part, 0), self.devices)

    def _seed_of(self, part: int, stream: int) -> int:
        """Of the randomness within a part, which no two parts share, on whatever process they are."""
        processes = self.problem.processes
        return mix_seed(self.seed, part * processes.size + processes.rank, stream)

    def all_reduce(self, shares: Tree) -> Tree:
        """The sum of what every process has computed for its rows; takes `shares` over."""
        if self.problem.processes.size > 1:
            self.counts.reduced += tree.size({n: leaf for n, leaf in shares.items() if not shards.is_sharded(leaf)})
        return self.problem.processes.all_reduce(shares)

    def all_reduce_one(self, share: Tensor) -> Tensor:
        """`all_reduce` of a single tensor, summed in float64: a process without rows does not know a loss's dtype."""
        if self.problem.processes.size == 1:
            return share
        return self.all_reduce({"": share.double()})[""].to(share.dtype)

    def whole(self, shares: Tree) -> Tree:
        """`all_reduce` by its name up to 0.1; goes after the next release."""
        warnings.warn("PassContext.whole is all_reduce now", FutureWarning, stacklevel=2)
        return self.all_reduce(shares)

    def once(self, whole: Tree) -> Tree:
        """What every process has computed alike, as a share that is counted once."""
        return self.problem.processes.once(whole)

    def prefix(self, w: Tree, part: int, batch: Any) -> Tensor | None:
        """The hidden states that a cut's prefix gives for one part: those kept, or computed now without a graph."""
        cut = self.problem.cut
        if cut is None or cut.prefix is None:
            return None
        tape = self._tapes.get(part)
        if tape is not None and tape.kept is not None:
            return tape.kept
        self.counts.forwards += 1
        with self.scope(part), torch.no_grad():
            return cut.prefix(tree.detach(w), batch)

    def has_recorded(self, batch: Any) -> bool:
        """Whether the stop-gradient inputs of every part of `batch` are on tape, as they are recorded by now."""
        parts, facts = self.problem.parts(batch), self.problem.facts
        return len(self._tapes) >= max(len(parts), 1) and all(
            tape.detaches == facts.replay_detach for tape in self._tapes.values()
        )

    def inner_value(self, w: Tree, lam: Tree, batch: Any, *, inputs: Inputs = Inputs.LIVE, stream: int = 0) -> Tensor:
        """Inner loss without a graph, a 0-d tensor."""
        w, lam, values = tree.detach(w), tree.detach(lam), []
        for index, part in self.parts(batch):
            with self.scope(index, inputs=inputs, stream=stream), torch.no_grad(), plain_detaches():
                values.append(self.problem.inner_loss(w, lam, part))
            self.counts.forwards += 1
        return _sum(values, w)

    def inner_grad(
        self,
        w: Tree,
        lam: Tree,
        batch: Any,
        *,
        wrt_w: Iterable[str] = (),
        wrt_lam: Iterable[str] = (),
        inputs: Inputs = Inputs.LIVE,
        stream: int = 0,
    ) -> tuple[Tensor, Tree, Tree]:
        """Inner loss and its gradients at the named base and meta parameters, one part's graph at a time."""
        value, grad_w, grad_lam, _ = self._grad(
            self.problem.inner_loss, w, lam, self.parts(batch), tuple(wrt_w), tuple(wrt_lam), inputs, stream
        )
        return value, grad_w, grad_lam

    def step_grad(
        self, w: Tree, lam: Tree, batch: Any, *, wrt_lam: Iterable[str] = (), inputs: Inputs = Inputs.LIVE
    ) -> tuple[Tree, Tree]:
        """The whole gradient of a step at w, and a share of that at the named meta parameters.

        The first lacks the parameters that the loss did not reach on any process.
        """
        parts, names = self.parts(batch), tuple(wrt_lam)
        _, grad, to_lam, _ = self._grad(self.problem.inner_loss, w, lam, parts, tuple(w), names, inputs, 0, fill=False)
        return self.whole_step_grad(grad, w), to_lam

    def whole_step_grad(self, grad: Tree, w: Tree) -> Tree:
        """The sum of the processes' gradients of a step; each lacks the parameters that its rows did not reach."""
        processes = self.problem.processes
        if processes.size > 1:
            like = next(iter(w.values()))
            here = torch.tensor([float(name in grad) for name in w], dtype=like.dtype, device=like.device)
            reached = processes.all_reduce({"": here})[""].tolist()
            grad = _filled(grad, w, [name for name, count in zip(w, reached, strict=True) if count])
        return self.all_reduce(grad)

    def lam_grad(self, w: Tree, lam: Tree, batch: Any, *, inputs: Inputs = Inputs.LIVE) -> Tree:
        """The gradient of the inner loss at the meta parameters, by the rows that read them."""
        parts = self.parts(batch, lam_only=True)
        return self._grad(self.problem.inner_loss, w, lam, parts, (), tuple(lam), inputs, 0)[2]

    def outer_grad(
        self, w: Tree, lam: Tree, batch: Any, *, wrt_w: Iterable[str], wrt_lam: Iterable[str]
    ) -> tuple[Tensor, Tree, Tree, bool]:
        """Outer loss, its gradients, and whether it reads any meta parameter at all (has a direct term)."""
        parts = self.parts(batch)
        return self._grad(self.problem.outer_loss, w, lam, parts, tuple(wrt_w), tuple(wrt_lam), Inputs.LIVE, 0)

    def _grad(
        self,
        loss_fn: Loss,
        w: Tree,
        lam: Tree,
        parts: Sequence[tuple[int, Any]],
        wrt_w: tuple[str, ...],
        wrt_lam: tuple[str, ...],
        inputs: Inputs,
        stream: int,
        fill: bool = True,
    ) -> tuple[Tensor, Tree, Tree, bool]:
        values: list[Tensor] = []
        grad_w: Tree = {}
        grad_lam: Tree = {}
        for index, part in parts:
            with self.scope(index, inputs=inputs, stream=stream):
                w_leaves, lam_leaves = tree.leaves(w, wrt_w), tree.leaves(lam, wrt_lam)
                with plain_detaches():
                    loss = loss_fn(w_leaves, lam_leaves, part)
                values.append(loss.detach())
                self.counts.forwards += 1
                if not loss.requires_grad or not (wrt_w or wrt_lam):
                    continue
                targets = {n: w_leaves[n] for n in wrt_w}, {n: lam_leaves[n] for n in wrt_lam}
                found_w, found_lam = self.problem.weights.gradients(loss, *targets)
                self.counts.backwards += 1
            _accumulate(grad_w, wrt_w, found_w)
            _accumulate(grad_lam, wrt_lam, found_lam)
        if fill:
            grad_w = _filled(grad_w, w, wrt_w)
        return _sum(values, w), grad_w, _filled(grad_lam, lam, wrt_lam), bool(grad_lam)


def _sum(values: list[Tensor], like: Tree) -> Tensor:
    """The loss of the parts, if there are any."""
    if len(values) == 1 and values[0].dim() == 0:
        return values[0]
    leaf = next(iter(like.values()))
    return torch.stack(values).sum() if values else torch.zeros((), dtype=leaf.dtype, device=leaf.device)


def _accumulate(total: Tree, names: Sequence[str], found: Sequence[Tensor | None]) -> None:
    """Add the gradients found to `total`."""
    for name, gradient in zip(names, found, strict=True):
        if gradient is not None:
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            total[name] = total[name] + gradient if name in total else gradient


def _filled(found: Tree, like: Tree, names: Sequence[str]) -> Tree:
    """`found` in the order of `names`, zeros where the loss did not reach a parameter."""
    zeros = tree.zeros_like({name: like[name] for name in names if name not in found})
    return {name: found[name] if name in found else zeros[name] for name in names}
