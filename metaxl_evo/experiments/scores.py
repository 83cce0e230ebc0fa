"""Scores that bring the test examples they are made of, so that a comparison can resample them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from metaxl_evo.experiments.folders import understood

OUTCOMES = "outcomes.csv"
PARTS = ("numerator", "denominator")


class Rate(float):
    """A score that is a ratio of sums over the test examples: an accuracy, an entity F1, a mean loss.

    It is a plain number wherever one is wanted.

    Attributes:
        outcomes: (N, 2) numerators and denominators of the examples, in the order of the test set.
    """

    outcomes: NDArray[np.float64]

    @classmethod
    def of(cls, numerators: ArrayLike, denominators: ArrayLike, value: float | None = None) -> Rate:
        """The ratio of the sums, 0 where there is nothing to divide by.

        Args:
            numerators, denominators: (N,).
            value: the same score as another program computed it, of which every digit is kept.

        Raises:
            ValueError: where `value` is another score.
        """
        outcomes = np.stack([np.asarray(numerators, float), np.asarray(denominators, float)], axis=1)
        above, below = outcomes.sum(0)
        ratio = above / below if below else 0.0
        if value is not None and not isclose(value, ratio, rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError(f"a score of {value} is not that of its examples, {ratio}: please report this as a bug")
        rate = cls(ratio if value is None else value)
        rate.outcomes = outcomes
        return rate

    @classmethod
    def mean(cls, values: Iterable[Any] | ArrayLike) -> Rate:
        """The mean of (N,) numbers, one an example: hits (0 or 1), losses."""
        numbers = np.asarray(values, float).reshape(-1)
        return cls.of(numbers, np.ones_like(numbers))


def write_outcomes(folder: Path, scores: Mapping[str, Any]) -> None:
    """`outcomes.csv`: a row a test example, two columns a score; nothing where no score brings its examples.

    Raises:
        ValueError: where scores have another number of examples.
    """
    held = {name: score.outcomes for name, score in scores.items() if isinstance(score, Rate)}
    if len({len(one) for one in held.values()}) > 1:
        raise ValueError(f"the scores {', '.join(held)} are of different numbers of test examples")
    if held:
        parts = {name: pd.DataFrame(one, columns=list(PARTS)) for name, one in held.items()}
        pd.concat(parts, axis=1).to_csv(folder / OUTCOMES, index=False)


def read_outcomes(folder: Path) -> dict[str, NDArray[np.float64]]:
    """What `write_outcomes` left: score -> (N, 2); empty where it left nothing."""
    if not (folder / OUTCOMES).is_file():
        return {}
    with understood(folder / OUTCOMES):
        table = pd.read_csv(folder / OUTCOMES, header=[0, 1])
        return {str(name): table[name][list(PARTS)].to_numpy(float) for name in table.columns.unique(0)}
