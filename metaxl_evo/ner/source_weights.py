"""Weights of source rows: of a language, of a row by its loss or its states; learned, or fixed proportions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.models.weight_net import WeightNet

SUBFOLDER = "weigher"
LEARNED = ("language", "loss", "hidden")
SOURCE_WEIGHTS = ("none", *LEARNED)


class TaggerMeta(nn.Module):
    """The meta level of a tagger whose source rows have learned weights: the weigher, and the RTN if there is one."""

    def __init__(self, rtn: RepresentationTransform | None, weigher: WeightTable | WeightNet) -> None:
        super().__init__()
        self.rtn, self.weigher = rtn, weigher


class SourceWeights(nn.Module):
    """Weights (B,) of source rows, from what is weighed and the proportions that the languages have without.

    Of a `WeightTable` v, that of language k is w_k = f_k v_k / sum_j p_j v_j with f_k = p_k / s_k, where s are the
    shares of the languages among the source tokens and p the `proportions`: the learned shares s_k w_k are p_k v_k,
    normed, so they sum to 1, and the source mean keeps its part beside the target's whatever is learned. It is the
    importance weighting of a sample from s for a mixture of the shares s w, and w = 1 where p = s and v = 1. Of a
    `WeightNet` V, the weight of a row is f_k V(row).

    Args:
        reads: what the weigher reads: `language`, or a row's `loss` or `hidden` states.
        shares: of the languages among the labelled source tokens, (K,), summing to 1.
        proportions: those that they are to have in the source loss (default: `shares`).
    """

    first: Tensor
    factors: Tensor

    def __init__(self, reads: str, shares: Sequence[float], proportions: Sequence[float] | None = None) -> None:
        super().__init__()
        self.reads = reads
        s, p = (torch.tensor(one, dtype=torch.float64) for one in (shares, proportions or shares))
        self.register_buffer("first", p, persistent=False)
        self.register_buffer("factors", torch.ones_like(s) if proportions is None else p / s, persistent=False)

    def of_languages(self, weigher: WeightTable | WeightNet | None) -> Tensor:
        """Of the rows of each language, (K,); of a `WeightNet` what its weights are multiplied by."""
        if not isinstance(weigher, WeightTable):
            return self.factors
        v = weigher.weights()
        return self.factors.to(v) * v / (1 + self.first.to(v) @ (v - 1))  # 1 to the last bit at v = 1

    def forward(self, weigher: WeightTable | WeightNet | None, language: Tensor, seen: Tensor | None = None) -> Tensor:
        """Weights (B,) of rows of these languages (B,), by what a `WeightNet` reads of them, (B,) or (B, H)."""
        of_language = self.of_languages(weigher).to(language.device)[language]
        if seen is None or weigher is None:
            return of_language
        weights: Tensor = weigher(seen)
        return weights * of_language.to(weights)


def proportions_of(given: str, languages: int) -> list[float] | None:
    """`union` (None: as many as there are), `uniform`, or a positive number for each language; they sum to 1.

    Raises:
        ValueError: for what is none of these.
    """
    if given == "union":
        return None
    if given == "uniform":
        return [1 / languages] * languages
    try:
        numbers = [float(one) for one in given.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != languages or not all(0 < one < float("inf") for one in numbers):
        raise ValueError(
            f"source_proportions: {given!r} is neither union nor uniform, nor a positive number for each of the "
            f"{languages} source languages, such as {','.join(['0.5'] * languages)}"
        )
    return [one / sum(numbers) for one in numbers]


def sources_table(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, the source with the largest weight first: sentences, weight of one, share of the source loss, loss."""
    lines = [
        "| source | sentences | weight of one | share of the source loss, % | its loss |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, one in sorted(facts.items(), key=lambda item: -(item[1]["weight"] or 0.0)):
        numbers = (one["weight"], None if one["share"] is None else 100 * one["share"], one["loss"])
        cells = ["-" if number is None else f"{number:.3g}" for number in numbers]
        lines.append(f"| {name} | {one['sentences']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def last_logged(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The last number of this key in a log; None where there is none."""
    return next((row[key] for row in reversed(history) if key in row), None)
