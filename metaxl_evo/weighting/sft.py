"""Rows in trl's formats for supervised fine-tuning, made ready by trl itself."""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from metaxl_evo.messages import one_line
from metaxl_evo.training.isolation import kept_random_state
from metaxl_evo.weighting.scratch import HEAD_WIDTH, model_from_scratch

FORMATS = (("messages",), ("prompt", "completion"))  # columns; trl's `text` is a plain text


def format_of(columns: Sequence[str]) -> tuple[str, ...] | None:
    """Which of the formats a table's columns are; None for neither."""
    return next((names for names in FORMATS if set(names) <= set(columns)), None)


def as_texts(rows: Dataset, columns: Sequence[str]) -> list[str]:
    """Each row as one text, alike for rows that are alike, so that they are split and compared as texts are."""
    return [json.dumps({name: row[name] for name in columns}, ensure_ascii=False, sort_keys=True) for row in rows]


def encode_sft(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, args: TrainingArguments
) -> Dataset:
    """`input_ids` and `labels` of `as_texts`, as trl's SFTTrainer makes them.

    Of `prompt` and `completion` the completion alone is labelled, of `messages` all turns; an end is added, or the
    chat template is applied; what is longer than `max_length` is cut at its end. The tokenizer and the random state
    stay as they were.

    Args:
        args: of the training, whose device and precision are those of the whole process.

    Raises:
        ValueError: without trl, for what trl refuses, or rows of which no label is left.
    """
    require_trl()
    longest = min(max_length, tokenizer.model_max_length)
    rows: Any = Dataset.from_list([json.loads(text) for text in texts])
    with kept_random_state():
        try:
            made = _made_by_trl(rows, copy.deepcopy(tokenizer), longest, args)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"trl cannot read these rows: {one_line(error)}") from error
    if lost := len(rows) - len(made):  # trl drops them
        raise ValueError(f"{lost} of {len(rows)} rows have no label in max_length {longest}: raise it, or drop them")
    ids = made["input_ids"][:]
    mask = [[1] * len(row) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": mask, "labels": made["labels"][:]})


def _made_by_trl(rows: Any, tokenizer: Any, longest: int, args: TrainingArguments) -> Any:
    """The rows of an SFTTrainer, made with a small model: it may change what it is given."""
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            max_length=longest,
            packing=False,
            loss_type="nll",
            report_to="none",
            use_cpu=args.use_cpu,
            bf16=args.bf16,
            fp16=args.fp16,
        )
        model = model_from_scratch(tokenizer, layers=1, width=HEAD_WIDTH)
        return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer).train_dataset


def require_trl() -> None:
    """Raises the error of a missing extra."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError("messages, and prompt with completion, are read by trl: pip install metaxl_evo[trl]")
