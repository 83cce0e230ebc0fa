"""A schedule as a meta network: learning rate, momentum and weight decay in windows of an inner training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaxl_evo.bilevel.update import Windowed
from metaxl_evo.models.network_files import load_network, save_network

KINDS = ("lr", "momentum", "weight_decay")
SUBFOLDER = "schedule"
MODEL_TYPE = "metaxl_schedule"
ANYWHERE = (-math.inf, math.inf)


class Schedule(nn.Module):
    """The numbers that are learned, and what became of the trainings that were made with them.

    Args:
        windows: of each kind the number of its values; a kind that is left out is not learned.
        trainings: how many are to be made; what they were made with, and how they ended, is kept with the numbers, so
            that a checkpoint holds it.

    Attributes:
        tried: (trainings, values) what each began with, kind by kind.
        losses: (trainings,) the outer loss at its end; NaN where it is to come, infinite where the weights diverged.
        slopes: (trainings, values) the last hypergradient in each, zero where there was none.
    """

    tried: Tensor
    losses: Tensor
    slopes: Tensor

    def __init__(self, windows: Mapping[str, int], trainings: int = 1) -> None:
        super().__init__()
        self.kinds = [kind for kind in KINDS if windows.get(kind)]
        for kind in self.kinds:
            self.register_parameter(kind, nn.Parameter(torch.zeros(windows[kind])))
        size = sum(windows[kind] for kind in self.kinds)
        self.register_buffer("tried", torch.zeros(trainings, size))
        self.register_buffer("slopes", torch.zeros(trainings, size))
        self.register_buffer("losses", torch.full((trainings,), math.nan))

    def windows(self) -> dict[str, int]:
        """The number of values of each kind."""
        return {kind: leaf.numel() for kind, leaf in self.named_parameters()}

    def over(self, steps: int) -> dict[str, Windowed]:
        """The `tuned_optimizer` of a task whose trainings have so many steps."""
        return {kind: Windowed(kind, steps) for kind in self.kinds}

    def values(self, row: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Kind and values of a row of `tried` or `slopes`."""
        sizes = self.windows()
        return zip(sizes, row.split(list(sizes.values())), strict=True)

    def row(self, leaves: Mapping[str, Tensor] | None = None) -> Tensor:
        """The numbers as they are, or others like them, as such a row."""
        held = dict(self.named_parameters()) if leaves is None else leaves
        return torch.cat([held[kind].detach().flatten() for kind in self.kinds])

    @torch.no_grad()
    def put(self, row: Tensor) -> None:
        """Take these numbers."""
        for kind, values in self.values(row):
            self.get_parameter(kind).copy_(values)

    def plain(self) -> dict[str, list[float]]:
        """The numbers as they are, for a file."""
        return {kind: leaf.tolist() for kind, leaf in self.named_parameters()}

    def save(self, folder: str | Path) -> None:
        """Write it into its subfolder of a run."""
        config: dict[str, Any] = {"windows": self.windows(), "trainings": len(self.losses)}
        save_network(Path(folder) / SUBFOLDER, MODEL_TYPE, config, self)

    def load(self, folder: str | Path) -> None:
        """Read back what `save` wrote.

        Raises:
            ValueError: for one of another size.
        """
        saved = load_network(Path(folder) / SUBFOLDER, MODEL_TYPE, Schedule)
        if saved.windows() != self.windows() or len(saved.losses) != len(self.losses):
            raise ValueError(
                f"{folder} has a schedule of {saved.windows()} over {len(saved.losses)} trainings, here are "
                f"{self.windows()} over {len(self.losses)}: set the same"
            )
        self.load_state_dict(saved.state_dict())
