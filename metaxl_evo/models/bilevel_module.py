"""A task as a module: a base model, a meta network, and the two losses that tie them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from metaxl_evo.bilevel.passes import for_this_pass
from metaxl_evo.bilevel.problem import BilevelProblem, Split
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import UpdateRule

Batch = dict[str, Any]

TOTALS = "totals"  # batch key: the counts of the whole accumulation window, over all ranks


class BilevelModule(nn.Module, ABC):
    """What `MetaTrainer` trains: `base` by the inner loss, `meta` by hypergradients of the outer loss.

    A task subclasses it with its two losses, both *sums over items divided by the totals* of the whole accumulation
    window (`batch["totals"]`, as `counts` counts them; a batch alone is its own window), so that 8 x 1 = 4 x 2.
    The forward is the inner loss in training and the plain base in evaluation, where the meta network never acts.

    Attributes:
        stop_gradients: whether the losses call `stop_gradient` on live activations.
        direct_term: whether the outer loss reads the meta parameters.
    """

    base: Any  # an nn.Module; its class says what else it has
    stop_gradients: bool = False
    direct_term: bool = False
    accepts_loss_kwargs = False  # the Trainer's one number of items cannot normalise two means

    def __init__(self, base: nn.Module, meta: nn.Module):
        super().__init__()
        self.base, self.meta = base, meta
        meta.requires_grad_(
            False
        )  # learned by hypergradients only: not in the base backward, its clipping, its optimiser

    @abstractmethod
    def inner_loss(self, batch: Batch) -> Tensor:
        """Training loss of one micro-batch at the current base and meta parameters, a 0-d tensor."""

    @abstractmethod
    def outer_loss(self, batch: Batch) -> Tensor:
        """Meta loss of one micro-batch of meta rows, a 0-d tensor."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """The numbers of items that the losses' means divide by, in this micro-batch."""

    def join(self, batch: Batch, extra: Batch) -> Batch:
        """Train rows and the train part of the meta rows as one micro-batch."""
        raise ValueError(f"{type(self).__name__} cannot join meta rows to train rows: set meta_portion to 1")

    def suffix(self) -> tuple[frozenset[str], Callable[[Batch], Tensor], Callable[[Tensor, Batch], Tensor]] | None:
        """Names of a cheap suffix's base parameters, the hidden states before it, and the inner loss from them."""
        return None

    def forward(self, **batch: Any) -> Any:
        return {"loss": self.inner_loss(batch)} if self.training else self.base(**batch)

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.base.config

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Activation checkpointing of the base model."""
        self.base.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The same under its name in earlier versions of transformers."""
        self.base.gradient_checkpointing_enable(*args, **kwargs)

    def base_parameters(self) -> Tree:
        """The trainable base parameters by name (frozen ones are constants of the problem)."""
        return {name: p for name, p in self.base.named_parameters() if p.requires_grad}

    def meta_parameters(self) -> Tree:
        """The meta parameters by name."""
        return dict(self.meta.named_parameters())

    @property
    def second_order_obstacle(self) -> str | None:
        """Why the inner loss cannot be differentiated twice; None where it can."""
        if any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            return "activation_checkpointing recomputes the forward outside the pass"
        kernel = getattr(getattr(self.base, "config", None), "_attn_implementation", None) or "eager"
        if kernel not in ("eager", "sdpa"):
            return (
                f"the attention kernel {kernel!r} has no second derivative (attn_implementation 'eager' or 'sdpa' has)"
            )
        return None

    def problem(self, update: UpdateRule, *, dropout: bool = False) -> BilevelProblem:
        """The bilevel problem over named parameters; batches are lists of micro-batches.

        Args:
            update: the inner optimiser's step.
            dropout: keep dropout on in meta passes (its masks are shared); off, the base runs in eval mode, batch norm
                excepted.
        """
        obstacle = self.second_order_obstacle
        return BilevelProblem(
            inner_loss=self._at(self.inner_loss),
            outer_loss=self._at(self.outer_loss),
            update=update,
            parts=_micro_batches,
            scope=lambda: self._frozen(dropout),
            split=self._split() if obstacle is None else None,
            second_order=obstacle is None,
            stop_gradients=self.stop_gradients,
            direct_term=self.direct_term,
        )

    @abstractmethod
    def save_meta(self, folder: str | Path) -> None:
        """Write the meta network into its own subfolder of `folder`."""

    @abstractmethod
    def load_meta(self, folder: str | Path) -> None:
        """Read back what `save_meta` wrote."""

    def save_pretrained(self, folder: str | Path) -> None:
        """The base as a plain Hugging Face folder, the meta network in its own subfolder."""
        self.base.save_pretrained(folder)
        self.save_meta(folder)

    def load_pretrained(self, folder: str | Path) -> None:
        """Read the weights of both levels from what `save_pretrained` wrote.

        Raises:
            ValueError: for a file that is missing, damaged or incomplete, named.
        """
        file = Path(folder) / "model.safetensors"
        dtype = next(self.base.parameters()).dtype
        try:
            saved, report = type(self.base).from_pretrained(
                folder, config=copy.deepcopy(self.base.config), dtype=dtype, output_loading_info=True
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{file} cannot be read ({reason}): use another checkpoint") from error
        if report["missing_keys"]:
            raise ValueError(f"{file} has no {sorted(report['missing_keys'])[0]}: use another checkpoint")
        self.base.load_state_dict(saved.state_dict())
        self.load_meta(folder)

    def _at(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`loss` at given parameters; they stay swapped in until the pass ends, its backward included."""

        def evaluate(w: Tree, lam: Tree, *arguments: Any) -> Tensor:
            with for_this_pass(swapped(self.base, w)), for_this_pass(swapped(self.meta, lam)):
                return loss(*arguments)

        return evaluate

    def _split(self) -> Split | None:
        parts = self.suffix()
        if parts is None:
            return None
        names, hidden, loss = parts
        suffix_loss = self._at(loss)
        return Split(names, self._at(hidden), lambda w, states, batch: suffix_loss(w, {}, states, batch))

    @contextmanager
    def _frozen(self, dropout: bool) -> Iterator[None]:
        """Dropout off unless asked for, batch norm without a memory, other buffers on copies that are thrown away."""
        modes = [(module, module.training) for module in self.modules()]
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        tracking = [(norm, norm.track_running_stats) for norm in norms]
        buffers = [(m, key, b) for m in self.modules() for key, b in m._buffers.items() if b is not None]
        try:
            for owner, key, buffer in buffers:
                owner._buffers[key] = buffer.clone()
            for module in self.base.modules():
                if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = dropout and module.training
            for norm in norms:
                norm.track_running_stats = False  # an update in place is beyond torch.func, even on a copy
            yield
        finally:
            for owner, key, buffer in buffers:
                owner._buffers[key] = buffer
            for module, mode in modes:
                module.training = mode
            for norm, tracked in tracking:
                norm.track_running_stats = tracked


def _micro_batches(batch: Any) -> Sequence[Any]:
    return batch if isinstance(batch, (list, tuple)) else (batch,)


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Evaluate `module` at other parameter values: pointers are swapped, nothing is copied, tied weights stay tied.

    Unlike `torch.func.functional_call` the swap can outlast the forward, so that a backward that recomputes it
    (activation checkpointing) sees the same weights.

    Raises:
        ValueError: for a name that the module does not have.
    """
    parameters = dict(module.named_parameters())
    missing = tensors.keys() - parameters.keys()
    if missing:
        raise ValueError(f"{type(module).__name__} has no parameter {sorted(missing)[0]!r}")
    replacement = {id(parameters[name]): tensor for name, tensor in tensors.items()}
    places = [
        (owner, key, parameter)
        for owner in module.modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None and id(parameter) in replacement
    ]
    for owner, key, parameter in places:
        owner._parameters[key] = replacement[id(parameter)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for owner, key, parameter in places:
            owner._parameters[key] = parameter


def totals_of(module: BilevelModule, batch: Batch) -> Mapping[str, float | Tensor]:
    """The totals that the losses of `batch` divide by: the window's where they were set, else the batch's own."""
    return batch[TOTALS] if TOTALS in batch else module.counts(batch)
