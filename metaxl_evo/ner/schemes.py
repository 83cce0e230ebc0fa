"""How words are tagged: the schemes that mark entities, and their conversion to IOB2; parts of speech; whole texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB1, IOBES, Entities
from seqeval.scheme import IOB2 as SCHEME_IOB2

from metaxl_evo.messages import unknown
from metaxl_evo.ner.labels import label_names, map_types

IOB2 = "iob2"
PREFIXES = {IOB2: "BI", "iob1": "BI", "bioes": "BIES", "bilou": "BILU"}
POS_TAGS = (
    *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM"),
    *("PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
)
DROP = "drop"  # what `label_map` maps the label of a text to that is left out
NO_WORD = "_"  # the tag of what is written as one word and is several, which follow it
SAME_AS_BIOES = str.maketrans("LU", "ES")  # what BILOU calls the last word of an entity, and the only one
INVISIBLE = r"\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff"  # marks that would make another type of a tag
TYPE = re.compile(rf"[^\s{INVISIBLE}]+")


@dataclass(frozen=True)
class TagScheme:
    """How tags mark the entities of a data set.

    Args:
        name: one of PREFIXES. IOB1 writes B- only between two entities of one type that touch; BIOES (IOBES) marks the
            last word (E-) and the only one (S-) of an entity as well, and BILOU calls these L- and U-.
        entity_type: the type of all entities, where tags name none (`B`, `I`, `O`).

    Raises:
        ValueError: for an unknown scheme, or a type that is none.
    """

    words: ClassVar = "tokens"  # the columns of a table
    columns: ClassVar = ("ner_tags", "tags")
    what: ClassVar = "entity type"
    advice: ClassVar = ""

    name: str = IOB2
    entity_type: str | None = None

    def __post_init__(self) -> None:
        if self.name not in PREFIXES:
            raise ValueError(unknown("label_scheme", self.name, PREFIXES))
        if self.entity_type is not None and not TYPE.fullmatch(self.entity_type):
            raise ValueError(f"entity_type must be one word, e.g. ENT, not {self.entity_type!r}")

    @cached_property
    def tag(self) -> re.Pattern[str]:
        """What a tag looks like."""
        kind = "" if self.entity_type else f"-{TYPE.pattern}"
        return re.compile(rf"O|[{PREFIXES[self.name]}]{kind}")

    def refusal(self, tag: str) -> str:
        """Why `tag` is none of this scheme, and what sets it right where that can be told."""
        ending = "" if self.entity_type else "-TYPE"
        *firsts, last = [f"{prefix}{ending}" for prefix in PREFIXES[self.name]]
        advice = self._advice(tag)
        return f"malformed tag {tag!r}: a tag is O, {', '.join(firsts)} or {last}{advice and f': {advice}'}"

    def _advice(self, tag: str) -> str:
        if self.entity_type and TagScheme(self.name).tag.fullmatch(tag):
            return "it has a type: leave entity_type out"
        for name in PREFIXES:
            if TagScheme(name, self.entity_type).tag.fullmatch(tag):
                return f"it looks like {name.upper()}: set label_scheme: {name}"
        if not self.entity_type and re.fullmatch("[BIESLU]", tag):
            return "it names no type: set entity_type, e.g. ENT"
        if tag in POS_TAGS:
            return "it is a part of speech: use metaxl-evo pos, or name the column of entities by label_column_name"
        return ""

    def to_iob2(self, tags: Sequence[str]) -> list[str]:
        """The tags of one sentence in IOB2, with the same entities; IOB2 itself stays as it is.

        Read leniently, as `conlleval` does: whatever its prefix, a tag that continues nothing starts an entity.
        """
        typed = self._typed(tags)
        if self.name == IOB2:
            return typed
        converted = ["O"] * len(typed)
        for kind, start, end in get_entities(_as_bioes(typed)):
            converted[start : end + 1] = [f"B-{kind}", *[f"I-{kind}"] * (end - start)]
        return converted

    def is_well_formed(self, tags: Sequence[str]) -> bool:
        """Whether each tag of a sentence, other than O, is part of an entity that the scheme allows."""
        typed = _as_bioes(self._typed(tags))
        scheme = {IOB2: SCHEME_IOB2, "iob1": IOB1}.get(self.name, IOBES)
        (found,) = Entities([typed], scheme).entities
        return sum(entity.end - entity.start for entity in found) == sum(tag != "O" for tag in typed)

    def names_in_iob2(self, names: Sequence[str]) -> list[str]:
        """The declared label names in IOB2: O, then B- and I- of each type in its order; IOB2 itself stays."""
        if self.name == IOB2:
            return self._typed(names)
        kinds = dict.fromkeys(name[2:] for name in self._typed(names) if name != "O")
        return ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]

    @staticmethod
    def kind(tag: str) -> str:
        """The entity type of an IOB2 tag, "" where there is no entity."""
        return tag[2:]

    @staticmethod
    def label_names(kinds: Iterable[str]) -> list[str]:
        """All IOB2 tags of these types, O first."""
        return label_names(kinds)

    @staticmethod
    def mapped(tags: Sequence[str], label_map: Mapping[str, str]) -> list[str]:
        """A sentence's IOB2 tags with other types."""
        return map_types(tags, label_map)

    def _typed(self, tags: Sequence[str]) -> list[str]:
        if self.entity_type is None:
            return list(tags)
        return [tag if tag == "O" else f"{tag}-{self.entity_type}" for tag in tags]


