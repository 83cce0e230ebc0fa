"""Tables of mixtures, fixed mixtures, and models from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from metaxl_evo.models.weighers import WeightTable
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.weighting.domains import load_domains
from metaxl_evo.weighting.mix_task import MixTextArguments, MixTextTask
from metaxl_evo.weighting.mixture import first_logits, mixture_table, read_shares, uniform_shares, union_shares
from metaxl_evo.weighting.scratch import model_from_scratch, train_tokenizer

SIZES = {"large": 300, "middle": 150, "small": 50}
TEXTS = [f"the {word} of tale number {number} – naïve" for number in range(40) for word in ("beginning", "end")]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("shares", "weights"), [(union_shares, [1, 1, 1]), (uniform_shares, [0.3, 0.6, 1.8])])
def test_shares_begin_as_they_are_said(shares: Any, weights: list[float], sampled: bool) -> None:
    """A text of a domain a sixth as large weighs six times as much where all domains count alike."""
    wanted = shares(SIZES)
    table = WeightTable(3, "softmax")
    table.logits.data = first_logits(wanted, SIZES, sampled)
    rows = mixture_table(table.weights().tolist(), SIZES, sampled)
    assert [row["share"] for row in rows] == pytest.approx(list(wanted.values()))
    mean = sum(weights) / 3
    assert [row["weight"] for row in rows] == pytest.approx([one / mean for one in weights])


def test_a_mixture_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "mixture.csv").write_text("domain,texts,weight,share\nNA,3,1.0,0.25\nb,9,1.0,0.75\n")
    assert read_shares(tmp_path) == read_shares(tmp_path / "mixture.csv") == {"NA": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "mixture.csv is not there"),
        ("domain,texts\na,1\n", "is no mixture of a run"),
        ("domain,share\na,x\nb,0.5\n", "is no mixture of a run"),
        ("domain,share\na,0.5\na,0.5\n", "each domain needs a share of its own"),
        ("domain,share\na,0\nb,1\n", "each domain needs a share of its own"),
        ("domain,share\na,0.5\nb,0.6\n", "sum to 1.1"),
    ],
)
def test_what_is_no_mixture(text: str | None, line: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "mixture.csv").write_text(text)
    with pytest.raises(ValueError, match=line):
        read_shares(tmp_path)


def fixed(file: Path, mixing: str, **fields: Any) -> torch.Tensor:
    """The weights that a fixed mixture trains with."""
    settings = MixTextArguments(method="fixed", mixture_from=str(file), mixing=mixing, **fields)
    args = MetaTrainingArguments(str(file.parent / "run"), estimator="none", use_cpu=True, report_to="none")
    data = load_domains(settings)
    trainer: Any = MixTextTask().build_trainer(settings, args, data)
    assert trainer.meta_dataset is None
    return torch.as_tensor(trainer.model.meta.weights().detach())


def test_a_fixed_mixture_trains_as_the_table_says(tmp_path: Path) -> None:
    file = tmp_path / "mixture.csv"
    file.write_text("domain,texts,weight,share\nfives,9,1.0,0.2\nshuffled,9,1.0,0.8\n")
    given: dict[str, Any] = {"domains": ["shuffled", "fives"], "meta_size": 20, "test_size": 20}
    torch.testing.assert_close(fixed(file, "sampling", **given), torch.tensor([1.6, 0.4]))
    torch.testing.assert_close(fixed(file, "loss_weights", **given), torch.tensor([1.6, 0.4]))  # as many texts each
    with pytest.raises(ValueError, match="is of fives, shuffled, here train fives, twos: set domains"):
        fixed(file, "sampling", domains=["twos", "fives"], meta_size=20, test_size=20)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"method": "fixed"}, "mixture_from goes with method: fixed"),
        ({"mixture_from": "runs/a"}, "mixture_from goes with method: fixed"),
        ({"method": "union", "mixing": "sampling"}, "set mixing to loss_weights"),
        ({"mixing": "samples"}, "unknown mixing 'samples'"),
        ({"start": "unions"}, "unknown start 'unions'"),
        ({"width": 100}, "width must be a multiple of 32"),
        ({"pieces": 200}, "pieces must be"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        MixTextArguments(**fields)


def test_a_domain_without_order(tmp_path: Path) -> None:
    lines = {name: [f"{name} is the {number} of them" for number in range(20)] for name in ("news", "tales", "notes")}
    for name, texts in lines.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
    given: dict[str, Any] = {"data": str(tmp_path), "target": "tales", "meta_size": 5, "test_size": 5}
    settings = MixTextArguments(model_name_or_path="scratch", shuffle="news", **given)
    data = load_domains(settings)
    assert list(data.sizes) == ["news", "notes", "shuffled"]
    made = data.train["text"][40:]
    assert [sorted(text.split()) for text in made] == [sorted(text.split()) for text in lines["news"]]
    assert made != lines["news"]
    assert made == load_domains(settings).train["text"][40:]
    with pytest.raises(ValueError, match="shuffle: unknown domain 'new'"):
        load_domains(MixTextArguments(model_name_or_path="scratch", shuffle="new", **given))


def test_a_tokenizer_of_the_texts() -> None:
    """The same each time; any text comes back as it was, words never seen among them."""
    made, again = (train_tokenizer(TEXTS, 300, 32) for _ in range(2))
    assert made.get_vocab() == again.get_vocab()
    assert len(made) == 300
    for text in (TEXTS[3], "ςπαμ, \U0001f600\tquite unseen"):
        ids = made(text)["input_ids"]
        assert [ids[0], ids[-1]] == [made.bos_token_id, made.eos_token_id]
        assert made.decode(ids, skip_special_tokens=True) == text
    model = model_from_scratch(made, layers=1, width=32)
    logits = model(**made(TEXTS[0], return_tensors="pt")).logits
    assert logits.shape[-1] == 300
    assert model.config.pad_token_id == made.pad_token_id


def test_the_tokenizer_reads_what_trains(tmp_path: Path) -> None:
    """A word of the texts that judge or test is no piece of it."""
    for name, word in (("news", "unheard"), ("tales", "beginning"), ("notes", "telegram")):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{word} {word} {number}" for number in range(20)))
    settings = MixTextArguments(
        model_name_or_path="scratch", data=str(tmp_path), target="news", meta_size=5, test_size=15, width=32, layers=1
    )
    args = MetaTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    trainer: Any = MixTextTask().build_trainer(settings, args, load_domains(settings))
    known = trainer.processing_class.get_vocab()
    assert "beginning" in known
    assert "unheard" not in known
