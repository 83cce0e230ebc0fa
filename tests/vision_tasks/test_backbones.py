"""The classifiers: sizes, shapes, shortcuts, and transformers' own way of saving and loading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification

from metaxl_evo.models.weight_net import WeightNet
from tests.vision_tasks.small import small_convnet, small_resnet
from vision_tasks.backbones import BACKBONES, _Block


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def seen(model: nn.Module, *modules: nn.Module, images: Tensor) -> list[tuple[int, ...]]:
    """The shapes that leave these modules."""
    shapes: list[tuple[int, ...]] = []
    for module in modules:
        module.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape[1:])))
    model(pixel_values=images)
    return shapes


# Sizes


@pytest.mark.parametrize(
    ("width", "size"), [(1, 464_154), (2, 1_849_898), (3, 4_157_242), (4, 7_386_186), (5, 11_536_730)]
)
def test_the_papers_sizes_of_resnet32(width: int, size: int) -> None:
    with torch.device("meta"):
        model = BACKBONES["resnet32"](num_channels=3, num_labels=10, width=width)
    assert parameters(model) == size


def test_resnet32_has_32_layers_and_three_stages() -> None:
    model: Any = BACKBONES["resnet32"](num_channels=3, num_labels=100, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) + 1 == 32
    assert all(module.kernel_size == (3, 3) and module.bias is None for module in convolutions)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 31
    shapes = seen(model, model.stem, *model.blocks, images=torch.rand(2, 3, 32, 32))
    assert shapes == [(16, 32, 32)] * 6 + [(32, 16, 16)] * 5 + [(64, 8, 8)] * 5
    assert model.classifier.weight.shape == (100, 64)
    for module in (convolutions[5], convolutions[-1], model.classifier):  # He et al., ICCV 2015: variance 2 / fan in
        fan_in = module.weight[0].numel()
        assert float(module.weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


def test_the_last_features_are_means_over_the_image() -> None:
    model = small_resnet().eval()
    images = torch.rand(3, 1, 8, 8)
    features = model.blocks(model.stem(images))
    expected = F.linear(features.flatten(2).sum(2) / features[0, 0].numel(), *model.classifier.parameters())
    torch.testing.assert_close(model(pixel_values=images).logits, expected)


def test_lenet_is_the_papers() -> None:
    model: Any = BACKBONES["lenet"](num_labels=10)
    assert parameters(model) == 61_706
    layers = [*model.features, *model.classifier]
    assert [type(layer).__name__ for layer in layers] == [
        *("Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d"),
        *("Linear", "ReLU", "Linear", "ReLU", "Linear"),
    ]
    first, second = layers[0], layers[3]
    assert (first.in_channels, first.out_channels, first.kernel_size, first.padding) == (1, 6, (5, 5), (2, 2))
    assert (second.in_channels, second.out_channels, second.kernel_size, second.padding) == (6, 16, (5, 5), (0, 0))
    sizes = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    assert sizes == [(400, 120), (120, 84), (84, 10)]
    assert layers[2].kernel_size == layers[5].kernel_size == 2
    torch.manual_seed(0)
    expected = nn.Conv2d(1, 6, 5, padding=2).weight  # as torch initialises it
    torch.manual_seed(0)
    assert torch.equal(BACKBONES["lenet"](num_labels=10).features[0].weight, expected)
    assert model(pixel_values=torch.rand(2, 1, 28, 28)).logits.shape == (2, 10)


def test_the_small_convnet() -> None:
    model: Any = BACKBONES["convnet"](num_labels=10, image_size=14)
    assert parameters(model) == 9 * 16 + 16 + 9 * 16 * 32 + 32 + 3 * 3 * 32 * 128 + 128 + 128 * 10 + 10
    assert seen(model, model.features[2], model.features[5], images=torch.rand(1, 1, 14, 14)) == [
        (16, 7, 7),
        (32, 3, 3),
    ]
    with pytest.raises(ValueError, match="images of 2 pixels are too small for 2 layers"):
        BACKBONES["convnet"](num_labels=10, image_size=2)
    with pytest.raises(ValueError, match="images of 7 pixels are too small"):
        BACKBONES["lenet"](num_labels=10, image_size=7)


@pytest.mark.parametrize("hidden", [100, 1_000, 10_000])
def test_the_papers_sizes_of_the_weighting_network(hidden: int) -> None:
    net = WeightNet(hidden)
    assert parameters(net) == {100: 301, 1_000: 3_001, 10_000: 30_001}[hidden]
    weights = net(torch.linspace(0, 9, 7)).detach()
    assert weights.shape == (7,)
    assert 0 < float(weights.min()) <= float(weights.max()) < 1


@pytest.mark.parametrize(
    ("name", "fields", "size"),
    [("wrn_16_1", {}, 175_066), ("wrn_10_1", {}, 77_850), ("wrn_16_1", {"depth": 40, "width": 2}, 2_243_546)],
)
def test_the_papers_sizes_of_wide_resnets(name: str, fields: dict[str, int], size: int) -> None:
    with torch.device("meta"):
        assert parameters(BACKBONES[name](num_channels=3, num_labels=10, **fields)) == size


def test_wrn_10_1_by_hand() -> None:
    """Zagoruyko and Komodakis: (norm, ReLU, convolution) twice, plus x, or a 1 x 1 convolution of the first ReLU."""
    torch.manual_seed(0)
    model, x = BACKBONES["wrn_10_1"](num_labels=10).double(), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    weights = dict(model.named_parameters())

    def active(values: Tensor) -> Tensor:
        mean, variance = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), keepdim=True, correction=0)
        return ((values - mean) / (variance + 1e-5).sqrt()).relu()

    h = F.conv2d(x, weights["stem.weight"], padding=1)
    for block, stride in enumerate((1, 2, 2)):
        first, second = (weights[f"blocks.{block}.{name}.weight"] for name in ("first", "second"))
        inner = F.conv2d(active(F.conv2d(active(h), first, stride=stride, padding=1)), second, padding=1)
        h = inner + (F.conv2d(active(h), weights[f"blocks.{block}.shortcut.weight"], stride=stride) if block else h)
    expected = F.linear(active(h).mean((2, 3)), weights["classifier.weight"], weights["classifier.bias"])
    torch.testing.assert_close(model.train()(pixel_values=x).logits, expected, rtol=1e-10, atol=1e-10)
    fan = 16 * 9 + 32 * 9  # Glorot and Bengio: variance 2 / (fan in + fan out)
    assert float(weights["blocks.1.first.weight"].detach().std()) == pytest.approx((2 / fan) ** 0.5, rel=0.1)


def test_the_backbones_are_these() -> None:
    assert list(BACKBONES) == ["lenet", "convnet", "resnet32", "convnet_8", "wrn_16_1", "wrn_10_1"]
    with pytest.raises(ValueError, match="depth must be 10, 16, 22"):
        BACKBONES["wrn_16_1"](depth=18)


# Blocks


def test_a_shortcut_takes_every_second_pixel_and_pads_with_zeros() -> None:
    """With the convolutions at zero a block is the ReLU of its shortcut."""
    block = _Block(4, 8, 2)
    for name in ("first", "second"):
        nn.init.zeros_(getattr(block, name).weight)
    x = torch.randn(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                expected[:, 2 + channel, row, column] = x[:, channel, 2 * row, 2 * column].clamp(min=0)
    assert torch.equal(block(x), expected)
    same = _Block(4, 4, 1)
    for name in ("first", "second"):
        nn.init.zeros_(getattr(same, name).weight)
    assert torch.equal(same(x), x.relu())


def test_a_block_by_hand() -> None:
    torch.manual_seed(0)
    block, x = _Block(4, 8, 2).double(), torch.randn(3, 4, 6, 6, dtype=torch.float64)

    def normed(values: Tensor) -> Tensor:
        mean, variance = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), keepdim=True, correction=0)
        return (values - mean) / (variance + 1e-5).sqrt()

    inner = normed(F.conv2d(x, block.first.weight, stride=2, padding=1)).relu()
    inner = normed(F.conv2d(inner, block.second.weight, padding=1))
    shortcut = torch.cat([torch.zeros(3, 2, 3, 3), x[:, :, ::2, ::2], torch.zeros(3, 2, 3, 3)], 1)
    torch.testing.assert_close(block.train()(x), (inner + shortcut).relu(), rtol=1e-12, atol=1e-12)


# transformers


@pytest.mark.parametrize("make", [small_convnet, small_resnet])
def test_saved_and_loaded_bit_by_bit(tmp_path: Path, make: Any) -> None:
    model = make()
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 4
    model.train()(pixel_values=images)  # moves the statistics of batch norm
    model.config.id2label = dict(enumerate("abcd"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert loaded.config.image_mean == [0.375]
    assert loaded.config.id2label == dict(enumerate("abcd"))
    assert not loaded.training
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    found, expected = loaded(images, labels), model.eval()(images, labels)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    torch.testing.assert_close(expected.loss, F.cross_entropy(expected.logits, labels))
    assert model(images).loss is None


def test_a_weighting_network_is_saved_and_loaded(tmp_path: Path) -> None:
    net = WeightNet(7)
    net.save_pretrained(tmp_path / "run/weight_net")
    for folder in (tmp_path / "run", tmp_path / "run/weight_net"):
        loaded = WeightNet.from_pretrained(folder)
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("name", BACKBONES)
def test_a_head_for_other_classes_is_initialised(name: str, tmp_path: Path) -> None:
    """What the files lack gets torch's own start, on a model that would else hold whatever the memory held."""
    torch.manual_seed(0)
    model = BACKBONES[name](num_labels=10, image_size=28)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = type(model).from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    before, after = model.state_dict(), loaded.state_dict()
    head = {key for key in after if after[key].shape != before[key].shape}
    assert len(head) == 2
    assert all(torch.equal(after[key], before[key]) for key in after.keys() - head)
    (width,) = {after[key].shape[1] for key in head if after[key].dim() == 2}
    assert all(0 < after[key].abs().max() <= width**-0.5 for key in head)
