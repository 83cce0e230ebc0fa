"""Cross-domain few-shot learning: model, both losses, hypergradients by every engine, and training runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import default_collate

from metaxl_evo.bilevel import SGD, Adam, Hypergradient, hypergradient, tree
from metaxl_evo.estimators import Estimator, EvoGrad, OneStep, Sama
from metaxl_evo.models.bilevel_module import TOTALS
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.tiny import close, different, final_state, logged, same, tiny_arguments
from tests.vision_tasks.small import PERTURBED
from vision_tasks.augmentation import to_float
from vision_tasks.feature_transform import FeatureTransform
from vision_tasks.fewshot import (
    BACKBONES,
    METHODS,
    CrossDomainFewShot,
    FewShotConfig,
    FewShotModel,
    backbone_config,
    evaluating,
)
from vision_tasks.fewshot_episodes import Auxiliary, Domain, Episodes, EpisodeSize, whole
from vision_tasks.symbols import LOOKS, draw_symbols

Batch = dict[str, Any]

WAY, SHOT, QUERIES, SIDE, AUX, CLASSES = 3, 2, 2, 16, 4, 5
LR = 0.1
ENGINES: dict[str, Estimator] = {
    "double_backward": OneStep("double_backward"),
    "jvp": OneStep("jvp"),
    "finite_difference": OneStep("finite_difference", radius=1e-5),
    "sama": Sama(),
    "evograd": EvoGrad(copies=3, sigma=1e-3, parameters=PERTURBED),
    "evograd_per_copy": EvoGrad(copies=2, sigma=1e-3, parameters=PERTURBED, share_randomness=False),
}


def tiny_model(**fields: Any) -> FewShotModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "num_channels": 1,
        "embedding_size": 4,
        "hidden_sizes": [4, 6],
        "depths": [1, 1],
        "aux_classes": CLASSES,
        "image_mean": [0.4],
        "image_std": [0.3],
    }
    return FewShotModel(FewShotConfig(**settings | fields))


def tiny_module(
    method: str = "learned", *, dtype: torch.dtype = torch.float64, noise: str = "per_batch", **fields: Any
) -> CrossDomainFewShot:
    base = tiny_model(**fields)
    for part in base.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            nn.init.normal_(part.running_mean, std=0.3)  # not those of a batch, so that it shows which were used
    meta = FeatureTransform.for_encoder(base.encoder, noise=noise)
    module = CrossDomainFewShot(base, meta, method=method)
    return module.to(dtype)


def tiny_batch(episodes: int = 1, *, seed: int = 0, aux: bool = True, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def images(*shape: int) -> Tensor:
        return torch.rand(episodes, *shape, 1, SIDE, SIDE, generator=generator, dtype=dtype)

    batch: Batch = {
        "support": images(WAY, SHOT),
        "query": images(WAY, QUERIES),
        "labels": torch.arange(WAY).repeat_interleave(QUERIES).repeat(episodes, 1),
        "noise_seed": torch.randint(2**62, (episodes,), generator=generator),
    }
    if aux:
        batch["aux_images"] = images(AUX)
        batch["aux_labels"] = torch.randint(CLASSES, (episodes, AUX), generator=generator)
        batch["aux_weight"] = torch.full((episodes,), 0.9, dtype=dtype)
    return batch


def rows(batch: Batch, *chosen: int) -> Batch:
    return {key: value[list(chosen)] for key, value in batch.items()}


def estimate(module: CrossDomainFewShot, estimator: Estimator, train: Batch, val: Batch, **rest: Any) -> Hypergradient:
    problem, w, lam = module.problem(SGD(LR)), module.base_parameters(), module.meta_parameters()
    return hypergradient(problem, estimator, w, lam, [train], [val], **rest)


# The losses and their derivatives written out, by torch alone --------------------------------------------------------


def split_episode(batch: Batch, index: int) -> dict[str, Tensor]:
    return {key: batch[key][index : index + 1] for key in ("support", "query", "labels")}


class Written:
    """The losses as functions of the base parameters, by functional_call on clones of the buffers."""

    def __init__(self, module: CrossDomainFewShot):
        copied = copy.deepcopy(module)
        self.base, self.meta = copied.base, copied.meta
        self.meta.requires_grad_(True)
        self.w = {name: p.detach().requires_grad_() for name, p in self.base.named_parameters()}
        self.lam = dict(self.meta.named_parameters())

    def call(self, w: Mapping[str, Tensor], training: bool, **arguments: Any) -> Any:
        self.base.train(training)
        buffers = {name: buffer.clone() for name, buffer in self.base.named_buffers()}
        return functional_call(self.base, {**w, **buffers}, kwargs=arguments)

    def inner(self, w: Mapping[str, Tensor], batch: Batch) -> Tensor:
        losses = []
        for index, seed in enumerate(batch["noise_seed"].tolist()):
            with self.meta.active(seed):
                losses.append(self.call(w, True, **split_episode(batch, index)).loss)
        loss = torch.stack(losses).mean()
        return loss + self.aux(w, batch) if "aux_images" in batch else loss

    def aux(self, w: Mapping[str, Tensor], batch: Batch) -> Tensor:
        self.base.eval()
        encoder = {name.removeprefix("encoder."): leaf for name, leaf in w.items() if name.startswith("encoder.")}
        x = functional_call(self.base.encoder, encoder, ((batch["aux_images"].flatten(0, 1) - 0.4) / 0.3,))
        x = x.last_hidden_state.mean((2, 3))
        for layer in (0, 2, 4):
            x = x if layer == 0 else x.clamp(min=0)
            x = x @ w[f"aux_head.{layer}.weight"].T + w[f"aux_head.{layer}.bias"]
        return float(batch["aux_weight"][0]) * F.cross_entropy(x, batch["aux_labels"].flatten())

    def outer(self, w: Mapping[str, Tensor], batch: Batch) -> Tensor:
        losses = [self.call(w, False, **split_episode(batch, index)).loss for index in range(len(batch["labels"]))]
        return torch.stack(losses).mean()

    def grads(self, loss: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.lam, torch.autograd.grad(loss, list(self.lam.values())), strict=True))


def test_the_losses_are_what_is_written_out() -> None:
    module, batch = tiny_module().train(), tiny_batch(2)
    inner, outer = module.mean_inner_loss(batch), module.mean_outer_loss(batch)
    written = Written(module)  # with the running statistics that the auxiliary pass met, behind the episodes
    torch.testing.assert_close(inner, written.inner(written.w, batch))
    torch.testing.assert_close(outer, written.outer(written.w, batch))


def test_one_step_is_autograd_through_the_step() -> None:
    module, train, val = tiny_module().train(), tiny_batch(2), tiny_batch(1, seed=1, aux=False)
    written = Written(module)
    inner = written.inner(written.w, train)
    slopes = torch.autograd.grad(inner, list(written.w.values()), create_graph=True)
    after = {name: leaf - LR * slope for (name, leaf), slope in zip(written.w.items(), slopes, strict=True)}
    outer = written.outer(after, val)
    expected = written.grads(outer)
    found = {name: estimate(module, ENGINES[name], train, val) for name in list(ENGINES)[:3]}
    torch.testing.assert_close(found["double_backward"].outer_loss, outer.detach())
    close(found["double_backward"].grads, expected, 1e-10)
    close(found["jvp"].grads, expected, 1e-10)
    close(found["finite_difference"].grads, expected, 1e-6)
    assert all(float(leaf.abs().min()) > 0 for leaf in expected.values())


def test_evograd_is_autograd_through_the_copies() -> None:
    module, train, val = tiny_module().train(), tiny_batch(2), tiny_batch(1, seed=1, aux=False)
    written, generator = Written(module), torch.Generator().manual_seed(4)
    names = [name for name in written.w if not name.startswith("aux_head")]
    noise = [
        {n: 0.02 * torch.randn(written.w[n].shape, generator=generator, dtype=torch.float64) for n in names}
        for _ in range(3)
    ]
    copies = [{n: w.detach() + eps[n] if n in eps else w.detach() for n, w in written.w.items()} for eps in noise]
    weights = torch.softmax(-torch.stack([written.inner(w, train) for w in copies]) / 0.5, 0)
    combined = {n: torch.stack([weights[k] * copies[k][n] for k in range(3)]).sum(0) for n in written.w}
    estimator = EvoGrad(copies=3, temperature=0.5, parameters=PERTURBED)
    found = estimate(module, estimator, train, val, noise=noise)
    close(found.grads, written.grads(written.outer(combined, val)), 1e-9)


def test_the_pattern_of_the_paper_finds_encoder_and_head() -> None:
    problem = tiny_module().problem(SGD(LR))
    perturbed = EvoGrad(parameters=PERTURBED)._perturbed(tiny_module().base_parameters())
    assert problem.second_order
    assert {name.split(".")[0] for name in perturbed} == {"encoder", "head"}
    assert {name.split(".")[0] for name, _ in tiny_model().named_parameters()} == {"encoder", "head", "aux_head"}


# Noise ---------------------------------------------------------------------------------------------------------------


class Draws:
    """Keeps every noise that a transform draws."""

    def __init__(self, module: CrossDomainFewShot, monkeypatch: pytest.MonkeyPatch):
        self.drawn: list[Tensor] = []
        draw = module.meta._draw

        def keep(name: str, seed: int) -> Tensor:
            self.drawn.append(draw(name, seed))
            return self.drawn[-1]

        monkeypatch.setattr(module.meta, "_draw", keep)

    @property
    def passes(self) -> list[Tensor]:
        """All the noise of each pass over an episode of three layers."""
        assert len(self.drawn) % 3 == 0
        return [torch.cat(self.drawn[i : i + 3], 1) for i in range(0, len(self.drawn), 3)]


@pytest.mark.parametrize("name", ENGINES)
def test_every_pass_over_a_batch_has_its_noise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_module().train()
    draws = Draws(module, monkeypatch)
    train = tiny_batch()
    module(**train)["loss"].backward()  # the base step's own
    estimate(module, ENGINES[name], train, tiny_batch(seed=1, aux=False))
    assert len(draws.passes) > 2
    assert all(torch.equal(noise, draws.passes[0]) for noise in draws.passes)
    before = len(draws.passes)
    module.mean_inner_loss(tiny_batch(seed=3))
    assert not torch.equal(draws.passes[before], draws.passes[0])


def test_per_pass_noise_is_shared_among_copies_only_if_randomness_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_module(noise="per_pass").train()
    draws = Draws(module, monkeypatch)
    train, val = tiny_batch(), tiny_batch(seed=1, aux=False)
    module.mean_inner_loss(train)
    for shared in (True, False):
        estimate(module, EvoGrad(copies=2, parameters=PERTURBED, share_randomness=shared), train, val)
        first, second = draws.passes[-2:]  # behind those that test the loss
        assert torch.equal(first, second) == shared
        assert not torch.equal(first, draws.passes[0])


# What a meta step leaves alone, and a base step does not -------------------------------------------------------------


@pytest.mark.parametrize("name", ["jvp", "evograd_per_copy"])
def test_a_hypergradient_leaves_everything_as_it_was(name: str) -> None:
    module = tiny_module().train()
    module.base.encoder.embedder.eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    state = torch.random.get_rng_state()
    found = estimate(module, ENGINES[name], tiny_batch(2), tiny_batch(seed=1, aux=False))
    assert tree.norm(found.grads) > 0
    assert not different(dict(module.state_dict()), before)
    assert [part.training for part in module.modules()] == modes
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(norm.track_running_stats for norm in module.base.encoder.modules() if isinstance(norm, nn.BatchNorm2d))


def test_a_base_step_moves_the_running_statistics() -> None:
    module = tiny_module().train()
    before = {name: buffer.clone() for name, buffer in module.base.named_buffers()}
    assert before
    module(**tiny_batch())
    assert set(different(dict(module.base.named_buffers()), before)) == set(before)
    module.eval()
    before = {name: buffer.clone() for name, buffer in module.base.named_buffers()}
    module(**tiny_batch())
    module.mean_outer_loss(tiny_batch())
    assert not different(dict(module.base.named_buffers()), before)


def test_evaluating_puts_every_mode_back() -> None:
    module = tiny_model().train()
    module.head.eval()
    modes = [part.training for part in module.modules()]
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == modes


# The auxiliary classifier --------------------------------------------------------------------------------------------


def gradients(module: CrossDomainFewShot, loss: Tensor) -> dict[str, Tensor | None]:
    names = dict(module.base.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, list(names.values()), allow_unused=True), strict=True))


def test_the_auxiliary_head_learns_from_its_own_loss_alone() -> None:
    module, batch = tiny_module().train(), tiny_batch(2)
    plain = {key: value for key, value in batch.items() if not key.startswith("aux_")}
    without = gradients(module, module.mean_inner_loss(plain))
    assert all((gradient is None) == name.startswith("aux_head") for name, gradient in without.items())

    module = tiny_module().train()
    found = gradients(module, module.mean_inner_loss(batch))
    written = Written(module)  # with the running statistics that the auxiliary pass met
    of_aux = torch.autograd.grad(written.aux(written.w, batch), list(written.w.values()), allow_unused=True)
    for (name, gradient), alone in zip(found.items(), of_aux, strict=True):
        assert gradient is not None
        assert (alone is None) == name.startswith("head.")
        parts = [part for part in (alone, without[name]) if part is not None]
        torch.testing.assert_close(gradient, sum(parts), msg=name)


def test_the_auxiliary_loss_is_weighted_a_row() -> None:
    module, batch = tiny_module().eval(), tiny_batch(2)
    batch["aux_weight"] = torch.tensor([1.0, 0.5]).double()
    plain = {key: value for key, value in batch.items() if not key.startswith("aux_")}
    logits = module.base.classify(batch["aux_images"].flatten(0, 1))
    losses = F.cross_entropy(logits, batch["aux_labels"].flatten(), reduction="none").view(2, AUX)
    expected = (losses[0].sum() + 0.5 * losses[1].sum()) / (2 * AUX)
    torch.testing.assert_close(module.mean_inner_loss(batch) - module.mean_inner_loss(plain), expected)


def test_a_pass_to_the_meta_parameters_needs_no_auxiliary_images() -> None:
    module, batch = tiny_module(), tiny_batch(2)
    assert module.counts(batch) == {"episodes": 2, "aux_images": 2 * AUX}
    assert module.counts(tiny_batch(aux=False)) == {"episodes": 1, "aux_images": 0}
    fewer = module.reads_lam(batch)
    assert not any(key.startswith("aux_") for key in fewer)


# Batches -------------------------------------------------------------------------------------------------------------


def test_a_window_of_two_parts_is_one_batch() -> None:
    module, batch = tiny_module().train(), tiny_batch(2)
    whole_loss = module.mean_outer_loss(batch), module.mean_inner_loss(batch)
    parts = [{**rows(batch, index), TOTALS: module.counts(batch)} for index in range(2)]
    module = tiny_module().train()
    torch.testing.assert_close(sum(module.mean_outer_loss(part) for part in parts), whole_loss[0])
    module.eval()  # in training each part moves the running statistics that its auxiliary pass meets
    torch.testing.assert_close(sum(module.mean_inner_loss(part) for part in parts), module.mean_inner_loss(batch))


@pytest.mark.parametrize("method", METHODS)
def test_the_methods_differ_in_training_and_agree_in_evaluation(method: str) -> None:
    module, plain = tiny_module(method).train(), tiny_model().double().train()
    batch = tiny_batch(aux=False)
    plain.load_state_dict(module.base.state_dict())
    expected = plain(**batch)
    assert (module(**batch)["loss"].item() == pytest.approx(expected.loss.item())) == (method == "none")
    module.base.load_state_dict(plain.eval().state_dict())
    found = module.eval()(**batch)
    assert torch.equal(found.logits, plain(**batch).logits)
    assert found.logits.shape == (1, WAY * QUERIES, WAY)


@pytest.mark.parametrize("method", ["fixed", "none"])
def test_a_method_that_learns_nothing_has_no_hypergradient(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"method '{method}' does not learn its transform: set estimator: none"):
        tiny_module(method).problem(SGD(LR))
    with pytest.raises(ValueError, match="set estimator: none"):
        trainer(tmp_path, method=method)


# The model -----------------------------------------------------------------------------------------------------------


def test_the_papers_sizes() -> None:
    stages: Any
    for backbone, depths in BACKBONES.items():
        with torch.device("meta"):
            model = FewShotModel(backbone_config(backbone))
            maps = model.encode(torch.empty(2, 3, 224, 224))
        assert maps.shape == (2, 512, 7, 7)
        stages = model.encoder.encoder.stages
        assert [len(stage.layers) for stage in stages] == list(depths)
        assert stages[0].layers[0].layer[0].convolution.stride == (1, 1)
    stem: Any = model.encoder.embedder
    convolution, pool = stem.embedder.convolution, stem.pooler
    assert (tuple(convolution.weight.shape), convolution.stride, convolution.bias) == ((64, 3, 7, 7), (2, 2), None)
    assert (pool.kernel_size, pool.stride) == (3, 2)
    with torch.device("meta"):
        thin = FewShotModel(backbone_config("resnet10", width=16, aux_classes=64))
    assert thin.config.hidden_sizes == [16, 32, 64, 128]
    found = [part for part in thin.modules() if isinstance(part, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in found[2:]] == [(128, 128), (128, 128), (128, 64)]


def test_shortcuts_are_where_the_width_changes() -> None:
    with torch.device("meta"):
        stages: Any = FewShotModel(backbone_config("resnet34")).encoder.encoder.stages
    projected = [[not isinstance(block.shortcut, nn.Identity) for block in stage.layers] for stage in stages]
    assert projected == [[False] * 3, [True, *[False] * 3], [True, *[False] * 5], [True, *[False] * 2]]


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = FewShotModel(backbone_config("resnet10", width=32))
    checked = 0
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            expected = (2 / (part.kernel_size[0] ** 2 * part.out_channels)) ** 0.5
            assert part.weight.std().item() == pytest.approx(expected, rel=0.1)
            checked += 1
        elif isinstance(part, nn.BatchNorm2d):
            assert bool((part.weight == 1).all())
            assert not bool(part.bias.any())
    assert checked == 1 + 8 + 3 + 2


@pytest.mark.parametrize("side", [28, 32])
def test_small_images_pass_thin_nets(side: int) -> None:
    model = FewShotModel(FewShotConfig(embedding_size=4, hidden_sizes=[4, 8, 16], depths=[1, 1, 1]))
    assert model(torch.rand(1, 5, 1, 3, side, side), torch.rand(1, 5, 2, 3, side, side)).logits.shape == (1, 10, 5)


def test_images_are_standardised_by_the_configuration() -> None:
    model = tiny_model().eval()
    images = torch.rand(2, 1, SIDE, SIDE)
    expected = model.encoder((images - 0.4) / 0.3).last_hidden_state
    torch.testing.assert_close(model.encode(images), expected)


@pytest.mark.parametrize("head", ["relation", "relation_mse", "prototype"])
def test_saved_as_a_plain_folder_and_read_back(head: str, tmp_path: Path) -> None:
    module = tiny_module(head=head, dtype=torch.float32)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["head"] == head
    again = FewShotModel.from_pretrained(tmp_path)
    assert not different(dict(again.state_dict()), dict(module.base.state_dict()))
    other = tiny_module(head=head, dtype=torch.float32)
    other.load_pretrained(tmp_path)
    assert not different(dict(other.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize(
    ("attempt", "part"),
    [
        (lambda: tiny_model(head="relatoin"), "did you mean 'relation'"),
        (lambda: tiny_model(image_mean=[0.1, 0.2]), "image_mean has 2 numbers for images of 1 channels"),
        (lambda: tiny_model(image_std=[0.0]), "image_std must be positive"),
        (lambda: backbone_config("resnet11"), "did you mean 'resnet1"),
        (lambda: tiny_module("lerned"), "did you mean 'learned'"),
        (lambda: tiny_model(aux_classes=0).classify(torch.rand(1, 1, 16, 16)), "set aux_classes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(attempt: Any, part: str) -> None:
    with pytest.raises(ValueError) as caught:
        attempt()
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# Training ------------------------------------------------------------------------------------------------------------


def grey_float(image: Any, generator: Generator) -> Tensor:
    """The middle of an image, a little darker or brighter."""
    pixels = to_float(image).mean(0, keepdim=True)[:, 8:24, 8:24]
    return (pixels + 0.1 * torch.rand((), generator=generator)).clamp(0, 1)


def looks() -> list[Domain]:
    found = []
    for look in list(LOOKS)[:3]:
        images, labels = draw_symbols(look, 5, 5)
        found.append(Domain(look, list(images), labels, tuple("abcde"), whole(5)))
    return found


DOMAINS = looks()
SIZE = EpisodeSize(WAY, SHOT, QUERIES)
EVALUATED: dict[str, dict[str, Any]] = {
    "evograd": {"estimator": "evograd", "estimator_kwargs": {"parameters": PERTURBED, "sigma": 0.01}},
    "one_step": {"estimator": "one_step", "estimator_kwargs": {"engine": "double_backward"}},
    "finite_difference": {"estimator": "one_step", "estimator_kwargs": {"engine": "finite_difference"}},
}


def episodes(role: str, **fields: Any) -> Episodes:
    settings: dict[str, Any] = {"length": 3, "seed": 1, "transform": grey_float}
    return Episodes(DOMAINS, role, SIZE, **settings | fields)


def trainer(
    folder: Path, method: str = "learned", noise: str = "per_batch", aux: bool = True, **fields: Any
) -> MetaTrainer:
    """Three episodes an epoch, so that another pair of domains is drawn within a short run."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "per_device_meta_batch_size": 1,
        "meta_portion": 1.0,
        "meta_learning_rate": 1e-2,
        "max_steps": 4,
        **EVALUATED["evograd"],
    }
    module = tiny_module(method, dtype=torch.float32, noise=noise)
    return MetaTrainer(
        module,
        tiny_arguments(folder, **settings | fields),
        train_dataset=episodes("seen", aux=Auxiliary(DOMAINS[0], 4, AUX) if aux else None),
        meta_dataset=episodes("unseen"),
        eval_dataset=Episodes(DOMAINS[2:], "test", SIZE, length=4, seed=2, transform=grey_float),
        data_collator=default_collate,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )


