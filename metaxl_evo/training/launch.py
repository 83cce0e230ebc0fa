"""Launches that would be silently wrong, refused before anything runs."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers.trainer_utils import SaveStrategy

from metaxl_evo.estimators import Estimator
from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.distributed import Found, refuse, refuse_engines
from metaxl_evo.training.dry_run import refuse_unusable
from metaxl_evo.training.sharding import asks_for_shards, refused_with_shards

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, FullyShardedDataParallel)


def refuse_launch(args: MetaTrainingArguments, model: nn.Module, estimator: Estimator | None) -> None:
    """Refuse what would be silently wrong, or fail late: arguments, accelerate's environment, the model handed over.

    Without an estimator only what breaks the base step or its checkpoints is refused.

    Raises:
        ValueError: one line with what was found, the reason and the way out.
    """
    refuse_engines(args)
    refuse(_launch(args))
    refuse(_model(model))
    if asks_for_shards(args):
        refuse(refused_with_shards(args, model, estimator))
    else:
        refuse(_in_parts(model))
    refuse_unusable(args)
    if estimator is not None:
        refuse(_meta_launch(args, model))
        _refuse_second_derivatives(args, estimator)


def _launch(args: MetaTrainingArguments) -> Found:
    precision = _base_precision(args)
    if precision in ("fp16", "fp8"):
        yield precision, "its scaled gradients are not those that meta passes see; use bf16 or float32"
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
    if args.world_size > 1 and (args.bf16_full_eval or args.fp16_full_eval):
        yield "bf16_full_eval", "it leaves the model off its device until then; bf16: true evaluates under autocast"
    if args.enable_jit_checkpoint:
        yield "enable_jit_checkpoint", "SIGTERM ends any training with a whole checkpoint; leave it out"
    if args.save_strategy != SaveStrategy.NO:
        yield from _unresumable(config)


def refuse_unresumable(args: MetaTrainingArguments) -> None:
    """Refuse to resume where that cannot be exact; a run that saves nothing may have such settings.

    Raises:
        ValueError: one line with what was found, the reason and the way out.
    """
    refuse(_unresumable(args.accelerator_config))


def _unresumable(config: Any) -> Found:
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
        if parameter.is_meta:
            yield f"parameters on the meta device ({name})", "they are offloaded or were never loaded; load them whole"
        if not parameter.is_floating_point():
            yield f"{parameter.dtype} parameters ({name})", "quantised weights cannot be moved; load them in float32"


def _in_parts(model: nn.Module) -> Found:
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not Tensor:
            kind = type(parameter.data).__name__
            yield (
                f"parameters that are {kind}s ({name})",
                "sharded or quantised weights cannot be moved; load them plain",
            )


def _meta_launch(args: MetaTrainingArguments, model: nn.Module) -> Found:
    yield from _sixteen_bits(args, model)
    kernel = str(getattr(model, "attention_kernel", None))
    if kernel.startswith("flash_attention") and args.meta_precision != "bf16":
        yield (
            f"attn_implementation: {kernel}",
            f"it knows 16 bits only, and meta passes are in {args.meta_precision}; set attn_implementation: sdpa, or "
            "meta_precision: bf16 beside bf16: true",
        )
    if kernel.startswith("flash_attention") and args.meta_diagnostics_every:
        yield (
            f"meta_diagnostics_every beside {kernel}",
            "what is exact is computed in float32, and it knows 16 bits only; leave it out, or set "
            "attn_implementation: sdpa",
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


def _sixteen_bits(args: MetaTrainingArguments, model: Any) -> Found:
    """Parameters of 16 bits, but for frozen ones of the base below a base step under autocast."""
    learned = {id(p) for one in (model.base_parameters(), model.meta_parameters()) for p in one.values()}
    for name, parameter in model.named_parameters():
        if parameter.element_size() < 4 and id(parameter) in learned:
            yield (
                f"{parameter.dtype} parameters ({name})",
                "meta passes need float32; load them with dtype=torch.float32 (bf16: true still speeds up base steps)",
            )
        if parameter.element_size() < 4 and _base_precision(args) != "bf16":
            yield (
                f"frozen {parameter.dtype} parameters ({name}) below float32 ones",
                "the base step would mix them; set bf16: true, or load them with dtype=torch.float32",
            )


def _base_precision(args: MetaTrainingArguments) -> str:
    given = "fp16" if args.fp16 else "bf16" if args.bf16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return given.lower()


def _refuse_second_derivatives(args: MetaTrainingArguments, estimator: Estimator) -> None:
    for field in ("activation_checkpointing", "gradient_checkpointing", "torch_compile"):
        if getattr(args, field, False) and estimator.second_order:
            raise ValueError(
                f"estimator {args.estimator!r} ({estimator}) differentiates twice, which {field} does not allow: "
                "set the engine to finite_difference or use evograd"
            )
