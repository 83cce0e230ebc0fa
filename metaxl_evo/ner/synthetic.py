"""A seeded family of invented languages with tagged names: cross-lingual NER that needs no download.

All languages descend from one proto-language, whose roots are random syllables. A language at distance d from it
replaces a share d of all roots and affixes by its own, rotates a share d of the letters among themselves (a regular
sound change: the same letters in every word), and with probability d each puts the verb last, adpositions behind their
noun, and adjectives and titles behind theirs. So 0 is the proto-language itself and 1 an unrelated one; the first
language is the rich source at distance 0, and the r-th after it is r times `distance` away.

Sentences are clauses of subject, verb, object and place. Persons, organisations and places are capitalised, but so is
the first word of a sentence; some surnames are also place names, and an organisation may be named after a place or a
person, so that titles, verbs, adpositions and case endings must tell them apart. Training sentences use only a share
`seen_names` of the names that dev and test sentences use. Tags are IOB2 over WikiAnn's seven labels.

Every word has its universal part of speech as well, and every sentence a label: whether it names a person.

Everything follows from `seed` by `random.Random` on strings, so that it is the same in every process.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from metaxl_evo.messages import unknown
from metaxl_evo.ner.labels import label_names, ner_features
from metaxl_evo.ner.schemes import POS_TAGS

CONSONANTS, VOWELS = "bdfghklmnprstvz", "aeiou"
LABELS = label_names(("LOC", "ORG", "PER"))
TOPICS = ("no person", "person")  # of a sentence

SYLLABLES = {"determiner": 1, "ending": 1, "at a place": 1, "at a org": 1, "surname": 3, "place": 3}  # else 2
CLAUSES = (  # subject, verb, object, where
    ("person", "speaking", "thing", None),
    ("person", "working", None, "org"),
    ("person", "moving", None, "place"),
    ("person", "seeing", "person", None),
    ("org", "making", "thing", "place"),
    ("org", "hiring", "person", None),
    ("place", "seeing", "thing", None),
    ("thing", "seeing", "org", None),
    ("thing", "moving", None, "place"),
    ("thing", "seeing", "thing", None),
)

Tagged = list[tuple[str, str, str]]  # the words of a phrase, each with its tag and its part of speech


@dataclass(frozen=True)
class SyntheticFamily:
    """The knobs of a family; two families with the same knobs hold the same sentences.

    `train_size` sentences are for the first language, `target_train_size` for each other one. `words` is the number of
    nouns (half as many adjectives, a tenth as many verbs of each kind), `names` that of given names, surnames, places
    and organisations each; a share `ambiguous` of the places are named like persons.
    """

    seed: int = 0
    languages: tuple[str, ...] = ("aru", "beru", "celu", "dalu")
    distance: float = 0.15
    train_size: int = 2000
    target_train_size: int = 100
    dev_size: int = 100
    test_size: int = 300
    words: int = 120
    names: int = 120
    seen_names: float = 0.5
    ambiguous: float = 0.3

    def __post_init__(self) -> None:
        for field in ("distance", "seen_names", "ambiguous"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must lie in 0..1, not {getattr(self, field)}")
        for field in ("train_size", "target_train_size", "dev_size", "test_size", "words", "names"):
            if getattr(self, field) < 2:
                raise ValueError(f"{field} must be at least 2, not {getattr(self, field)}")

    def distance_of(self, language: str) -> float:
        """The distance of a language from the first one, in 0..1."""
        if language not in self.languages:
            raise ValueError(unknown("synthetic language", language, self.languages))
        return min(1.0, self.distance * self.languages.index(language))

    def load(self, language: str) -> DatasetDict:
        """The train, validation and test sentences of a language."""
        lexicon = Lexicon(self.seed, language, self.distance_of(language))
        train_size = self.train_size if language == self.languages[0] else self.target_train_size
        sizes = {"train": train_size, "validation": self.dev_size, "test": self.test_size}
        return DatasetDict({split: self._draw(lexicon, split, size) for split, size in sizes.items()})

    def _draw(self, lexicon: Lexicon, split: str, size: int) -> Dataset:
        n_names = max(1, round(self.names * self.seen_names)) if split == "train" else self.names
        grammar = Grammar(self, lexicon, n_names, random.Random(f"{self.seed}/{lexicon.language}/{split}"))
        sentences = [grammar.sentence() for _ in range(size)]
        columns: dict[str, Any] = {
            name: [[word[at] for word in sentence] for sentence in sentences]
            for at, name in enumerate(("tokens", "ner_tags", "upos"))
        }
        columns["text"] = [" ".join(words) for words in columns["tokens"]]
        columns["label"] = [TOPICS["B-PER" in tags] for tags in columns["ner_tags"]]
        further = {"upos": List(ClassLabel(names=list(POS_TAGS))), "text": Value("string"), "label": Value("string")}
        return Dataset.from_dict(columns, features=Features(ner_features(LABELS) | further))


class Lexicon:
    """The words and habits of one language: what it keeps of the proto-language, and what it has of its own."""

    def __init__(self, seed: int, language: str, distance: float) -> None:
        self.seed = seed
        self.language = language
        self.distance = distance
        self._sounds: dict[int, str] = {}
        for letters in (CONSONANTS, VOWELS):
            shuffled = self._own("sounds", letters).sample(letters, len(letters))
            changed = shuffled[: round(distance * len(letters))]
            self._sounds |= str.maketrans(dict(zip(changed, changed[1:] + changed[:1], strict=True)))
        self._roots: dict[tuple[str, int], str] = {}

    def root(self, category: str, number: int = 0) -> str:
        """The root of a meaning, named by its category and a number within it."""
        key = (category, number)
        if key not in self._roots:
            rng = self._own(*key) if self.differs(*key) else random.Random(f"{self.seed}/{category}/{number}")
            root = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(SYLLABLES.get(category, 2)))
            coda = rng.choice(("", *"lmnrs")) if category != "ending" else ""
            self._roots[key] = (root + coda).translate(self._sounds)
        return self._roots[key]

    def differs(self, *feature: object) -> bool:
        """Whether the language parts from the proto-language in a feature: never at distance 0, always at 1."""
        return self._own("differs", *feature).random() < self.distance

    def _own(self, *key: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, self.language, *key))))


class Grammar:
    """Draws tagged sentences of one language from `rng`, with the first `n_names` names of each kind."""

    def __init__(self, family: SyntheticFamily, lexicon: Lexicon, n_names: int, rng: random.Random) -> None:
        self.family = family
        self.lexicon = lexicon
        self.n_names = n_names
        self.rng = rng

    def sentence(self) -> Tagged:
        subject, verb, other, where = self.rng.choice(CLAUSES)
        clause = [self._phrase(subject), self._verb(verb)]
        if other:
            clause.append(self._phrase(other))
        if where:
            clause.append(self._adpositional(where))
        if self.lexicon.differs("verb last"):
            clause.append(clause.pop(1))
        (first, tag, part_of_speech), *rest = [item for phrase in clause for item in phrase]
        return [(first.capitalize(), tag, part_of_speech), *rest, (".", "O", "PUNCT")]

    def _phrase(self, kind: str) -> Tagged:
        return {"thing": self._thing, "person": self._person, "place": self._place, "org": self._organisation}[kind]()

    def _thing(self) -> Tagged:
        determiner = _outside("DET", self._word("determiner", 3))
        word = self._word("noun", self.family.words)
        noun = _outside("NOUN", word + self.rng.choice(("", self.lexicon.root("ending", 0))))
        if self.rng.random() < 0.6:
            return determiner + noun
        adjective = _outside("ADJ", self._word("adjective", self.family.words // 2))
        return determiner + self._order("adjective last", adjective, noun)

    def _verb(self, kind: str) -> Tagged:
        return _outside("VERB", self._word(kind, max(2, self.family.words // 10)) + self.lexicon.root("ending", 1))

    def _adpositional(self, kind: str) -> Tagged:
        """A place or organisation with its adposition and case ending."""
        *words, (last, tag, part_of_speech) = self._phrase(kind)
        phrase = [*words, (last + self.lexicon.root("ending", 2), tag, part_of_speech)]
        return self._order("postpositions", _outside("ADP", self._word(f"at a {kind}", 2)), phrase)

    def _person(self) -> Tagged:
        surname = self._name("surname")
        form = self.rng.random()
        if form < 0.5:
            return _entity("PER", self._name("given name"), surname)
        if form < 0.75:
            return _entity("PER", surname)
        title = _outside("NOUN", self._word("title", 4))
        return self._order("title last", title, _entity("PER", surname))

    def _place(self) -> Tagged:
        qualified = self.rng.random() < 0.3
        return _entity("LOC", *([self._word("qualifier", 3)] if qualified else []), self._name("place"))

    def _organisation(self) -> Tagged:
        form = self.rng.random()
        if form < 0.4:
            return _entity("ORG", self._word("institution", 4), self._name("place"))
        if form < 0.7:
            return _entity("ORG", self._name("surname"), self._word("company", 4))
        return _entity("ORG", self._name("organisation"))

    def _name(self, kind: str) -> str:
        number = self.rng.randrange(self.n_names)
        # Scattered over the numbers, so that the names of training sentences hold their share of ambiguous ones.
        chance = random.Random(f"{self.family.seed}/ambiguous/{number}").random()
        return self.lexicon.root("surname" if kind == "place" and chance < self.family.ambiguous else kind, number)

    def _word(self, category: str, size: int) -> str:
        return self.lexicon.root(category, int(size * self.rng.random() ** 2))  # the first ones are the common ones

    def _order(self, feature: str, *phrases: Tagged) -> Tagged:
        """The phrases in the order of the proto-language, or in reverse where the language differs in `feature`."""
        return [item for phrase in (phrases[::-1] if self.lexicon.differs(feature) else phrases) for item in phrase]


def _outside(part_of_speech: str, word: str) -> Tagged:
    return [(word, "O", part_of_speech)]


def _entity(kind: str, *words: str) -> Tagged:
    return [(word.capitalize(), f"{'I' if position else 'B'}-{kind}", "PROPN") for position, word in enumerate(words)]
