"""Settings of a benchmark."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

from transformers import XLMRobertaConfig

from metaxl_evo.benchmark.rows import Row
from metaxl_evo.estimators import ESTIMATORS
from metaxl_evo.messages import unknown
from metaxl_evo.training.arguments import META_ORDERS, MetaTrainingArguments
from vision_tasks import fewshot
from vision_tasks.backbones import BACKBONES

PROBLEMS = ("regression", "tagger", "weight_net", "rotation", "fewshot", "peers")
OF_PEERS = ("weight_net", "tagger")
WIDE = ("resnet32", *fewshot.BACKBONES)  # backbones that have a width


@dataclass
class BenchmarkArguments:
    """What is compared, on which problem, and how often.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    output_dir: str = field(metadata={"help": "Where results.json, table.md and the plots are written."})
    problem: str = field(
        default="regression",
        metadata={
            "help": "regression: a decay for each feature learned over whole episodes, in float64; tagger: an XLM-R "
            "with random weights and an RTN, in a MetaTrainer; weight_net: an image classifier on noisy labels with a "
            "loss-weighting net, in a MetaTrainer; rotation: an image classifier with a learned angle, the same; "
            "fewshot: an episodic classifier with a feature-wise transform, the same; peers: one SGD step of `cases` "
            "beside other libraries, on the CPU."
        },
    )
    cases: dict[str, Any] = field(
        default_factory=lambda: {"weight_net": {"problem": "weight_net"}},
        metadata={
            "help": f"Name -> what is other in this case than in the settings around it, a problem of {OF_PEERS} at "
            "least; all is measured once for each (peers)."
        },
    )
    estimators: list[str] = field(
        default_factory=lambda: list(ESTIMATORS), metadata={"help": "Names of the estimators (default: all)."}
    )
    variants: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Estimator -> list of its settings, a row each (default: one row of its default settings)."},
    )
    orders: list[str] = field(
        default_factory=lambda: list(META_ORDERS),
        metadata={"help": f"Of {', '.join(META_ORDERS)} (in a MetaTrainer)."},
    )
    repeats: int = field(default=9, metadata={"help": "Timed runs of each row."})
    warmup: int = field(default=1, metadata={"help": "Runs of each row before them."})
    noise_draws: int = field(
        default=8, metadata={"help": "Estimates of a stochastic estimator whose scatter is seen."}
    )
    seed: int = field(default=0, metadata={"help": "Of weights, data, noise and the order of the runs."})
    horizons: list[int] = field(default_factory=lambda: [1], metadata={"help": "Steps of an episode (regression)."})
    learning_rate: float = field(default=0.1, metadata={"help": "Of the inner SGD (regression, peers)."})
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Fields of XLMRobertaConfig (tagger; default: base shape)."}
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of a LoRA adapter that is trained in place of the base (tagger)."}
    )
    rtn_layer: list[int] = field(
        default_factory=lambda: [12], metadata={"help": "The RTN is after this layer; all is measured once for each."}
    )
    batch_size: int = field(default=100, metadata={"help": "Images of a batch (peers)."})
    length: int = field(default=64, metadata={"help": "Tokens of a sentence (tagger)."})
    backbone: str = field(
        default="convnet",
        metadata={
            "help": f"One of {', '.join(BACKBONES)} (weight_net, rotation, peers) or {', '.join(fewshot.BACKBONES)} "
            "(fewshot)."
        },
    )
    widths: list[int] | None = field(
        default=None,
        metadata={
            "help": "Times the channels of resnet32, or channels of the stem (fewshot); all is measured once for each."
        },
    )
    blocks: int | None = field(default=None, metadata={"help": "Of each stage of resnet32 (default: 5)."})
    weight_net_hidden: list[int] = field(
        default_factory=lambda: [100],
        metadata={
            "help": "Hidden units of the weighting net, which has 3 times as many parameters + 1 (weight_net); all is "
            "measured once for each. The first one is that of peers."
        },
    )
    one_at_a_time: bool = field(
        default=False,
        metadata={
            "help": "Widths at the first weight_net_hidden and weight_net_hidden at the first width (default: all "
            "combinations)."
        },
    )
    image_size: int = field(default=16, metadata={"help": "Pixels of a side (weight_net, rotation, fewshot, peers)."})
    image_channels: int = field(default=1, metadata={"help": "1 or 3, the same thrice (weight_net, rotation, peers)."})
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Fields of MetaTrainingArguments, such as use_cpu and batch sizes (in a MetaTrainer)."},
    )

    def __post_init__(self) -> None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("a benchmark measures one process, and several would write the same files: use python")
        self._known("problem", [self.problem], PROBLEMS)
        self._known("estimator", self.estimators, ESTIMATORS)
        self._known("estimator", self.variants, ESTIMATORS)
        self._known("order", self.orders, META_ORDERS)
        self._known("training field", self.training, [one.name for one in fields(MetaTrainingArguments) if one.init])
        self._known("model field", self.model, [*XLMRobertaConfig().to_dict(), "num_labels"])
        self._known("backbone", [self.backbone], fewshot.BACKBONES if self.problem == "fewshot" else BACKBONES)
        for name in ("repeats", "noise_draws", "length", "batch_size", "image_size", "lora_r", "blocks"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, not {self.warmup}")
        for name in ("horizons", "rtn_layer", "widths", "weight_net_hidden"):
            if getattr(self, name) is not None and min(getattr(self, name), default=0) < 1:
                raise ValueError(f"{name} must be whole numbers of at least 1, not {getattr(self, name)}")
        if self.image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 or 3, not {self.image_channels}")
        for name, having in {"widths": WIDE, "blocks": ("resnet32",)}.items():
            if getattr(self, name) is not None and self.backbone not in having:
                raise ValueError(
                    f"{name} are of {', '.join(having)}, not of the backbone {self.backbone}: leave them out"
                )
        if self.problem == "peers":
            for name in self.cases:
                self.case(name)
        for name, variants in self.variants.items():
            if not (isinstance(variants, list) and all(isinstance(one, dict) for one in variants)):
                raise ValueError(f"variants: {name} must be a list of mappings, as in [{{}}], not {variants!r}")

    def case(self, name: str) -> BenchmarkArguments:
        """The settings in one of `cases`.

        Raises:
            ValueError: for what is no case, naming it.
        """
        given = self.cases[name]
        if not isinstance(given, dict) or given.get("problem") not in OF_PEERS:
            raise ValueError(f"cases: {name} must be a mapping with a problem of {', '.join(OF_PEERS)}, not {given!r}")
        self._known(f"field of the case {name}", given, [one.name for one in fields(self)])
        return replace(self, **given)

    def rows(self, orders: list[str] | None = None, **case: Any) -> list[Row]:
        """An empty row for every estimator, variant and order."""
        return [
            Row(name, settings, order, case)
            for name in self.estimators
            for settings in self.variants.get(name, [{}])
            for order in (self.orders if orders is None else orders)
        ]

    @property
    def each_width(self) -> list[int | None]:
        """The backbone's width in every case; None is its own."""
        return [*self.widths] if self.widths else [None]

    def sizes(self) -> list[tuple[int | None, int]]:
        """Width of the backbone and hidden units of the weighting net, for every case of weight_net."""
        widths, hidden = self.each_width, self.weight_net_hidden
        return [
            (width, units)
            for width, units in product(widths, hidden)
            if not self.one_at_a_time or width == widths[0] or units == hidden[0]
        ]

    def draws(self, row: Row) -> int:
        """How many estimates of a row are looked at."""
        return self.noise_draws if row.estimator in ESTIMATORS and row.make().stochastic else 1

    @staticmethod
    def _known(what: str, given: Any, valid: Any) -> None:
        for one in given:
            if one not in valid:
                raise ValueError(unknown(what, str(one), valid))
