"""The representation transform: its closed forms, where it acts, what it lets through, how it is saved."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForTokenClassification, XLMRobertaConfig, XLMRobertaForTokenClassification

from metaxl_evo.models import rtn
from metaxl_evo.models.hooks import encoder_layers
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.models.rtn_networks import KINDS

HIDDEN = 32
ROWS = [0, -1, 0, -1]


def tiny_model(dtype: torch.dtype = torch.float32) -> XLMRobertaForTokenClassification:
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=100,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        num_labels=5,
        attn_implementation="eager",
    )
    return XLMRobertaForTokenClassification(config).to(dtype).eval()


def tiny_transform(*, seed: int = 1, dtype: torch.dtype = torch.float32, **fields: Any) -> RepresentationTransform:
    torch.manual_seed(seed)
    return RepresentationTransform(HIDDEN, **{"layers": [2], **fields}).to(dtype)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Four sentences of up to seven tokens; the second and third are padded."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2, 3:] = 0
    ids = torch.randint(5, 100, (4, 7), generator=generator)
    return {"input_ids": ids.where(mask == 1, torch.tensor(1)), "attention_mask": mask}


def hidden_states(rows: int = 3) -> Tensor:
    return torch.randn(rows, 5, HIDDEN, generator=torch.Generator().manual_seed(3))


def by_hand(model: nn.Module, batch: dict[str, Tensor], layer: int, change: Any) -> Tensor:
    """Logits of an encoder that is run to `layer`, has `change` applied to its states, and runs its tail."""
    hidden = model.roberta.embeddings(batch["input_ids"])
    padding = batch["attention_mask"][:, None, None, :] == 0
    mask = torch.zeros(padding.shape, dtype=hidden.dtype).masked_fill(padding, torch.finfo(hidden.dtype).min)
    for number, module in enumerate(model.roberta.encoder.layer, start=1):
        hidden = module(hidden, mask)
        if number == layer:
            hidden = change(hidden)
    return model.classifier(hidden)


# The networks


def linear(params: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ params[f"nets.0.0.{name}.weight"].T + params[f"nets.0.0.{name}.bias"]


def gated_tied(p: dict[str, Tensor], h: Tensor, mask: Tensor) -> Tensor:
    out = linear(p, "net.2", linear(p, "net.0", h).clamp(min=0))
    return out[..., :HIDDEN] / (1 + torch.exp(-out[..., HIDDEN:]))


def gated_untied(p: dict[str, Tensor], h: Tensor, mask: Tensor) -> Tensor:
    gate = linear(p, "gate.2", linear(p, "gate.0", h).clamp(min=0))
    return perceptron(p, h, mask) / (1 + torch.exp(-gate))


def perceptron(p: dict[str, Tensor], h: Tensor, mask: Tensor) -> Tensor:
    return linear(p, "net.2", linear(p, "net.0", h).clamp(min=0))


def transformer(p: dict[str, Tensor], h: Tensor, mask: Tensor) -> Tensor:
    """The layer with two heads, one sentence and one head at a time, on its real tokens alone."""
    rows = []
    for sentence, real in zip(h, mask.bool(), strict=True):
        heads, half = [], HIDDEN // 2
        for part in (slice(0, half), slice(half, HIDDEN)):
            q, k, v = (linear(p, name, sentence)[:, part] for name in ("query", "key", "value"))
            heads.append((q @ k[real].T / half**0.5).softmax(-1) @ v[real])
        x = nn.functional.layer_norm(sentence + linear(p, "output", torch.cat(heads, -1)), (HIDDEN,))
        rows.append(nn.functional.layer_norm(x + linear(p, "down", nn.functional.gelu(linear(p, "up", x))), (HIDDEN,)))
    return torch.stack(rows)


CLOSED_FORMS = {
    "gated_tied": gated_tied,
    "gated_untied": gated_untied,
    "perceptron": perceptron,
    "transformer": transformer,
}


def test_closed_forms_cover_the_kinds() -> None:
    assert CLOSED_FORMS.keys() == KINDS.keys()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_transform_is_the_closed_form(kind: str, training: bool) -> None:
    transform = tiny_transform(kind=kind, num_attention_heads=2, dtype=torch.float64).train(training)
    for module in transform.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.bias)  # it starts at 0, and would not show
    hidden = hidden_states().double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    expected = hidden + CLOSED_FORMS[kind](dict(transform.named_parameters()), hidden, mask)
    torch.testing.assert_close(transform.transform(hidden, 0, torch.zeros(3, dtype=torch.long), mask), expected)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, 591_361),
        ({"bottleneck": 192}, 296_065),
        ({"kind": "gated_untied"}, 2 * (768 * 384 + 384) + (384 * 768 + 768) + (384 + 1)),
        ({"kind": "perceptron"}, (768 * 192 + 192) + (192 * 768 + 768)),
        ({"kind": "transformer"}, 7_087_872),  # a BERT-base layer
        ({"layers": [3, 12], "languages": ["en", "de", "ru"], "bottleneck": 192}, 6 * 296_065 + 6),
    ],
)
def test_parameter_counts(fields: dict[str, Any], parameters: int) -> None:
    transform = RepresentationTransform(768, **{"layers": [12], **fields})
    assert sum(p.numel() for p in transform.parameters()) == parameters


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values(kind: str) -> None:
    """Xavier-normal weights, zero biases, in every network: the gate included."""
    transform = RepresentationTransform(256, layers=[1, 2], kind=kind, languages=["a", "b"])
    linears = [module for module in transform.modules() if isinstance(module, nn.Linear)]
    assert len({id(module) for module in linears}) == 4 * {"gated_untied": 4, "transformer": 6}.get(kind, 2)
    for module in linears:
        std = (2 / sum(module.weight.shape)) ** 0.5
        assert module.weight.std().item() == pytest.approx(std, rel=0.25)
        assert not module.bias.any()


@pytest.mark.parametrize(("hidden", "heads"), [(768, 12), (1024, 16), (312, 4), (32, 1), (200, 2)])
def test_default_attention_heads(hidden: int, heads: int) -> None:
    assert RepresentationTransform(hidden, layers=[1]).num_attention_heads == heads


def test_mixing_weights() -> None:
    transform = tiny_transform(layers=[1, 2, 3], languages=["en", "de"])
    assert torch.equal(transform.mixing(), torch.full((2, 3), 1 / 3))
    with torch.no_grad():
        transform.mixing_logits[0, 1] = 2.0
    torch.testing.assert_close(transform.mixing()[0], torch.tensor([0.0, 2.0, 0.0]).softmax(0))
    torch.testing.assert_close(transform.mixing().sum(1), torch.ones(2))


def test_one_layer_has_weight_one_and_nothing_to_learn() -> None:
    transform = tiny_transform(languages=["en", "de"])
    assert torch.equal(transform.mixing(), torch.ones(2, 1))
    assert not transform.mixing().requires_grad
    assert "mixing_logits" not in dict(transform.named_parameters())


# Where it acts


@torch.no_grad()
def test_off_by_default_and_never_outside_the_context(batch: dict[str, Tensor]) -> None:
    model, transform = tiny_model(), tiny_transform()
    plain = model(**batch).logits
    transform.attach(model)
    assert torch.equal(model(**batch).logits, plain)
    with transform.active(ROWS):
        assert not torch.equal(model(**batch).logits, plain)
    assert torch.equal(model(**batch).logits, plain)
    with pytest.raises(ValueError, match="input_ids"), transform.active(ROWS):
        model()
    assert torch.equal(model(**batch).logits, plain)


@torch.no_grad()
def test_contexts_nest() -> None:
    model, transform = tiny_model(), tiny_transform()
    transform.attach(model)
    ids = torch.arange(5, 11).reshape(2, 3)
    with transform.active([0, 0]):
        outer = model(ids).logits
        with transform.active([-1, -1]):
            inner = model(ids).logits
        assert torch.equal(model(ids).logits, outer)
    assert torch.equal(model(ids).logits, inner)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_source_rows_meet_the_network_and_others_stay(kind: str, layer: int, batch: dict[str, Tensor]) -> None:
    model, transform = tiny_model(), tiny_transform(kind=kind, layers=[layer])
    plain = model(**batch).logits
    transform.attach(model)
    with transform.active(torch.tensor(ROWS), attention_mask=batch["attention_mask"]):
        logits = model(**batch).logits
    assert torch.equal(logits[[1, 3]], plain[[1, 3]])

    zeros = torch.zeros(4, dtype=torch.long)
    manual = by_hand(model, batch, layer, lambda h: transform.transform(h, 0, zeros, batch["attention_mask"]))
    torch.testing.assert_close(logits[[0, 2]], manual[[0, 2]])
    assert (logits - plain)[[0, 2]].abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_routes_of_the_cpu_serve_another_device(kind: str) -> None:
    model, transform = tiny_model().to("meta"), tiny_transform(kind=kind, languages=["en", "de"]).to("meta")
    transform.attach(model)
    with transform.active([0, 1, -1], attention_mask=torch.ones(3, 7, device="meta")):
        assert model(inputs_embeds=torch.ones(3, 7, HIDDEN, device="meta")).logits.is_meta


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_the_hidden_dtype(kind: str, batch: dict[str, Tensor]) -> None:
    model, transform = tiny_model(), tiny_transform(kind=kind)
    transform.attach(model)
    with transform.active(ROWS, attention_mask=batch["attention_mask"]):
        exact = model(**batch, output_hidden_states=True)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**batch, output_hidden_states=True)
    assert rounded.hidden_states[2].dtype == torch.float32
    assert (rounded.logits - exact.logits).abs().max() < 0.2


@torch.no_grad()
def test_several_layers_by_replicated_rows(batch: dict[str, Tensor]) -> None:
    """Copies of the source rows, one layer each, see what a transform of that single layer would show them."""
    transform = tiny_transform(layers=[1, 3])
    singles = [tiny_transform(layers=[layer]) for layer in (1, 3)]
    for index, single in enumerate(singles):
        single.nets[0][0].load_state_dict(transform.nets[0][index].state_dict())
    copies = {name: value[[0, 2, 0, 2, 1]] for name, value in batch.items()}
    model = tiny_model()
    transform.attach(model)
    with transform.active([0, 0, 0, 0, -1], [0, 0, 1, 1, 0]):
        logits = model(**copies).logits
    for index, single in enumerate(singles):
        single.attach(model)
        with single.active([0, 0, 0, 0, -1]):
            alone = model(**copies).logits
        picked = slice(2 * index, 2 * index + 2)
        torch.testing.assert_close(logits[picked], alone[picked])
    assert torch.equal(logits[4], model(**copies).logits[4])


def test_each_language_has_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(rtn, "stop_gradient", lambda x, key: calls.append(x) or x.detach())
    transform = tiny_transform(languages=["en", "de", "ru"])
    hidden = hidden_states(4)
    out = transform.transform(hidden, 0, torch.tensor([2, 0, 2, 0]))
    for row, language in enumerate([2, 0, 2, 0]):
        torch.testing.assert_close(out[row], hidden[row] + transform.nets[language][0](hidden[row], None))
    assert len(calls) == 1  # once for all languages: the order of the recordings is that of the layers
    assert calls[0] is hidden


def test_hook_stops_the_gradient_once_on_the_transformed_rows(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(rtn, "stop_gradient", lambda x, key: calls.append((len(x), key)) or x.detach())
    model, transform = tiny_model(), tiny_transform(layers=[1, 2, 3], languages=["en", "de"])
    transform.attach(model)
    with transform.active([0, -1, 1, 1], [0, 0, 0, 2]):
        model(**batch)
    assert calls == [(2, 0), (1, 2)]  # rows, and the index of the layer as key


class TupleLayer(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return 2 * x, "weights"


class TupleEncoder(nn.Module):
    """Layers as transformers 4 has them, in a model without `config` and `base_model_prefix`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TupleLayer(), TupleLayer()])

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        for block in self.blocks:
            x, rest = block(x)
        return x, rest


