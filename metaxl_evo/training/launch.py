"""Launches that would be silently wrong, refused before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.trainer_utils import SaveStrategy

from metaxl_evo.estimators import Estimator
from metaxl_evo.models.bilevel_module import BilevelModule

if TYPE_CHECKING:
    from metaxl_evo.training.arguments import MetaTrainingArguments

Found = Iterator[tuple[str, str]]  # what cannot be, and why with the way out

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, FullyShardedDataParallel)
_WHOLE = "use DDP (accelerate launch --multi_gpu) or one device"


def refuse_launch(args: MetaTrainingArguments, model: nn.Module, estimator: Estimator | None) -> None:
    """Refuse what would be silently wrong, by arguments, by accelerate's environment or by the model handed over.

    Without an estimator only what breaks the base step or its checkpoints is refused.

    Raises:
        ValueError: one line with what was found, the reason and the way out.
    """
    refuse_engines(args)
    _refuse(_launch(args))
    _refuse(_model(model))
    if estimator is not None:
        _refuse(_meta_launch(args, model))
        _refuse_second_derivatives(args, estimator)


def refuse_engines(args: MetaTrainingArguments) -> None:
    """Refuse engines that shard the weights or own the backward; the arguments do so before they ask for a package.

    Raises:
        ValueError: one line with what was found, the reason and the way out.
    """
    _refuse(_engines(args))


def refuse_lost_processes(args: MetaTrainingArguments) -> None:
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


def _refuse(found: Found) -> None:
    for what, reason in found:
        raise ValueError(f"MetaTrainer does not run with {what}: {reason}")


def _engines(args: MetaTrainingArguments) -> Found:
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        yield "fsdp", f"meta passes would see shards of the weights; {_WHOLE}"
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        yield "deepspeed", f"its engine owns the backward and the step; {_WHOLE}"
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        yield "Megatron-LM", f"its engine owns the backward and the step; {_WHOLE}"
    config = args.parallelism_config
    if config is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        config = ParallelismConfig()
    for size in ("dp_shard_size", "tp_size", "cp_size", "sp_size"):
        if getattr(config, size, 1) != 1:
            yield f"parallelism_config {size}", f"meta passes would see shards of the weights or rows; {_WHOLE}"


def _launch(args: MetaTrainingArguments) -> Found:
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision.lower() in ("fp16", "fp8"):
        yield precision.lower(), "its scaled gradients are not those that meta passes see; use bf16 or float32"
    if args.n_gpu > 1:
        yield "DataParallel", "replicas lose the hooks; start with accelerate launch, or set CUDA_VISIBLE_DEVICES"
    if args.use_liger_kernel:
        yield (
            "use_liger_kernel",
            "it patches bare Hugging Face models only, and has no second derivative; leave it out",
        )
    if args.neftune_noise_alpha is not None:
        yield "neftune_noise_alpha", "a task's losses know nothing of its noise; leave it out"
    config: Any = args.accelerator_config
    if args.world_size > 1 and not config.even_batches:
        yield "even_batches: false", "ranks with fewer batches leave the others waiting; leave it true"
    if args.save_strategy != SaveStrategy.NO:
        if config.dispatch_batches:
            yield "dispatch_batches", "a resumed run would see other rows; leave it out, or set save_strategy: no"
        if not config.use_seedable_sampler:
            yield (
                "use_seedable_sampler: false",
                "a resumed run would see other rows; leave it true, or set save_strategy: no",
            )


def _model(model: nn.Module) -> Found:
    if not isinstance(model, BilevelModule):
        yield f"a {type(model).__name__} as model", "it trains a BilevelModule, unwrapped; hand over that"
        return
    for module in model.modules():
        if isinstance(module, _WRAPPERS) or hasattr(module, "_orig_mod"):
            yield (
                f"a module inside {type(module).__name__}",
                "accelerate wraps the task itself; hand over bare modules",
            )
        if getattr(module, "hf_quantizer", None) is not None:
            yield "a quantised model", "its weights cannot be moved; load it without quantization_config"
        if len(set(getattr(module, "hf_device_map", {}).values())) > 1:
            yield "a model over several devices", "meta passes need all of it on one; load it without device_map"
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor:
            kind = type(parameter.data).__name__
            yield (
                f"parameters that are {kind}s ({name})",
                "sharded or quantised weights cannot be moved; load them plain",
            )
        if parameter.is_meta:
            yield f"parameters on the meta device ({name})", "they are offloaded or were never loaded; load them whole"
        if not parameter.is_floating_point():
            yield f"{parameter.dtype} parameters ({name})", "quantised weights cannot be moved; load them in float32"


def _meta_launch(args: MetaTrainingArguments, model: nn.Module) -> Found:
    for name, parameter in model.named_parameters():
        if parameter.element_size() < 4:
            yield (
                f"{parameter.dtype} parameters ({name})",
                "meta passes need float32; load them with dtype=torch.float32 (bf16: true still speeds up base steps)",
            )
    options = args.activation_checkpointing_kwargs
    if args.activation_checkpointing and isinstance(options, dict) and options.get("use_reentrant"):
        yield (
            "use_reentrant: true",
            "meta passes ask for gradients of their own, which it cannot give; leave it out of "
            "activation_checkpointing_kwargs",
        )
    if args.auto_find_batch_size:
        yield (
            "auto_find_batch_size",
            "it starts again at step 0 with weights that have moved, and never shrinks meta rows; lower "
            "per_device_train_batch_size and raise gradient_accumulation_steps",
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no" and not args.torch_compile:
        yield "--dynamo_backend", "meta passes have to know of it; set torch_compile: true in its place"


def _refuse_second_derivatives(args: MetaTrainingArguments, estimator: Estimator) -> None:
    for field in ("activation_checkpointing", "gradient_checkpointing", "torch_compile"):
        if getattr(args, field, False) and (estimator.second_order or estimator.needs_forward_ad):
            raise ValueError(
                f"estimator {args.estimator!r} ({estimator}) differentiates twice, which {field} does not allow: "
                "set the engine to finite_difference or use evograd"
            )
