"""The numbers of a mixture of domains: where it starts, its table, and the table of a run read back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from metaxl_evo.messages import one_line

TABLE = "mixture.csv"


def first_logits(shares: Mapping[str, float], sizes: Mapping[str, int], sampled: bool) -> Tensor:
    """Of a softmax table (K,) whose domains have these shares of what trains, up to one number for all.

    Sampled texts have a domain's share itself as its probability; texts of the union weigh share / size each.
    """
    by = {name: share if sampled else share / sizes[name] for name, share in shares.items()}
    return torch.tensor([math.log(by[name]) for name in sizes])


def union_shares(sizes: Mapping[str, int]) -> dict[str, float]:
    """Of the union of the texts: as many as there are."""
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def uniform_shares(sizes: Mapping[str, int]) -> dict[str, float]:
    """All domains alike, however large."""
    return dict.fromkeys(sizes, 1 / len(sizes))


def mixture_table(weights: Sequence[float], sizes: Mapping[str, int], sampled: bool) -> list[dict[str, Any]]:
    """Rows domain, texts, weight, share.

    `weight` is that of a text beside the others, 1 on average over domains; `share` is the domain's of what trains.

    Args:
        weights: of the domains: of a text each, or where it is sampled, of the whole domain.
    """
    of_text = [weight / size if sampled else weight for weight, size in zip(weights, sizes.values(), strict=True)]
    mean = sum(of_text) / len(of_text)
    whole = sum(weight * size for weight, size in zip(of_text, sizes.values(), strict=True))
    return [
        {"domain": name, "texts": size, "weight": weight / mean, "share": weight * size / whole}
        for (name, size), weight in zip(sizes.items(), of_text, strict=True)
    ]


def read_shares(place: str | Path) -> dict[str, float]:
    """Domain -> share, of a run's folder or the `mixture.csv` in it; they sum to 1.

    Raises:
        ValueError: one line for a file that is missing, or no such table.
    """
    file = Path(place).expanduser()
    file = file / TABLE if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{file} is not there: give the folder of a mix-text run, or its {TABLE}")
    try:
        table = pd.read_csv(file, keep_default_na=False, dtype={"domain": str})
        shares = dict(zip(table["domain"], table["share"].astype(float), strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file} is no mixture of a run ({one_line(error)}): give the folder of a mix-text run"
        ) from error
    if not shares or len(shares) < len(table) or not all(0 < share <= 1 for share in shares.values()):
        raise ValueError(f"{file}: each domain needs a share of its own, above 0 and at most 1")
    whole = sum(shares.values())
    if abs(whole - 1) > 1e-3:
        raise ValueError(f"{file}: the shares sum to {whole:g}, not to 1")
    return {name: share / whole for name, share in shares.items()}


def shares_for(place: str | Path, sizes: Mapping[str, int]) -> dict[str, float]:
    """`read_shares` for exactly these domains.

    Raises:
        ValueError: naming what differs.
    """
    shares = read_shares(place)
    if set(shares) != set(sizes):
        raise ValueError(
            f"mixture_from: {place} is of {', '.join(sorted(shares))}, here train {', '.join(sorted(sizes))}: set "
            "domains to the same ones"
        )
    return shares
