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
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from metaxl_evo.training.saved_models import (
    ask_hub,
    load,
    refuse_kernel,
    require_embeddings,
    require_vocabulary,
    require_whole,
    unusable,
)
from metaxl_evo.weighting.arguments import TextArguments
from metaxl_evo.weighting.drawn import SYNTHETIC, draw_classifier, draw_language_model


class Head(NamedTuple):
    """A kind of head: the class that loads it, how such classes are called, and peft's word for it."""

    loads: Any
    called: str
    task_type: str


SEQUENCE = Head(AutoModelForSequenceClassification, "ForSequenceClassification", "SEQ_CLS")
CAUSAL = Head(AutoModelForCausalLM, "ForCausalLM", "CAUSAL_LM")


def trained_labels(settings: TextArguments, head: Head) -> list[str] | None:
    """The label names of a trained head of this kind, in its order; None where the model has none.

    Raises:
        ValueError: for a model that cannot be had.
    """
    if settings.model_name_or_path == SYNTHETIC:
        return None
    _, config = _found(settings)
    if not any(head.called in one for one in config.architectures or []):
        return None
    labels: dict[Any, str] = dict(config.id2label or {})
    return [labels[number] for number in sorted(labels)]


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
        return settings.adapted(drawn, head.task_type), its_tokenizer
    trained = trained_labels(settings, head)
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
    return settings.adapted(base, head.task_type), tokenizer


def load_language_model(settings: TextArguments) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A float32 causal language model, below an adapter where the settings ask for one, and its tokenizer.

    Raises:
        ValueError: for a model that cannot be had, or is not whole.
    """
    if settings.model_name_or_path == SYNTHETIC:
        drawn, its_tokenizer = draw_language_model()
        return settings.adapted(drawn, CAUSAL.task_type), its_tokenizer
    base, tokenizer, missing = _load(settings, CAUSAL)
    require_whole(settings.model_name_or_path, base, missing)
    return settings.adapted(base, CAUSAL.task_type), tokenizer


def _load(
    settings: TextArguments, head: Head, **fields: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A model, its tokenizer, which can pad, and the weights that are not in its file."""
    model, trusted = settings.model_name_or_path, settings.trust_remote_code
    place, _ = _found(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trusted)
        base, found = load(head.loads, place, trust_remote_code=trusted, **fields)
    except Exception as error:  # the content of a file leads the library into any
        raise unusable(model, error) from error
    require_vocabulary(model, tokenizer)
    require_embeddings(model, base, tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"model_name_or_path: {model} has no padding token: give its tokenizer one, and save it")
        tokenizer.pad_token = tokenizer.eos_token  # behind a mask and without a label, nobody reads it
    if base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id  # by which a decoder's classifier finds the last token
    return base, tokenizer, sorted(found["missing_keys"])


def _found(settings: TextArguments) -> tuple[str | Path, PretrainedConfig]:
    """The folder of a model, or a Hub id that was asked for once, with a short timeout; and its configuration."""
    model, trusted = settings.model_name_or_path, settings.trust_remote_code
    folder = Path(model).expanduser()
    place: str | Path = folder if folder.is_dir() else model
    try:
        if place is model:
            ask_hub(model)
        config = AutoConfig.from_pretrained(place, trust_remote_code=trusted)
    except Exception as error:  # of the id, an HTTP library, or whatever the content of the file leads into
        raise unusable(model, error) from error
    if not trusted:
        refuse_kernel(model, config)
    return place, config
