"""Leaves of which every process holds some rows: what of them is here, and sums over all of them.

They are DTensors along their first dimension, as `torch.distributed.fsdp.fully_shard` makes them. Algebra entry by
entry is theirs as it is of any tensor; a norm or an inner product is a number of each process and one sum.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard


def is_sharded(leaf: Tensor) -> bool:
    """Whether other processes hold other rows of a leaf."""
    return isinstance(leaf, DTensor)


def any_sharded(a: Mapping[str, Tensor]) -> bool:
    """Whether a tree has such leaves."""
    return any(map(is_sharded, a.values()))


def local(a: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that are here, as plain tensors on the same storage, outside of any graph; plain leaves as they are."""
    return {name: leaf.to_local().detach() if isinstance(leaf, DTensor) else leaf for name, leaf in a.items()}


def like(a: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`rows` that are here, as leaves that are sharded where those of `a` are; the inverse of `local`."""
    return {name: _sharded_as(a[name], leaf) for name, leaf in rows.items()}


def first_row(leaf: Tensor) -> int:
    """The number of the first of the rows that are here."""
    if not isinstance(leaf, DTensor):
        return 0
    each = -(-leaf.shape[0] // leaf.device_mesh.size())
    return min(each * leaf.device_mesh.get_local_rank(), leaf.shape[0])


def part_of(whole: Tensor, leaf: Tensor) -> Tensor:
    """A tensor that every process holds whole, sharded as a leaf of its shape; as it is beside a plain one."""
    first = first_row(leaf)
    (here,) = local({"": leaf}).values()
    return whole if here is leaf else _sharded_as(leaf, whole[first : first + len(here)].contiguous())


def processes_of(a: Mapping[str, Tensor]) -> int:
    """Among how many the leaves are sharded."""
    return max((leaf.device_mesh.size() for leaf in a.values() if isinstance(leaf, DTensor)), default=1)


def total(a: Mapping[str, Tensor], share: Tensor) -> Tensor:
    """A number that each process computed of its rows of `a`, summed in place; as it is of plain leaves."""
    held = [leaf for leaf in a.values() if isinstance(leaf, DTensor)]
    if held:
        dist.all_reduce(share, group=held[0].device_mesh.get_group())
    return share


def require_rows(a: Mapping[str, Tensor]) -> None:
    """Refuse weights that are sharded otherwise than by rows over one mesh.

    Raises:
        ValueError: naming one.
    """
    for name, leaf in a.items():
        if not isinstance(leaf, DTensor) or leaf.device_mesh.ndim != 1 or leaf.placements != (Shard(0),):
            how = leaf.placements if isinstance(leaf, DTensor) else "no DTensor"
            raise ValueError(
                f"base weights are sharded by rows over one mesh, and {name} is not ({how}): use fully_shard with a "
                "mesh of one dimension, and without shard_placement_fn"
            )


def _sharded_as(leaf: Tensor, rows: Tensor) -> Tensor:
    if not isinstance(leaf, DTensor):
        return rows
    return DTensor.from_local(
        rows, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
    )