def test_tuple_outputs_and_module_path() -> None:
    transform, model, hidden = tiny_transform(layers=[1]), TupleEncoder(), hidden_states()
    transform.attach(model, "blocks")
    with transform.active([0, -1, 0]):
        out, rest = model(hidden)
    assert rest == "weights"
    assert torch.equal(out[1], 4 * hidden[1])
    torch.testing.assert_close(out[0], 2 * transform.transform(2 * hidden, 0, torch.zeros(3))[0])


@torch.no_grad()
def test_recorded_hidden_states_are_the_transformed_ones(batch: dict[str, Tensor]) -> None:
    model, transform = tiny_model(), tiny_transform()
    plain = model(**batch, output_hidden_states=True).hidden_states  # installs the library's own capture hooks first
    transform.attach(model)
    with transform.active(ROWS):
        states = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], plain[1])
    zeros = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(states[2][[0, 2]], transform.transform(plain[2], 0, zeros)[[0, 2]])


def test_attaching_twice_installs_once_and_detaching_removes(batch: dict[str, Tensor]) -> None:
    model, transform = tiny_model(), tiny_transform(layers=[1, 3])
    other = tiny_transform()
    other.attach(model)
    transform.attach(model)
    handles = transform.attach(model)
    layers = encoder_layers(model)
    assert [len(layer._forward_hooks) for layer in layers] == [1, 1, 1]
    handles[0].remove()
    transform.detach(model)
    transform.detach(model)
    assert [len(layer._forward_hooks) for layer in layers] == [0, 1, 0]


