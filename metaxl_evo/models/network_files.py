"""Networks as files, as transformers' own models are: `model.safetensors`, of our small networks `config.json` too."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from metaxl_evo.bilevel.base_weights import reshard
from metaxl_evo.bilevel.shards import part_of
from metaxl_evo.bilevel.tree import copy_into
from metaxl_evo.messages import first_line, one_line

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "model_type"
Network = TypeVar("Network", bound=nn.Module)


def save_network(folder: str | Path, model_type: str, config: Mapping[str, Any], network: nn.Module) -> None:
    """Write both files into `folder`, which is made if need be; `config` are the fields that make the network anew."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = json.dumps({MODEL_TYPE: model_type, **config}, indent=2)
    (folder / CONFIG_FILE).write_text(written + "\n", encoding="utf-8")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_network(folder: str | Path, model_type: str, make: Callable[..., Network]) -> Network:
    """The network of both files, on the CPU, in the dtype that it was saved in.

    Args:
        make: the fields of the configuration as keywords -> the network.

    Raises:
        ValueError: for a file that is missing, damaged or of another kind of network, named.
    """
    config_file, weights_file = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if config.pop(MODEL_TYPE) != model_type:
            raise ValueError("of another model type")
        network = make(**config)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{config_file} does not describe a {model_type} ({one_line(error)}): use another checkpoint"
        ) from error
    try:
        network.load_state_dict(load_file(weights_file, device="cpu"), assign=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights_file} cannot be read ({one_line(error)}): use another checkpoint") from error
    return network


def save_state(network: Any, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """By the network's own `save_pretrained` where it has one, else its state as `model.safetensors`.

    Args:
        state: the whole state of a network that is sharded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if callable(getattr(network, "save_pretrained", None)):
        network.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    elif state is not None:
        save_file(dict(state), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    else:
        save_model(network, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def load_state(network: nn.Module, folder: Path) -> None:
    """Read back what `save_state` wrote, by safetensors.

    Raises:
        ValueError: for a file that is missing, damaged or of another network, named.
    """
    file = folder / WEIGHTS_FILE
    try:
        if isinstance(network, FSDPModule):
            _give(network, load_file(file, device="cpu"))
        else:
            load_model(network, file, strict=True, device="cpu")
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({one_line(error)}): use another checkpoint") from error


def load_pretrained_weights(base: Any, folder: Path) -> None:
    """Read the weights of a transformers model, in its own dtype, from what its `save_pretrained` wrote.

    Raises:
        ValueError: for a file that is missing, damaged or incomplete, named.
    """
    file = folder / WEIGHTS_FILE
    dtype = next(base.parameters()).dtype
    try:
        saved, report = type(base).from_pretrained(
            folder, config=copy.deepcopy(base.config), dtype=dtype, output_loading_info=True
        )
    except pickle.UnpicklingError as error:  # of a pytorch_model.bin; its text advises to run what it refused
        raise ValueError(
            f"{file} is missing, and the weights beside it are more than tensors: use another checkpoint"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({first_line(error)}): use another checkpoint") from error
    if report["missing_keys"]:
        raise ValueError(f"{file} has no {sorted(report['missing_keys'])[0]}: use another checkpoint")
    _give(base, saved.state_dict())


def _give(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state, of which a sharded network takes the rows that are here."""
    if not isinstance(network, FSDPModule):
        network.load_state_dict(state)
        return
    reshard(network)
    held = network.state_dict()
    copy_into(held, {name: part_of(state[name].to(leaf.device), leaf) for name, leaf in held.items()})
