"""Settings of a cross-lingual tagger, and the methods that are compared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from metaxl_evo.messages import unknown
from metaxl_evo.models.adapters import LoraArguments
from metaxl_evo.models.rtn_networks import KINDS
from metaxl_evo.ner.layout import ColumnArguments, LayoutArguments, PosLayoutArguments, TextLayoutArguments
from metaxl_evo.ner.scorers import EntityScorer, Scorer, TextScorer, WordScorer
from metaxl_evo.ner.source_weights import LEARNED, SOURCE_WEIGHTS, proportions_of
from metaxl_evo.training.arguments import MetaTrainingArguments

PAPER_LANGUAGES = ("qu", "cdo", "ilo", "xmf", "mhr", "mi", "tk", "gn")
SELECTIONS = ("dev", "last")
SHUFFLED = "shuffled"  # the name of a source language whose labels are
SHORTEST = 8  # sub-tokens: the special ones and a word or two
WIDEST = 65536  # of an RTN: many times any encoder's width
UNFIT = {  # fields of TrainingArguments that cannot be on here
    "remove_unused_columns": "the losses read a column that the model's forward does not name",
    "prediction_loss_only": "entity scores need predictions",
    "batch_eval_metrics": "entity scores are of all sentences together (eval_accumulation_steps keeps memory low)",
    "bf16_full_eval": "it casts the model that is then saved; bf16: true evaluates under autocast",
    "fp16_full_eval": "it casts the model that is then saved; bf16: true evaluates under autocast",
    "debug": "its hooks cannot read an encoder's boolean masks",
}


@dataclass(frozen=True)
class Method:
    """What a method trains on and whether anything is learned on the meta level.

    Args:
        source, target: whether source and target rows are trained on.
        transform: whether the source rows go through the RTN.
        meta: whether the RTN, or weights of the source rows, are learned by hypergradients.
        all_target_rows: train on every drawn target row instead of leaving the meta part out.
        weight: of the source and the target mean in the inner loss.
    """

    source: bool = True
    target: bool = True
    transform: bool = False
    meta: bool = False
    all_target_rows: bool = False
    weight: float = 1.0


METHODS = {
    "metaxl": Method(transform=True, meta=True),
    "frozen_rtn": Method(transform=True),
    "weighted": Method(meta=True),
    "joint_training": Method(all_target_rows=True, weight=0.5),
    "joint_training_equal": Method(),
    "target_only": Method(source=False),
    "zero_shot": Method(target=False),
}


@dataclass
class NerTrainingArguments(MetaTrainingArguments):
    """MetaTrainingArguments of a task whose target rows train as well: half of each draw, as published.

    `label_names`, which a Trainer has for the labels of its batches, here always `labels`, are those of integer tags.
    """

    meta_portion: float = field(
        default=0.5,
        metadata={"help": "Share of each draw of target rows that judges (outer loss); the rest trains."},
    )

    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of tags that are integers, from 0 on, e.g. O,B-PER,I-PER."}
    )

    best: ClassVar = "f1"  # what chooses a checkpoint, as `select` says; TrainingArguments would take the loss

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = self.best
        super().__post_init__()


@dataclass
class PosTrainingArguments(NerTrainingArguments):
    """NerTrainingArguments of a tagger of parts of speech, and of a classifier of texts."""

    best: ClassVar = "accuracy"


@dataclass
class TaggingArguments(LoraArguments, ColumnArguments):
    """Model, data, RTN and method, whatever is tagged; the optimisation is in NerTrainingArguments.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    model_name_or_path: str = field(
        default="FacebookAI/xlm-roberta-base",
        metadata={"help": "Hub id or folder of a model, or `synthetic`: a small random one for the synthetic data."},
    )
    dataset: str = field(
        default="unimelb-nlp/wikiann",
        metadata={"help": "Hub id (a configuration a language), a folder LANG/{train,dev,test}, or `synthetic`."},
    )
    source_languages: list[str] = field(default_factory=lambda: ["en"], metadata={"help": "The rich languages."})
    target_languages: list[str] = field(
        default_factory=lambda: list(PAPER_LANGUAGES), metadata={"help": "One run a language, each on its own."}
    )
    method: str = field(default="metaxl", metadata={"help": f"One of {', '.join(METHODS)}."})
    train_size: int | None = field(default=5000, metadata={"help": "Source sentences a language (null: all)."})
    target_train_size: int | None = field(default=100, metadata={"help": "Target sentences (null: all)."})
    eval_size: int | None = field(default=None, metadata={"help": "Dev and test sentences at most (null: all)."})
    sample_seed: int = field(default=42, metadata={"help": "Seed of the choice of sentences."})
    max_length: int = field(default=200, metadata={"help": "Sub-tokens of a training sentence at most."})
    eval_max_length: int = field(default=512, metadata={"help": "The same in evaluation; words beyond count as O."})
    rtn_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Encoder layers whose output is transformed, counted from 1 (default: the last)."},
    )
    rtn_kind: str = field(default="gated_tied", metadata={"help": f"One of {', '.join(KINDS)}."})
    rtn_bottleneck: int | None = field(default=None, metadata={"help": "Width of the RTN (default: by its kind)."})
    rtn_per_language: bool = field(default=True, metadata={"help": "A network of its own for each source language."})
    source_weights: str = field(
        default="none",
        metadata={
            "help": "Learned weights of the source rows, with method weighted, or metaxl beside its RTN: a number "
            "a language, 1 on average (language), or a network of a row's loss or mean hidden state, in (0, 1)."
        },
    )
    source_weights_floor: float = field(default=0.0, metadata={"help": "The least weight, from 0 to below 1."})
    source_weights_units: int = field(default=100, metadata={"help": "Hidden units of a weighing network."})
    source_proportions: str = field(
        default="union",
        metadata={
            "help": "Shares of the languages in the source loss, or those that learned weights begin with: union (as "
            "many as there are), uniform, or numbers in the order of the languages, such as 0.5,0.3,0.2."
        },
    )
    shuffle: str | None = field(
        default=None,
        metadata={
            "help": "Add the source language `shuffled`, to see whether it is found out: the sentences of this one, "
            "all their labels in no order."
        },
    )
    rtn_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a trained RTN to begin with (default: a random one)."}
    )
    rtn_module_path: str | None = field(
        default=None, metadata={"help": "Where the model's list of encoder layers is, if it is not found by itself."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Give the model a new head where its own has other labels than the data."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the model brings along (auto_map); read it first."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel of the base model."})
    select: str = field(
        default="dev",
        metadata={
            "help": "dev: score a dev set too, and leave the best checkpoint (by F1, or accuracy) if "
            "load_best_model_at_end is on; last: the last, no dev set is read."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known: dict[str, Iterable[str]]
        known = {"method": METHODS, "rtn_kind": KINDS, "select": SELECTIONS, "source_weights": SOURCE_WEIGHTS}
        for name, valid in known.items():
            if getattr(self, name) not in valid:
                raise ValueError(unknown(name, str(getattr(self, name)), valid))
        counted = ("train_size", "target_train_size", "eval_size", "rtn_bottleneck", "source_weights_units")
        sizes = dict.fromkeys(counted, 1)
        for name, least in {**sizes, "max_length": SHORTEST, "eval_max_length": SHORTEST}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
            if value is not None and value >= 2**31:
                raise ValueError(f"{name} must be below 2**31, not {value}")
        if self.rtn_bottleneck is not None and self.rtn_bottleneck > WIDEST:
            raise ValueError(f"rtn_bottleneck must be at most {WIDEST}, not {self.rtn_bottleneck}")
        self.check_lora()
        for name in ("source_languages", "target_languages"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one language")
        double = [one for one in self.source_languages if self.source_languages.count(one) > 1]
        if double:
            raise ValueError(f"source_languages: {double[0]} is named twice: name it once")
        if self.rtn_name_or_path is not None and not self.recipe.transform:
            raise ValueError(f"rtn_name_or_path: method {self.method} has its RTN off: leave it out")
        both = sorted(set(self.source_languages) & set(self.target_languages))
        if both:
            raise ValueError(f"{', '.join(both)} is both a source and a target language: name it once")

        self._check_weights()

    def _check_weights(self) -> None:
        """Whether weights of source rows can be as they are set."""
        if self.shuffle is not None and self.shuffle not in self.source_languages:
            raise ValueError(f"shuffle: {unknown('source language', self.shuffle, self.source_languages)}")
        if self.shuffle is not None and SHUFFLED in (*self.source_languages, *self.target_languages):
            raise ValueError(f"shuffle adds the language {SHUFFLED}, which there is already: leave one of them out")
        weighed, recipe = self.source_weights != "none", self.recipe
        if weighed and not recipe.meta:
            raise ValueError(
                f"source_weights are learned, method {self.method} learns nothing: use weighted or metaxl"
            )
        if self.method == "weighted" and not weighed:
            raise ValueError(f"method weighted learns source_weights: set them to {', '.join(LEARNED)}")
        if not 0 <= self.source_weights_floor < 1:
            raise ValueError(f"source_weights_floor must be at least 0 and below 1, not {self.source_weights_floor}")
        if self.source_weights_floor and not weighed:
            raise ValueError("source_weights_floor is that of learned weights: set source_weights, or leave it out")
        if self.source_weights == "language" and len(self.sources) < 2:
            raise ValueError(
                f"source_weights: {self.sources[0]} is the one source language and has the weight 1: name more "
                "source_languages, or weigh its rows by loss or hidden"
            )
        if self.source_weights == "hidden" and recipe.transform and len(self.rtn_layers or ()) > 1:
            raise ValueError(
                "source_weights: hidden reads one state of a row, which several rtn_layers encode several times: use "
                "language or loss, or one layer"
            )
        proportions = proportions_of(self.source_proportions, len(self.sources))
        if proportions is not None and (len(self.sources) < 2 or not recipe.source):
            raise ValueError("source_proportions are of several source languages that train: leave them out")

    @property
    def sources(self) -> list[str]:
        """The source languages, with the shuffled one."""
        return [*self.source_languages, *([] if self.shuffle is None else [SHUFFLED])]

    @property
    def recipe(self) -> Method:
        return METHODS[self.method]

    @property
    @abstractmethod
    def scorer(self) -> Scorer:
        """What the words are judged by."""


@dataclass
class NerArguments(TaggingArguments, LayoutArguments):
    """Settings of a tagger of entities.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    strict: bool = field(default=False, metadata={"help": "Count only well-formed IOB2 entities."})

    @property
    def scorer(self) -> EntityScorer:
        return EntityScorer(self.strict)


@dataclass
class PosArguments(TaggingArguments, PosLayoutArguments):
    """Settings of a tagger of parts of speech.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    dataset: str = field(
        default="synthetic",
        metadata={"help": "Hub id (a configuration a language), a folder LANG/{train,dev,test}, or `synthetic`."},
    )

    @property
    def scorer(self) -> WordScorer:
        return WordScorer()


@dataclass
class SentimentArguments(TaggingArguments, TextLayoutArguments):
    """Settings of a classifier of texts.

    Raises:
        ValueError: one line for the first value that cannot be, with the valid choices.
    """

    dataset: str = field(
        default="synthetic",
        metadata={"help": "Hub id (a configuration a language), a folder LANG/{train,dev,test}, or `synthetic`."},
    )
    eval_max_length: int = field(default=512, metadata={"help": "Sub-tokens of a text in evaluation at most."})

    @property
    def scorer(self) -> TextScorer:
        return TextScorer()


def refuse_fields(args: TrainingArguments) -> None:
    """Refuse what the Trainer offers and a tagger cannot use.

    Raises:
        ValueError: one line with the field, the reason and the way out.
    """
    for name, reason in UNFIT.items():
        if getattr(args, name):
            raise ValueError(f"{name} cannot be set for NER: {reason}: leave it out")
    config: Any = args.accelerator_config
    if args.world_size > 1 and config.dispatch_batches:
        raise ValueError(
            "dispatch_batches cannot send batches of unequal lengths, as sentences make them: leave it out"
        )


def refuse_metric(args: TrainingArguments, metrics: Sequence[str]) -> None:
    """Refuse to choose a checkpoint by what is no score, or by the worst.

    Raises:
        ValueError: one line with the valid choices.
    """
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in metrics:
        raise ValueError(unknown("metric_for_best_model", metric, metrics))
    if metric is not None and args.greater_is_better == metric.endswith("loss"):
        raise ValueError(f"greater_is_better would choose the checkpoint with the worst {metric}: leave it out")
