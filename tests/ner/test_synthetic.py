"""The synthetic family: reproducible, as far apart as asked, and worth learning from."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from metaxl_evo.ner import synthetic
from metaxl_evo.ner.data import load_ner_dataset
from metaxl_evo.ner.encoding import encode
from metaxl_evo.ner.metrics import entity_scores, word_predictions
from metaxl_evo.ner.synthetic import LABELS, Lexicon, SyntheticFamily
from metaxl_evo.ner.synthetic_tagger import make_synthetic_tagger, train_tokenizer

SMALL = SyntheticFamily(train_size=60, target_train_size=20, dev_size=10, test_size=30)


def sentences(family: SyntheticFamily, language: str, split: str = "train") -> list[list[str]]:
    return list(family.load(language)[split]["tokens"])


def test_sizes_and_labels() -> None:
    loaded = load_ner_dataset("synthetic", SMALL.languages, synthetic=SMALL)
    assert {language: len(parts["train"]) for language, parts in loaded.items()} == {
        "aru": 60,
        "beru": 20,
        "celu": 20,
        "dalu": 20,
    }
    assert {len(parts["validation"]) for parts in loaded.values()} == {10}
    assert {len(parts["test"]) for parts in loaded.values()} == {30}
    assert LABELS == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    assert loaded["dalu"]["test"].features["ner_tags"].feature.names == LABELS


def test_tags_are_well_formed_and_names_are_capitalised() -> None:
    seen = set()
    for language in SMALL.languages:
        for part in SMALL.load(language).values():
            for words, tags in zip(part["tokens"], part["ner_tags"], strict=True):
                assert words[-1] == "."
                previous = "O"
                for word, tag in zip(words, (LABELS[tag] for tag in tags), strict=True):
                    seen.add(tag)
                    assert tag[0] != "I" or previous[2:] == tag[2:]
                    assert tag == "O" or re.fullmatch("[A-Z][a-z]+", word)
                    previous = tag
    assert seen == set(LABELS)


def digest() -> str:
    family = SyntheticFamily(seed=5, train_size=40)
    vocabulary = sorted(train_tokenizer(family, 300, 64).get_vocab().items())
    content = repr([list(part) for part in family.load("celu").values()]) + repr(vocabulary)
    return hashlib.sha256(content.encode()).hexdigest()


@pytest.mark.slow
def test_same_sentences_in_every_process() -> None:
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['digest']())"
    path = os.pathsep.join([str(Path(synthetic.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": path}
    other = subprocess.run([sys.executable, "-c", code, __file__], env=environment, capture_output=True, text=True)
    assert other.stdout.strip() == digest(), other.stderr


def test_seeds_give_other_families() -> None:
    assert sentences(SMALL, "aru") != sentences(SyntheticFamily(seed=1, train_size=60), "aru")
    assert sentences(SMALL, "aru") != sentences(SMALL, "aru", "test")[:60]


@pytest.mark.parametrize(
    ("distance", "lowest", "highest"), [(0.0, 1.0, 1.0), (0.1, 0.3, 0.9), (0.5, 0.01, 0.3), (1.0, 0.0, 0.02)]
)
def test_share_of_words_kept_at_a_distance(distance: float, lowest: float, highest: float) -> None:
    source, target = Lexicon(0, "aru", 0.0), Lexicon(0, "beru", distance)
    kept = sum(source.root("noun", number) == target.root("noun", number) for number in range(500)) / 500
    assert lowest <= kept <= highest


def test_sound_changes_are_regular() -> None:
    source, target = Lexicon(0, "aru", 0.0), Lexicon(0, "beru", 0.3)
    letters: dict[str, set[str]] = {}
    for number in range(300):
        if not target.differs("noun", number):
            for old, new in zip(source.root("noun", number), target.root("noun", number), strict=True):
                letters.setdefault(old, set()).add(new)
    assert all(len(new) == 1 for new in letters.values())
    assert len({min(new) for new in letters.values()}) == len(letters)
    changed = sum(new != {old} for old, new in letters.items())
    assert changed == round(0.3 * len(synthetic.CONSONANTS)) + round(0.3 * len(synthetic.VOWELS))


def test_distance_grows_with_rank_and_ends_at_one() -> None:
    family = SyntheticFamily(distance=0.4)
    assert [family.distance_of(name) for name in family.languages] == pytest.approx([0, 0.4, 0.8, 1.0])


def test_names_seen_in_training_and_not() -> None:
    """Given names stand in no other role, so that each can be told from the test sentences of the source."""
    family = SyntheticFamily(test_size=1000)
    lexicon = Lexicon(family.seed, "aru", 0.0)
    known, unknown = (
        {lexicon.root("given name", number).capitalize() for number in numbers}
        for numbers in (range(60), range(60, 120))
    )
    used = {
        split: {word for words in sentences(family, "aru", split) for word in words} for split in ("train", "test")
    }
    assert known <= used["train"]
    assert len(used["train"] & (unknown - known)) == 0
    assert len(used["test"] & (unknown - known)) > 40


def test_some_names_are_ambiguous() -> None:
    roles: dict[str, set[str]] = {}
    part = SyntheticFamily().load("aru")["train"]
    for words, tags in zip(part["tokens"], part["ner_tags"], strict=True):
        for word, tag in zip(words, tags, strict=True):
            if tag:
                roles.setdefault(word, set()).add(LABELS[tag][2:])
    assert sum({"PER", "LOC"} <= kinds for kinds in roles.values()) > 10


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"distance": 1.5}, r"distance must lie in 0\.\.1, not 1\.5"),
        ({"seen_names": -0.1}, r"seen_names must lie in 0\.\.1"),
        ({"test_size": 0}, "test_size must be at least"),
    ],
)
def test_knobs_out_of_range(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticFamily(**knobs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown synthetic language 'bero': did you mean 'beru'"):
        SMALL.load("bero")


def test_tagger_saves_loads_and_runs_in_a_pipeline(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    model, tokenizer = make_synthetic_tagger(SMALL, layers=1, hidden_size=16, heads=2, vocab_size=300)
    assert torch.equal(torch.random.get_rng_state(), state)
    again, _ = make_synthetic_tagger(SMALL, layers=1, hidden_size=16, heads=2, vocab_size=300)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 299]
    assert len(tokenizer) == model.config.vocab_size == 300
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    words = sentences(SMALL, "beru", "test")[0]
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoded, loaded = (each(words, is_split_into_words=True) for each in (tokenizer, loaded_tokenizer))
    assert loaded["input_ids"] == encoded["input_ids"]
    assert loaded_tokenizer.decode(loaded["input_ids"], skip_special_tokens=True) == " ".join(words)
    assert loaded.word_ids()[1:-1] == sorted(loaded.word_ids()[1:-1])
    assert list(AutoModelForTokenClassification.from_pretrained(tmp_path).config.id2label.values()) == LABELS
    tagged = pipeline("token-classification", model=str(tmp_path))(" ".join(words))
    assert {token["entity"] for token in tagged} <= set(LABELS)


def test_a_tagger_learns_the_source_and_transfers_a_little() -> None:
    """A smoke test of learnability: 150 small steps on the source reach what chance and the target alone do not."""
    family = SyntheticFamily(train_size=1000, test_size=150)
    model, tokenizer = make_synthetic_tagger(family, layers=1)
    pad = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    rows = list(encode(family.load("aru")["train"], tokenizer, 64))

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        return {
            key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
            for key, value in pad.items()
        }

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(150):
            picked = torch.randint(len(rows), (32,), generator=generator).tolist()
            model(**collate([rows[row] for row in picked])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    f1 = {}
    for language in ("aru", "beru"):
        test = family.load(language)["test"]
        batch = collate(list(encode(test, tokenizer, 64, numbered=True)))
        labels = batch.pop("labels")
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(-1)
        references = [[LABELS[tag] for tag in tags] for tags in test["ner_tags"]]
        words = word_predictions(predictions, labels, list(map(len, references)), LABELS)
        f1[language] = entity_scores(references, words)["f1"]
    assert f1["aru"] > 0.4
    assert 0.05 < f1["beru"] < f1["aru"] - 0.1
