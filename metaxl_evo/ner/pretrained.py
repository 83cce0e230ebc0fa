"""Base models and tokenizers: from a folder, the Hub or its cache, or made for the synthetic family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from metaxl_evo.ner.sources import HUB_TIMEOUT

SYNTHETIC = "synthetic"


def load_config(model: str) -> PretrainedConfig:
    """The configuration of a model; of an unreachable Hub id this says so within seconds.

    Raises:
        ValueError: for what is neither a model folder nor to be had from the Hub or its cache.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        _require_reachable(model)
    elif not (folder / CONFIG_NAME).is_file():
        inside = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_NAME}"))
        advice = (
            f"give one of its models: {', '.join(inside)}" if inside else "give a folder that save_pretrained wrote"
        )
        raise ValueError(f"model_name_or_path: {model} holds no {CONFIG_NAME}: {advice}")
    try:
        return AutoConfig.from_pretrained(folder if folder.is_dir() else model)
    except (OSError, ValueError) as error:
        raise _unusable(model, error) from error


def trained_labels(model: str) -> list[str] | None:
    """The label names of a trained token-classification head, in its order; None where the model has none yet."""
    if model == SYNTHETIC:
        return None
    config = load_config(model)
    if not any("TokenClassification" in kind for kind in config.architectures or []):
        return None
    labels: dict[Any, str] = dict(config.id2label or {})
    return [labels[number] for number in sorted(labels)]


def load_classifier(
    model: str, names: Sequence[str], attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A float32 token classifier for the label names, whatever the checkpoint's dtype, and its fast tokenizer.

    Raises:
        ValueError: for a model that cannot be had or read, or whose trained head has other labels.
    """
    if model == SYNTHETIC:
        from metaxl_evo.ner.synthetic import SyntheticFamily, build_tagger

        return build_tagger(SyntheticFamily())
    trained = trained_labels(model)
    if trained is not None and trained != list(names):
        raise ValueError(
            f"the head of {model} knows {', '.join(trained)}, the data set has {', '.join(names)}: "
            "use a model without a head, or data with the same labels"
        )
    place = Path(model).expanduser() if Path(model).expanduser().is_dir() else model
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    kernel = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        base = AutoModelForTokenClassification.from_pretrained(place, dtype="float32", **labels, **kernel)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(model, error) from error
    return base, tokenizer


def _require_reachable(model: str) -> None:
    """Ask the Hub once, with a short timeout, before transformers asks it with its long retries."""
    try:
        if is_offline_mode() or isinstance(try_to_load_from_cache(model, CONFIG_NAME), str):
            return
        HfApi().model_info(model, timeout=HUB_TIMEOUT)
    except (
        Exception
    ) as error:  # HFValidationError, or that of whatever HTTP library the installed huggingface_hub uses
        raise _unusable(model, error) from error


def _unusable(model: str, error: Exception) -> ValueError:
    reason = next(filter(None, map(str.strip, str(error).splitlines())), "").rstrip(":. ")
    return ValueError(
        f"model_name_or_path: {model!r} cannot be loaded ({type(error).__name__}: {reason}): give the folder of a "
        "transformers model, a Hub id that can be reached, or set HF_HUB_OFFLINE=1 with a filled cache"
    )
