"""FSDP2 by accelerate: the base of a task is sharded as a root of its own, and its meta network stays whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from metaxl_evo.estimators import ESTIMATORS, Estimator, make_estimator
from metaxl_evo.models.adapters import is_adapted
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.models.losses import TOTALS
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.distributed import Found


def asks_for_shards(args: TrainingArguments) -> bool:
    """Whether the arguments, or `accelerate launch`, say FSDP."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def shard_base_only(accelerator: Accelerator) -> None:
    """Let `accelerator.prepare` shard the base of a task, and leave the task itself as it is.

    Were the task the root, a meta pass, which calls the base and not the task, would find the root's weights not
    gathered; and accelerate knows the layers of a Hugging Face model, not those of a task. Micro-batches are reduced
    one by one: kept for the last one, their gradients would be whole on every process.
    """
    prepare = accelerator.prepare

    def prepared(*objects: Any, **settings: Any) -> Any:
        for task in [one for one in objects if isinstance(one, BilevelModule)]:
            task.meta.to(accelerator.device)
            _name_layers(accelerator.state.fsdp_plugin, task.base)
        found = prepare(*(one.base if isinstance(one, BilevelModule) else one for one in objects), **settings)
        if len(objects) == 1:
            return objects[0] if isinstance(objects[0], BilevelModule) else found
        return tuple(
            one if isinstance(one, BilevelModule) else other for one, other in zip(objects, found, strict=True)
        )

    def reduced(model: Any) -> AbstractContextManager[None]:
        return nullcontext()

    accelerator.prepare, accelerator.no_sync = prepared, reduced


def _name_layers(plugin: Any, base: Any) -> None:
    """Tell accelerate the layers to shard, where nobody has: those that the model names, but for its embeddings.

    Accelerate shards the embedding table by itself, and fails where its module is sharded already (BERT).
    """
    names = getattr(base, "_no_split_modules", None)
    if plugin.transformer_cls_names_to_wrap is None and names:
        table = base.get_input_embeddings()
        holders = {type(one).__name__ for one in base.modules() if table in one.children()}
        plugin.transformer_cls_names_to_wrap = sorted(set(names) - holders)


def stand_ins(judged: Sequence[Batch], count: int) -> list[Batch]:
    """Micro-batches that weigh nothing, so that a process with fewer meta rows makes the passes of the others.

    Raises:
        ValueError: where there is no row to make them of.
    """
    if count and not judged:
        raise ValueError(
            "a process has no meta row in this step, and sharded weights need all processes in every pass: lower "
            "the number of processes or gradient_accumulation_steps, or give more meta rows"
        )
    return [{**judged[-1], TOTALS: dict.fromkeys(judged[-1][TOTALS], float("inf"))} for _ in range(count)]


def refused_with_shards(args: MetaTrainingArguments, model: Any, estimator: Estimator | None) -> Found:
    """What does not work on sharded weights, or is not known to."""
    yield from _refused_plugins(args)
    if args.torch_compile:
        yield "fsdp and torch_compile", "meta passes put weights into the module as it is; leave torch_compile out"
    if is_adapted(model.base):
        yield "fsdp and an adapter", "its small weights need no shards; use DDP (accelerate launch --multi_gpu)"
    if estimator is not None:
        yield from _refused_at_two_levels(args, model, estimator)
    if args.world_size == 1:
        yield "fsdp of one process", "there is nothing to share; leave it out, or start several processes"


def _refused_plugins(args: MetaTrainingArguments) -> Found:
    given = args.fsdp_plugin_args or {}

    def is_set(name: str) -> bool:
        return bool(given.get(name)) if args.fsdp else parse_flag_from_env(f"FSDP_{name.upper()}")

    if is_set("cpu_ram_efficient_loading"):
        yield "fsdp cpu_ram_efficient_loading", "all processes compare what they have loaded; set it to false"
    if is_set("cpu_offload") or is_set("offload_params"):
        yield "fsdp cpu_offload", "meta passes perturb weights where they are computed with; leave it out"
    if is_set("activation_checkpointing"):
        yield "fsdp activation_checkpointing", "it renames the parameters; set gradient_checkpointing: true instead"


def _refused_at_two_levels(args: MetaTrainingArguments, model: Any, estimator: Estimator) -> Found:
    if not estimator.takes_shards:
        yield (
            f"fsdp and {estimator}",
            "double backward and whole trajectories need whole weights; on sharded ones work engine finite_difference "
            f"(jvp where there are no Hessian products), and {', '.join(_on_shards())}",
        )
    if estimator.remembers == "base":
        yield f"fsdp and {estimator}", "the examples that it draws may leave a process without any; use DDP, or greedy"
    if args.bf16 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no" or args.meta_precision == "bf16":
        yield "fsdp and bf16", "small perturbations are lost in weights that are gathered in 16 bits; use float32"
    if model.tuned_optimizer:
        yield "fsdp and a learned optimiser", "its numbers are whole beside weights in parts; use DDP"
    if args.meta_diagnostics_every:
        yield "fsdp and meta_diagnostics_every", "what is exact needs whole weights; leave it at 0"
    if args.episode_reset != "continue":
        yield f"fsdp and episode_reset: {args.episode_reset}", "it was not tried on parts of weights; use DDP"


def _on_shards() -> Iterator[str]:
    for name in ESTIMATORS:
        if make_estimator(name).takes_shards:
            yield name
