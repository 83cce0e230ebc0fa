"""Tagged sentences that train, judge and test: which entities are spoilt, by seqeval, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2, Entities

from metaxl_evo.ner.labels import label_names, ner_features
from metaxl_evo.weighting.tagged import TaggedArguments, load_tagged, spoilt, well_formed

NAMES = label_names(("LOC", "ORG", "PER"))
Marks = set[tuple[int, str, int, int]]


def rows_of(tags: Sequence[Sequence[str]], names: list[str] = NAMES) -> Dataset:
    made = {
        "tokens": [[f"w{row}.{place}" for place in range(len(words))] for row, words in enumerate(tags)],
        "ner_tags": [[names.index(tag) for tag in words] for words in tags],
    }
    return Dataset.from_dict(made, features=ner_features(names))


def random_rows(count: int = 200) -> Dataset:
    """Tags in any order, so that entities touch and stray I- begin some."""
    generator = np.random.default_rng(5)
    return rows_of([[NAMES[tag] for tag in generator.choice(7, 9, p=[0.4, *[0.1] * 6])] for _ in range(count)])


def tags_of(rows: Dataset) -> list[list[str]]:
    return [[NAMES[tag] for tag in words] for words in rows["ner_tags"]]


def marks(rows: Dataset) -> Marks:
    return {(row, *mark) for row, words in enumerate(tags_of(rows)) for mark in get_entities(words)}


@pytest.mark.parametrize(("noise", "dropped"), [("drop", 1.0), ("type", 0.0), ("both", 0.5)])
@pytest.mark.parametrize("rate", [0.0, 0.33, 0.5, 1.0])
def test_so_many_whole_entities_are_spoilt_and_no_other(noise: str, dropped: float, rate: float) -> None:
    clean = well_formed(random_rows(), NAMES)
    assert marks(clean) == marks(random_rows())  # with their stray I-
    noisy = spoilt(clean, NAMES, noise, rate, np.random.default_rng(3))
    before, after = marks(clean), marks(noisy)
    gone, new = before - after, after - before
    assert len(gone) == round(rate * len(before))
    assert len(gone) - len(new) == pytest.approx(dropped * len(gone), abs=0.5)
    places = {(row, first, last): kind for row, kind, first, last in gone}
    assert all(places[row, first, last] != kind for row, kind, first, last in new)
    inside = {(row, word) for row, first, last in places for word in range(first, last + 1)}
    for row, pair in enumerate(zip(tags_of(clean), tags_of(noisy), strict=True)):
        differing = {(row, word) for word, tags in enumerate(zip(*pair, strict=True)) if len(set(tags)) == 2}
        assert differing == {place for place in inside if place[0] == row}
        (found,) = Entities([pair[1]], IOB2).entities  # strict: each begins with B-
        assert {(one.tag, one.start, one.end - 1) for one in found} == set(get_entities(pair[1]))
    assert noisy["tokens"][:] == clean["tokens"][:]


def test_the_same_seed_spoils_the_same() -> None:
    clean = well_formed(random_rows(), NAMES)
    made = [spoilt(clean, NAMES, "both", 0.5, np.random.default_rng(seed))["ner_tags"][:] for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


# What is read --------------------------------------------------------------------------------------------------------

SENTENCE = (("Ann", "B-PER"), ("sees", "O"), ("Rome", "B-LOC"))


def write(folder: Path, **splits: Sequence[str]) -> str:
    """LANGUAGE `xx` of three-word sentences, each with its own verb."""
    (folder / "xx").mkdir(parents=True)
    for split, verbs in splits.items():
        text = ["\n".join(f"{verb if tag == 'O' else word}\t{tag}" for word, tag in SENTENCE) for verb in verbs]
        (folder / "xx" / split).write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return str(folder)


def verbs(count: int, start: int = 0) -> list[str]:
    return [f"v{number}" for number in range(start, start + count)]


def settings_of(dataset: str, **fields: Any) -> TaggedArguments:
    fields = {"language": "xx", "meta_size": 4, "model_name_or_path": "synthetic", **fields}
    made = TaggedArguments(**fields)
    made.dataset = dataset  # of words that the synthetic model does not know; it is not built here
    return made


def test_no_clean_sentence_is_tested_or_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half of what could judge is tested, too; each is there twice."""
    data = load_tagged(settings_of(write(tmp_path, train=verbs(20) * 2, test=verbs(10))), 0)
    tested, judging, trained = ({tuple(row) for row in one["tokens"]} for one in (data.test, data.meta, data.train))
    assert len(data.meta) == 4
    assert not judging & tested
    assert not judging & trained
    assert tested < trained
    assert data.seen == 10
    assert "10 test sentences train, too" in caplog.text


