"""A page in the browser that tags a sentence with one trained run, or with two side by side.

metaxl-evo demo FOLDER [FOLDER2] [--port 7860]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate, cycle
from operator import itemgetter
from statistics import mean
from typing import Any, NamedTuple

from metaxl_evo.ner.metrics import entities
from metaxl_evo.ner.saved_tagger import TEXT, SavedTagger, SavedTaggerArguments
from metaxl_evo.training.cli import ends_with_one_line
from metaxl_evo.training.parser import parse_arguments

COLOURS = ("#2f9e44", "#1971c2", "#e8590c", "#9c36b5", "#c2255c", "#0c8599", "#f08c00", "#5f3dc4")
COLUMNS = ("entity", "type", "confidence")


@dataclass
class DemoArguments:
    """Where the page is.

    Raises:
        ValueError: one line for a port that cannot be.
    """

    port: int | None = field(default=None, metadata={"help": "Of 127.0.0.1 (default: the first free one from 7860)."})

    def __post_init__(self) -> None:
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError(f"port must be between 1 and 65535, not {self.port}")


class Entity(NamedTuple):
    """Its place among the characters of a text, type, and the mean probability of its words' labels."""

    start: int
    end: int
    kind: str
    confidence: float


class Tagger:
    """A trained run that reads a sentence, as `predict_ner` does; the folder is read anew each time.

    Args:
        name: its folder or Hub id.

    Attributes:
        kinds: the types of entities that it knows.

    Raises:
        ValueError: for what holds no tagger that can be used.
    """

    def __init__(self, name: str):
        self.name = name
        self._settings = SavedTaggerArguments(model_name_or_path=name, use_cpu=True)
        _, self._labels = self._settings.labels()
        self.kinds = {label[2:] for label in self._labels} - {""}
        self.tag(["."])

    def tag(self, words: Sequence[str]) -> tuple[list[Entity], int]:
        """The entities of a sentence whose words stand one space apart, and how many words were not read.

        Raises:
            ValueError: for a sentence that the model cannot read.
        """
        (labels,), (confidences,) = SavedTagger.of_words(self._settings, self._labels, [words]).tag(TEXT)
        starts = list(accumulate((len(word) + 1 for word in words), initial=0))
        found = []
        for kind, first, last in sorted(entities(labels, strict=False), key=itemgetter(1)):
            read = [one for one in confidences[first : last + 1] if one is not None]
            found.append(Entity(starts[first], starts[last + 1] - 1, kind, mean(read)))
        return found, confidences.count(None)


def build_page(taggers: Sequence[Tagger]) -> Any:
    """The page (gradio's Blocks): a sentence, and for each tagger its entities in colour and their confidences."""
    import gradio as gr

    kinds = sorted(set[str]().union(*(tagger.kinds for tagger in taggers)))
    colours = dict(zip(kinds, cycle(COLOURS), strict=False))

    def shown(words: list[str], tagger: Tagger) -> tuple[dict[str, Any], list[list[str]]]:
        try:
            found, unread = tagger.tag(words) if words else ([], 0)
        except ValueError as error:
            raise gr.Error(f"{tagger.name}: {error}") from error
        if unread:
            gr.Warning(f"{tagger.name}: {unread} words were not read: too long a sentence, or unknown characters")
        text = " ".join(words)
        spans = [{"entity": one.kind, "start": one.start, "end": one.end} for one in found]
        rows = [[text[one.start : one.end], one.kind, f"{one.confidence:.3f}"] for one in found]
        return {"text": text, "entities": spans}, rows

    def answer(sentence: str) -> list[Any]:
        return [part for tagger in taggers for part in shown(sentence.split(), tagger)]

    with gr.Blocks(title="metaxl_evo", analytics_enabled=False) as page:
        sentence = gr.Textbox(label="Sentence", info="Words and punctuation between spaces", autofocus=True)
        button = gr.Button("Tag", variant="primary")
        outputs: list[Any] = []
        with gr.Row():
            for tagger in taggers:
                with gr.Column():
                    outputs.append(gr.HighlightedText(label=tagger.name, color_map=colours, show_legend=True))
                    outputs.append(gr.Dataframe(headers=list(COLUMNS), label="Confidence", interactive=False))
        gr.on([button.click, sentence.submit], answer, sentence, outputs)
    return page


def serve(argv: Sequence[str] | None = None) -> int:
    """Open the page on this machine alone, until it is interrupted.

    Raises:
        ValueError: one line for what cannot be shown.
    """
    given = list(argv or ())
    named = next((place for place, one in enumerate(given) if one.startswith("-")), len(given))
    names, (settings,) = given[:named], parse_arguments((DemoArguments,), given[named:])
    if len(names) not in (1, 2):
        raise ValueError("demo: name the folder of a trained tagger, or of two, as in metaxl-evo demo runs/a runs/b")
    if not find_spec("gradio"):
        raise ValueError("demo: gradio is not installed: pip install 'metaxl_evo[demo]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build_page([Tagger(name) for name in names])
    page.launch(server_name="127.0.0.1", server_port=settings.port, share=False)
    return 0


main = ends_with_one_line(serve)

if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
