"""Data sets of the Hugging Face Hub, or in offline mode of its cache; whatever is wrong with them is one line."""

from __future__ import annotations

from typing import NamedTuple

from datasets import DatasetDict, get_dataset_config_names, load_dataset
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from metaxl_evo.messages import one_line

HUB_TIMEOUT = 4.0  # seconds, tried twice at most; load_dataset alone retries an unreachable Hub for about 23


class Instead(NamedTuple):
    """What a task's errors advise: the option that takes local data, and a data set known to load (`NAME: ID`)."""

    option: str
    known: str


def require_reachable(dataset: str, instead: Instead) -> None:
    """Ask the Hub once, with a short timeout, before `load_dataset` asks it with its long retries.

    Raises:
        ValueError: for a dataset script.
        OSError: for what is neither there nor a Hub id.
    """
    if dataset.endswith(".py"):
        raise ValueError(script_message(dataset, instead))
    if is_offline_mode():
        return
    try:
        HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(_unreachable_message(dataset, instead, error)) from error
    except Exception as error:  # of whatever HTTP library the installed huggingface_hub uses
        raise ConnectionError(_unreachable_message(dataset, instead, error)) from error


def configurations_of(dataset: str, instead: Instead) -> list[str]:
    """The names of the configurations that the Hub offers.

    Raises:
        ValueError: for a dataset script.
    """
    try:
        return list(get_dataset_config_names(dataset))
    except RuntimeError as error:
        raise _clearer(dataset, instead, error) from error


def load_from_hub(
    dataset: str, configuration: str | None = None, *, instead: Instead, what: str = "the default configuration"
) -> DatasetDict:
    """All splits of one configuration.

    Args:
        what: the configuration in the words of the task.

    Raises:
        ValueError: for a dataset script, or a configuration that there is not.
        OSError: where the Hub or its cache does not have it.
    """
    try:
        return load_dataset(dataset, configuration)
    except RuntimeError as error:
        raise _clearer(dataset, instead, error) from error
    except ValueError as error:
        raise ValueError(f"cannot load {what} of {dataset}: {one_line(error)}") from error
    except OSError as error:
        raise ConnectionError(_unreachable_message(dataset, instead, error)) from error


def script_message(dataset: str, instead: Instead) -> str:
    """Why a dataset script is refused."""
    return (
        f"{dataset} is a dataset script, and Dataset scripts are no longer supported: "
        f"use a data-only copy ({instead.known}) or {instead.option}"
    )


def _clearer(dataset: str, instead: Instead, error: RuntimeError) -> Exception:
    is_script = "scripts are no longer supported" in str(error)
    return ValueError(script_message(dataset, instead)) if is_script else error


def _unreachable_message(dataset: str, instead: Instead, error: Exception) -> str:
    return (
        f"{dataset!r} is neither a folder nor a reachable Hub id ({type(error).__name__}: {one_line(error)}): "
        f"use {instead.option}, or HF_HUB_OFFLINE=1 with a filled cache"
    )
