"""Pictures of results, where matplotlib is installed (`pip install metaxl_evo[plot]`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files alone.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


@contextmanager
def figure(file: Path, columns: int = 1, size: tuple[float, float] = (6.4, 4.0)) -> Iterator[list[Any]]:
    """Axes side by side to draw on, saved at the end.

    Args:
        size: of the whole, in inches.

    Raises:
        ImportError: without matplotlib.
    """
    plt = pyplot()
    made, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    yield list(axes[0])
    made.savefig(file, dpi=120)
    plt.close(made)
