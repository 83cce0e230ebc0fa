"""How the processes were started: what no arguments can be made under, whatever is trained."""

from __future__ import annotations

import os
from collections.abc import Iterator

from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

Found = Iterator[tuple[str, str]]  # what cannot be, and why with the way out

_WHOLE = "use DDP (accelerate launch --multi_gpu) or one device"


def refuse_engines(args: TrainingArguments) -> None:
    """Refuse engines that shard the weights or own the backward; the arguments do so before they ask for a package.

    Raises:
        ValueError: one line with what was found, the reason and the way out.
    """
    refuse(_engines(args))


def refuse_lost_processes(args: TrainingArguments) -> None:
    """Refuse processes that were started together and know nothing of each other: each would write the same files.

    Raises:
        ValueError: one line with the way out.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size < started:
        raise ValueError(
            f"{started} processes were started, and each would train alone into the same folder: set use_cpu: true "
            "where there are no GPUs, or start as many processes as there are GPUs"
        )


def refuse(found: Found) -> None:
    """Refuse the first of what was found.

    Raises:
        ValueError: one line with what was found, the reason and the way out.
    """
    for what, reason in found:
        raise ValueError(f"MetaTrainer does not run with {what}: {reason}")


def _engines(args: TrainingArguments) -> Found:
    if _fsdp_version(args) == 1:
        yield "fsdp version 1", "it knows flat weights only; set fsdp_config: {version: 2}, or --fsdp_version 2"
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        yield (
            "deepspeed",
            "its engine owns the backward and the step; use FSDP2 (configs/accelerate/fsdp2.yaml) for weights that do "
            "not fit one device, else DDP (accelerate launch --multi_gpu)",
        )
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        yield "Megatron-LM", f"its engine owns the backward and the step; {_WHOLE}"
    config = args.parallelism_config
    if config is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        config = ParallelismConfig()
    for size in ("dp_shard_size", "tp_size", "cp_size", "sp_size"):
        if getattr(config, size, 1) != 1:
            yield f"parallelism_config {size}", f"meta passes would see shards of the weights or rows; {_WHOLE}"


def _fsdp_version(args: TrainingArguments) -> int | None:
    """Of the FSDP that is asked for, as far as the arguments are processed; None without."""
    if args.fsdp:
        return int((getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version", 2))
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return int(os.environ.get("FSDP_VERSION", "1"))
    return None
