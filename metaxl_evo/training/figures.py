"""Pictures of results, where matplotlib is installed (`pip install metaxl_evo[plot]`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metaxl_evo.training.durable import whole


@contextmanager
def figure(
    file: Path, columns: int = 1, size: tuple[float, float] = (6.4, 4.0), *, rows: int = 1, dpi: int = 120
) -> Iterator[list[Any]]:
    """Axes to draw on, row by row, saved at the end.

    Args:
        size: of the whole, in inches.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    yield list(axes.flat)
    try:
        with whole(file) as draft:
            made.savefig(draft, dpi=dpi, format=file.suffix[1:])
    finally:
        plt.close(made)
