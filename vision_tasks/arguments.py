"""What the settings of all vision experiments share: the data, and the runs that one command makes and compares."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from metaxl_evo.messages import unknown
from metaxl_evo.training.arguments import MetaTrainingArguments
from vision_tasks.images import SYNTHETIC


@dataclass
class VisionTrainingArguments(MetaTrainingArguments):
    """MetaTrainingArguments for tasks whose judging rows do not train."""

    meta_portion: float = field(default=1.0, metadata={"help": "1: rows that judge do not join the train rows."})


@dataclass
class VisionArguments:
    """Data and runs; the optimisation is in MetaTrainingArguments.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    data: str = field(
        default=SYNTHETIC,
        metadata={"help": "An .npz file (x_train, y_train, x_test, y_test), a Hub id, or `synthetic`: generated."},
    )
    runs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Name -> settings that this run has over all others (null: leave it out); the first is the "
            "baseline (default: one run). Each goes into a folder of its own."
        },
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Repetitions: every run is made with each of these seeds (default: seed)."}
    )
    check: bool = field(default=False, metadata={"help": "Run a few steps, print a verdict, write nothing."})

    def __post_init__(self) -> None:
        seeds = [0] if self.seeds is None else self.seeds
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
            raise ValueError(f"seeds must be different whole numbers of at least 0, below 2**32, not {seeds}")
        known = {one.name for cls in (type(self), MetaTrainingArguments) for one in fields(cls) if one.init}
        known -= {"runs", "seeds", "seed", "check", "output_dir", "resume_from_checkpoint"}
        self.runs = {name: settings for name, settings in self.runs.items() if settings is not None}
        for name, settings in self.runs.items():
            if not name or not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"runs: {name!r} names a folder: use letters, digits, - and _")
            if not isinstance(settings, dict):
                raise ValueError(f"runs: {name} must be a mapping of settings, as in {{}}, not {settings!r}")
            for key in settings:
                self.require_known(f"setting of run {name}", key, sorted(known))

    @staticmethod
    def require_known(what: str, given: str, valid: Any) -> None:
        """Raises the error of an unknown choice."""
        if given not in valid:
            raise ValueError(unknown(what, str(given), valid))

    @staticmethod
    def require_count(name: str, value: int | None, least: int = 1) -> None:
        """Raises the error of a number out of range; None is left out."""
        whole = isinstance(value, int) and not isinstance(value, bool)  # a run's own settings come as they are
        if value is not None and not (whole and least <= value < 2**31):
            raise ValueError(f"{name} must be a whole number of at least {least} and below 2**31, not {value!r}")