@pytest.mark.parametrize("name", ["BertModel", "XLMRobertaForMaskedLM"])
def test_encoder_layers_are_found(name: str) -> None:
    """Of a base model, and of one below another head; test_layer_trace.py has the architectures."""
    import transformers

    model_class = getattr(transformers, name)
    sizes = {"vocab_size": 60, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 8}
    config = model_class.config_class(hidden_size=8, pad_token_id=0, **sizes)
    with torch.device("meta"):
        model = model_class(config)
    assert len(encoder_layers(model)) == 2
    RepresentationTransform(8, layers=[2]).attach(model)


# What it leaves alone


def test_base_model_is_saved_and_loaded_as_before(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    model, transform = tiny_model(), tiny_transform()
    keys, names = list(model.state_dict()), list(dict(model.named_parameters()))
    transform.attach(model)
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_parameters())) == names
    with transform.active(ROWS):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "rtn").exists()
    loaded, info = AutoModelForTokenClassification.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


class Pair(nn.Module):
    """A base model and its transform; forward is a loss of the joined batch."""

    def __init__(self, base: nn.Module, meta: RepresentationTransform):
        super().__init__()
        self.base, self.meta = base, meta
        meta.attach(base)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        with self.meta.active(ROWS, attention_mask=batch["attention_mask"]):
            return self.base(**batch).logits.log_softmax(-1)[..., 0].square().mean()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_model_and_transform_stay_paired(clone: Any, batch: dict[str, Tensor]) -> None:
    pair = Pair(tiny_model(), tiny_transform())
    twin = clone(pair)
    assert torch.equal(twin(batch), pair(batch))
    with torch.no_grad():
        twin.meta.nets[0][0].net[2].weight.zero_()
    assert not torch.equal(twin(batch), pair(batch))


