"""The state of a sharded base optimiser as files: each process writes its rows, and any number of them reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers.trainer import OPTIMIZER_NAME

from metaxl_evo.bilevel import shards
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.training.checkpoint import read_tensors

SHARDS = "optimizer_shards"  # in safetensors: torch's own format is read by unpickling
_BEFORE_KEY = "/"


def save_optimizer(optimizer: torch.optim.Optimizer, parameters: Tree, checkpoint: Path, *, first: bool) -> None:
    """Write the state of these parameters, on all processes, and on the first one the settings of the groups.

    Raises:
        ValueError: for a state that is not made of tensors.
    """
    held = {
        f"{name}{_BEFORE_KEY}{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }
    for name, value in held.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the optimiser's {name} is a {type(value).__name__}, of which no shard can be saved")
    folder = checkpoint / SHARDS
    if first:
        shutil.rmtree(folder, ignore_errors=True)  # what a save on more processes has left would be read
        folder.mkdir(parents=True)
        torch.save(optimizer.state_dict() | {"state": {}}, checkpoint / OPTIMIZER_NAME)
    dist.barrier()
    if held:
        save(held, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: Tree, checkpoint: Path) -> None:
    """Read what `save_optimizer` wrote, or a whole state, for parameters that are sharded or not."""
    saved = read_tensors(checkpoint / OPTIMIZER_NAME)
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {
        number: {key: _as_held(value, ordered[number]) for key, value in of_one.items()}
        for number, of_one in saved["state"].items()
    }
    numbers = {id(parameter): number for number, parameter in enumerate(ordered)}
    for name, value in _read(checkpoint / SHARDS, parameters).items():
        owner, _, key = name.rpartition(_BEFORE_KEY)
        state.setdefault(numbers[id(parameters[owner])], {})[key] = value
    optimizer.load_state_dict({**saved, "state": state})


def _read(folder: Path, parameters: Tree) -> Tree:
    """The state by its names in the files, sharded as its parameter is."""
    if not any(folder.glob("*.safetensors")):
        return {}
    reader: Any = HuggingFaceStorageReader(str(folder))
    found: Tree = {}
    for name, one in reader.read_metadata().state_dict_metadata.items():
        leaf = parameters[name.rpartition(_BEFORE_KEY)[0]].detach()
        like = leaf if one.size == leaf.shape else torch.empty(one.size)
        found[name] = torch.zeros_like(like, dtype=one.properties.dtype)
    load(found, storage_reader=reader)
    return found


def _as_held(value: Any, leaf: Tensor) -> Any:
    """A whole tensor of an optimiser's state, sharded where its parameter is and on its device."""
    if not isinstance(value, Tensor) or value.shape != leaf.shape or not value.dim():
        return value
    return shards.part_of(value.to(leaf.device), leaf.detach())
