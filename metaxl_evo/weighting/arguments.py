"""What the settings of all weighting tasks share: the model, its adapter, and the columns of the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from metaxl_evo.messages import unknown
from metaxl_evo.models.adapters import LoraArguments
from metaxl_evo.training.values import refuse_count
from metaxl_evo.weighting.drawn import SYNTHETIC


class Checked:
    """Settings that say in one line what they cannot be."""

    @staticmethod
    def require_known(name: str, given: str, valid: Iterable[str]) -> None:
        """Raises the error of an unknown choice."""
        if given not in list(valid):
            raise ValueError(unknown(name, str(given), valid))

    @staticmethod
    def require_count(name: str, value: Any, least: int = 1) -> None:
        """Raises the error of a number out of range; None is left out."""
        refuse_count(name, value, least)


@dataclass(kw_only=True)
class WeigherArguments(Checked):
    """What learned weights have in common, whatever they are of."""

    floor: float = field(default=0.0, metadata={"help": "The least weight that is learned, from 0 to below 1."})
    weigher_hidden: int = field(default=100, metadata={"help": "Hidden units of a weighing network."})

    def check_weigher(self) -> None:
        """Refuse values that cannot be."""
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must be at least 0 and below 1, not {self.floor}")
        self.require_count("weigher_hidden", self.weigher_hidden)


@dataclass
class TextArguments(LoraArguments, Checked):
    """Model and data; the optimisation is in MetaTrainingArguments.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    model_name_or_path: str = field(
        default=SYNTHETIC,
        metadata={"help": "Hub id or folder of a model, or `synthetic`: a small random one for the drawn data."},
    )
    data: str = field(
        default=SYNTHETIC,
        metadata={
            "help": "A .csv, .tsv, .jsonl, .json, .parquet or .txt file, a folder of such files train, validation "
            "and test, a Hub id, or `synthetic`: drawn."
        },
    )
    data_configuration: str | None = field(default=None, metadata={"help": "Configuration of a Hub id."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    label_column: str = field(default="label", metadata={"help": "Column of the label: a name, or an integer."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text at most."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the model brings along (auto_map); read it first."}
    )

    def __post_init__(self) -> None:
        self.require_count("max_length", self.max_length)
        self.check_lora()
        if self.model_name_or_path == SYNTHETIC and self.data != SYNTHETIC:
            raise ValueError(
                "model_name_or_path: the synthetic model knows the drawn words alone: give a model for these data"
            )
