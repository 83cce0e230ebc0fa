"""Text models and their tokenizers, of a folder, the Hub or its cache, or small ones for the drawn data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from metaxl_evo.models.adapters import add_lora
from metaxl_evo.training.saved_models import ask_hub, cannot_load, load, require_whole
from metaxl_evo.weighting.arguments import TextArguments
from metaxl_evo.weighting.drawn import SYNTHETIC, draw_classifier, draw_language_model


class Head(NamedTuple):
    """A kind of head: the class that loads it, how such classes are called, and peft's word for it."""

    loads: Any
    called: str
    task_type: str


SEQUENCE = Head(AutoModelForSequenceClassification, "ForSequenceClassification", "SEQ_CLS")
CAUSAL = Head(AutoModelForCausalLM, "ForCausalLM", "CAUSAL_LM")


def trained_labels(model: str, head: Head) -> list[str] | None:
    """The label names of a trained head of this kind, in its order; None where the model has none.

    Raises:
        ValueError: for a model that cannot be had.
    """
    if model == SYNTHETIC:
        return None
    place = _located(model)
    try:
        config = AutoConfig.from_pretrained(place)
    except Exception as error:  # the content of the file leads the library into any
        raise _unusable(model, error) from error
    if not any(head.called in one for one in config.architectures or []):
        return None
    return [str(config.id2label[number]) for number in sorted(config.id2label)]


def load_classifier(
    settings: TextArguments, names: Sequence[str], head: Head = SEQUENCE
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A float32 classifier of these labels, below an adapter where the settings ask for one, and its tokenizer.

    Raises:
        ValueError: for a model that cannot be had, is not whole, or whose trained head has other labels.
    """
    model = settings.model_name_or_path
    if model == SYNTHETIC:
        drawn, its_tokenizer = draw_classifier(names)
        return with_adapter(settings, drawn, head), its_tokenizer
    trained = trained_labels(model, head)
    if trained not in (None, list(names)):
        raise ValueError(
            f"model_name_or_path: the head of {model} knows {', '.join(trained or ())}, the data have "
            f"{', '.join(names)}: give a model without a head, or data with the same labels"
        )
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    base, tokenizer, missing = _load(settings, head, **labels)
    own = f"{base.base_model_prefix}."  # a new head, and a pooler that it reads, are made here
    lacking = [name for name in missing if trained is not None or (name.startswith(own) and ".pooler." not in name)]
    require_whole(model, base, lacking)
    return with_adapter(settings, base, head), tokenizer


def load_language_model(settings: TextArguments) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A float32 causal language model, below an adapter where the settings ask for one, and its tokenizer.

    Raises:
        ValueError: for a model that cannot be had, or is not whole.
    """
    if settings.model_name_or_path == SYNTHETIC:
        drawn, its_tokenizer = draw_language_model()
        return with_adapter(settings, drawn, CAUSAL), its_tokenizer
    base, tokenizer, missing = _load(settings, CAUSAL)
    require_whole(settings.model_name_or_path, base, missing)
    return with_adapter(settings, base, CAUSAL), tokenizer


def with_adapter(settings: TextArguments, base: PreTrainedModel, head: Head) -> nn.Module:
    """`base`, below LoRA where the settings ask for it."""
    if not settings.use_peft:
        return base
    return add_lora(
        base,
        r=settings.lora_r,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules,
        task_type=head.task_type,
    )


def _load(
    settings: TextArguments, head: Head, **fields: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A model, its tokenizer, which can pad, and the weights that are not in its file."""
    model, trusted = settings.model_name_or_path, settings.trust_remote_code
    place = _located(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trusted)
        base, found = load(head.loads, place, trust_remote_code=trusted, **fields)
    except Exception as error:  # the content of a file leads the library into any
        raise _unusable(model, error) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"model_name_or_path: {model} has no padding token: give its tokenizer one, and save it")
        tokenizer.pad_token = tokenizer.eos_token  # behind a mask and without a label, nobody reads it
    if base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id  # by which a decoder's classifier finds the last token
    return base, tokenizer, sorted(found["missing_keys"])


def _located(model: str) -> str | Path:
    """The folder of a model, or a Hub id that was asked for once, with a short timeout."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        ask_hub(model)
    except Exception as error:  # of the id, or of an HTTP library
        raise _unusable(model, error) from error
    return model


def _unusable(model: str, error: Exception) -> ValueError:
    return cannot_load(model, error, "a transformers model")
