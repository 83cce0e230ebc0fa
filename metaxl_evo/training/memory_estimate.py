"""How much memory a process needs to train at two levels with a sharded base: a formula, term by term.

Weights and moments are counted off the model's configuration; what autograd keeps of a micro-batch by a forward on the
meta device, which has shapes and no numbers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from metaxl_evo.messages import first_line, unknown

HEADS: dict[str, Any] = {
    "tokens": AutoModelForTokenClassification,
    "rows": AutoModelForSequenceClassification,
    "language": AutoModelForCausalLM,
}
BESIDE = {  # trees like the weights, beside them and the moments, at the most
    "none": 0,
    "one_step": 4,  # the weights before the step, a direction, perturbed weights, those that they displace
    "evograd": 3,  # the same without the direction
}
BYTES, GIB = 4, 2**30  # of a float32 number
TOGETHER = 3  # a layer's weights, their gradient, and the same in the order in which it is sent
LEARNED = 4  # the meta network, its gradient and moments


@dataclass
class MemoryArguments:
    """What is to be trained, on how many processes."""

    model_name_or_path: str = field(metadata={"help": "A folder, or a Hub id, with the config.json of the base."})
    head: str = field(default="language", metadata={"help": f"What the base is for: {', '.join(HEADS)}."})
    processes: int = field(default=8, metadata={"help": "Among which the base is sharded."})
    rows: int = field(default=1, metadata={"help": "Of a micro-batch."})
    tokens: int = field(default=512, metadata={"help": "Of a row."})
    estimator: str = field(default="one_step", metadata={"help": f"{', '.join(BESIDE)}; one_step by differences."})
    moments: int = field(default=2, metadata={"help": "Trees like the weights in the optimiser: 2 of AdamW."})
    meta_parameters: int = field(default=0, metadata={"help": "Numbers of the meta network."})

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(unknown("head", self.head, HEADS))
        if self.estimator not in BESIDE:
            raise ValueError(unknown("estimator whose memory was measured", self.estimator, BESIDE))
        for name, least in {"processes": 2, "rows": 1, "tokens": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(frozen=True)
class Memory:
    """The peak of one process, in bytes.

    Args:
        weights, moments: this process's rows.
        perturbed: its rows of other trees like the weights.
        pass_: what a pass takes: activations and the layers that are gathered, where they are most.
        meta: the meta network with its gradient and moments, whole.
    """

    weights: float
    moments: float
    perturbed: float
    pass_: float
    meta: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def estimate_memory(args: MemoryArguments) -> None:
    """Print the terms, and their sum.

    Raises:
        ValueError: for a model whose configuration cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path)
        with torch.device("meta"):
            base = HEADS[args.head].from_config(config, dtype=torch.float32)
    except Exception as error:  # of any class, as the file may lead the library anywhere
        raise ValueError(f"model_name_or_path: {args.model_name_or_path!r} ({first_line(error)})") from error
    found = memory_of(base, args)
    for name, size in [*asdict(found).items(), ("in all", found.total)]:
        print(f"{name.rstrip('_'):<10} {size / GIB:10.3g} GiB")


def memory_of(base: Any, args: MemoryArguments) -> Memory:
    """The terms for a base on the meta device.

    A backward is at its peak where it begins, at the last layer, or where it ends, at the embedding table, when all
    other gradients are there.
    """
    whole = _size(base)
    mine = whole / args.processes
    layers = [one for one in base.modules() if type(one).__name__ in (base._no_split_modules or ())]
    table = base.get_input_embeddings()
    largest = max((_size(one) for one in layers if table not in one.children()), default=whole)
    begins = activations(base, args.rows, args.tokens) + TOGETHER * largest
    ends = mine + TOGETHER * _size(table)
    return Memory(
        weights=mine,
        moments=args.moments * mine,
        perturbed=BESIDE[args.estimator] * mine,
        pass_=max(begins, ends),
        meta=LEARNED * BYTES * args.meta_parameters,
    )


def activations(base: nn.Module, rows: int, tokens: int) -> int:
    """The bytes that autograd keeps of a forward, of a base on the meta device, for its backward."""
    own = {parameter.untyped_storage()._cdata for parameter in base.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base(input_ids=torch.zeros(rows, tokens, dtype=torch.long, device="meta"))
    return sum(storage.nbytes() for storage in kept.values())


def _size(module: nn.Module) -> int:
    return BYTES * sum(math.prod(parameter.shape) for parameter in module.parameters())
