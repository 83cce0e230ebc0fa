"""A trained tagger in a folder or on the Hub: its settings, and the labels and confidences that it gives to words."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from datasets import Dataset
from transformers import TrainingArguments

from metaxl_evo.ner.arguments import SHORTEST
from metaxl_evo.ner.encoding import PadRight
from metaxl_evo.ner.evaluation import EvaluationSet, WordTrainer
from metaxl_evo.ner.labels import ner_features
from metaxl_evo.ner.metrics import by_word
from metaxl_evo.ner.pretrained import (
    TEXTS,
    TOKENS,
    Head,
    head_of,
    load_classifier,
    longest_input,
    require_padding_unseen,
    require_readable,
    trained_labels,
)
from metaxl_evo.ner.scorers import Scorer, scorer_of
from metaxl_evo.ner.spacing import as_in_text
from metaxl_evo.training.logs import is_watched

BREAKS = str.maketrans("\t\n\r", "   ")  # within a word of a table

TEXT = "text"


@dataclass(kw_only=True)
class SavedTaggerArguments:
    """Which tagger, and how it reads.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a trained token classifier."})
    batch_size: int = field(default=32, metadata={"help": "Sentences per device and pass."})
    max_length: int = field(
        default=512, metadata={"help": "Sub-tokens of a sentence at most; words beyond count as O."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the files that are written, where they exist."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model brings along."})

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_length", SHORTEST)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def labels(self, heads: Sequence[Head] = (TOKENS,)) -> tuple[Head, list[str]]:
        """The trained head, one of these, and its label names.

        Raises:
            ValueError: for a model that has none of them.
        """
        for head in heads:
            names = trained_labels(self.model_name_or_path, head, trust_remote_code=self.trust_remote_code)
            if names is not None:
                return head, names
        raise ValueError(
            f"{self.model_name_or_path} has no trained token-classification head: train one with "
            "scripts/train_ner.py and give its output folder"
        )

    def new_file(self, setting: str) -> Path | None:
        """The file that `setting` names, if it does.

        Raises:
            ValueError: for one that must not be replaced.
        """
        name = getattr(self, setting)
        file = None if name is None else Path(name)
        if file is not None and file.is_dir():
            raise ValueError(f"{setting}: {file} is a folder: name a file in it")
        if file is not None and file.exists() and not self.overwrite:
            raise ValueError(f"{setting}: {file} exists: choose another name, or set overwrite: true")
        return file


class Tagged(NamedTuple):
    """The label of each word of each sentence, and its probability; None for a word that the model has not read."""

    labels: list[list[str]]
    confidences: list[list[float | None]]


class SavedTagger:
    """A tagger that is ready to read some sentences.

    Args:
        parts: all that it will read, `tokens` and `ner_tags`, by their names; they decide how words are spaced.
        scorer: what the words are judged by.

    Attributes:
        sets: what each part is scored by.

    Raises:
        ValueError: for a model that cannot be read, or cannot read these sentences.
    """

    def __init__(
        self, settings: SavedTaggerArguments, names: Sequence[str], parts: dict[str, Dataset], scorer: Scorer
    ):
        trusted = settings.trust_remote_code
        head = head_of(scorer)
        base, published = load_classifier(settings.model_name_or_path, names, head=head, trust_remote_code=trusted)
        words = [words for part in parts.values() for words in part["tokens"][:100]]
        tokenizer = as_in_text(published, words, base.config, trust_remote_code=trusted)
        length = min(settings.max_length, longest_input(base))
        self.sets = {name: EvaluationSet(part, tokenizer, length, names, scorer) for name, part in parts.items()}
        for one in self.sets.values():
            require_readable(base, one.rows, "max_length")
            require_padding_unseen(base, one.rows, tokenizer.pad_token_id, "batch_size", settings.batch_size)
        self._scratch = tempfile.TemporaryDirectory()  # a Trainer wants a folder even where it writes nothing
        args = TrainingArguments(
            self._scratch.name,
            per_device_eval_batch_size=settings.batch_size,
            use_cpu=settings.use_cpu,
            report_to="none",
            disable_tqdm=not is_watched(),
            remove_unused_columns=False,
        )
        self.trainer = WordTrainer(base, args, data_collator=PadRight(tokenizer.pad_token_id))
        self.trainer.with_confidence, self.trainer.of_texts = True, head is TEXTS

    @classmethod
    def of_words(
        cls, settings: SavedTaggerArguments, names: Sequence[str], tokens: Sequence[Sequence[str]], head: Head = TOKENS
    ) -> Self:
        """One that is ready to read the part `TEXT`: sentences that have no labels."""
        blank = [[0] * len(words) for words in tokens]
        rows = Dataset.from_dict({"tokens": tokens, "ner_tags": blank}, features=ner_features(names))
        return cls(settings, names, {TEXT: rows}, scorer_of(names, of_texts=head is TEXTS))

    def tag(self, name: str) -> Tagged:
        """Read the sentences of a part."""
        one = self.sets[name]
        found = self.trainer.predict(one.rows)
        predictions: Any = found.predictions
        lengths = list(map(len, one.references))
        return Tagged(one.words(predictions[0], found.label_ids), by_word(predictions[1], found.label_ids, lengths))


def conll(tokens: Sequence[Sequence[str]], *columns: Sequence[Sequence[Any]]) -> str:
    """A word a line with its columns behind tabs, a blank line between sentences; `-` for what there is not."""
    return "\n".join(
        "".join("\t".join(map(_cell, line)) + "\n" for line in zip(*sentence, strict=True))
        for sentence in zip(tokens, *columns, strict=True)
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value).translate(BREAKS)