def test_which_words_are_wrong_is_known(tmp_path: Path) -> None:
    """Whole entities of one word here: by comparison with the file."""
    place = write(tmp_path, train=verbs(40), test=verbs(4, 90))
    data = load_tagged(settings_of(place, noise_rate=0.5), 0)
    assert data.wrong is not None
    for tags, wrong in zip(data.train["ner_tags"], data.wrong, strict=True):
        right = [tag for _, tag in SENTENCE]
        assert wrong == [data.names[tag] != truth for tag, truth in zip(tags, right, strict=True)]
    assert sum(map(sum, data.wrong)) == round(0.5 * 2 * len(data.train))


def test_a_spoilt_entity_joins_no_stray_one_behind_it(tmp_path: Path) -> None:
    """B-PER I-LOC are two entities; with the first one a place they would be one of two words."""
    (tmp_path / "xx").mkdir()
    for split, words in (("train", verbs(60)), ("test", verbs(3, 90))):
        text = "\n\n".join(f"Ann\tB-PER\nRome\tI-LOC\n{verb}\tO" for verb in words)
        (tmp_path / "xx" / split).write_text(f"{text}\n", encoding="utf-8")
    data = load_tagged(settings_of(str(tmp_path), noise_rate=0.5, noise="type"), 0)
    assert data.wrong is not None
    assert sum(map(sum, data.wrong)) == len(data.train)
    assert {len(get_entities([data.names[tag] for tag in row])) for row in data.train["ner_tags"]} == {2}


def test_integer_tags_take_their_names(tmp_path: Path) -> None:
    (tmp_path / "xx").mkdir()
    for split, words in (("train", verbs(10)), ("test", verbs(3, 50))):
        lines = [json.dumps({"tokens": ["Ann", verb], "ner_tags": [1, 0]}) for verb in words]
        (tmp_path / "xx" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = load_tagged(settings_of(str(tmp_path)), 0, label_names=["O", "B-PER", "I-PER"])
    assert data.names == ["O", "B-PER", "I-PER"]
    with pytest.raises(ValueError, match="label_names"):
        load_tagged(settings_of(str(tmp_path)), 0)


def test_too_few_sentences_are_left_to_judge(tmp_path: Path) -> None:
    place = write(tmp_path, train=verbs(12), test=verbs(4))
    with pytest.raises(ValueError, match=r"8 of 12 training sentences are not tested and may judge: lower meta_size"):
        load_tagged(settings_of(place, meta_size=9), 0)


@pytest.mark.parametrize(
    ("clean", "line"),
    [
        (verbs(6, 2), "2 sentences of .* are tested, too: take them out of one"),
        ([], r"clean.xx.train is empty"),
    ],
)
def test_clean_sentences_that_cannot_judge(clean: list[str], line: str, tmp_path: Path) -> None:
    place = write(tmp_path / "data", train=verbs(12, 20), test=verbs(4))
    own = write(tmp_path / "clean", train=clean)
    with pytest.raises(ValueError, match=line):
        load_tagged(settings_of(place, meta_dataset=own), 0)


def test_texts_are_no_tagged_sentences(tmp_path: Path) -> None:
    (tmp_path / "xx").mkdir()
    for split in ("train", "test"):
        (tmp_path / "xx" / f"{split}.csv").write_text("text,label\na b,yes\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"needs the columns tokens and ner_tags, but has text, label"):
        load_tagged(settings_of(str(tmp_path)), 0)
