"""The main task: a token classifier as base, a representation transformation network as meta network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaxl_evo.bilevel import stop_gradient
from metaxl_evo.models.bilevel_module import Batch, Cut
from metaxl_evo.models.hooks import encoder_layers, states_below_head
from metaxl_evo.models.layer_trace import require_layers
from metaxl_evo.models.remembered import on_host, remembered
from metaxl_evo.models.rtn import SUBFOLDER, RepresentationTransform
from metaxl_evo.models.weighers import WeightTable, give_weigher
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.ner.source_weights import SUBFOLDER as WEIGHER
from metaxl_evo.ner.source_weights import SourceWeights, TaggerMeta
from metaxl_evo.training.watched import Watched
from metaxl_evo.training.weight_watch import Watch

IGNORED = -100
TARGET = -1  # the `language` of a row that no network transforms


class CrossLingualTagger(Watched):
    """Cross-lingual tagging with transformed source representations (MetaXL: Xia et al., NAACL 2021).

    inner loss = w_s * (mean cross-entropy of the source tokens) + w_t * (that of the target tokens), the source rows
    through the RTN; outer loss = mean cross-entropy of the meta rows, without it. Both means are over labelled first
    sub-tokens. Source rows may have weights, which their losses are multiplied by; what the mean divides by stays the
    number of source tokens, so that a language that is absent from a micro-batch changes nothing.

    Batches hold `input_ids, attention_mask, labels` (B, T) and `language` (B,): the index of a source language, -1 for
    target rows.

    Args:
        base: a Hugging Face token classifier, also one that peft wraps (LoRA).
        meta: the RTN; its hooks are attached to `base` here.
        pad_token_id: for joining rows of different lengths.
        transform: False trains on untransformed source rows (joint training).
        source_weight, target_weight: of the two means (MetaXL: 1 and 1; the paper's joint training: 1/2 and 1/2).
        module_path: where the encoder's list of layers is, for models that are not found by themselves.
        weigher: what learns weights of the source rows: the attribute `meta` is then a `TaggerMeta` with both, or with
            the weigher alone where the RTN is off.
        source_weights: how source rows are weighed (None: 1 each).
        languages: the names of the source languages that train; the log tells several apart.

    Raises ValueError for a list that holds no encoder layers, and a weigher without source_weights.
    """

    stop_gradients = True

    def __init__(
        self,
        base: nn.Module,
        meta: RepresentationTransform,
        *,
        pad_token_id: int,
        transform: bool = True,
        source_weight: float = 1.0,
        target_weight: float = 1.0,
        module_path: str | None = None,
        weigher: WeightTable | WeightNet | None = None,
        source_weights: SourceWeights | None = None,
        languages: Sequence[str] = (),
    ):
        if weigher is not None and source_weights is None:
            raise ValueError("a weigher learns source_weights, which say what it reads: give both")
        super().__init__(base, meta if weigher is None else TaggerMeta(meta if transform else None, weigher))
        self.meta: Any  # whose class says what it has
        self.padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED}
        self.transform, self.source_weights = transform, source_weights
        self.source_weight, self.target_weight = source_weight, target_weight
        meta.attach(self.plain_base, module_path)
        layers = encoder_layers(self.plain_base, module_path)
        trace = require_layers(self.plain_base, layers)
        self._is_on_top = transform and trace.is_result and meta.layers == (len(layers),)
        self._languages = len(languages)
        told_apart = len(languages) > 1 or weigher is not None
        self.watch = Watch(languages if told_apart else (), 0.0 if weigher is None else weigher.floor)

    @property
    def rtn(self) -> RepresentationTransform | None:
        """The RTN; None where weights alone are learned."""
        found: RepresentationTransform | None = self.meta.rtn if isinstance(self.meta, TaggerMeta) else self.meta
        return found

    @property
    def weigher(self) -> WeightTable | WeightNet | None:
        """What learns weights of the source rows, if anything does."""
        return self.meta.weigher if isinstance(self.meta, TaggerMeta) else None

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        """Whether rows have weights of their own, which may go wrong as those of examples do."""
        return isinstance(self.weigher, WeightNet)

    @property
    def reads_loss(self) -> bool:  # type: ignore[override]
        """Whether these are read off their losses."""
        return self._reads == "loss"

    def counts(self, batch: Batch) -> dict[str, int]:
        return dict(self._labelled(batch))

    def _labelled(self, batch: Batch) -> dict[str, int]:
        """The numbers of labelled tokens of either side."""

        def count() -> dict[str, int]:
            labelled, of_source = (batch["labels"] != IGNORED).sum(1), batch["language"] != TARGET  # (B,)
            source, target = torch.stack([(labelled * of_source).sum(), (labelled * ~of_source).sum()]).tolist()
            return {"source": source, "target": target}

        return remembered("counts", count, batch["labels"], batch["language"])

    def inner_loss(self, batch: Batch) -> dict[str, Tensor]:
        with states_below_head(self.plain_base, self._reads == "hidden") as states:
            if not self._has_plain_head or self.is_sharded:
                logits = self._encode(batch, self.base).logits
            else:
                logits = self._head(self._hidden(None, batch))
        return self._means(logits, batch, states)

    def outer_loss(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses, labels = _token_loss(logits, batch["labels"]), batch["labels"]
        count = sum(self._labelled(batch).values())
        places = remembered("labelled", lambda: _places(labels != IGNORED, count), labels)
        return {"target": losses.flatten().index_select(0, places)}

    def cut(self) -> Cut | None:
        if not self._has_plain_head or self.weigher is not None or (self._layers > 1):
            return None  # the loss behind the encoder reads meta parameters: weights, or those that mix several layers
        names = frozenset(name for name in self.base_parameters() if name.startswith("classifier."))
        return Cut(names, self._hidden, self._suffix_loss, self._untransformed if self._is_on_top else None)

    def reads_lam(self, batch: Batch) -> Batch:
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}

        def fewer() -> Batch:
            of_source = on_host(batch["language"]) != TARGET  # (B,)
            rows = of_source.nonzero().squeeze(1).to(batch["language"].device)  # (B',)
            some = 0 < len(rows) < len(of_source)
            return {key: value[rows] for key, value in tensors.items()} if some else {}

        others = [value for key, value in tensors.items() if key != "language"]
        return dict(remembered(("source rows", *tensors), fewer, batch["language"], *others)) or batch

    def lookups(self, batch: Batch) -> dict[str, Tensor]:
        words = self.plain_base.get_input_embeddings()
        if type(words) is not nn.Embedding or words.max_norm is not None:
            return {}
        names = [name for name, parameter in self.plain_base.named_parameters() if parameter is words.weight]
        rows: Tensor = batch["input_ids"]
        return dict.fromkeys(names, rows)

    def join(self, batch: Batch, extra: Batch) -> Batch:
        joined = {}
        for key in batch:
            if batch[key].dim() < 2:
                joined[key] = torch.cat([batch[key], extra[key]])
                continue
            length = max(batch[key].shape[1], extra[key].shape[1])
            rows = [
                F.pad(part[key], (0, length - part[key].shape[1]), value=self.padding[key]) for part in (batch, extra)
            ]
            joined[key] = torch.cat(rows)  # (B + B', T)
        return joined

    def save_meta(self, folder: str | Path) -> None:
        if self.rtn is not None:
            self.rtn.save_pretrained(Path(folder) / SUBFOLDER)
        if self.weigher is not None:
            self.weigher.save_pretrained(Path(folder) / WEIGHER)

    def load_meta(self, folder: str | Path) -> None:
        if self.rtn is not None:
            self.rtn.load_state_dict(RepresentationTransform.from_pretrained(folder).state_dict())
        if self.weigher is not None:
            give_weigher(self.weigher, Path(folder) / WEIGHER)

    @property
    def _layers(self) -> int:
        """How often a source row is encoded."""
        return len(self.rtn.layers) if self.transform and self.rtn is not None else 1

    @property
    def _reads(self) -> str | None:
        return None if self.source_weights is None or self.weigher is None else self.source_weights.reads

    @property
    def _has_plain_head(self) -> bool:
        """Whether the head is dropout and one linear layer, as in the BERT family."""
        return all(isinstance(getattr(self.plain_base, name, None), nn.Module) for name in ("dropout", "classifier"))

    def _rows(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """Several RTN layers: each source row once a layer; the layer index a row (None for a single layer)."""
        layers = self._layers
        if layers == 1:
            return batch, None
        copies = torch.where(batch["language"] != TARGET, layers, 1)  # (B,)
        index = torch.arange(len(copies), device=copies.device).repeat_interleave(copies)
        first = torch.cumsum(copies, 0) - copies
        layer = torch.arange(len(index), device=copies.device) - first[index]
        rows = {key: value[index] for key, value in batch.items() if isinstance(value, Tensor)}
        return {**batch, **rows}, layer

    def _encode(self, batch: Batch, run: Callable[..., Any]) -> Any:
        """`run` on the rows of the batch, the source rows transformed."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if not self.transform:
            return run(**inputs)
        rows, layer = self._rows(batch)
        inputs = {key: rows[key] for key in inputs}
        assert self.rtn is not None
        with self.rtn.active(self._networks(rows["language"]), layer, rows["attention_mask"]):
            return run(**inputs)

    def _networks(self, language: Tensor) -> Tensor:
        """The network of each row, (B,): that of its language, or the one that all of them share."""
        assert self.rtn is not None
        if self._languages < 2 or len(self.rtn.languages) > 1:
            return language
        return remembered("networks", lambda: language.clamp(max=0), language)

    def _hidden(self, below: Tensor | None, batch: Batch) -> Tensor:
        """The encoder's output (B', T, H), the transform applied; `below` saves the encoder where it is on top."""
        if below is None:
            return self._encode(batch, self.plain_base.base_model).last_hidden_state
        assert self.rtn is not None  # it is on top
        with self.rtn.active(self._networks(batch["language"]), attention_mask=batch["attention_mask"]):
            changed = self.rtn.apply_layer(below, 0)
        return below if changed is None else changed

    def _untransformed(self, batch: Batch) -> Tensor:
        """The encoder's output before a transform on top of it, (B, T, H)."""
        return self.plain_base.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state

    def _suffix_loss(self, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        return self._means(self._head(hidden), batch)

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits (B', T, C)."""
        logits: Tensor = self.plain_base.classifier(self.plain_base.dropout(hidden))
        return logits

    def _means(self, logits: Tensor, batch: Batch, states: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """The weighted losses of the labelled tokens of either side, of logits (B', T, C)."""
        rows, layer = self._rows(batch)
        losses = _token_loss(logits, rows["labels"])  # (B', T), of a wider type than the logits under autocast
        if layer is not None:  # a row's losses are the mixture of those of its copies
            language = rows["language"]
            assert self.rtn is not None
            mixing = self.rtn.mixing()[self._networks(language).clamp(min=0), layer]
            mixed = losses * torch.where(language == TARGET, 1.0, mixing)[:, None]
            first = torch.cumsum(layer == 0, 0) - 1  # (B',): the row that each is a copy of
            losses = mixed.new_zeros(batch["labels"].shape).index_add(0, first, mixed)
        labels, language = batch["labels"], batch["language"]

        def sides() -> tuple[Tensor, Tensor]:
            labelled, of_source = labels != IGNORED, (language != TARGET)[:, None]  # (B, T), (B, 1)
            counts = self._labelled(batch)
            return _places(labelled & of_source, counts["source"]), _places(labelled & ~of_source, counts["target"])

        source, target = remembered("sides", sides, labels, language)
        of_source = losses.flatten().index_select(0, source)
        weights = self._weights(of_source, source, batch, states)
        return {
            "source": self.source_weight * (of_source if weights is None else weights * of_source),
            "target": self.target_weight * losses.flatten().index_select(0, target),
        }

    def _weights(self, losses: Tensor, places: Tensor, batch: Batch, states: Sequence[Tensor]) -> Tensor | None:
        """The weights of source tokens (N,), each of which has that of its row; None where all are 1.

        Args:
            losses: of the tokens, (N,).
            places: of the tokens in the flat batch, (N,).
            states: below the head, (B, T, H), where the weigher reads them.
        """
        watched = self._training_step and bool(self.watch.domains)
        if self.source_weights is None and not watched:
            return None
        language, weights, rows = batch["language"], None, places // batch["labels"].shape[1]
        if self.source_weights is not None and self.weighted:
            of_source = language != TARGET  # (B,)
            chosen = remembered("of source", lambda: of_source.nonzero().squeeze(1), language)  # (B',)
            place = (torch.cumsum(of_source, 0) - 1)[rows]  # (N,): of the row among the source rows
            seen = self._seen(losses, place, chosen, batch, states)
            weights = self.source_weights(self.weigher, language[chosen], seen)[place].to(losses)
        elif self.source_weights is not None:
            weights = self.source_weights(self.weigher, language[rows]).to(losses)
        if watched:
            self.note(torch.ones_like(losses) if weights is None else weights, losses, language[rows])
        return weights

    def _seen(self, losses: Tensor, place: Tensor, chosen: Tensor, batch: Batch, states: Sequence[Tensor]) -> Tensor:
        """What a network weighs source rows by: their mean losses (B',), or mean states (B', H), as they are."""
        if self._reads == "loss":
            sums = losses.new_zeros(2, len(chosen)).index_add(1, place, torch.stack([losses, torch.ones_like(losses)]))
            return stop_gradient(sums[0] / sums[1].clamp(min=1), key="losses")
        mask = batch["attention_mask"][chosen].to(states[0]).unsqueeze(-1)
        return stop_gradient((states[0][chosen] * mask).sum(1) / mask.sum(1), key="states")


class CrossLingualClassifier(CrossLingualTagger):
    """Cross-lingual classification of texts: a `CrossLingualTagger` whose base has one answer a row, (B, C).

    Each row has one label, at any of its tokens. The classifier reads the first token's final state, which the RTN of
    the source rows transforms with all the others.
    """

    @property
    def _has_plain_head(self) -> bool:
        return False  # it has a pooler, or layers of its own


def _places(mask: Tensor, count: int) -> Tensor:
    """The `count` places where a mask holds, in the flat order of its entries."""
    return mask.flatten().nonzero_static(size=count).squeeze(1)  # the host need not wait for how many there are


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token, 0 where it has no label: (B, T, C), (B, T) -> (B, T).

    Logits (B, C) of rows as a whole are those of each of their tokens, one of which has the row's label.
    """
    if logits.dim() == 2:
        logits = logits[:, None].expand(-1, labels.shape[1], -1)
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view_as(labels)
