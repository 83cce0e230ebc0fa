"""Labels of a saved tagger for sentences that have none."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from metaxl_evo.messages import one_line
from metaxl_evo.ner.columns import read_words, text_lines
from metaxl_evo.ner.pretrained import TEXTS, TOKENS
from metaxl_evo.ner.saved_tagger import TEXT, SavedTagger, SavedTaggerArguments, Tagged, conll
from metaxl_evo.training.checkpoint import require_writable


@dataclass(kw_only=True)
class PredictionArguments(SavedTaggerArguments):
    """What is read by which tagger.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    text_file: str | None = field(
        default=None,
        metadata={
            "help": "Text, a sentence a line; its words stand between spaces. A classifier of texts labels lines."
        },
    )
    tokens_file: str | None = field(
        default=None, metadata={"help": "A word a line, a blank line between sentences, further columns left out."}
    )
    tokens_column: int = field(default=1, metadata={"help": "Column of the words in tokens_file, counted from 1."})
    output_file: str | None = field(
        default=None,
        metadata={"help": "CoNLL file: token, predicted label and confidence (default: print)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.text_file is None) == (self.tokens_file is None):
            raise ValueError("give one file to read: text_file (a sentence a line) or tokens_file (a word a line)")
        if self.tokens_column < 1:
            raise ValueError(f"tokens_column must be at least 1, not {self.tokens_column}")

    def sentences(self, *, of_texts: bool = False) -> list[list[str]]:
        """The words of each sentence; of whole texts each line is one.

        Raises:
            ValueError: for a file that cannot be read, or holds none.
        """
        name = self.text_file or self.tokens_file or ""
        try:
            if of_texts and self.text_file is None:
                raise ValueError("tokens_file: a classifier of texts reads text_file, a text a line")
            if self.tokens_file is not None:
                found = read_words(Path(name), self.tokens_column)
            else:
                lines = filter(str.strip, text_lines(Path(name)))
                found = [[line.strip()] if of_texts else line.split() for line in lines]
        except OSError as error:
            raise ValueError(f"{name} cannot be read ({one_line(error)}): name a text file") from error
        if not found:
            raise ValueError(f"{name} is empty: it must hold at least one sentence")
        return found


def predict(settings: PredictionArguments) -> Tagged:
    """The labels and confidences of all words; prints them in CoNLL columns, or writes them where asked.

    Raises:
        ValueError: for a model without a trained head, sentences that it cannot read, or a file that exists or cannot
            be written.
    """
    file, (head, names) = settings.new_file("output_file"), settings.labels((TOKENS, TEXTS))
    tokens = settings.sentences(of_texts=head is TEXTS)
    tagger = SavedTagger.of_words(settings, names, tokens, head)
    if file is not None:
        require_writable(file.parent, "output_file")
    found = tagger.tag(TEXT)
    if tagger.trainer.is_world_process_zero():
        text = conll(tokens, *found)
        print(text, end="") if file is None else file.write_text(text, encoding="utf-8")
    return found
