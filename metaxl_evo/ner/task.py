"""Cross-lingual tagging as a task: data, tagger, trainer and scores of one target language."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub import EvalResult
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.experiments.folders import RESULTS, hub_id, read_results
from metaxl_evo.experiments.task import Task
from metaxl_evo.models.adapters import ADAPTER
from metaxl_evo.models.hooks import encoder_layers
from metaxl_evo.models.rtn import SUBFOLDER, RepresentationTransform
from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.models.weight_net import WeightNet
from metaxl_evo.ner.arguments import (
    NerArguments,
    NerTrainingArguments,
    PosArguments,
    PosTrainingArguments,
    SentimentArguments,
    TaggingArguments,
    refuse_fields,
    refuse_metric,
)
from metaxl_evo.ner.check import evaluation_findings, sentence_findings
from metaxl_evo.ner.encoding import PadRight, encode, labelled_tokens
from metaxl_evo.ner.evaluation import EvaluationSet, WordTrainer, evaluation_sets
from metaxl_evo.ner.pretrained import (
    SYNTHETIC,
    TEXTS,
    head_of,
    load_classifier,
    longest_input,
    require_readable,
)
from metaxl_evo.ner.scorers import EntityScorer, Scorer, TextScorer, WordScorer
from metaxl_evo.ner.source_weights import SUBFOLDER as WEIGHER
from metaxl_evo.ner.source_weights import SourceWeights, last_logged, proportions_of, sources_table
from metaxl_evo.ner.spacing import as_in_text
from metaxl_evo.ner.tagger import TARGET, CrossLingualClassifier, CrossLingualTagger
from metaxl_evo.ner.target_data import TargetData, load_for_model, require_enough
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.figures import figure
from metaxl_evo.training.schedules import steps_of
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.training.watched import WatchingTrainer
from metaxl_evo.training.weight_watch import WEIGHT, draw_over_time, over_time

logger = logging.getLogger(__name__)

METAXL = "Xia et al., MetaXL: Meta Representation Transformation for Low-resource Cross-lingual Learning, NAACL 2021"
PICTURE = "source_weights.png"
Settings = TypeVar("Settings", bound=TaggingArguments)


class NerTrainer(WordTrainer, WatchingTrainer):
    """A MetaTrainer that is scored by words; its logs tell several source languages apart.

    Attributes:
        evaluation: `test`, and `dev` where one is used.
    """

    evaluation: dict[str, EvaluationSet]


class TaggingTask(Task[Settings, TargetData]):
    """One tagger a target language, beside a rich source language (Xia et al., NAACL 2021).

    Attributes:
        scorer: what the words are judged by.
    """

    scorer: Scorer
    pipeline: ClassVar = "token-classification"  # the Hub's word for the task
    case = "target_languages"
    sources = (METAXL,)
    own_files = (
        SUBFOLDER,
        WEIGHER,
        PICTURE,
        ADAPTER,
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    )

    def learns(self, settings: Settings) -> bool:
        return settings.recipe.meta

    def refuse(self, settings: Settings, args: MetaTrainingArguments) -> None:
        refuse_fields(args)

    def load(self, settings: Settings, args: MetaTrainingArguments) -> TargetData:
        (target,) = settings.target_languages
        data = load_for_model(settings, target, args.label_names)
        require_enough(settings, args, target, data)
        return data

    def fit_arguments(
        self, settings: Settings, args: MetaTrainingArguments, data: TargetData
    ) -> MetaTrainingArguments:
        return fit_arguments(settings, args, data)

    def build_trainer(self, settings: Settings, args: MetaTrainingArguments, data: TargetData) -> NerTrainer:
        return build_trainer(settings, args, data)

    def score(self, trainer: MetaTrainer, settings: Settings, data: TargetData) -> dict[str, Any]:
        return self._of_language(trainer, settings, "test")

    def dev_score(self, trainer: MetaTrainer, settings: Settings, data: TargetData) -> dict[str, Any] | None:
        return None if data.dev is None else self._of_language(trainer, settings, "dev")

    def _of_language(self, trainer: MetaTrainer, settings: Settings, split: str) -> dict[str, Any]:
        (target,) = settings.target_languages
        scores = {target: cast(NerTrainer, trainer).evaluation[split].predict(trainer)}
        return {**scores, "average": self.scorer.average(scores)}

    def flat_scores(self, test: Mapping[str, Any]) -> Mapping[str, Any]:
        return cast(Mapping[str, Any], next(iter(test.values())))

    def table(self, test: Mapping[str, Any]) -> str:
        return self.scorer.table({language: row for language, row in test.items() if language != "average"})

    def card_scores(self, test: Mapping[str, Any]) -> str:
        return f"{self.table(test)}\n\n{self.scorer.details(dict(self.flat_scores(test)))}"

    def join_cases(self, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The scores of several languages and their average, in the form of one."""
        summary: dict[str, Any] = {}
        for split in ("test", "dev"):
            scores = {target: found[split][target] for target, found in results.items() if split in found}
            if scores:
                summary[split] = {**scores, "average": self.scorer.average(scores)}
        first = next(iter(results.values()))
        summary["settings"] = {**first["settings"], "target_languages": list(results)}
        return summary | {"run": {target: found["run"] for target, found in results.items()}}

    def describe(self, trainer: MetaTrainer, settings: Settings, data: TargetData, start: Tree) -> dict[str, Any]:
        tagger, found = cast(CrossLingualTagger, trainer.model), dict[str, Any]()
        if tagger.rtn is not None:
            of_rtn = {
                name.removeprefix("rtn."): leaf for name, leaf in start.items() if not name.startswith("weigher.")
            }
            found["rtn_relative_change"] = tagger.rtn.relative_change(of_rtn)
        found["test_sentences_in_train"] = data.overlap
        if tagger.watch.domains:
            history = trainer.state.log_history
            found["sources"] = source_facts(tagger, data, history)
            found["source_weights_over_time"] = over_time(history, tagger.watch.domains)
        return found

    def findings(self, run: Mapping[str, Any]) -> str:
        return f"Source languages, by their weight:\n\n{sources_table(run['sources'])}" if "sources" in run else ""

    def plot(self, folder: Path, results: Mapping[str, Any]) -> None:
        if results["settings"]["source_weights"] != "none":
            with figure(folder / PICTURE) as (axis,):
                draw_over_time(axis, results["run"]["source_weights_over_time"])

    def describe_check(
        self, trainer: MetaTrainer, settings: Settings, data: TargetData
    ) -> tuple[dict[str, Any], list[str]]:
        found, problems = evaluation_findings(trainer)
        return {**sentence_findings(settings, data, trainer), **found}, problems

    @abstractmethod
    def scored_by(self, settings: Settings) -> str:
        """What the card says that the scores are of."""

    def card_text(self, settings: Settings) -> str:
        sources = ", ".join(settings.sources) if settings.recipe.source else "none"
        data = hub_id(settings.dataset) or Path(settings.dataset).name
        adapted = " Its LoRA adapter is merged into it, and in `adapter/` by itself." if settings.use_peft else ""
        return (
            f"Method `{settings.method}`, source {sources}, data `{data}`. "
            f"The model here is a plain {head_of(self.scorer).what}. The training left {self._meta_files(settings)}; "
            f"prediction needs no more than the model.{adapted} Scores are {self.scored_by(settings)}, in percent."
        )

    @staticmethod
    def _meta_files(settings: Settings) -> str:
        """What the training had on the meta level, and where it is."""
        rtn = [] if settings.method == "weighted" else ["the representation transformation network in `rtn/`"]
        weigher = f"the weights of the source sentences (by {settings.source_weights}) in `{WEIGHER}/`"
        return " and ".join([*rtn, *([] if settings.source_weights == "none" else [weigher])])

    def card_metadata(self, settings: Settings) -> dict[str, Any]:
        (target,) = settings.target_languages
        return {
            "tasks": self.pipeline,
            "language": target,
            "dataset_tags": hub_id(settings.dataset, SYNTHETIC),
            "finetuned_from": hub_id(settings.model_name_or_path, SYNTHETIC),
        }

    def card_data(self, settings: Settings, data: TargetData, results: Mapping[str, Any]) -> dict[str, Any]:
        """The three rates for the Hub's model-index; of public data, sentences of the target language to try."""
        (target,) = settings.target_languages
        public, rates = hub_id(settings.dataset), self.flat_scores(results["test"])
        found = [
            EvalResult(
                task_type=self.pipeline,
                dataset_name=Path(settings.dataset).name,
                dataset_type=public or "local",
                dataset_config=target,
                dataset_split="test",
                metric_type=name,
                metric_value=float(rates[name]),
            )
            for name in self.units
        ]
        examples = [{"text": " ".join(words)} for words in data.test["tokens"][:3]]
        return {"eval_results": found, **({} if public is None else {"widget": examples})}


