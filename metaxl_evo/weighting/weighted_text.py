"""The module of both levels: a text model, its training losses weighted, and clean rows that judge."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from metaxl_evo.bilevel import stop_gradient
from metaxl_evo.messages import unknown
from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.heads import token_labels, token_places
from metaxl_evo.models.hooks import states_below_head
from metaxl_evo.models.weighers import NORMALISATIONS, WeightTable, give_weigher, normalised
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.training.watched import Watched
from metaxl_evo.training.weight_watch import Watch
from metaxl_evo.weighting.sampling import DRAWN

SUBFOLDER = "weigher"
READS = ("number", "loss", "hidden", "columns")


class WeightedText(Watched):
    """inner loss = mean of w_i l_i; outer loss = the plain mean over the clean rows.

    Items are rows, with `tokens` labelled tokens. Batches are what the base takes, with `labels`, and what the weigher
    reads: `columns` (B, F), or `number` (B,) of an example or its domain, with `per_token` (B, T) of each token. A
    loss or hidden state is read as it is: no derivative goes through it. Rows of `MixtureRows` bring the weight by
    which they were drawn, (B,), which theirs is divided by.

    Args:
        base: a Hugging Face model with a head whose losses are known, also one that peft wraps.
        meta: the weigher.
        reads: what of an example the weigher reads: `hidden` is the mean over its tokens of the states below the head.
        weighted: False trains on the plain mean.
        tokens: every labelled token counts the same, as in tagging and language modelling.
        per_token: tokens have weights of their own; else all tokens of a row have that of the row.
        domains: names of the domains that the log tells apart.
        domain_of: the column of a batch that counts them, (B,), or of a tagger by its tokens (B, T).
        normalisation: of the weights of a micro-batch, as in `normalised`; 8 x 1 rows are 4 x 2 with `mean` alone.

    Raises:
        ValueError: for what there is not to read.
    """

    def __init__(
        self,
        base: nn.Module,
        meta: WeightTable | WeightNet,
        *,
        reads: str = "loss",
        weighted: bool = True,
        tokens: bool = False,
        per_token: bool = False,
        domains: tuple[str, ...] = (),
        domain_of: str = "number",
        normalisation: str = "mean",
    ) -> None:
        super().__init__(base, meta)
        if reads not in READS:
            raise ValueError(unknown("reads", reads, READS))
        if normalisation not in NORMALISATIONS:
            raise ValueError(unknown("weight_normalisation", normalisation, NORMALISATIONS))
        if isinstance(meta, WeightTable) != (reads == "number"):
            raise ValueError(f"a {type(meta).__name__} cannot read {reads}: a WeightTable reads number, and it alone")
        if per_token and (not tokens or reads == "columns"):
            raise ValueError(f"a token has no {reads} of its own: weigh rows, or tokens by number, loss or hidden")
        self.meta: WeightTable | WeightNet = meta
        self.reads, self.weighted, self.tokens, self.per_token = reads, weighted, tokens, per_token
        self.normalisation = normalisation
        self.stop_gradients = weighted and reads in ("loss", "hidden")
        relative = normalisation != "mean" or (isinstance(meta, WeightTable) and meta.form == "softmax")
        self.watch, self.domain_of = Watch(domains, meta.floor, relative=relative), domain_of
        self.reads_loss = reads == "loss"

    def counts(self, batch: Batch) -> int | dict[str, int]:
        return self.labelled_tokens(batch) if self.tokens else super().counts(batch)

    @property
    def counts_rows(self) -> bool:
        return not self.tokens

    def inner_loss(self, batch: Batch) -> Tensor:
        losses, weights = self.weighed(batch)
        if self.weighted:
            labels = token_labels(self.plain_base, batch) if self.tokens else batch["labels"]
            weights = normalised(weights, self.normalisation, labels)
        self.note(weights, losses, self._domains(batch) if self.watch.domains else None)
        return weights * losses if self.weighted else losses

    def outer_loss(self, batch: Batch) -> Tensor:
        return self.losses(batch, tokens=self.tokens)

    def weighed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses and weights of the items, (N,) each; the weights are 1 where the base trains without."""
        if not self.weighted:
            losses = self.losses(batch, tokens=self.tokens)
            return losses, torch.ones_like(losses)
        with states_below_head(self.plain_base, self.reads == "hidden") as states:
            losses = self.losses(batch, tokens=self.tokens)
        weights = self.meta(self._seen(batch, losses, states))
        if DRAWN in batch:  # 1, with the derivative of the probability
            weights = weights / batch[DRAWN].to(weights)
        return losses, weights if self.per_token or not self.tokens else weights[self.token_rows(batch)]

    def save_meta(self, folder: str | Path) -> None:
        self.meta.save_pretrained(Path(folder) / SUBFOLDER)

    def load_meta(self, folder: str | Path) -> None:
        give_weigher(self.meta, Path(folder) / SUBFOLDER)

    def _domains(self, batch: Batch) -> Tensor:
        """The domain of each item, (N,): of its row, or where a batch has one a token, (B, T), its own."""
        domains: Tensor = batch[self.domain_of]
        if not self.tokens:
            return domains
        return self._of_tokens(batch, domains) if domains.ndim == 2 else domains[self.token_rows(batch)]

    def _of_tokens(self, batch: Batch, values: Tensor) -> Tensor:
        """What stands (B, T, ...) where the labelled tokens are predicted, (N, ...)."""
        return values[tuple(token_places(self.plain_base, batch).T)]

    def _seen(self, batch: Batch, losses: Tensor, states: list[Tensor]) -> Tensor:
        """What the weigher reads, a row an item that has a weight."""
        if self.reads in ("number", "columns"):
            seen: Tensor = batch[self.reads]
            if self.per_token:
                if seen.shape != batch["labels"].shape:
                    raise ValueError(
                        f"number must be of each token, {tuple(batch['labels'].shape)}, not {tuple(seen.shape)}"
                    )
                return self._of_tokens(batch, seen)
            _refuse_packed(self.reads, seen, batch)
            return seen
        if self.reads == "hidden":
            return stop_gradient(self._pooled(batch, states[0]), key="states")
        of_rows = losses if self.per_token or not self.tokens else self._row_means(batch, losses)
        return stop_gradient(of_rows, key="losses")

    def _row_means(self, batch: Batch, losses: Tensor) -> Tensor:
        """(B,) of token losses (N,)."""
        rows = self.token_rows(batch)
        found = torch.bincount(rows, minlength=len(batch["labels"])).clamp(min=1)
        return losses.new_zeros(len(found)).index_add(0, rows, losses) / found

    def _pooled(self, batch: Batch, states: Tensor) -> Tensor:
        """States (B, T, H) -> (B, H), or those that the labelled tokens are predicted from, (N, H)."""
        if self.per_token:
            return self._of_tokens(batch, states)
        mask = batch["attention_mask"].to(states) if "attention_mask" in batch else torch.ones_like(states[..., 0])
        return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _refuse_packed(reads: str, seen: Tensor, batch: Batch) -> None:
    """Refuse rows that hold several texts, of which the weigher would read one, or none of them."""
    if seen.ndim != (1 if reads == "number" else 2) or len(seen) != len(batch["labels"]):
        raise ValueError(
            f"{reads} has the shape {tuple(seen.shape)} where a batch has {len(batch['labels'])} rows, as of packed "
            "texts: leave packing off, or pack the texts of one domain together and give a row one number"
        )
