"""The feature-wise transform: where it acts, its formula, its noise, how it is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from metaxl_evo.bilevel.randomness import mix_seed
from vision_tasks.feature_transform import SUBFOLDER, ChannelAffine, FeatureTransform, transformed_norms
from vision_tasks.fewshot import FewShotModel, backbone_config


def tiny_encoder(**fields: Any) -> ResNetModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 1]}
    return ResNetModel(ResNetConfig(**{"layer_type": "basic", **sizes, **fields})).double().eval()


def attached(**settings: Any) -> tuple[ResNetModel, FeatureTransform]:
    encoder = tiny_encoder()
    transform = FeatureTransform.for_encoder(encoder, **settings).double()
    transform.attach(encoder)
    return encoder, transform


def photos() -> Tensor:
    return torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def features(encoder: nn.Module) -> Tensor:
    found: Tensor = encoder(photos()).last_hidden_state
    return found


@pytest.mark.parametrize(("backbone", "parameters"), [("resnet10", 3712), ("resnet18", 5632), ("resnet34", 9344)])
def test_the_papers_numbers_of_meta_parameters(backbone: str, parameters: int) -> None:
    with torch.device("meta"):
        transform = FeatureTransform.for_encoder(FewShotModel(backbone_config(backbone)).encoder)
    assert sum(p.numel() for p in transform.parameters()) == parameters


def test_the_last_norm_of_every_block_and_those_of_shortcuts() -> None:
    encoder = tiny_encoder()
    names = {id(module): name for name, module in encoder.named_modules()}
    assert {key: names[id(norm)] for key, norm in transformed_norms(encoder).items()} == {
        "stage1_block1": "encoder.stages.0.layers.0.layer.1.normalization",
        "stage1_block2": "encoder.stages.0.layers.1.layer.1.normalization",
        "stage2_block1": "encoder.stages.1.layers.0.layer.1.normalization",
        "stage2_block1_shortcut": "encoder.stages.1.layers.0.shortcut.normalization",
    }
    bottlenecks = transformed_norms(tiny_encoder(layer_type="bottleneck", hidden_sizes=[8, 16]))
    assert [norm.num_features for norm in bottlenecks.values()] == [8, 8, 8, 16, 16]


def test_start_values_and_names() -> None:
    transform = FeatureTransform({"stage1_block1": 4})
    assert {name: p.tolist() for name, p in transform.named_parameters()} == {
        "layers.stage1_block1.gamma": pytest.approx([0.3] * 4),
        "layers.stage1_block1.beta": pytest.approx([0.5] * 4),
    }


def test_the_formula_by_hand() -> None:
    layer = ChannelAffine(2, 0.3, 0.5).double()
    with torch.no_grad():
        layer.gamma.copy_(torch.tensor([0.3, 0.005]))
        layer.beta.copy_(torch.tensor([-0.01, 0.5]))
    x, noise = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([[1.5, -2.0], [0.5, 1.0]])

    def softplus(value: Tensor) -> Tensor:
        return torch.log1p(torch.exp(100 * value)) / 100

    scale = 1 + noise[0].double() * softplus(layer.gamma)
    shift = noise[1].double() * softplus(layer.beta)
    torch.testing.assert_close(layer(x, noise), scale[:, None, None] * x + shift[:, None, None])
    assert softplus(torch.tensor(0.0)).item() == pytest.approx(0.0069, abs=1e-4)


def test_identity_outside_of_active() -> None:
    encoder, transform = attached()
    plain = features(tiny_encoder())
    assert torch.equal(features(encoder), plain)
    with transform.active(1):
        assert not torch.allclose(features(encoder), plain)
    with pytest.raises(RuntimeError), transform.active(1):
        raise RuntimeError
    assert torch.equal(features(encoder), plain)
    transform.detach(encoder)
    with transform.active(1):
        assert torch.equal(features(encoder), plain)


def test_one_draw_a_channel_and_layer_for_batch_and_positions() -> None:
    encoder, transform = attached()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:  # the block adds to its output in place
        return lambda module, args, out: seen.__setitem__(name, (args[0], out.clone()))

    for name, layer in transform.layers.items():
        layer.register_forward_hook(keep(name))
    with transform.active(7):
        features(encoder)
    assert list(seen) == ["stage1_block1", "stage1_block2", "stage2_block1", "stage2_block1_shortcut"]
    scales = []
    for number, (name, (x, out)) in enumerate(seen.items()):
        noise = torch.randn(2, x.shape[1], generator=torch.Generator().manual_seed(mix_seed(7, number))).double()
        scale, shift = (1 + 0.3 * noise[0])[:, None, None], (0.5 * noise[1])[:, None, None]
        torch.testing.assert_close(out, scale * x + shift, rtol=1e-6, atol=1e-6, msg=name)
        scales.append(tuple(noise[0, :4].tolist()))
    assert len(set(scales)) == 4


def test_noise_per_batch_and_per_pass() -> None:
    encoder, transform = attached()
    global_state = torch.random.get_rng_state()
    with transform.active(1):
        first, again = features(encoder), features(encoder)
    with transform.active(2):
        other = features(encoder)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.random.get_rng_state(), global_state)

    encoder, transform = attached(noise="per_pass")
    with transform.active(1):
        torch.manual_seed(3)
        first, second = features(encoder), features(encoder)
        torch.manual_seed(3)
        again = features(encoder)
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)


def test_a_deep_copy_has_its_own_transform() -> None:
    encoder, transform = attached()
    pair = copy.deepcopy(nn.ModuleList([encoder, transform]))
    plain = features(encoder)
    with pair[1].active(1):  # type: ignore[operator]
        assert torch.equal(features(encoder), plain)
        assert not torch.allclose(features(pair[0]), plain)


def test_the_dtype_of_the_features_stays() -> None:
    layer = ChannelAffine(2, 0.3, 0.5)
    assert layer(torch.ones(1, 2, 1, 1, dtype=torch.bfloat16), torch.ones(2, 2)).dtype == torch.bfloat16


def test_saved_and_read_back(tmp_path: Path) -> None:
    _, transform = attached(noise="per_pass")
    for parameter in transform.parameters():
        nn.init.normal_(parameter)
    transform.save_pretrained(tmp_path / SUBFOLDER)
    for folder in (tmp_path, tmp_path / SUBFOLDER):
        again = FeatureTransform.from_pretrained(folder)
        assert again.config == transform.config
        state = again.state_dict()
        assert state.keys() == transform.state_dict().keys()
        assert all(torch.equal(state[name], leaf) for name, leaf in transform.state_dict().items())
    assert sorted(file.name for file in (tmp_path / SUBFOLDER).iterdir()) == ["config.json", "model.safetensors"]


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    _, transform = attached()
    folder = tmp_path / SUBFOLDER
    transform.save_pretrained(folder)

    def refusals() -> list[str]:
        found = []
        for attempt in (
            lambda: FeatureTransform({"a": 1}, noise="per_bach"),
            lambda: FeatureTransform({}),
            lambda: FeatureTransform.for_encoder(nn.Linear(1, 1)),
            lambda: transform.attach(tiny_encoder(hidden_sizes=[4, 6])),
            lambda: FeatureTransform.from_pretrained(tmp_path / "nowhere"),
        ):
            with pytest.raises(ValueError) as caught:
                attempt()
            found.append(str(caught.value))
        return found

    messages = refusals()
    assert not any("\n" in message for message in messages)
    for message, part in zip(
        messages,
        [
            "did you mean 'per_batch'",
            "no batch norm",
            "and Linear has none",
            "8 channels at stage2",
            "does not describe",
        ],
        strict=True,
    ):
        assert part in message

    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*: use another checkpoint"):
        FeatureTransform.from_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "metaxl_rtn"}), encoding="utf-8")
    with pytest.raises(ValueError, match="another model type"):
        FeatureTransform.from_pretrained(tmp_path)
