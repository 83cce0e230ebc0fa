"""A task as a module: a base model, a meta network, and the two losses that tie them."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from transformers.modeling_layers import GradientCheckpointingLayer

from metaxl_evo.bilevel.problem import BilevelProblem, Split
from metaxl_evo.bilevel.replay import for_this_pass, plain_detaches
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import UpdateRule, Windowed
from metaxl_evo.messages import first_line
from metaxl_evo.models.adapters import ADAPTER, is_adapted, load_adapter, merged, plain_model, save_adapter
from metaxl_evo.models.norms import cast, normalises_batches, without_update

Batch = dict[str, Any]

Places = Mapping[str, Sequence[tuple[Any, str]]]  # a parameter's name -> the modules that hold it, and their names

TOTALS = "totals"  # batch key: the counts of the whole accumulation window, over all ranks


class Cut(NamedTuple):
    """How a task's inner loss comes apart (`bilevel.Split`), at the parameters that are swapped in."""

    names: frozenset[str]
    hidden: Callable[[Tensor | None, Batch], Tensor]
    loss: Callable[[Tensor, Batch], Tensor]
    prefix: Callable[[Batch], Tensor] | None = None


class BilevelModule(nn.Module, ABC):
    """What `MetaTrainer` trains: `base` by the inner loss, `meta` by hypergradients of the outer loss.

    A task subclasses it with its two losses, both *sums over items divided by the totals* of the whole accumulation
    window (`batch["totals"]`, as `counts` counts them; a batch alone is its own window), so that 8 x 1 = 4 x 2.
    The forward is the inner loss in training and the plain base in evaluation, where the meta network never acts.

    Attributes:
        stop_gradients: whether the losses call `stop_gradient` on live activations (found out where it is None).
        straight_through: accept an inner loss whose gradient is not its slope where weights are perturbed.
        direct_term: whether the outer loss reads the meta parameters.
        tuned_optimizer: numbers of the base optimiser (lr, weight_decay, momentum) that are meta parameters: their
            names, or `Windowed(name, steps)` for a schedule over an episode. The trainer puts them into the optimiser
            before every step, for all its parameters.
    """

    base: Any  # an nn.Module; its class says what else it has
    stop_gradients: bool | None = None
    straight_through: bool = False
    direct_term: bool = False
    tuned_optimizer: Mapping[str, str | Windowed] = {}
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

    def cut(self) -> Cut | None:
        """The inner loss in pieces, of which a cheap suffix alone reads some of the base parameters."""
        return None

    def reads_lam(self, batch: Batch) -> Batch:
        """The rows of a micro-batch through which its inner loss reads the meta parameters, with the same totals."""
        return batch

    def lookups(self, batch: Batch) -> dict[str, Tensor]:
        """Row numbers that a micro-batch looks up in embeddings of the base, by parameter name."""
        return {}

    def touched_rows(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The sorted rows of the trainable embeddings that these micro-batches look up; no other row matters to them.

        The rows up to `padding_idx` are among them, so that it keeps its number.
        """
        found: dict[str, list[Tensor]] = defaultdict(list)
        for batch in batches:
            for name, rows in self.lookups(batch).items():
                found[name].append(rows.flatten())
        touched, trainable, places = {}, self.base_parameters(), places_of(self.plain_base)
        for name, looked_up in found.items():
            if name not in trainable or len(places[name]) > 1:  # tied weights are read whole elsewhere
                continue
            padding = torch.arange((places[name][0][0].padding_idx or 0) + 1, device=looked_up[0].device)
            touched[name] = torch.cat([padding, *looked_up]).unique()
        return touched

    @property
    def plain_base(self) -> Any:
        """The base without its peft wrapper, if it has one: it names and holds the parts of the model as ever."""
        return plain_model(self.base)

    def forward(self, **batch: Any) -> Any:
        if not self.training:
            return self.base(**batch)
        with plain_detaches():
            return {"loss": self.inner_loss(batch)}

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
        """The trainable base parameters by their names in `plain_base` (frozen ones are constants of the problem)."""
        return {name: p for name, p in self.plain_base.named_parameters() if p.requires_grad}

    def meta_parameters(self) -> Tree:
        """The meta parameters by name."""
        return dict(self.meta.named_parameters())

    @property
    def has_dropout(self) -> bool:
        """Whether the training forward draws masks: a dropout layer, or a rate in the base's configuration."""
        layers = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p for module in self.base.modules())
        config = getattr(self.base, "config", None)
        rates = {} if config is None else config.to_dict()
        return layers or any("drop" in key and isinstance(rate, float) and rate > 0 for key, rate in rates.items())

    @property
    def attention_kernel(self) -> str | None:
        """The base's attention by its name in transformers; None where there is none to choose."""
        return getattr(getattr(self.base, "config", None), "_attn_implementation", None)

    @property
    def second_order_obstacle(self) -> str | None:
        """Why the inner loss cannot be differentiated twice; None where it can."""
        if any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules()):
            return "activation_checkpointing is beyond torch.func, forward mode with it"
        kernel = self.attention_kernel or "eager"
        if kernel not in ("eager", "sdpa"):
            return (
                f"the attention kernel {kernel!r} has no second derivative (attn_implementation 'eager' or 'sdpa' has)"
            )
        return None

    def problem(
        self, update: UpdateRule, *, dropout: bool = False, rows: Mapping[str, Tensor] | None = None
    ) -> BilevelProblem:
        """The bilevel problem over named parameters; batches are lists of micro-batches.

        Args:
            update: the inner optimiser's step.
            dropout: keep dropout on in meta passes (its masks are shared); off, the base runs in eval mode, batch norm
                excepted.
            rows: `touched_rows` of every batch there will be; the weights then hold these rows of the embeddings only.
        """
        obstacle = self.second_order_obstacle
        base, meta = places_of(self.plain_base), places_of(self.meta)
        rows = {} if rows is None else rows
        embeddings = [(base[name][0][0], numbers) for name, numbers in rows.items()]

        def at(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            """`loss` at given parameters; they stay swapped in until the pass ends, its backward included."""

            @wraps(loss)
            def evaluate(w: Tree, lam: Tree, *arguments: Any) -> Tensor:
                with for_this_pass(swapped(base, w)), for_this_pass(swapped(meta, lam)):
                    return loss(*arguments)

            return evaluate

        return BilevelProblem(
            inner_loss=at(self.inner_loss),
            outer_loss=at(self.outer_loss),
            update=update,
            parts=_micro_batches,
            scope=lambda: self._frozen(dropout, embeddings),
            split=_split(self.cut(), at) if obstacle is None else None,
            second_order=obstacle is None,
            stop_gradients=self.stop_gradients,
            straight_through=self.straight_through,
            direct_term=self.direct_term,
            reads_lam=self.reads_lam if not dropout else _same,  # other rows, other masks
            rows=rows,
            cast=lambda dtype: cast(self, dtype),
        )

    @abstractmethod
    def save_meta(self, folder: str | Path) -> None:
        """Write the meta network into its own subfolder of `folder`."""

    @abstractmethod
    def load_meta(self, folder: str | Path) -> None:
        """Read back what `save_meta` wrote."""

    def save_pretrained(self, folder: str | Path) -> None:
        """The base as a plain Hugging Face folder, the meta network in its own subfolder.

        Of a base that peft wraps the adapter alone is written, into `adapter/`; `save_merged` writes the model.
        """
        if is_adapted(self.base):
            save_adapter(self.base, Path(folder) / ADAPTER)
        else:
            self.base.save_pretrained(folder)
        self.save_meta(folder)

    def save_merged(self, folder: str | Path) -> None:
        """The base that peft wraps as a plain Hugging Face folder, the adapter merged into a copy of its weights."""
        merged(self.base).save_pretrained(folder)

    def load_pretrained(self, folder: str | Path) -> None:
        """Read the weights of both levels from what `save_pretrained` wrote.

        Raises:
            ValueError: for a file that is missing, damaged or incomplete, named.
        """
        if is_adapted(self.base):
            load_adapter(self.base, Path(folder) / ADAPTER)
        else:
            self._load_base(Path(folder))
        self.load_meta(folder)

    def _load_base(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        dtype = next(self.base.parameters()).dtype
        try:
            saved, report = type(self.base).from_pretrained(
                folder, config=copy.deepcopy(self.base.config), dtype=dtype, output_loading_info=True
            )
        except pickle.UnpicklingError as error:  # of a pytorch_model.bin; its text advises to run what it refused
            raise ValueError(
                f"{file} is missing, and the weights beside it are more than tensors: use another checkpoint"
            ) from error
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({first_line(error)}): use another checkpoint") from error
        if report["missing_keys"]:
            raise ValueError(f"{file} has no {sorted(report['missing_keys'])[0]}: use another checkpoint")
        self.base.load_state_dict(saved.state_dict())

    @contextmanager
    def _frozen(self, dropout: bool, embeddings: Sequence[tuple[nn.Module, Tensor]]) -> Iterator[None]:
        """Dropout off unless asked for, running statistics without a memory, buffers on copies that are thrown away.

        Embeddings that hold some rows only are looked up by their place among these. Layers still checkpoint.
        """
        modes = [(module, module.training) for module in self.modules()]
        recomputed = [module for module, training in modes if training and not dropout and _is_checkpointed(module)]
        norms = [module for module in self.modules() if normalises_batches(module)]
        tracking = [(norm, norm.track_running_stats) for norm in norms if isinstance(norm, _BatchNorm)]
        buffers = [(m, key, b) for m in self.modules() for key, b in m._buffers.items() if b is not None]
        hooks = [module.register_forward_pre_hook(_renumber(rows)) for module, rows in embeddings]
        hooks += [hook for norm in norms if isinstance(norm, _InstanceNorm) for hook in without_update(norm)]
        try:
            for owner, key, buffer in buffers:
                owner._buffers[key] = buffer.clone()
            for module in self.base.modules():
                if module not in norms:
                    module.training = dropout and module.training
            for norm, _ in tracking:  # an update in place is beyond torch.func, even on a copy
                norm.track_running_stats = False
            with _recomputing(recomputed):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for owner, key, buffer in buffers:
                owner._buffers[key] = buffer
            for module, mode in modes:
                module.training = mode
            for norm, tracked in tracking:
                norm.track_running_stats = tracked


def _is_checkpointed(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing


@contextmanager
def _recomputing(layers: Sequence[Any]) -> Iterator[None]:
    """Let these layers of transformers checkpoint their activations in evaluation mode.

    They do so only while their own `training` is on, which some of them (BART's) read for dropout as well: it is off
    again wherever their forward runs.
    """
    before = [(layer, layer._gradient_checkpointing_func) for layer in layers]
    try:
        for layer, checkpointed in before:
            layer.training, layer._gradient_checkpointing_func = True, _in_evaluation(layer, checkpointed)
        yield
    finally:
        for layer, checkpointed in before:
            layer.training, layer._gradient_checkpointing_func = False, checkpointed


def _in_evaluation(layer: nn.Module, checkpointed: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's checkpointing function that takes its `training` back for each run of its forward."""

    def run(forward: Callable[..., Any], *args: Any) -> Any:
        def evaluated(*args: Any) -> Any:
            layer.training = False
            try:
                return forward(*args)
            finally:
                layer.training = True

        return checkpointed(evaluated, *args)

    return run


def _micro_batches(batch: Any) -> Sequence[Any]:
    return batch if isinstance(batch, (list, tuple)) else (batch,)


def _same(batch: Batch) -> Batch:
    return batch


def _split(cut: Cut | None, at: Callable[..., Callable[..., Tensor]]) -> Split | None:
    """The pieces as functions of the parameters; a suffix and a prefix read no meta parameters."""
    if cut is None:
        return None
    loss, prefix = at(cut.loss), None if cut.prefix is None else at(cut.prefix)
    return Split(
        cut.names,
        at(cut.hidden),
        lambda w, states, batch: loss({name: w[name] for name in cut.names}, {}, states, batch),
        None if prefix is None else lambda w, batch: prefix(w, {}, batch),
    )


def _renumber(rows: Tensor) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    """A hook that turns the row numbers an embedding is asked for into their places among `rows`."""
    return lambda module, inputs: torch.searchsorted(rows, inputs[0])


def places_of(module: nn.Module) -> Places:
    """Where each parameter of `module` is held; tied ones in several places under one name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    places: dict[str, list[tuple[Any, str]]] = defaultdict(list)
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                places[names[id(parameter)]].append((owner, key))
    return places


@contextmanager
def swapped(places: Places, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Evaluate a module at other parameter values: pointers are swapped, nothing is copied, tied weights stay tied.

    Unlike `torch.func.functional_call` the swap can outlast the forward, so that a backward that recomputes it
    (activation checkpointing) sees the same weights.

    Args:
        places: `places_of` the module.
        tensors: values by parameter name.

    Raises:
        ValueError: for a name that the module does not have.
    """
    missing = tensors.keys() - places.keys()
    if missing:
        raise ValueError(f"the module has no parameter {sorted(missing)[0]!r}")
    before = [
        (owner._parameters, key, owner._parameters[key], tensor)
        for name, tensor in tensors.items()
        for owner, key in places[name]
    ]
    for held, key, _, tensor in before:
        held[key] = tensor
    try:
        yield
    finally:
        for held, key, parameter, _ in before:
            held[key] = parameter


def totals_of(module: BilevelModule, batch: Batch) -> Mapping[str, float | Tensor]:
    """The totals that the losses of `batch` divide by: the window's where they were set, else the batch's own."""
    return batch[TOTALS] if TOTALS in batch else module.counts(batch)