class NerTask(TaggingTask[NerArguments]):
    """Named entities."""

    settings = NerArguments
    training = NerTrainingArguments
    title = "Cross-lingual NER"
    configs = "ner"
    scorer = EntityScorer()
    units = EntityScorer.units

    def scored_by(self, settings: NerArguments) -> str:
        return f"of entities, by seqeval{' (strict IOB2)' if settings.strict else ''}"


class PosTask(TaggingTask[PosArguments]):
    """Universal parts of speech."""

    settings = PosArguments
    training = PosTrainingArguments
    title = "Cross-lingual part-of-speech tagging"
    configs = "pos"
    scorer = WordScorer()
    units = WordScorer.units

    def scored_by(self, settings: PosArguments) -> str:
        return "of words, macro F1 the mean over tags"


class SentimentTask(TaggingTask[SentimentArguments]):
    """Texts and their labels, sentiment for one."""

    settings = SentimentArguments
    training = PosTrainingArguments
    title = "Cross-lingual classification of texts"
    configs = "sentiment"
    scorer = TextScorer()
    units = TextScorer.units
    pipeline = "text-classification"
    usage = (
        'from transformers import pipeline\n\nclassify = pipeline("text-classification", model=".")  # this folder\n'
        'print(classify("some text"))'
    )

    def scored_by(self, settings: SentimentArguments) -> str:
        return "of texts, macro F1 the mean over labels"


