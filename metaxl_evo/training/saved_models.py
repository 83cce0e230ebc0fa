"""Saved models of a folder, the Hub or its cache, whatever their task: whole, or refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from metaxl_evo.messages import first_line
from metaxl_evo.training.hub import HUB_TIMEOUT
from metaxl_evo.training.logs import without_load_report


def ask_hub(model: str) -> None:
    """Ask the Hub once, with a short timeout, before transformers asks it with its long retries.

    Raises:
        Exception: of the id, or of the HTTP library that the installed huggingface_hub uses.
    """
    if not is_offline_mode() and not isinstance(try_to_load_from_cache(model, CONFIG_NAME), str):
        HfApi().model_info(model, timeout=HUB_TIMEOUT)


def load(
    kind: Any, place: str | Path | None, *, trust_remote_code: bool = False, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """A float32 model by a class of transformers, and what loading found, for the caller to judge.

    Raises:
        Exception: of any class, into which the content of a file leads the library.
    """
    fixed = {"dtype": "float32", "output_loading_info": True, "trust_remote_code": trust_remote_code}
    with without_load_report():
        model, found = kind.from_pretrained(place, **fixed, **settings)
    return model, found


def require_whole(model: str, base: PreTrainedModel, lacking: Sequence[str]) -> None:
    """Refuse weights that are not all there, or not numbers.

    Args:
        lacking: the weights that the checkpoint has not, and should have.

    Raises:
        ValueError: naming one.
    """
    unfit = [name for name, parameter in base.named_parameters() if not parameter.isfinite().all()]
    if lacking:
        raise not_whole(model, f"lacks {len(lacking)} of its weights, such as {lacking[0]}")
    if unfit:
        raise not_whole(model, f"has weights that are not finite, such as {unfit[0]}")


def require_vocabulary(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that transformers made up where its files are missing.

    Raises:
        ValueError: with the way out.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"model_name_or_path: {model} holds no vocabulary of a tokenizer: save the model's own there, or give its "
            "Hub id"
        )


def require_embeddings(model: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model with fewer word embeddings than its tokenizer has pieces.

    Raises:
        ValueError: with both numbers.
    """
    words = getattr(base.config, "vocab_size", len(tokenizer))
    if tokenizer.is_fast and len(tokenizer) > words:
        raise not_whole(model, f"has {words} word embeddings for a tokenizer with a vocabulary of {len(tokenizer)}")


def not_whole(model: str, problem: str) -> ValueError:
    """The error of a model that was not saved, or fetched, to its end."""
    return ValueError(f"model_name_or_path: {model} {problem}: fetch or save it again, whole")


def cannot_load(model: str, error: Exception, wanted: str) -> ValueError:
    """The error of a model that a library cannot load.

    Args:
        wanted: what to give the folder of.
    """
    reason = f"{type(error).__name__}: {first_line(error).rstrip(':. ')}"
    return ValueError(
        f"model_name_or_path: {model!r} cannot be loaded ({reason}): give the folder of {wanted}, a Hub id that can "
        "be reached, or set HF_HUB_OFFLINE=1 with a filled cache"
    )


def refuse_kernel(model: str, config: PretrainedConfig) -> None:
    """Refuse a model whose attention kernel is code of the Hub, which transformers would fetch and run.

    Raises:
        ValueError: naming it.
    """
    if "/" in (kernel := str(config._attn_implementation)):
        raise untrusted(model, f"the attention kernel {kernel} of the Hub")


def unusable(model: str, error: Exception) -> ValueError:
    """The error of a transformers model that cannot be loaded, or brings code along."""
    if "trust_remote_code=True" in str(error):  # as transformers words it, in several lines
        return untrusted(model, "auto_map")
    return cannot_load(model, error, "a transformers model")


def untrusted(model: str, what: str) -> ValueError:
    """The error of a model that brings code along, which `what` names."""
    return ValueError(
        f"model_name_or_path: {model!r} brings code along ({what}), which is not run unasked: read it, then set "
        "trust_remote_code: true, or use another model"
    )
