"""The lists of encoder layers, held against the hidden states that transformers itself gives of each architecture."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

from metaxl_evo.models.hooks import encoder_layers
from metaxl_evo.models.layer_trace import require_layers, trace_layers
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.tagger import CrossLingualTagger
from tests.training.tiny import collate, random_rows

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**SIZES, "num_key_value_heads": 2}
DEBERTA = {**SIZES, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
T5 = {"d_model": 16, "num_layers": 3, "num_heads": 2, "d_ff": 24, "d_kv": 8}
XLM = {"emb_dim": 16, "n_layers": 3, "n_heads": 2}
FOUND: dict[str, tuple[dict[str, Any], str, bool]] = {  # sizes, the layers' place, whether they are all of the encoder
    "Bert": (SIZES, "bert.encoder.layer", True),
    "Bloom": ({"hidden_size": 16, "n_layer": 3, "n_head": 2}, "transformer.h", False),
    "DebertaV2": (DEBERTA, "deberta.encoder.layer", True),
    "DistilBert": ({"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24}, "distilbert.transformer.layer", True),
    "Electra": ({**SIZES, "embedding_size": 8}, "electra.encoder.layer", True),
    "EuroBert": (LLAMA, "model.layers", False),
    "GPT2": ({"n_embd": 16, "n_layer": 3, "n_head": 2}, "transformer.h", False),
    "Llama": (LLAMA, "model.layers", False),
    "ModernBert": (SIZES, "model.layers", False),
    "Mpt": ({"d_model": 16, "n_layers": 3, "n_heads": 2}, "transformer.blocks", False),
    "MT5": (T5, "transformer.encoder.block", False),
    "RemBert": ({**SIZES, "input_embedding_size": 8}, "rembert.encoder.layer", True),
    "RobertaPreLayerNorm": (SIZES, "roberta_prelayernorm.encoder.layer", False),
    "T5": (T5, "transformer.encoder.block", False),
    "UMT5": (T5, "transformer.encoder.block", False),
    "XLMRoberta": (SIZES, "roberta.encoder.layer", True),
    "XLMRobertaXL": (SIZES, "roberta.encoder.layer", False),
}
UNFOUND: dict[str, tuple[dict[str, Any], str]] = {
    "Albert": ({**SIZES, "embedding_size": 8}, r"no lists of 3 .* one of albert.encoder.albert_layer_groups \(1\)$"),
    "Funnel": ({"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "block_sizes": [1, 2]},
               r"no lists of 3 .* one of funnel.encoder.blocks \(2\), funnel.decoder.layers \(2\)$"),
    "XLM": (XLM, r"4 lists of 3 .* one of transformer.attentions \(3\), transformer.layer_norm1 \(3\), .*ffns"),
}  # fmt: skip
UNFIT: dict[str, tuple[dict[str, Any], str, str]] = {
    "Albert": (UNFOUND["Albert"][0], "albert.encoder.albert_layer_groups", "called 3 times a pass, not each of 1"),
    "Funnel": (UNFOUND["Funnel"][0], "funnel.encoder.blocks", "called 0 times a pass, not each of 2 once"),
    "SqueezeBert": ({**SIZES, "intermediate_size": 16, "embedding_size": 16}, "transformer.encoder.layers",
                    "called 0 times a pass, not each of 3 once"),
    "XLNet": ({"d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 24}, "transformer.layer",
              r"return \(3, 1, 16\) for one sentence"),
}  # fmt: skip


def tiny(name: str, sizes: dict[str, Any]) -> Any:
    kind = getattr(T, f"{name}ForTokenClassification")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(kind.config_class(vocab_size=100, pad_token_id=0, num_labels=5, **sizes)).eval()


@pytest.mark.parametrize("name", FOUND)
@torch.no_grad()
def test_what_the_layers_return_are_the_hidden_states_of_transformers(name: str) -> None:
    sizes, place, is_whole = FOUND[name]
    model, returned = tiny(name, sizes), list[Tensor]()
    layers = encoder_layers(model)
    assert layers is model.get_submodule(place) is encoder_layers(model, place)
    for layer in layers:
        layer.register_forward_hook(
            lambda module, args, output: returned.append(output if isinstance(output, Tensor) else output[0])
        )
    ids = torch.arange(5, 12)[None]
    _, *states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == len(layers) == 3
    assert all(map(torch.equal, returned[:-1], states[:-1]))
    assert torch.equal(returned[-1], model.base_model(ids).last_hidden_state) == is_whole
    assert require_layers(model, layers).is_result == is_whole


@pytest.mark.parametrize("name", UNFOUND)
def test_where_no_list_or_several_could_be_the_layers_all_are_named(name: str) -> None:
    sizes, message = UNFOUND[name]
    with pytest.raises(ValueError, match=f"^{name}ForTokenClassification has {message}"):
        encoder_layers(tiny(name, sizes))


@pytest.mark.parametrize("name", UNFIT)
def test_a_list_that_cannot_be_transformed_is_refused(name: str) -> None:
    """Shared weights, lists of lists, `forward` called past the hooks, states (T, B, H)."""
    sizes, place, message = UNFIT[name]
    model = tiny(name, sizes)
    with pytest.raises(ValueError, match=f"^the layers of {name}ForTokenClassification .*{message}.* another list"):
        CrossLingualTagger(model, RepresentationTransform(16, layers=[1]), pad_token_id=0, module_path=place)


def test_parts_of_layers_are_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """XLM has no module for a layer; the norm at its end returns what the layer does."""
    model = tiny("XLM", XLM)
    with caplog.at_level(logging.WARNING):
        assert require_layers(model, encoder_layers(model, "transformer.layer_norm2")).is_result
    assert "none of these 3 modules reads what the one before it returns" in caplog.text


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("Bert", SIZES).train()
    model.dropout.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    trace_layers(model, encoder_layers(model))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", FOUND)
@torch.no_grad()
def test_the_encoder_pass_is_shared_where_the_transform_is_on_top_of_it(name: str) -> None:
    """Where a norm follows the last layer, the transform is below it, and there is nothing to share."""
    sizes, _, is_whole = FOUND[name]
    tagger = CrossLingualTagger(tiny(name, sizes), RepresentationTransform(16, layers=[3]), pad_token_id=0)
    batch, cut = collate(list(random_rows(4, seed=1, language=[0, -1]))), tagger.cut()
    prefix = None if cut is None else cut.prefix
    assert (prefix is not None) == is_whole
    if cut is None or prefix is None:
        return
    found, expected = cut.loss(cut.hidden(prefix(batch), batch), batch), tagger.inner_loss(batch)
    assert expected.keys() == found.keys()
    for part, loss in expected.items():
        torch.testing.assert_close(found[part], loss)
