"""From token logits to entity scores: of one data set inside a Trainer, or of a saved model on several languages."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainingArguments

from metaxl_evo.messages import unknown
from metaxl_evo.ner.arguments import SHORTEST
from metaxl_evo.ner.data import load_ner_dataset
from metaxl_evo.ner.encoding import IGNORED, PadRight, encode, lost_words, plain_labels
from metaxl_evo.ner.layout import LayoutArguments
from metaxl_evo.ner.metrics import (
    Scores,
    average,
    entity_scores,
    numbers_of,
    scores_table,
    with_sentences,
    word_predictions,
)
from metaxl_evo.ner.pretrained import (
    load_classifier,
    longest_input,
    require_padding_unseen,
    require_readable,
    trained_labels,
)
from metaxl_evo.ner.sources import SPLITS
from metaxl_evo.ner.spacing import as_in_text
from metaxl_evo.training.checkpoint import require_writable


@dataclass
class EvaluationArguments(LayoutArguments):
    """What is evaluated on what.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a trained token classifier."})
    dataset: str = field(
        metadata={"help": "Hub id (a configuration a language), a folder LANG/SPLIT, or `synthetic`."}
    )
    languages: list[str] = field(metadata={"help": "Languages to evaluate on, each on its own."})
    split: str = field(default="test", metadata={"help": f"One of {', '.join(SPLITS)}."})
    label_names: list[str] | None = field(
        default=None, metadata={"help": "Names of tags that are integers, from 0 on, e.g. O,B-PER,I-PER."}
    )
    strict: bool = field(default=False, metadata={"help": "Count only well-formed IOB2 entities."})
    batch_size: int = field(default=32, metadata={"help": "Sentences per device and pass."})
    max_length: int = field(
        default=512, metadata={"help": "Sub-tokens of a sentence at most; words beyond count as O."}
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the scores (default: print only)."})
    overwrite: bool = field(default=False, metadata={"help": "Replace output_file where it exists."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in SPLITS:
            raise ValueError(unknown("split", self.split, SPLITS))
        for name, least in (("batch_size", 1), ("max_length", SHORTEST)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.languages:
            raise ValueError("languages is empty: name at least one language")


class EvaluationSet:
    """A language's dev or test sentences, encoded, with the words that their predictions are scored against.

    Each word has a number, which is part of its label and comes back with its prediction: scores depend on no order of
    the rows, no batch and no padding.

    Args:
        sentences: `tokens` and `ner_tags`.
        max_length: sub-tokens a sentence; the words beyond are predicted O, and counted in `n_truncated_words`.
        strict: count only well-formed IOB2 entities.
    """

    def __init__(
        self,
        sentences: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        names: Sequence[str],
        strict: bool,
    ):
        self.names, self.strict = list(names), strict
        self.references = [[self.names[tag] for tag in tags] for tags in sentences["ner_tags"]]
        self.rows = encode(sentences, tokenizer, max_length, numbered=True)
        self.lost = lost_words(sentences, tokenizer, max_length)
        self._labels = np.sort(numbers_of([row or [IGNORED] for row in self.rows["labels"]]))

    def score(self, predictions: Any, labels: Any) -> Scores:
        """Entity scores of (n, L) predicted label ids, and what came back with them: the labels of `rows`.

        Raises:
            ValueError: where these are not the labels of all words.
        """
        if not np.array_equal(np.unique(numbers_of(labels)), self._labels):
            raise ValueError(
                f"the labels that came back are not those of the {len(self._labels)} words to score: evaluate the "
                "rows of this set, all of them, by a trainer of its kind"
            )
        words = word_predictions(predictions, labels, list(map(len, self.references)), self.names)
        counts = {
            "n_truncated_words": self.lost.truncated,
            "n_words_without_sub_token": self.lost.without_sub_token,
        }
        scores = entity_scores(self.references, words, strict=self.strict) | counts
        return with_sentences(scores, self.references, words, strict=self.strict)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The three rates, for the Trainer's log and model selection."""
        scores = self.score(prediction.predictions, prediction.label_ids)
        return {key: float(scores[key]) for key in ("precision", "recall", "f1")}

    def predict(self, trainer: Trainer) -> Scores:
        """Run the trainer's model over the sentences and score it."""
        previous, trainer.compute_metrics = trainer.compute_metrics, None
        try:
            found = trainer.predict(self.rows)
        finally:
            trainer.compute_metrics = previous
        return self.score(found.predictions, found.label_ids)


class WordTrainer(Trainer):
    """A Trainer whose evaluation leaves no row out, and brings label ids back beside the numbered labels of words."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label_names = ["labels"]  # whatever the arguments call so

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of the plain labels; (B, T) predicted label ids and numbered labels, padded alike."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        inputs = {**inputs, "labels": plain_labels(labels)}
        loss, found, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        logits: Any = found  # with whatever else the model returns behind them
        if logits is None:
            return loss, None, None
        return loss, (logits[0] if isinstance(logits, tuple) else logits).argmax(-1), labels

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All rows, in their order."""
        with self._every_row():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """All rows, in their order."""
        with self._every_row():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _every_row(self) -> Iterator[None]:
        """Without what training asks of its own batches."""
        args, self.args = self.args, copy.copy(self.args)
        self.args.dataloader_drop_last, self.args.train_sampling_strategy = False, "random"
        self.args.dataloader_persistent_workers = False  # it would keep the rows of another evaluation set
        self.args.dataloader_in_order = True  # gathering cuts the last batch to the size of the shortest one
        try:
            yield
        finally:
            self.args = args


def evaluate_model(settings: EvaluationArguments) -> dict[str, Any]:
    """Score a trained model on each language; prints a table, returns the scores and saves them where asked.

    The result is `{SPLIT: {LANGUAGE: scores, "average": scores}, "settings": {...}}`, as in `results.json` of a run.

    Raises:
        ValueError: for a model without a trained head, data that do not fit it, or an output file that exists or
            cannot be written.
    """
    output = None if settings.output_file is None else Path(settings.output_file)
    if output is not None and output.is_dir():
        raise ValueError(f"output_file: {output} is a folder: name a file in it")
    if output is not None and output.exists() and not settings.overwrite:
        raise ValueError(f"output_file: {output} exists: choose another name, or set overwrite: true")
    names = trained_labels(settings.model_name_or_path)
    if names is None:
        raise ValueError(
            f"{settings.model_name_or_path} has no trained token-classification head: train one with "
            "scripts/train_ner.py and give its output folder"
        )
    data = load_ner_dataset(
        settings.dataset,
        settings.languages,
        splits=[settings.split],
        names=names,
        layout=settings.layout(settings.label_names),
    )
    base, tokenizer = load_classifier(settings.model_name_or_path, names)
    if output is not None:
        require_writable(output.parent, "output_file")
    parts = {language: splits[SPLITS[settings.split]] for language, splits in data.items()}
    tokenizer = as_in_text(
        tokenizer, [words for part in parts.values() for words in part["tokens"][:100]], base.config
    )
    max_length = min(settings.max_length, longest_input(base))
    sets = {
        language: EvaluationSet(part, tokenizer, max_length, names, settings.strict)
        for language, part in parts.items()
    }
    for one in sets.values():
        require_readable(base, one.rows, "max_length")
        require_padding_unseen(base, one.rows, tokenizer.pad_token_id, "batch_size", settings.batch_size)
    with tempfile.TemporaryDirectory() as scratch:  # a Trainer wants a folder even where it writes nothing
        trainer = WordTrainer(
            base,
            TrainingArguments(
                scratch,
                per_device_eval_batch_size=settings.batch_size,
                use_cpu=settings.use_cpu,
                report_to="none",
                remove_unused_columns=False,
            ),
            data_collator=PadRight(tokenizer.pad_token_id),
        )
        scores = {language: one.predict(trainer) for language, one in sets.items()}
    results = {settings.split: {**scores, "average": average(scores)}, "settings": asdict(settings)}
    if trainer.is_world_process_zero():
        print(scores_table(scores))
        if output is not None:
            output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results