@pytest.mark.parametrize(
    ("estimator", "order"), list(zip(EVALUATED, ["after_step", "lookahead", "after_step"], strict=True))
)
def test_training_moves_every_number_of_the_transform(estimator: str, order: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, meta_order=order, **EVALUATED[estimator])
    meta = tree.clone(run.model.meta_parameters())
    base = {name: p.detach().clone() for name, p in run.model.base.named_parameters()}
    run.train()
    now = run.model.meta_parameters()
    assert all(bool((now[name] != start).all()) for name, start in meta.items())
    assert set(different(dict(run.model.base.named_parameters()), base)) == set(base)
    assert len(logged(run, "meta_loss")) == 4
    assert run.skipped_meta_steps == 0

    def results() -> dict[str, float]:
        return {key: value for key, value in run.evaluate().items() if key in ("eval_loss", "eval_accuracy")}

    found = results()
    with torch.no_grad():
        for parameter in now.values():
            parameter.fill_(9.0)
    assert results() == found  # the transform does not act
    assert len(found) == 2


def test_the_fixed_transform_acts_and_stays(tmp_path: Path) -> None:
    ends = {}
    for method in ("fixed", "none"):
        run = trainer(tmp_path, method, estimator="none", estimator_kwargs=None)
        start = tree.clone(run.model.meta_parameters())
        run.train()
        assert not different(dict(run.model.meta_parameters()), start)
        ends[method] = run.model.base.head.score[0].weight.detach().clone()
    assert not torch.equal(ends["fixed"], ends["none"])


