"""What `--help` prints: a line a setting, the task's own first; `--help_all` has all of them, in full."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import TrainingArguments

THEIRS = {field.name for field in dataclasses.fields(TrainingArguments)}
USUAL = (  # of TrainingArguments
    *("output_dir", "resume_from_checkpoint", "seed", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "warmup_steps", "lr_scheduler_type", "max_grad_norm", "bf16"),
    *("eval_strategy", "save_strategy", "load_best_model_at_end", "logging_steps", "report_to", "push_to_hub"),
)
NARROWEST, WIDEST, NAMES = 80, 140, 30


def short_help(types: Sequence[type], actions: Mapping[str, argparse.Action]) -> str:
    """The settings of these dataclasses in groups.

    Args:
        actions: of the options, by the name of the setting.
    """
    width = max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))
    lines = ["Settings: --config FILE or NAME (YAML), then --NAME VALUE over it. --help_all: all of them, in full."]
    for one in types:
        own = [field for field in dataclasses.fields(one) if field.init and field.name not in THEIRS]
        lines += ["", _title(one), *_lines(own, actions, width)]
    if any(issubclass(one, TrainingArguments) for one in types):
        theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
        title = f"of transformers' TrainingArguments ({len(theirs)} in all)"
        lines += ["", title, *_lines([theirs[name] for name in USUAL], actions, width)]
    return "\n".join(lines) + "\n"


def _title(one: type) -> str:
    if issubclass(one, TrainingArguments):
        return "The meta level"
    return (one.__doc__ or one.__name__).strip().partition("\n")[0].rstrip(".")


def _lines(fields: Sequence[dataclasses.Field], actions: Mapping[str, argparse.Action], width: int) -> Iterator[str]:
    for field in fields:
        text = " ".join(str(actions[field.name].help or "").replace("%%", "%").split())
        meaning, bracket, default = text.rpartition(" (default: ") if text.endswith(")") else ("", "", "")
        default = textwrap.shorten(bracket + default, width // 3, placeholder=" ...)") if meaning else ""
        meaning = textwrap.shorten(meaning or text, width - NAMES - 6 - len(default), placeholder=" ...")
        yield f"  --{field.name:<{NAMES}} {meaning} {default}".rstrip()


class HelpAll(argparse.Action):
    """Prints argparse's own help, and ends."""

    def __init__(self, **kwargs: Any):
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        print(parser.format_help())
        parser.exit()
