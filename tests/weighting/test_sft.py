"""Rows in trl's formats: what is labelled, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.weighting.domains import load_domains
from metaxl_evo.weighting.mix_task import MixTextArguments, MixTextTask
from metaxl_evo.weighting.scratch import model_from_scratch, train_tokenizer
from metaxl_evo.weighting.sft import as_texts, encode_sft

pytest.importorskip("trl")

TURNS = (
    "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer([f"what is {one} and {one + 1}? it is {2 * one + 1}" for one in range(50)], 300, 64)
    made.backend_tokenizer.post_processor = None  # so that a prompt begins its whole
    made.chat_template = TURNS
    return made


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to="none")


def questions(first: str) -> Dataset:
    return Dataset.from_list([{"prompt": first, "completion": " it is 3"}, {"prompt": "4?", "completion": " 5"}])


def test_the_completion_alone_is_labelled(tokenizer: Any, tmp_path: Path) -> None:
    rows = questions("what is 1 and 2?")
    before, vocabulary = torch.get_rng_state(), tokenizer.get_vocab()
    made = encode_sft(as_texts(rows, ("prompt", "completion")), tokenizer, 64, arguments(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
    assert tokenizer.get_vocab() == vocabulary
    for row, given in zip(made, rows, strict=True):
        answer = tokenizer(given["completion"])["input_ids"] + [tokenizer.eos_token_id]
        asked = tokenizer(given["prompt"])["input_ids"]
        assert row["input_ids"] == asked + answer
        assert row["labels"] == [-100] * len(asked) + answer
        assert row["attention_mask"] == [1] * len(asked + answer)


def test_messages_follow_the_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "what is 1 and 2?"}, {"role": "assistant", "content": "it is 3"}]
    made = encode_sft(
        as_texts(Dataset.from_list([{"messages": turns}]), ("messages",)), tokenizer, 64, arguments(tmp_path)
    )
    assert tokenizer.decode(made[0]["input_ids"]) == "user: what is 1 and 2?\nassistant: it is 3\n"
    assert made[0]["labels"] == made[0]["input_ids"]


def test_a_completion_that_is_cut_off_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    rows = questions("what is 1 and 2? " * 20)
    with pytest.raises(ValueError, match="1 of 2 rows have no label in max_length 32"):
        encode_sft(as_texts(rows, ("prompt", "completion")), tokenizer, 32, arguments(tmp_path))


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    """Three domains of questions, and a model."""
    for number, name in enumerate(("sums", "counts", "tales")):
        rows = [{"prompt": f"what is {one}?", "completion": f" {one + number}"} for one in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model_from_scratch(tokenizer, 1, 32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def settings_of(folder: Path, **fields: Any) -> MixTextArguments:
    given: dict[str, Any] = {"target": "sums", "meta_size": 5, "test_size": 5, "data_format": "sft", **fields}
    return MixTextArguments(data=str(folder), model_name_or_path=str(folder / "model"), **given)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_counts_completions(bf16: bool, folder: Path) -> None:
    """Its trainer is made in either precision, and what is asked has no label."""
    task, settings = MixTextTask(), settings_of(folder)
    args = MetaTrainingArguments(
        str(folder / "run"), max_steps=1, use_cpu=True, bf16=bf16, report_to="none", per_device_meta_batch_size=4
    )
    data = load_domains(settings)
    trainer: Any = task.build_trainer(settings, args, data)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    labels = batch["labels"]
    assert trainer.model.counts(batch) == int((labels != -100).sum())
    assert (labels[:, 0] == -100).all()
    trainer.train()
    assert 0 < float(task.score(trainer, settings, data)["loss"]) < 20


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"data_format": "text"}, "unknown column 'text'.*or set data_format: sft"),
        ({"data_format": "chat"}, "unknown data_format 'chat'"),
        ({"shuffle": "sums"}, "those of shuffle, are plain"),
    ],
)
def test_formats_that_cannot_be(fields: dict[str, Any], line: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=line):
        load_domains(settings_of(folder, **fields))


def test_plain_texts_are_no_format_of_trl(folder: Path) -> None:
    (folder / "sums.jsonl").write_text("\n".join(json.dumps({"text": f"{one}"}) for one in range(20)))
    with pytest.raises(ValueError, match="neither messages nor prompt and completion: set data_format: text"):
        load_domains(settings_of(folder))


def test_without_trl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ValueError, match=r"read by trl: pip install metaxl_evo\[trl\]"):
        load_domains(settings_of(folder))