def test_copy_of_the_model_alone_is_off(batch: dict[str, Tensor]) -> None:
    pair = Pair(tiny_model(), tiny_transform())
    twin = copy.deepcopy(pair.base)
    plain = pair.base(**batch).logits
    with pair.meta.active(ROWS):
        assert torch.equal(twin(**batch).logits, plain)


# Gradients


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_body_gradient_passes_through_the_identity_only(kind: str, layer: int, batch: dict[str, Tensor]) -> None:
    """It is the gradient of an encoder to whose states a constant, the transform's output, is added."""
    pair = Pair(tiny_model(torch.float64), tiny_transform(kind=kind, layers=[layer], dtype=torch.float64))
    weights = [p for n, p in pair.base.named_parameters() if "position_embeddings" not in n]
    found = torch.autograd.grad(pair(batch), weights)

    def add_constant(hidden: Tensor) -> Tensor:
        zeros = torch.zeros(4, dtype=torch.long)
        change = (pair.meta.transform(hidden, 0, zeros, batch["attention_mask"]) - hidden).detach()
        return hidden + change * (torch.tensor(ROWS) == 0)[:, None, None]

    logits = by_hand(pair.base, batch, layer, add_constant)
    expected = torch.autograd.grad(logits.log_softmax(-1)[..., 0].square().mean(), weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_every_parameter_of_the_networks_in_use_gets_a_gradient(batch: dict[str, Tensor]) -> None:
    pair = Pair(tiny_model(), tiny_transform(languages=["en", "de"]))
    pair(batch).backward()
    grads = {name: p.grad for name, p in pair.meta.named_parameters()}
    assert all(grads[name] is not None and grads[name].any() for name in grads if name.startswith("nets.0"))
    assert all(grads[name] is None for name in grads if name.startswith("nets.1"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative_in_both_modes(kind: str, training: bool, batch: dict[str, Tensor]) -> None:
    """d_lam <grad_w L, v>: two backward passes, and forward mode over one backward pass, at swapped parameters."""
    pair = Pair(tiny_model(torch.float64), tiny_transform(kind=kind, dtype=torch.float64)).train(training)
    w = {f"base.{n}": p.detach().clone() for n, p in pair.base.named_parameters()}
    lam = {f"meta.{n}": p.detach() * 1.5 for n, p in pair.meta.named_parameters()}
    generator = torch.Generator().manual_seed(4)
    v = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in w.items()}
    for name in ("word", "position"):  # the padding row has no gradient backwards, but has one forwards
        v[f"base.roberta.embeddings.{name}_embeddings.weight"][1] = 0

    def loss(w: dict[str, Tensor], lam: dict[str, Tensor]) -> Tensor:
        return functional_call(pair, {**w, **lam}, (batch,))

    _, forward = torch.func.jvp(lambda w: torch.func.grad(loss, argnums=1)(w, lam), (w,), (v,))

    live = {n: p.requires_grad_() for n, p in w.items()}, {n: p.requires_grad_() for n, p in lam.items()}
    grads = torch.autograd.grad(loss(*live), list(live[0].values()), create_graph=True)
    product = sum((g * v[n]).sum() for n, g in zip(live[0], grads, strict=True))
    backward = dict(zip(lam, torch.autograd.grad(product, list(live[1].values()), allow_unused=True), strict=True))

    scale = max(value.abs().max().item() for value in forward.values())
    assert scale > 1e-6
    for name, value in forward.items():
        other = torch.zeros_like(value) if backward[name] is None else backward[name]
        assert (value - other).abs().max().item() <= 1e-12 * max(1.0, scale), name


# Saving and loading


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "gated_untied", "layers": [1, 3], "languages": ["en", "de"], "bottleneck": 5},
        {"kind": "perceptron"},
        {"kind": "transformer", "num_attention_heads": 8},
    ],
)
def test_round_trip_is_bit_equal_and_draws_no_numbers(fields: dict[str, Any], tmp_path: Path) -> None:
    transform = tiny_transform(**fields)
    transform.save_pretrained(tmp_path / "rtn")
    assert {file.name for file in (tmp_path / "rtn").iterdir()} == {"config.json", "model.safetensors"}
    state = torch.get_rng_state()
    for folder in (tmp_path / "rtn", tmp_path, str(tmp_path)):
        loaded = RepresentationTransform.from_pretrained(folder)
        assert loaded.config == transform.config
        assert loaded.state_dict().keys() == transform.state_dict().keys()
        for name, value in loaded.named_parameters():
            assert torch.equal(value, transform.get_parameter(name))
            assert value.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_loads_beside_a_model_and_in_float32(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_transform(dtype=torch.bfloat16).save_pretrained(tmp_path / "rtn")
    loaded = RepresentationTransform.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    AutoModelForTokenClassification.from_pretrained(tmp_path)


def test_loads_from_the_hub_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tagger"
    transform = tiny_transform()
    transform.save_pretrained(repository / "snapshots" / "abc" / "rtn")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    loaded = RepresentationTransform.from_pretrained("someone/tagger", cache_dir=tmp_path, local_files_only=True)
    assert all(torch.equal(p, transform.get_parameter(n)) for n, p in loaded.named_parameters())


def test_push_to_hub_uploads_a_loadable_subfolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        """A Hub on disk."""

        def __init__(self, token: str | None = None):
            assert token == "secret"

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
            assert exist_ok
            return type("Repo", (), {"repo_id": f"someone/{repo_id}"})

        def upload_folder(self, *, repo_id: str, folder_path: str, path_in_repo: str, commit_message: str) -> str:
            (tmp_path / repo_id).mkdir(parents=True)
            Path(folder_path).rename(tmp_path / repo_id / path_in_repo)
            Path(folder_path).mkdir()  # for the temporary folder's own clean-up
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(rtn, "HfApi", Api)
    transform = tiny_transform()
    assert transform.push_to_hub("tagger", token="secret") == "https://hub/someone/tagger"
    assert RepresentationTransform.from_pretrained(tmp_path / "someone/tagger").config == transform.config


def test_relative_change() -> None:
    transform = tiny_transform(layers=[1, 2])
    start = {name: value.detach().clone() for name, value in transform.named_parameters()}
    assert transform.relative_change(start) == 0.0
    with torch.no_grad():
        for value in transform.parameters():
            value.mul_(1.25)
    assert transform.relative_change(start) == pytest.approx(0.25, rel=1e-6)
    with pytest.raises(ValueError, match="start has other parameters: mixing_logits"):
        transform.relative_change({name: value for name, value in start.items() if name != "mixing_logits"})


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "gated_tide"}, r"unknown rtn_kind 'gated_tide': did you mean 'gated_tied'\? Valid: .*transformer"),
        ({"layers": []}, r"layers of the RTN must be a list of distinct int values, got \[\]"),
        ({"layers": [2, 2]}, r"layers .* distinct int values, got \[2, 2\]"),
        ({"layers": ["2"]}, r"layers .* distinct int values, got \['2'\]"),
        ({"layers": 2}, r"layers .* distinct int values, got 2"),
        ({"languages": "en"}, r"languages .* distinct str values, got 'en'"),
        ({"languages": ["en", "en"]}, r"languages .* distinct str values"),
        ({"bottleneck": 0}, "bottleneck of the RTN must be a whole number of at least 1, got 0"),
        ({"bottleneck": 2.5}, "bottleneck of the RTN must be a whole number of at least 1, got 2.5"),
        ({"num_attention_heads": 5}, "num_attention_heads of the RTN must divide its hidden size 32, got 5"),
        ({"num_attention_heads": 0}, "must divide its hidden size 32, got 0"),
    ],
)
def test_impossible_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tiny_transform(**fields)
    assert "\n" not in str(error.value)