@dataclass(frozen=True)
class PartsOfSpeech:
    """The universal parts of speech: a tag a word, all of the same kind as the word's label.

    Source: https://universaldependencies.org/u/pos (version 2).
    """

    words: ClassVar = "tokens"
    columns: ClassVar = ("upos", "pos_tags", "tags")
    what: ClassVar = "part of speech"
    advice: ClassVar = ""
    tag: ClassVar = re.compile("|".join((*POS_TAGS, NO_WORD)))

    def refusal(self, tag: str) -> str:
        """Why `tag` is none."""
        return f"malformed tag {tag!r}: a tag is one of {', '.join(POS_TAGS)}"

    @staticmethod
    def kind(tag: str) -> str:
        """The tag itself, as `label_map` names it."""
        return tag

    @staticmethod
    def label_names(kinds: Iterable[str]) -> list[str]:
        """All there are, whichever of them occur, so that languages share one label set."""
        return [*POS_TAGS, *sorted(set(kinds) - set(POS_TAGS))]

    @staticmethod
    def mapped(tags: Sequence[str], label_map: Mapping[str, str]) -> list[str]:
        """A sentence's tags with other names."""
        return [label_map.get(tag, tag) for tag in tags]


@dataclass(frozen=True)
class TextLabels:
    """A label a text. A text is a sentence of one word here: both are read, learned and scored alike."""

    words: ClassVar = "text"
    columns: ClassVar = ("label", "labels", "sentiment")
    what: ClassVar = "label"
    advice: ClassVar = f" (LABEL: {DROP} leaves its texts out)"
    tag: ClassVar = re.compile(rf"(?!{DROP}$)\S(.*\S)?")

    def refusal(self, tag: str) -> str:
        """Why `tag` is none."""
        return f"malformed label {tag!r}: a label is a name without spaces around it, and not {DROP}"

    @staticmethod
    def kind(tag: str) -> str:
        """The label itself, as `label_map` names it."""
        return tag

    @staticmethod
    def label_names(kinds: Iterable[str]) -> list[str]:
        """These, in alphabetical order."""
        return sorted(kinds)

    @staticmethod
    def mapped(tags: Sequence[str], label_map: Mapping[str, str]) -> list[str]:
        """A text's label with another name; none where it is left out."""
        return [name for tag in tags if (name := label_map.get(tag, tag)) != DROP]


Scheme = TagScheme | PartsOfSpeech | TextLabels


def _as_bioes(tags: Sequence[str]) -> list[str]:
    return [tag[0].translate(SAME_AS_BIOES) + tag[1:] for tag in tags]
