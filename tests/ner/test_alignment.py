"""Scores are those of seqeval on the raw file, one sentence a pass, however rows are batched and padded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import RandomSampler
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    TrainingArguments,
)

from metaxl_evo.ner.data import load_ner_dataset
from metaxl_evo.ner.encoding import PadRight
from metaxl_evo.ner.evaluation import EvaluationSet, WordTrainer
from metaxl_evo.ner.scorers import EntityScorer
from metaxl_evo.ner.spacing import as_in_text
from tests.ner.encoders import ABSOLUTE, KINDS, NAMES, SENTENCES, scores_by_hand, write_encoder
from tests.processes import on_processes

SIZES = (1, 7, 64)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"train_sampling_strategy": "group_by_length"},
    {"dataloader_drop_last": True},
    {
        "eval_accumulation_steps": 1,
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_in_order": False,
    },
    {"eval_do_concat_batches": False},
    {"eval_accumulation_steps": 2, "eval_do_concat_batches": False, "eval_use_gather_object": True},
]


def write_test(root: Path) -> Path:
    """A test file with sentences of 1 to 30 words, some of them twice, and words that no tokenizer sees."""
    words, draw = " ".join(SENTENCES).split(), random.Random(0)
    blocks = [
        "".join(
            f"xx:{draw.choice([*words, '', '']) if place else draw.choice(words)}\t{draw.choice(NAMES)}\n"
            for place in range(draw.choice((1, 2, 5, 30)))
        )
        for _ in range(45)
    ]
    blocks += blocks[:5]
    (root / "xx").mkdir(parents=True)
    (root / "xx/test").write_text("\n".join(blocks), encoding="utf-8")
    return root


def save_as_trained(kind: str, root: Path) -> Path:
    """A folder as a run leaves it: with the tokenizer that reads the words of the data as they stand in text."""
    folder = write_encoder(kind, root / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [sentence.split() for sentence in SENTENCES]
    as_in_text(tokenizer, words, AutoModelForTokenClassification.from_pretrained(folder).config).save_pretrained(
        folder
    )
    return folder


def scored(folder: Path, root: Path, scratch: str, collator: Any = None, **settings: Any) -> dict[str, Any]:
    trainer, evaluation = prepared(folder, root, scratch, collator, **settings)
    return evaluation.predict(trainer)


def prepared(
    folder: Path, root: Path, scratch: str, collator: Any = None, **settings: Any
) -> tuple[WordTrainer, EvaluationSet]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = load_ner_dataset(str(root), ["xx"], splits=["test"], names=NAMES)["xx"]["test"]
    base = AutoModelForTokenClassification.from_pretrained(folder)
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "label_names": ["labels"]}
    args = TrainingArguments(scratch, remove_unused_columns=False, **fixed, **settings)
    trainer = WordTrainer(base, args, data_collator=collator or PadRight(tokenizer.pad_token_id))
    return trainer, EvaluationSet(sentences, tokenizer, 512, NAMES, EntityScorer())


def assert_same(found: dict[str, Any], expected: dict[str, float]) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_one_sentence_a_pass(kind: str, tmp_path: Path) -> None:
    root, folder = write_test(tmp_path / "data"), save_as_trained(kind, tmp_path)
    expected = scores_by_hand(folder, root / "xx/test")
    assert 0 < expected["f1"] < 1
    number = list(KINDS).index(kind)
    chosen = SETTINGS[1:] if number == 0 else [SETTINGS[1 + number % 2], SETTINGS[-1 - number % 2]]
    for size, settings in [(SIZES[number % 3], {}), *((7, one) for one in chosen)]:
        found = scored(folder, root, str(tmp_path / "out"), per_device_eval_batch_size=size, **settings)
        assert_same(found, expected)
        assert found["n_words_without_sub_token"] > 0
        assert found["n_truncated_words"] == 0


@pytest.mark.parametrize(
    ("side", "kind"), [*zip(["left", "right"] * 4, [kind for kind in KINDS if kind not in ABSOLUTE], strict=True)]
)
def test_other_collators_and_samplers(kind: str, side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, folder = write_test(tmp_path / "data"), save_as_trained(kind, tmp_path)
    expected = scores_by_hand(folder, root / "xx/test")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    monkeypatch.setattr(WordTrainer, "_get_eval_sampler", lambda self, rows: RandomSampler(rows))
    for padding in ({}, {"pad_to_multiple_of": 8}, {"padding": "max_length", "max_length": 390}):
        collator = DataCollatorForTokenClassification(tokenizer, **padding)
        assert_same(scored(folder, root, str(tmp_path / "out"), collator, per_device_eval_batch_size=7), expected)


def test_kinds_and_settings_are_as_many_as_they_were() -> None:
    assert (len(KINDS), len(ABSOLUTE), len(SETTINGS)) == (10, 2, 6)


def _on_a_rank(folder: str, root: str, scratch: str) -> list[dict[str, Any]]:
    return [scored(Path(folder), Path(root), scratch, per_device_eval_batch_size=7, **one) for one in SETTINGS]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("count", [2, 3])
def test_scores_on_several_processes(count: int, tmp_path: Path) -> None:
    root, folder = write_test(tmp_path / "data"), save_as_trained("bloom, unframed, left", tmp_path)
    expected = scores_by_hand(folder, root / "xx/test")
    for rank in on_processes(count, _on_a_rank, str(folder), str(root), str(tmp_path / "out")):
        assert len(rank) == len(SETTINGS)
        for found in rank:
            assert_same(found, expected)


def test_labels_of_other_words_are_refused(tmp_path: Path) -> None:
    """Rows that are left out, of another set, or in part of another."""
    root, folder = write_test(tmp_path / "data"), save_as_trained("xlm-r, metaspace", tmp_path)
    trainer, evaluation = prepared(folder, root, str(tmp_path / "out"))
    found = trainer.predict(evaluation.rows)
    assert evaluation.score(found.predictions, found.label_ids)["n_sentences"] == len(found.predictions)
    for rows in (slice(1, None), [0] * len(found.predictions), slice(0, 0)):
        with pytest.raises(ValueError, match=r"are not those of the .* words to score: evaluate the rows of this set"):
            evaluation.score(found.predictions[rows], found.label_ids[rows])
    with pytest.raises(ValueError, match=r"are not those of the .* words to score"):
        evaluation.score(found.predictions, found.label_ids + 1)
    again = [found.predictions, found.predictions[:3]], [found.label_ids, found.label_ids[:3]]
    assert evaluation.score(*again) == evaluation.score(found.predictions, found.label_ids)
