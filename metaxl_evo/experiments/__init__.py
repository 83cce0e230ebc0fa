"""Methods x cases x seeds: how a study is planned, made, compared and reported, whatever its task."""

from metaxl_evo.experiments.scores import Rate
from metaxl_evo.experiments.task import Task

__all__ = ["Rate", "Task"]
