"""The architectures of `configs/ner/`, tiny, with the kinds of tokenizers that they have: engines, resuming, files.

Their layers are in `tests/models/test_layer_trace.py`; scores of the same encoders, by every way to them, in
`tests/scripts/test_ner_scores.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import is_sentencepiece_available

from metaxl_evo.bilevel import SGD, Tree, hypergradient, tree
from metaxl_evo.estimators import OneStep
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.pretrained import load_classifier
from metaxl_evo.ner.tagger import CrossLingualTagger
from tests.ner.encoders import NAMES, write_encoder
from tests.scripts.runs import cut_off_after, keep_checkpoints, same, train, weights
from tests.scripts.test_ner_scores import evaluate, write_named
from tests.training.tiny import collate, random_rows

LAYERS = [1, 2, 3]  # the first, one between, the last
ERRORS = {  # relative, at most, of jvp and of finite differences; mT5's norms compute in float32
    "xlm-r, metaspace": (1e-12, 3e-3),
    "mmbert, gemma, left": (1e-12, 3e-3),
    "mdeberta, unigram": (1e-12, 3e-3),
    "mt5, unigram, one end": (1e-6, 1e-2),
}


def tiny_tagger(kind: str, folder: Path) -> CrossLingualTagger:
    """In float64, with a network after each layer."""
    base, tokenizer = load_classifier(str(write_encoder(kind, folder, layers=len(LAYERS))), NAMES)
    torch.manual_seed(1)
    transform = RepresentationTransform(base.config.hidden_size, layers=LAYERS).double()
    return CrossLingualTagger(base.double(), transform, pad_token_id=tokenizer.pad_token_id)


def rows(count: int, language: int | list[int], tagger: CrossLingualTagger, seed: int) -> dict[str, Tensor]:
    """Random ones of the tagger's vocabulary and labels, padded."""
    batch = collate(list(random_rows(count, seed=seed, language=language)))
    words = 4 + batch["input_ids"] % (tagger.plain_base.config.vocab_size - 4)
    pad = tagger.padding["input_ids"]
    return {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, words, pad)}


@pytest.mark.parametrize("kind", ERRORS)
def test_every_engine_gives_one_hypergradient_of_all_networks(kind: str, tmp_path: Path) -> None:
    tagger = tiny_tagger(kind, tmp_path)
    train_rows, judge = rows(6, [0, -1], tagger, 1), rows(5, -1, tagger, 3)

    def by(engine: str) -> Tree:
        estimator = OneStep(engine=engine, radius=1e-3)
        levels = tagger.base_parameters(), tagger.meta_parameters()
        return hypergradient(tagger.problem(SGD(0.1)), estimator, *levels, [train_rows], [judge]).grads

    expected, (exact, estimated) = by("double_backward"), ERRORS[kind]
    assert all(bool(leaf.any()) for leaf in expected.values())
    for engine, error in [("jvp", exact), ("auto", exact), ("finite_difference", estimated)]:
        assert tree.norm(tree.add(by(engine), expected, -1.0)) < error * tree.norm(expected), engine


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.slow
def test_a_run_with_all_networks_resumes_bit_by_bit(kind: str, tmp_path: Path) -> None:
    """Dropout on; the score is that of the folder that is left."""
    model = write_encoder(kind, tmp_path / "model", layers=len(LAYERS), head=False)
    data, out = write_named(tmp_path / "data"), tmp_path / "out"
    settings: dict[str, Any] = {
        "source_languages": "en",
        "target_languages": "sw",
        "rtn_layers": ",".join(map(str, LAYERS)),
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_eval_batch_size": 7,
    }
    whole = train(model, data, tmp_path / "whole", **settings)
    with cut_off_after(2):
        train(model, data, out, **settings)
    resumed = train(model, data, keep_checkpoints(out), **settings, resume_from_checkpoint="latest")
    assert same(weights(out), weights(tmp_path / "whole"))
    assert resumed["test"] == whole["test"]
    assert evaluate(out, data, "sw", batch_size=3) == whole["test"]["sw"]
    before = load_file(tmp_path / "whole/checkpoint-2/rtn/model.safetensors")
    after = load_file(out / "rtn/model.safetensors")
    assert sorted({name[: len("nets.0.0")] for name in after if not after[name].equal(before[name])}) == [
        "mixing_l", "nets.0.0", "nets.0.1", "nets.0.2",
    ]  # fmt: skip


def test_the_encoder_of_a_whole_mt5_is_taken(tmp_path: Path) -> None:
    """A checkpoint on the Hub has the decoder too."""
    folder = write_encoder("mt5, unigram, one end", tmp_path, layers=2)
    whole: Any = T.MT5ForConditionalGeneration(T.AutoConfig.from_pretrained(folder)).eval()
    whole.save_pretrained(folder)
    base, _ = load_classifier(str(folder), NAMES)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        found = base.eval().base_model(ids).last_hidden_state
        assert torch.equal(found, whole.encoder(ids).last_hidden_state)
    weights_of = load_file(folder / "model.safetensors")
    del weights_of["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights_of, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of its weights, such as transformer\.encoder\.block\.1\.layer\.0"):
        load_classifier(str(folder), NAMES)


@pytest.mark.skipif(is_sentencepiece_available(), reason="sentencepiece is installed")
@pytest.mark.parametrize(
    ("kind", "file"), [("mt5, unigram, one end", "spiece.model"), ("mdeberta, unigram", "spm.model")]
)
def test_a_tokenizer_that_is_a_sentencepiece_model_asks_for_its_packages(kind: str, file: str, tmp_path: Path) -> None:
    write_encoder(kind, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a sentencepiece model.*: run pip install sentencepiece protobuf$"):
        load_classifier(str(tmp_path), NAMES)


def test_an_architecture_without_a_token_classifier_is_refused(tmp_path: Path) -> None:
    T.BartConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no token classifier for .*: unknown model type 'bart': .* Valid: albert, "):
        load_classifier(str(tmp_path), NAMES)
