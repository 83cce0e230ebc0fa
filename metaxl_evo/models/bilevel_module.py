"""A task as a module: a base model, a meta network, and the two losses that tie them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.base_weights import BaseWeights, Sharded, Whole, reshard
from metaxl_evo.bilevel.initial import Initial, initial_of
from metaxl_evo.bilevel.problem import BilevelProblem, Cut, Examples
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.bilevel.replay import for_this_pass
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.bilevel.update import UpdateRule, Windowed
from metaxl_evo.models.adapters import ADAPTER, is_adapted, load_adapter, merged, plain_model, save_adapter
from metaxl_evo.models.examples import examples_of, join_rows, take_rows
from metaxl_evo.models.frozen import frozen
from metaxl_evo.models.heads import columns_of, labelled_tokens, row_losses, token_losses, token_rows
from metaxl_evo.models.losses import (
    MICRO_BATCHES,
    TOTALS,
    Batch,
    Losses,
    as_window,
    counts_of,
    mean_share,
    rows_of,
    totals_of,
    view_of,
)
from metaxl_evo.models.network_files import load_pretrained_weights, load_state, save_state
from metaxl_evo.models.norms import cast
from metaxl_evo.models.parameters import Places, places_of, swapped

__all__ = ["TOTALS", "Batch", "BilevelModule", "Cut", "totals_of"]

META = "meta"  # where the default `save_meta` writes


class BilevelModule(nn.Module, ABC):
    """What `MetaTrainer` trains: `base` by the inner loss, `meta` by hypergradients of the outer loss.

    A task subclasses it with its two losses. **A loss returns the losses of its items**; their mean over the items of
    the whole accumulation window and all processes is taken by the framework, so that 8 x 1 = 4 x 2 = 2 processes x
    4 x 1. An item is a row and a loss is of shape (B,), unless `counts` says otherwise. What does not count is left
    out (`losses[mask]`) or masked (the pair `losses, mask`), never zero. A dict of named losses is a sum of means:
    `counts` then has the same names, a mean may have no items in a micro-batch, and its weight is a factor of its
    losses. A 0-d tensor is the mean over `counts` where the task defines it; without, it is right for one micro-batch
    on one process, and refused elsewhere. The forward is the inner loss in training and the plain base in evaluation,
    where the meta network never acts.

    Attributes:
        stop_gradients: whether the losses call `stop_gradient` on live activations (found out where it is None).
        straight_through: accept an inner loss whose gradient is not its slope where weights are perturbed.
        direct_term: whether the outer loss reads the meta parameters.
        tuned_optimizer: numbers of the base optimiser (lr, weight_decay, momentum) that are meta parameters: their
            names, or `Windowed(name, steps)` for a schedule over an episode, for all base parameters; or a mapping of
            base parameter names to these. The trainer puts them into the optimiser before every step.
        tuned_ranges: the least and the largest value of each of these numbers (default: not below 0; momentum 0 to 1);
            after a meta step they are put back into it.

    Raises:
        ValueError: for a parameter that is in both networks.
    """

    base: Any  # an nn.Module; its class says what else it has
    stop_gradients: bool | None = None
    straight_through: bool = False
    direct_term: bool = False
    tuned_optimizer: Mapping[str, str | Windowed | Mapping[str, str | Windowed]] = {}
    tuned_ranges: Mapping[str, tuple[float, float]] = {}
    accepts_loss_kwargs = False  # the Trainer's one number of items cannot normalise two means

    def __init__(self, base: nn.Module, meta: nn.Module):
        super().__init__()
        _refuse_shared(base, meta)
        self.base, self.meta = base, meta
        meta.requires_grad_(
            False
        )  # learned by hypergradients only: not in the base backward, its clipping, its optimiser

    @abstractmethod
    def inner_loss(self, batch: Batch) -> Losses:
        """Training losses of one micro-batch at the current base and meta parameters."""

    @abstractmethod
    def outer_loss(self, batch: Batch) -> Losses:
        """Meta losses of one micro-batch of meta rows."""

    def counts(self, batch: Batch) -> int | dict[str, int]:
        """The number of items that a mean is over, in this micro-batch; by name where there are several means.

        By default the number of rows. It has to be known before the first backward of a window, so it is read off the
        batch, and what a loss returns is compared with it.
        """
        return rows_of(batch)

    @property
    def counts_rows(self) -> bool:
        """Whether the task leaves `counts` at its default."""
        return type(self).counts is BilevelModule.counts

    def losses(self, batch: Batch, *, tokens: bool = False) -> Tensor:
        """The losses (B,) of a Hugging Face head for classification, regression, tagging or language modelling.

        Those of a row's tokens are averaged; `tokens=True` gives those of all labelled tokens, shape (N,), for a task
        with `counts = labelled_tokens`. The batch has `labels`, as the model takes them.

        Raises:
            ValueError: for a head whose losses are not known, a row without a labelled token, a batch without labels.
        """
        return (
            token_losses(self.plain_base, self.base, batch)
            if tokens
            else row_losses(self.plain_base, self.base, batch)
        )

    def labelled_tokens(self, batch: Batch) -> int:
        """How many losses `losses(batch, tokens=True)` returns."""
        return labelled_tokens(self.plain_base, batch)

    def token_rows(self, batch: Batch) -> Tensor:
        """The row of each of `losses(batch, tokens=True)`, shape (N,): `batch["domain"][self.token_rows(batch)]`."""
        return token_rows(self.plain_base, batch)

    def join(self, batch: Batch, extra: Batch) -> Batch:
        """Train rows and the train part of the meta rows as one micro-batch; by default rows of one shape.

        Raises:
            ValueError: for rows that would have to be padded.
        """
        return join_rows(type(self).__name__, batch, extra)

    def take_rows(self, batch: Batch, rows: Tensor) -> Batch:
        """The rows (a 1-d int64 tensor) of a micro-batch, for estimators that draw examples of several (D*)."""
        return take_rows(batch, rows)

    def examples(self, processes: Processes) -> Examples:
        """How such an estimator takes batches apart and puts them together; by default row by row."""
        return examples_of(self, processes)

    @property
    def tasks(self) -> int:
        """Of how many tasks the base holds the weights (`MetaLearner`)."""
        return 1

    def pooled(self, w: Tree) -> Tree:
        """The mean over the tasks of base weights, or of what is like them, in the place of each."""
        return w

    def first_weights(self) -> Tree | None:
        """The base weights that an episode begins with, computed from the meta parameters (MAML); None: others."""
        return None

    def begin_from(self, start: Tree) -> None:
        """Told, at the end of an episode, the base weights from which the next one begins."""

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
        if self.is_sharded:  # by rows already
            return {}
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

    def mean_inner_loss(self, batch: Batch) -> Tensor:
        """What a micro-batch adds to the mean of the inner losses over its window, a 0-d tensor."""
        return mean_share(self, "inner_loss", self.inner_loss, batch)

    def mean_outer_loss(self, batch: Batch) -> Tensor:
        """The same of the outer losses."""
        return mean_share(self, "outer_loss", self.outer_loss, batch)

    def forward(self, **batch: Any) -> Any:
        if self.training:
            return {"loss": self.mean_inner_loss(batch)}
        return self.base(**columns_of(self.plain_base, batch))

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
        reshard(self.base)  # what a forward has left gathered are others
        return {name: p for name, p in self.plain_base.named_parameters() if p.requires_grad}

    def meta_parameters(self) -> Tree:
        """The meta parameters by name."""
        return dict(self.meta.named_parameters())

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds a part of the base's weights, which gathers them where it is called itself."""
        return isinstance(self.base, FSDPModule)

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
        if not any(True for _ in self.meta.parameters()):
            raise ValueError(f"{type(self).__name__}.meta has no parameters to learn: set estimator: none")
        obstacle = self.second_order_obstacle
        weights: BaseWeights = Sharded(self.base, self.base_parameters()) if self.is_sharded else Whole()
        base, meta = places_of(self.plain_base), places_of(self.meta)
        rows = {} if rows is None else rows
        embeddings = [(base[name][0][0], numbers) for name, numbers in rows.items()]

        def at(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            """`loss` at given parameters; they stay swapped in until the pass ends, its backward included."""

            @wraps(loss)
            def evaluate(w: Tree, lam: Tree, *arguments: Any) -> Tensor:
                here = weights.at(w) if weights.sharded else swapped(base, w)  # a swap would not be gathered
                with for_this_pass(here), for_this_pass(swapped(meta, lam)):
                    return loss(*arguments)

            return evaluate

        return BilevelProblem(
            inner_loss=at(self.mean_inner_loss),
            outer_loss=at(self.mean_outer_loss),
            update=update,
            parts=partial(as_window, self),
            scope=lambda: frozen(self, self.base, dropout=dropout, embeddings=embeddings),
            cut=self._cut_at(at) if obstacle is None and not weights.sharded else None,
            second_order=obstacle is None,
            weights=weights,
            stop_gradients=self.stop_gradients,
            straight_through=self.straight_through,
            direct_term=self.direct_term,
            reads_lam=_same if dropout or weights.sharded else self._reading_lam,  # other rows, other masks
            rows=rows,
            examples=self.examples(Processes()),
            initial=self._initial(meta),
            cast=lambda dtype: cast(self, dtype),
        )

    def _initial(self, meta: Places) -> Initial | None:
        """How the first weights of an episode depend on the meta parameters, where they do."""
        if type(self).first_weights is BilevelModule.first_weights:
            return None
        lam = tree.leaves(self.meta_parameters(), self.meta_parameters())
        with torch.enable_grad(), swapped(meta, lam):
            first = self.first_weights()
        return None if first is None else initial_of(first, lam)

    def _reading_lam(self, part: Batch) -> Batch:
        view = view_of(part)
        fewer = self.reads_lam(view)
        if fewer is view:
            return part
        totals = part[TOTALS] if TOTALS in part else counts_of(self, view)
        return {**fewer, TOTALS: totals, MICRO_BATCHES: part.get(MICRO_BATCHES, 1)}

    def _cut_at(self, at: Callable[..., Callable[..., Tensor]]) -> Cut | None:
        """The pieces as functions of the parameters; a suffix and a prefix read no meta parameters."""
        cut = self.cut()
        if cut is None:
            return None
        hidden = at(lambda below, batch: cut.hidden(below, view_of(batch)))
        loss = at(lambda states, batch: mean_share(self, "cut().loss", cut.loss, batch, states))
        prefix = None if cut.prefix is None else at(lambda batch: cut.prefix(view_of(batch)))
        return Cut(
            cut.names,
            hidden,
            lambda w, states, batch: loss({name: w[name] for name in cut.names}, {}, states, batch),
            None if prefix is None else lambda w, batch: prefix(w, {}, batch),
        )

    def save_meta(self, folder: str | Path) -> None:
        """Write the meta network into its own subfolder of `folder`: `meta`, by its own `save_pretrained` if any."""
        save_state(self.meta, Path(folder) / META)

    def load_meta(self, folder: str | Path) -> None:
        """Read back what `save_meta` wrote.

        Raises:
            ValueError: for a file that is missing, damaged or of another network, named.
        """
        load_state(self.meta, Path(folder) / META)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Any] | None = None) -> None:
        """The base as a plain Hugging Face folder, the meta network in its own subfolder.

        Of a base that peft wraps the adapter alone is written, into `adapter/`; `save_merged` writes the model.

        Args:
            state_dict: of the base, where it is sharded: `gathered_state()`.
        """
        if is_adapted(self.base):
            save_adapter(self.base, Path(folder) / ADAPTER)
        else:
            save_state(self.base, Path(folder), state_dict)
        self.save_meta(folder)

    def gathered_state(self) -> dict[str, Any] | None:
        """The whole state of a sharded base, on the CPU of the first process; all processes call it. Else None."""
        if not self.is_sharded:
            return None
        reshard(self.base)
        return get_model_state_dict(self.base, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

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
        elif isinstance(self.base, PreTrainedModel):
            load_pretrained_weights(self.base, Path(folder))
        else:
            load_state(self.base, Path(folder))
        self.load_meta(folder)


def _same(batch: Batch) -> Batch:
    return batch


def _refuse_shared(base: nn.Module, meta: nn.Module) -> None:
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    shared = [(names[id(p)], name) for name, p in meta.named_parameters() if id(p) in names]
    if shared:
        raise ValueError(
            f"base.{shared[0][0]} is meta.{shared[0][1]} ({len(shared)} parameters in all), and only one level can "
            "learn it: give the meta network a copy (copy.deepcopy), or hand it what the base computes"
        )
