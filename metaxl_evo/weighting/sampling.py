"""A mixture as what is sampled: the domain of each row of a step is drawn by the weights as they then are."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

DRAWN = "drawn_weight"  # column of a batch: the weight by which a row's domain was drawn


class MixtureRows:
    """Rows of several domains, of which each step draws its own: first a domain by its share p, then a row of it.

    Row i of a step is a function of (p, seed, step, i): the same on any number of processes, however the step is cut
    into micro-batches, and after resume. Rows are drawn with replacement; an epoch is as many rows as there are.

    The derivative by p is that of importance weights under the drawn sample: row i counts w_k(lam) / w_k(drawn), which
    is 1, and whose derivative is d log p_k, the score function (Williams, Machine Learning 1992; as reweighting:
    Owen, Monte Carlo, 2013, ch. 9). Over draws the derivative of a mean of rows, and so of its gradient, is unbiased:
    E d_lam (p_k(lam) / p_k) l_i = d_lam sum_k p_k(lam) E_k l. A mean over tokens is a ratio, with a bias of
    O(1 / rows) where rows are of unequal lengths. A hypergradient multiplies this by a cotangent at weights that the
    same rows have moved, a bias of O(learning rate) as in any one-step estimate; AdamW's step is not linear in its
    gradient, which biases it further.

    Args:
        rows: with a column `number`, of the domain, counted from 0.

    Raises:
        ValueError: for rows that stream, or a domain without rows.
    """

    def __init__(self, rows: Dataset) -> None:
        if not isinstance(rows, Dataset):
            raise ValueError(f"a {type(rows).__name__} has no rows to draw by number: load it whole, or weigh losses")
        self.rows = rows
        numbers = np.asarray(rows["number"][:])
        self.places = [np.flatnonzero(numbers == number) for number in range(int(numbers.max()) + 1)]
        if empty := [number for number, places in enumerate(self.places) if not len(places)]:
            raise ValueError(f"domain number {empty[0]} has no rows to draw: leave it out")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row as it lies there; the trainer counts epochs by them, and trains on `drawn` ones."""
        row: dict[str, Any] = self.rows[index]
        return {**row, DRAWN: 1.0}

    def drawn(self, weights: Tensor, seed: int, step: int, places: range) -> list[dict[str, Any]]:
        """The rows at these places of a step, each with the weight of its domain.

        Args:
            weights: of the domains, (K,), of any positive sum.
            places: of all rows of the step, over all micro-batches and processes.
        """
        w = weights.detach().double().cpu().numpy()
        points = np.random.default_rng([29, seed, step]).random((places.stop, 2))[places.start :]
        domains = np.searchsorted(np.cumsum(w / w.sum())[:-1], points[:, 0], side="right")
        return [self._row(domain, point, w) for domain, point in zip(domains, points[:, 1], strict=True)]

    def _row(self, domain: int, point: float, weights: np.ndarray) -> dict[str, Any]:
        of_domain = self.places[domain]
        row: dict[str, Any] = self.rows[int(of_domain[int(point * len(of_domain))])]
        return {**row, DRAWN: float(weights[domain])}
