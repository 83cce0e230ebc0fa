"""A mixture of domains: the training domains of a causal language model, weighted for a target domain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
from datasets import Dataset
from torch import nn
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.experiments.folders import hub_id
from metaxl_evo.experiments.scores import Rate
from metaxl_evo.experiments.task import Task
from metaxl_evo.models.adapters import ADAPTER
from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.figures import figure
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.training.weight_watch import WEIGHT
from metaxl_evo.weighting.bandit import BanditText, BanditTrainer
from metaxl_evo.weighting.domains import DomainArguments, DomainData, load_domains
from metaxl_evo.weighting.drawn import SYNTHETIC
from metaxl_evo.weighting.encoding import encode
from metaxl_evo.weighting.mixture import (
    TABLE,
    first_logits,
    mixture_table,
    shares_for,
    uniform_shares,
    union_shares,
)
from metaxl_evo.weighting.pretrained import CAUSAL, load_language_model
from metaxl_evo.weighting.sampling import MixtureRows
from metaxl_evo.weighting.scratch import HEAD_WIDTH, LEAST_PIECES, SCRATCH, model_from_scratch, train_tokenizer
from metaxl_evo.weighting.sft import encode_sft
from metaxl_evo.weighting.trainer import WeightingTrainer
from metaxl_evo.weighting.verdict import (
    WEIGHTS_PICTURE,
    WEIGHTS_TABLE,
    judged,
    losses_of,
    plot_weights,
    weights_facts,
)
from metaxl_evo.weighting.weighted_text import SUBFOLDER, WeightedText

METHODS = ("mixture", "bandit", "union", "uniform", "fixed")
MOVING = ("mixture", "bandit")  # whose mixture changes in the training
STARTS = ("union", "uniform")
MIXINGS = ("loss_weights", "sampling")
WEIGHERS = {"domain": "number", "each": "number", "loss": "loss", "hidden": "hidden"}
PICTURE = "mixture.png"


@dataclass
class MixTextArguments(DomainArguments):
    """Settings of `mix-text`.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    method: str = field(
        default="mixture",
        metadata={
            "help": "mixture: what weigher learns; union: all texts alike (domains by size); uniform: all domains "
            "alike, however large; fixed: the mixture of mixture_from; bandit: large losses are drawn more often."
        },
    )
    weigher: str = field(
        default="domain",
        metadata={
            "help": "A number for each domain, 1 on average (domain), or for each text (each), or a network of a "
            "text's loss (loss) or of the mean of the model's own states in it (hidden)."
        },
    )
    per_token: bool = field(
        default=False, metadata={"help": "Of weigher loss or hidden: tokens are weighed, each by its own."}
    )
    mixing: str = field(
        default="loss_weights",
        metadata={
            "help": "loss_weights: the union is sampled, losses are weighted; sampling: each row's domain is drawn "
            "by the mixture."
        },
    )
    start: str = field(
        default="union", metadata={"help": "The mixture that the learned weights begin with: union or uniform."}
    )
    mixture_from: str | None = field(
        default=None, metadata={"help": "The folder of a mix-text run, or its mixture.csv; for method fixed."}
    )
    layers: int = field(default=2, metadata={"help": "Of the model that model_name_or_path scratch makes."})
    width: int = field(default=128, metadata={"help": "Of its hidden states, a multiple of 32."})
    pieces: int = field(default=2000, metadata={"help": "Of its tokenizer, which the texts that train make (BPE)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("method", self.method, METHODS)
        self.require_known("mixing", self.mixing, MIXINGS)
        self.require_known("weigher", self.weigher, WEIGHERS)
        self.require_known("start", self.start, STARTS)
        self.require_count("layers", self.layers)
        self.require_count("pieces", self.pieces, LEAST_PIECES)
        if self.width < HEAD_WIDTH or self.width % HEAD_WIDTH:
            raise ValueError(f"width must be a multiple of {HEAD_WIDTH}, not {self.width}")
        if self.data_format == "sft" and self.model_name_or_path == SCRATCH:
            raise ValueError("data_format: the tokenizer of a model from scratch is made of plain texts: give a model")
        if self.method == "union" and self.sampled:
            raise ValueError(
                "method union samples all texts alike as it is: set mixing to loss_weights, or leave it out"
            )
        if self.method == "bandit" and not (self.sampled and self.floor):
            raise ValueError(
                "method bandit draws domains, by chance alone as often as floor says: set mixing: sampling and floor, "
                "to 0.1 for one"
            )
        if self.weigher != "domain" and (self.method != "mixture" or self.sampled or self.start != "union"):
            raise ValueError(
                f"weigher {self.weigher} learns weights of the losses of all texts: leave out method {self.method}, "
                f"mixing {self.mixing} and start {self.start}, or take weigher domain"
            )
        if self.per_token and self.weigher in ("domain", "each"):
            raise ValueError(f"per_token: weigher {self.weigher} sees no tokens: take loss or hidden, or leave it out")
        if (self.method == "fixed") != (self.mixture_from is not None):
            raise ValueError("mixture_from goes with method: fixed, and it alone: set both, or neither")

    @property
    def sampled(self) -> bool:
        """Whether domains are drawn."""
        return self.mixing == "sampling"


class MixTextTask(Task[MixTextArguments, DomainData]):
    """Losses of tokens times the weight of their domain or text, or their own, which texts of the target judge."""

    settings = MixTextArguments
    title = "A mixture of domains"
    sources = ()
    usage = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")'
    )
    own_files = (
        *(SUBFOLDER, ADAPTER, TABLE, PICTURE, WEIGHTS_TABLE, WEIGHTS_PICTURE),
        *("tokenizer.json", "tokenizer_config.json"),
    )
    configs = "weighting"
    units: ClassVar = {"loss": ""}
    greater_is_better = False
    inputs = (*Task.inputs, "mixture_from")

    def learns(self, settings: MixTextArguments) -> bool:
        return settings.method == "mixture"

    def refuse(self, settings: MixTextArguments, args: MetaTrainingArguments) -> None:
        if args.meta_portion != 1:
            raise ValueError(
                "texts of the target judge alone: set meta_portion to 1 (the target may be one of domains)"
            )
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end has nothing to choose by: leave it out, the last step counts")

    def load(self, settings: MixTextArguments, args: MetaTrainingArguments) -> DomainData:
        return load_domains(settings)

    def build_trainer(
        self, settings: MixTextArguments, args: MetaTrainingArguments, data: DomainData
    ) -> WeightingTrainer:
        base, tokenizer = _base(settings, data)
        config: Any = base.config
        bandit = settings.method == "bandit"
        module = (BanditText if bandit else WeightedText)(
            base,
            self._weigher(settings, data, config.hidden_size),
            reads=WEIGHERS[settings.weigher],
            weighted=settings.method != "union",
            tokens=True,
            per_token=settings.per_token,
            domains=tuple(data.sizes),
            domain_of="domain" if settings.weigher == "each" else "number",
        )
        rows = self._rows(settings, data.train, tokenizer, args)
        if settings.weigher == "each":
            rows = rows.rename_column("number", "domain").add_column("number", list(range(len(rows))))
        return (BanditTrainer if bandit else WeightingTrainer)(
            module,
            args,
            train_dataset=MixtureRows(rows) if settings.sampled else rows,
            meta_dataset=self._rows(settings, data.meta, tokenizer, args) if self.learns(settings) else None,
            processing_class=tokenizer,
            data_collator=DataCollatorForTokenClassification(tokenizer),  # it pads labels as well, by -100
        )

    def _weigher(self, settings: MixTextArguments, data: DomainData, hidden_size: int) -> WeightTable | WeightNet:
        if settings.weigher == "each":
            return WeightTable(len(data.train), floor=settings.floor)
        if settings.weigher != "domain":
            return WeightNet(settings.weigher_hidden, 1 if settings.weigher == "loss" else hidden_size, settings.floor)
        moves = settings.method in MOVING
        mixture = WeightTable(len(data.sizes), "softmax", settings.floor if moves else 0.0)
        mixture.logits.data = first_logits(_first_shares(settings, data.sizes), data.sizes, settings.sampled)
        return mixture

    @staticmethod
    def _rows(
        settings: MixTextArguments, texts: Dataset, tokenizer: PreTrainedTokenizerBase, args: MetaTrainingArguments
    ) -> Dataset:
        if settings.data_format == "sft":
            rows = encode_sft(texts["text"][:], tokenizer, settings.max_length, args)
        else:
            rows = encode(texts["text"][:], tokenizer, settings.max_length)
            rows = rows.add_column("labels", rows["input_ids"][:])
        return rows.add_column("number", texts["number"][:])

    def score(self, trainer: MetaTrainer, settings: MixTextArguments, data: DomainData) -> dict[str, Any]:
        """The loss of a token of the target, in nats, and the perplexity that it is."""
        tokenizer: Any = trainer.processing_class
        losses, tokens = losses_of(trainer, self._rows(settings, data.test, tokenizer, trainer.args))
        loss = Rate.of(losses, tokens)
        return {"loss": loss, "perplexity": math.exp(loss)}

    def describe(
        self, trainer: MetaTrainer, settings: MixTextArguments, data: DomainData, start: Tree
    ) -> dict[str, Any]:
        """The mixture, the weights on the way to it, and facts of those of texts."""
        weighing, found = cast(WeightingTrainer, trainer), dict[str, Any]()
        module = weighing.model
        if not module.weighted:
            learned = [1.0] * len(data.sizes)
        elif settings.weigher == "domain":
            learned = cast(WeightTable, module.meta).weights().tolist()
        else:
            weighing.said = judged(trainer, cast(Dataset, trainer.train_dataset))
            learned = weighing.said["weight"].groupby(np.asarray(data.train["number"])).mean().tolist()
            found["weights"] = weights_facts(weighing.said, None)
        logged = [row for row in trainer.state.log_history if "loss" in row]
        path = {name: [row.get(f"{WEIGHT}{name}") for row in logged] for name in data.sizes}
        found["mixture"] = mixture_table(learned, data.sizes, settings.sampled)
        return found | {"steps_logged": [row["step"] for row in logged], "weights_over_time": path}

    def write_files(self, folder: Path, trainer: MetaTrainer, settings: MixTextArguments, data: DomainData) -> None:
        pd.DataFrame(self.describe(trainer, settings, data, {})["mixture"]).to_csv(folder / TABLE, index=False)
        said = cast(WeightingTrainer, trainer).said
        if said is not None:
            domains = np.array(list(data.sizes))[np.asarray(data.train["number"])]
            table = said.assign(domain=domains, text=data.train["text"][:])
            table.sort_values("weight", kind="stable").to_csv(folder / WEIGHTS_TABLE, index=False)

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        run = results["run"]
        plot_mixture(run["steps_logged"], run["weights_over_time"], folder / PICTURE)
        if "weights" in run:
            plot_weights(run["weights"], None, folder / WEIGHTS_PICTURE)

    def card_text(self, settings: MixTextArguments) -> str:
        data = hub_id(settings.data, SYNTHETIC) or Path(settings.data).name
        return f"Method `{settings.method}`, target `{settings.target}`, data `{data}`. Loss in nats a token."

    def card_metadata(self, settings: MixTextArguments) -> dict[str, Any]:
        return {
            "tasks": "text-generation",
            "dataset_tags": hub_id(settings.data, SYNTHETIC),
            "finetuned_from": hub_id(settings.model_name_or_path, SYNTHETIC, SCRATCH),
        }


def _base(settings: MixTextArguments, data: DomainData) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The language model and its tokenizer; what starts from scratch reads no text that judges or tests."""
    if settings.model_name_or_path != SCRATCH:
        return load_language_model(settings)
    tokenizer = train_tokenizer(data.train["text"][:], settings.pieces, settings.max_length)
    made = model_from_scratch(tokenizer, settings.layers, settings.width)
    return settings.adapted(made, CAUSAL.task_type), tokenizer


def _first_shares(settings: MixTextArguments, sizes: Mapping[str, int]) -> dict[str, float]:
    if settings.mixture_from is not None:
        return shares_for(settings.mixture_from, sizes)
    uniform = settings.method == "uniform" or (settings.start == "uniform" and settings.method in MOVING)
    return uniform_shares(sizes) if uniform else union_shares(sizes)


def plot_mixture(steps: list[int], weights: Mapping[str, list[float | None]], file: Path) -> None:
    """The weight of each domain over the steps.

    Raises:
        ImportError: without matplotlib (`pip install metaxl_evo[plot]`).
    """
    with figure(file) as (axis,):
        for name, path in weights.items():
            points = [(step, weight) for step, weight in zip(steps, path, strict=True) if weight is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set(xlabel="step", ylabel="weight, 1 on average")
        axis.legend()
