"""How a data set is laid out, where it does not say so itself: its columns, and how its tags are written."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from metaxl_evo.messages import unknown
from metaxl_evo.ner.schemes import DROP, IOB2, POS_TAGS, PREFIXES, TYPE, PartsOfSpeech, Scheme, TagScheme, TextLabels

INTEGER = re.compile(r"\d+")
OF_A_TRAINER = ("labels",)  # the one value that `label_names` has where it names the labels of a batch


@dataclass(frozen=True)
class Layout:
    """What a reader has to know of a data set.

    Args:
        tokens, tags: the names of these columns in a table, or their numbers in a text file, counted from 1; found by
            the reader if None.
        label_names: the tags that integers stand for, in the order of these; none where tags are written out.
        label_map: other names for entity types, or O for those that are not wanted; other parts of speech.

    Raises:
        ValueError: for a map to what is no type, label names that are no tags or come twice, or one column as both.
    """

    scheme: Scheme = field(default_factory=TagScheme)
    tokens: str | None = None
    tags: str | None = None
    label_names: tuple[str, ...] = ()
    label_map: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens == self.tags:
            raise ValueError(f"tokens_column and label_column_name are both {self.tokens}: name two columns")
        for kind in self.label_map.values():
            if self.of_texts and not (kind == DROP or (isinstance(kind, str) and self.scheme.tag.fullmatch(kind))):
                raise ValueError(f"label_map maps a label to another, or to {DROP}, not to {kind!r}")
            if not self.of_texts and not (isinstance(kind, str) and TYPE.fullmatch(kind)):
                raise ValueError(f"label_map maps an entity type to another, or to O, not to {kind!r}")
            if isinstance(self.scheme, PartsOfSpeech) and kind not in POS_TAGS:
                raise ValueError(unknown("part of speech in label_map", kind, POS_TAGS))
        for name in self.label_names:
            if not self.scheme.tag.fullmatch(name):
                raise ValueError(f"label_names: {self.scheme.refusal(name)}")
        if len(set(self.label_names)) < len(self.label_names):
            raise ValueError(f"label_names has a name twice: {', '.join(self.label_names)}: name each number's tag")

    @property
    def of_texts(self) -> bool:
        """Whether labels are of whole texts."""
        return isinstance(self.scheme, TextLabels)

    @property
    def tag(self) -> re.Pattern[str]:
        """What a tag looks like in the data."""
        return INTEGER if self.label_names else self.scheme.tag

    def refusal(self, tag: str) -> str:
        """Why `tag` is none, and what sets it right where that can be told."""
        if self.label_names:
            return f"malformed tag {tag!r}: label_names is for tags that are integers: leave it out"
        advice = ": set label_names to the names of integer tags" if INTEGER.fullmatch(tag) else ""
        return self.scheme.refusal(tag) + advice


@dataclass(kw_only=True)
class ColumnArguments(ABC):
    """The settings of a layout, whatever the tags say.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    tokens_column: str | None = field(
        default=None,
        metadata={"help": "Column of the words: a name (default: tokens), in text files a number counted from 1."},
    )
    label_column_name: str | None = field(
        default=None,
        metadata={"help": "Column of the tags: a name (default: ner_tags, tags, upos), in text files a number."},
    )
    label_map: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Other names of entity types, or O to drop one, e.g. {DATE: O}; of parts of speech, others."
        },
    )

    def __post_init__(self) -> None:
        self.layout()

    @abstractmethod
    def scheme(self) -> Scheme:
        """What the tags say."""

    def layout(self, label_names: Sequence[str] | None = None) -> Layout:
        """The layout that these settings say, with the names of integer tags."""
        names = tuple(label_names or ())
        return Layout(
            self.scheme(),
            tokens=self.tokens_column,
            tags=self.label_column_name,
            label_names=() if names == OF_A_TRAINER else names,
            label_map=self.label_map or {},
        )


@dataclass(kw_only=True)
class LayoutArguments(ColumnArguments):
    """The settings of a layout whose tags mark entities.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    label_scheme: str = field(
        default=IOB2, metadata={"help": f"How the data mark entities, one of {', '.join(PREFIXES)}; read as IOB2."}
    )
    entity_type: str | None = field(
        default=None, metadata={"help": "Type of all entities, where the tags are B, I and O alone (e.g. ENT)."}
    )

    def scheme(self) -> TagScheme:
        return TagScheme(self.label_scheme, self.entity_type)


@dataclass(kw_only=True)
class PosLayoutArguments(ColumnArguments):
    """The settings of a layout whose tags are universal parts of speech."""

    def scheme(self) -> PartsOfSpeech:
        return PartsOfSpeech()


@dataclass(kw_only=True)
class TextLayoutArguments(ColumnArguments):
    """The settings of a layout whose labels are of whole texts."""

    tokens_column: str | None = field(default=None, metadata={"help": "Column of the text (default: text)."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the label (default: label, labels, sentiment)."}
    )
    label_map: dict[str, str] | None = field(
        default=None,
        metadata={"help": f"Other names of labels, or `{DROP}` to leave their texts out, e.g. {{neutral: {DROP}}}."},
    )

    def scheme(self) -> TextLabels:
        return TextLabels()
