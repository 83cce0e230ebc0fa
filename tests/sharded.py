"""Accelerate's own FSDP2 on a CPU, which it would ignore there without a word."""

from __future__ import annotations

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from metaxl_evo.training.trainer import MetaTrainer


class ShardedTrainer(MetaTrainer):
    """A MetaTrainer of processes on a CPU that are taken for ones with a GPU each, with `fsdp: true`."""

    def create_accelerator_and_postprocess(self) -> None:
        state = Accelerator(cpu=True).state
        PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        super().create_accelerator_and_postprocess()
