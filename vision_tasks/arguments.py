"""What the settings of all vision tasks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from metaxl_evo.messages import unknown
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.values import refuse_count
from vision_tasks.images import SYNTHETIC


@dataclass
class VisionTrainingArguments(MetaTrainingArguments):
    """MetaTrainingArguments for tasks whose judging rows do not train."""

    meta_portion: float = field(default=1.0, metadata={"help": "1: rows that judge do not join the train rows."})


@dataclass
class VisionArguments:
    """The data; the optimisation is in MetaTrainingArguments."""

    data: str = field(
        default=SYNTHETIC,
        metadata={"help": "An .npz file (x_train, y_train, x_test, y_test), a Hub id, or `synthetic`: generated."},
    )

    @staticmethod
    def require_known(what: str, given: str, valid: Any) -> None:
        """Raises the error of an unknown choice."""
        if given not in valid:
            raise ValueError(unknown(what, str(given), valid))

    @staticmethod
    def require_count(name: str, value: int | None, least: int = 1) -> None:
        """Raises the error of a number out of range; None is left out."""
        refuse_count(name, value, least)
