"""The losses of single rows, or tokens, of Hugging Face heads, whose own `.loss` is a mean."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IGNORED = -100
ROWS = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification")
TOKENS = ("ForTokenClassification", "ForMaskedLM")


def columns_of(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The columns of a batch that a model's forward takes by name; all for a forward with `**kwargs` of its own."""
    taken = inspect.signature(model.forward).parameters
    if not isinstance(model, PreTrainedModel) and any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return batch
    return {key: value for key, value in batch.items() if key in taken}


def row_losses(model: nn.Module, base: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The loss of each row, shape (B,); that of a row of tokens is the mean over its labelled ones.

    Args:
        model: the model with the head.
        base: what is called: the model, or its wrapper.

    Raises:
        ValueError: for a head whose losses are not known, or a row without a labelled token.
    """
    if _reads_tokens(model):
        losses, labelled = _of_tokens(model, base, batch)
        found = labelled.sum(1)  # (B,)
        if not bool(found.all()):
            raise ValueError(
                "a row has no labelled token, and no loss: leave it out of the data set, or use losses(batch, "
                "tokens=True)"
            )
        return (losses * labelled).sum(1) / found
    logits, labels = _logits(model, base, batch), batch["labels"]
    kind = _kind_of(model, labels)
    if kind == "single_label_classification":
        if bool((labels == IGNORED).any()):
            raise ValueError(f"a row has the label {IGNORED}, and no loss: leave it out of the data set")
        return F.cross_entropy(logits, labels.long().flatten(), reduction="none")
    if kind == "regression":
        return F.mse_loss(logits, labels.to(logits).view_as(logits), reduction="none").mean(1)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1)


def token_losses(model: nn.Module, base: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The losses of the labelled tokens of all rows, shape (N,).

    Raises:
        ValueError: for a head that is not one of tokens.
    """
    if not _reads_tokens(model):
        raise ValueError(f"{type(model).__name__} has one loss a row: leave tokens=True out")
    losses, labelled = _of_tokens(model, base, batch)
    return losses[labelled]


def labelled_tokens(model: nn.Module, batch: dict[str, Any]) -> int:
    """The number of labelled tokens, of a causal language model those that are predicted."""
    return int((_labels(model, batch) != IGNORED).sum())


def token_rows(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The row of each labelled token, in the order of `token_losses`, shape (N,)."""
    return token_places(model, batch)[:, 0]


def token_places(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Row and column of the state that predicts each labelled token, (N, 2), in the order of `token_losses`."""
    return (_labels(model, batch) != IGNORED).nonzero()


def token_labels(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The label of each labelled token, (N,), in the order of `token_losses`."""
    labels = _labels(model, batch)
    return labels[labels != IGNORED]


def _of_tokens(model: nn.Module, base: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Losses (B, T) and which of them are of labelled tokens (B, T)."""
    logits, labels = _logits(model, base, batch), _labels(model, batch)
    if _is_causal(model):
        logits = logits[:, :-1]
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"the logits are of {logits.shape[1]} places, the labels of {labels.shape[1]}: write the losses yourself"
        )
    losses = F.cross_entropy(logits.flatten(0, 1), labels.long().flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(labels), labels != IGNORED


def _logits(model: nn.Module, base: nn.Module, batch: dict[str, Any]) -> Tensor:
    if "labels" not in batch:
        raise ValueError(f"the batch has no labels, of which losses(batch) are: it has {sorted(batch)}")
    inputs = columns_of(model, batch)
    if not _is_encoder_decoder(model):  # which makes its decoder's inputs of them
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
    logits: Tensor = base(**inputs).logits
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _labels(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Of the logits' places; a causal language model predicts from the second token on."""
    labels: Tensor = batch["labels"]
    return labels[:, 1:] if _is_causal(model) else labels


def _reads_tokens(model: nn.Module) -> bool:
    kind = getattr(model, "loss_type", None)
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        raise ValueError(
            f"{type(model).__name__} adds a loss of its routers (output_router_logits), of which no row has a share: "
            "set it to False in the model's configuration, or write the losses in inner_loss and outer_loss"
        )
    if kind in TOKENS or _has_the_common_loss(model):
        return True
    if kind in ROWS:
        return False
    raise ValueError(
        f"the losses of a {type(model).__name__} are not known here (known: classification, regression, tagging and "
        "language modelling heads of transformers, with the loss that these share): write them in inner_loss and "
        "outer_loss, one a row"
    )


def _has_the_common_loss(model: nn.Module) -> bool:
    """Whether a language model's own loss is the one of transformers, for causal ones that which shifts the labels.

    Some causal models have another, most of which (BART's decoder, TrOCR, XLNet) do not shift them.
    """
    if _is_causal(model):
        losses = {"loss_function"}
    elif _is_encoder_decoder(model):
        losses = {"loss_function", "CrossEntropyLoss"}
    else:
        return False
    forwards = [inspect.unwrap(vars(one)["forward"]) for one in type(model).__mro__ if "forward" in vars(one)]
    return any(
        not losses.isdisjoint(forward.__code__.co_names) for forward in forwards if hasattr(forward, "__code__")
    )


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return getattr(model, "loss_type", None) == "ForConditionalGeneration" and bool(
        getattr(config, "is_encoder_decoder", False)
    )


def _is_causal(model: nn.Module) -> bool:
    kind = getattr(model, "loss_type", None)
    if kind == "ForConditionalGeneration":
        return not _is_encoder_decoder(model)  # images and text, by a language model
    return kind == "ForCausalLM" or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _kind_of(model: Any, labels: Tensor) -> str:
    """The problem type of a classifier; where its configuration names none, as transformers tells it."""
    if model.config.problem_type is not None:
        return str(model.config.problem_type)
    if model.config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