@pytest.mark.parametrize(("estimator", "noise"), [("evograd", "per_pass"), ("one_step", "per_batch")])
def test_a_run_is_its_two_halves(estimator: str, noise: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, **EVALUATED[estimator]}
    whole_run = trainer(tmp_path / "whole", noise=noise, **fields)
    whole_run.train()
    again = trainer(tmp_path / "again", noise=noise, **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))  # within the second epoch
    expected, found = final_state(whole_run), final_state(again)
    assert {key: same(found[key], expected[key]) for key in expected} == dict.fromkeys(expected, True)
    buffers = dict(whole_run.model.base.named_buffers())
    assert not different(dict(again.model.base.named_buffers()), buffers)
    assert logged(again, "meta_loss") == logged(whole_run, "meta_loss")


def test_accumulated_episodes_are_one_batch(tmp_path: Path) -> None:
    """But for the auxiliary loss, which reads running statistics that every micro-batch moves."""
    ends = []
    for size, steps in ((3, 1), (1, 3)):
        run = trainer(
            tmp_path,
            aux=False,
            per_device_train_batch_size=size,
            per_device_meta_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            meta_optim="SGD",
            learning_rate=0.1,
            meta_learning_rate=1.0,
            max_steps=2,
            max_grad_norm=0,
            **EVALUATED["one_step"],
        )
        run.train()
        ends.append(np.concatenate([p.detach().flatten().numpy() for p in run.model.meta_parameters().values()]))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5)
    assert np.abs(ends[0] - ends[0].round(1)).min() > 1e-6


def test_adam_is_differentiated_too() -> None:
    module, train, val = tiny_module().train(), tiny_batch(), tiny_batch(seed=1, aux=False)
    w, lam = module.base_parameters(), module.meta_parameters()
    found = [
        hypergradient(module.problem(Adam(1e-3)), OneStep(engine), w, lam, [train], [val]).grads
        for engine in ("double_backward", "jvp")
    ]
    close(found[1], found[0], 1e-9)