def test_impossible_hidden_size() -> None:
    with pytest.raises(ValueError, match="hidden_size of the RTN must be a whole number of at least 1, got 0"):
        RepresentationTransform(0, layers=[1])


@pytest.mark.parametrize("layer", [-1, 0, 4])
def test_layer_out_of_range_installs_nothing(layer: int) -> None:
    model = tiny_model()
    message = f"rtn_layers: {layer} is not a layer of XLMRobertaForTokenClassification: valid are 1 to 3 .*embeddings"
    with pytest.raises(ValueError, match=message):
        tiny_transform(layers=[1, layer]).attach(model)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("path", [None, "0", "nowhere.layer"])
def test_model_without_an_encoder(path: str | None) -> None:
    with pytest.raises(ValueError, match=r"Sequential has no .*encoder layers.* to hook: it holds no list of modules"):
        tiny_transform().attach(nn.Sequential(nn.Linear(2, 2)), path)


def test_other_hidden_size() -> None:
    transform = RepresentationTransform(16, layers=[1])
    with pytest.raises(ValueError, match="the RTN was built for hidden size 16, the encoder has 32"):
        transform.attach(tiny_model())
    model = TupleEncoder()  # says nothing of its size: found out in the first pass
    transform.attach(model, "blocks")
    with pytest.raises(ValueError, match="hidden size 16, the encoder has 32"), transform.active([0, 0, 0]):
        model(hidden_states())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"languages": [0, 2], "layers": [0, 0]}, r"languages of active\(\) must be .* from -1 to 1"),
        ({"languages": [0, -2], "layers": [0, 0]}, r"languages of active\(\)"),
        ({"languages": [0.0, 1.0], "layers": [0, 0]}, r"languages of active\(\) must be one whole number a row"),
        ({"languages": [[0, 1]], "layers": [0, 0]}, r"languages of active\(\)"),
        ({"languages": [0, 1], "layers": [0, 3]}, r"layers of active\(\) must be .* from 0 to 1"),
        ({"languages": [0, 1], "layers": [0]}, r"differ in rows: \[1, 2\]"),
        ({"languages": [0, 1], "layers": [0, 0], "attention_mask": torch.ones(3, 4)}, r"differ in rows: \[2, 3\]"),
        ({"languages": [0, 1]}, r"has 2 layers: give active\(\) the layer index of each row"),
    ],
)
def test_impossible_routes(arguments: dict[str, Any], message: str) -> None:
    transform = tiny_transform(layers=[1, 2], languages=["en", "de"])
    with pytest.raises(ValueError, match=message), transform.active(**arguments):
        pass
    assert transform._route is None


