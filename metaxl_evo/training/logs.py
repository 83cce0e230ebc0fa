"""What a log file is spared: bars that nobody watches, and reports of what the caller looks at itself."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import transformers
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers.utils.import_utils import is_in_notebook


def is_watched() -> bool:
    """Whether somebody sees a bar move: on a terminal, or in a notebook."""
    return sys.stderr.isatty() or is_in_notebook()


def hide_unwatched_bars() -> None:
    """The libraries' own bars (downloads, weights, mapped rows) stay off where they would fill a log file."""
    if not is_watched():
        datasets.disable_progress_bars()
        disable_progress_bars()
        transformers.logging.disable_progress_bar()


@contextmanager
def without_load_report() -> Iterator[None]:
    """Loading inside prints no table of weights: the caller asks for `output_loading_info`, and judges it."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_load_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_load_report)


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