def build_trainer(ner: TaggingArguments, args: MetaTrainingArguments, data: TargetData) -> NerTrainer:
    """The trainer of one run, `args` being fitted to it."""
    trusted = ner.trust_remote_code
    base, tokenizer = load_classifier(
        ner.model_name_or_path,
        data.names,
        ner.attn_implementation,
        head=head_of(ner.scorer),
        ignore_mismatched_sizes=ner.ignore_mismatched_sizes,
        trust_remote_code=trusted,
    )
    trained = [*(data.sources.values() if ner.recipe.source else ()), *([data.target] if data.target else ())]
    words = [words for part in (data.test, *trained) for words in part["tokens"][:100]]
    tokenizer = as_in_text(tokenizer, words, base.config, trust_remote_code=trusted)
    evaluation = evaluation_sets(
        {"dev": data.dev, "test": data.test},
        base,
        tokenizer,
        ner.eval_max_length,
        args.per_device_eval_batch_size,
        names=data.names,
        scorer=ner.scorer,
    )
    sources, target = _training_rows(ner, data, base, tokenizer)
    tagger = build_tagger(ner, base, tokenizer, [labelled_tokens(rows) for rows in sources])
    train = concatenate_datasets(sources) if sources else target
    assert train is not None  # every method trains on one or the other
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train) < batch:
        raise ValueError(
            f"dataloader_drop_last would drop all {len(train)} train sentences, less than a batch of {batch}: "
            "lower per_device_train_batch_size, or leave it out"
        )
    dev = evaluation.get("dev")
    if dev is not None and not args.load_best_model_at_end:
        logger.warning("load_best_model_at_end is off: the last weights are tested and saved, not the best on dev")
    trainer = NerTrainer(
        tagger,
        args,
        train_dataset=train,
        meta_dataset=target if sources else None,
        eval_dataset=None if dev is None else dev.rows,
        data_collator=PadRight(tokenizer.pad_token_id),
        processing_class=tokenizer,
        compute_metrics=None if dev is None else dev.compute_metrics,
    )
    trainer.evaluation, trainer.of_texts = evaluation, head_of(ner.scorer) is TEXTS
    return trainer


def _training_rows(
    ner: TaggingArguments, data: TargetData, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Dataset], Dataset | None]:
    """The encoded rows of each source language that is trained on, and of the target."""
    max_length = min(ner.max_length, longest_input(base))
    sources = [
        _with_language(encode(sentences, tokenizer, max_length), index)
        for index, sentences in enumerate(data.sources.values() if ner.recipe.source else ())
    ]
    target = None if data.target is None else _with_language(encode(data.target, tokenizer, max_length), TARGET)
    for rows in (*sources, *([] if target is None else [target])):
        require_readable(base, rows, "max_length")
    return sources, target


def build_tagger(
    ner: TaggingArguments, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int] = ()
) -> CrossLingualTagger:
    """The two-level module: an RTN for the source languages on the chosen layers of the encoder, and what weighs rows.

    Args:
        tokens: labelled ones of each source language that trains.
    """
    last = len(encoder_layers(base, ner.rtn_module_path))
    rtn = RepresentationTransform(
        base.config.hidden_size,
        layers=ner.rtn_layers or [last],
        kind=ner.rtn_kind,
        bottleneck=ner.rtn_bottleneck,
        languages=ner.sources if ner.rtn_per_language else ["source"],
    )
    if ner.rtn_name_or_path is not None:
        _load_rtn(rtn, ner.rtn_name_or_path)
        _warn_of_another_base(ner.rtn_name_or_path, ner.model_name_or_path)
    recipe = ner.recipe
    head = head_of(ner.scorer)
    made = CrossLingualClassifier if head is TEXTS else CrossLingualTagger
    return made(
        ner.adapted(base, head.task_type),
        rtn,
        pad_token_id=tokenizer.pad_token_id,
        transform=recipe.transform,
        source_weight=recipe.weight,
        target_weight=recipe.weight,
        module_path=ner.rtn_module_path,
        weigher=_weigher(ner, base.config.hidden_size),
        source_weights=_source_weights(ner, tokens),
        languages=ner.sources if tokens else (),
    )