def test_route_of_another_batch(batch: dict[str, Tensor]) -> None:
    model, transform = tiny_model(), tiny_transform()
    transform.attach(model)
    with pytest.raises(ValueError, match="RTN routes 3 rows, the encoder runs 4"), transform.active([0] * 3):
        model(**batch)


def saved(folder: Path) -> Path:
    tiny_transform().save_pretrained(folder / "rtn")
    return folder / "rtn"


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "model.safetensors")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "metaxl')


def add_field(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "temperature": 1}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"rtn/model\.safetensors is corrupt or truncated .*: copy it again or train anew"),
        (empty, r"rtn/model\.safetensors is corrupt or truncated"),
        (drop_weights, r"rtn/model\.safetensors is missing: copy it beside its config\.json"),
        (drop_tensor, r"rtn/model\.safetensors does not fit the config\.json beside it: .*Missing key"),
        (break_config, r"rtn/config\.json is not readable JSON .*: copy it again or train anew"),
        (add_field, r"rtn/config\.json does not describe an RTN of this version: .*temperature"),
    ],
)
def test_damaged_files(damage: Any, message: str, tmp_path: Path) -> None:
    damage(saved(tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        RepresentationTransform.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["empty", "model"])
def test_folder_without_a_transform(what: str, tmp_path: Path) -> None:
    if what == "model":
        tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no RTN at .*: no rtn/config\.json or config\.json of model type"):
        RepresentationTransform.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "someone/unknown"])
def test_nothing_to_load(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no RTN at {name}: not a folder, and not from the Hub") as error:
        RepresentationTransform.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(error.value)