def _weigher(ner: TaggingArguments, hidden_size: int) -> WeightTable | WeightNet | None:
    if ner.source_weights == "none":
        return None
    if ner.source_weights == "language":
        return WeightTable(len(ner.sources), "softmax", ner.source_weights_floor)
    inputs = hidden_size if ner.source_weights == "hidden" else 1
    return WeightNet(ner.source_weights_units, inputs, ner.source_weights_floor)


def _source_weights(ner: TaggingArguments, tokens: Sequence[int]) -> SourceWeights | None:
    """None where all rows weigh 1."""
    proportions = proportions_of(ner.source_proportions, len(ner.sources))
    if not tokens or (ner.source_weights == "none" and proportions is None):
        return None
    if 0 in tokens:
        raise ValueError(f"{ner.sources[tokens.index(0)]} has no labelled word to weigh: leave it out of the sources")
    return SourceWeights(ner.source_weights, [count / sum(tokens) for count in tokens], proportions)


def source_facts(
    tagger: CrossLingualTagger, data: TargetData, history: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Source language -> its sentences, the weight of one, its share of the source loss, and its loss without weights.

    Weights of rows and losses are means over the tokens since the log before the last; None where nothing was logged.
    """
    names, of_rows = tagger.watch.domains, isinstance(tagger.weigher, WeightNet)
    held = tagger.source_weights
    weights = torch.ones(len(names)) if held is None else held.of_languages(tagger.weigher)
    rows = {name: {"weight": float(weight)} for name, weight in zip(names, weights, strict=True)}
    if held is not None and not of_rows:
        for row, share in zip(rows.values(), (held.first / held.factors).to(weights) * weights, strict=True):
            row["share"] = float(share)
    logged = {"share": "domain_share/", "loss": "domain_loss/", "weight": WEIGHT}
    return {
        name: {"sentences": len(data.sources[name])}
        | {key: last_logged(history, f"{kind}{name}") for key, kind in logged.items()}
        | ({} if of_rows else row)
        for name, row in rows.items()
    }


def _load_rtn(rtn: RepresentationTransform, place: str) -> None:
    """Give a new RTN the weights of a trained one.

    Raises:
        ValueError: where there is none, or one of another form, with the settings that differ.
    """
    trained = RepresentationTransform.from_pretrained(place)
    then, now = trained.config, rtn.config
    if differing := [name for name in now if now[name] != then[name]]:
        pairs = ", ".join(f"{name} {then[name]}, not {now[name]}" for name in differing)
        raise ValueError(f"rtn_name_or_path: the RTN of {place} has {pairs}: set rtn_layers, rtn_kind, ... as it has")
    rtn.load_state_dict(trained.state_dict())


def _warn_of_another_base(place: str, model: str) -> None:
    """An RTN reshapes the states of the model that it was trained with, which the results beside it name."""
    results = Path(place) / RESULTS
    if not results.is_file():
        return
    try:
        base = read_results(results)["settings"]["model_name_or_path"]
    except (ValueError, KeyError, TypeError):  # of an earlier version, or edited: nothing to warn of
        return
    if base != model:
        logger.warning("rtn_name_or_path: the RTN of %s was trained with %s, not %s", place, base, model)


def fit_arguments(ner: TaggingArguments, args: MetaTrainingArguments, data: TargetData) -> MetaTrainingArguments:
    """The arguments as the method needs them: no estimator without meta learning, no selection without dev data."""
    args, recipe = copy.copy(args), ner.recipe
    if not recipe.meta:
        args.estimator, args.estimator_kwargs = NO_ESTIMATOR, None
    if recipe.all_target_rows:
        args.meta_portion = 0.0
    if data.dev is None:
        args.eval_strategy, args.load_best_model_at_end, args.metric_for_best_model = "no", False, None
    refuse_metric(args, (*ner.scorer.units, "loss"))
    if not recipe.source:
        _keep_source_schedule(args, sum(map(len, data.sources.values())))
    return args


def _keep_source_schedule(args: MetaTrainingArguments, sentences: int) -> None:
    """Without source rows: as many steps, and checkpoints to choose from, as the other methods count on the source."""
    if args.max_steps > 0:
        return
    batch, accumulation = args.per_device_train_batch_size * args.world_size, args.gradient_accumulation_steps
    args.max_steps = steps_of(args.num_train_epochs, sentences, batch, accumulation)
    an_epoch = steps_of(1, sentences, batch, accumulation)
    if args.eval_strategy == IntervalStrategy.EPOCH:
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, an_epoch
    if args.save_strategy == SaveStrategy.EPOCH:
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, an_epoch


def _with_language(rows: Dataset, index: int) -> Dataset:
    return rows.add_column("language", [index] * len(rows))
