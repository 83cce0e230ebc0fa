"""The same step by other libraries: higher, TorchOpt and Betty, each used as its documentation does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.problems import Episode, make_tagger, sentences
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.benchmark.trajectories import AFTER, Estimation, by_estimator, measure_estimations
from metaxl_evo.benchmark.vision import EPOCH, noisy_images, weighted_classifier
from metaxl_evo.bilevel import SGD, Hypergradient
from metaxl_evo.estimators import ESTIMATORS
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.ner.tagger import TARGET, CrossLingualTagger
from metaxl_evo.training.base_optimizer import gathered
from vision_tasks.images import ImageRows
from vision_tasks.weight_net import WeightedClassifier

EXTRA = "pip install metaxl_evo[peers]"
INSTALL = {
    "higher": EXTRA,
    "torchopt": EXTRA,
    # Its last release wants Python < 3.11, and runs on later ones.
    "betty": "pip install --no-deps --ignore-requires-python betty-ml==0.2.1",
}

_TWICE = partial(sdpa_kernel, SDPBackend.MATH)  # torch's other attention kernels have no second derivative


def measure_peers(settings: BenchmarkArguments) -> Iterator[list[Row]]:
    """One SGD step and its hypergradient, in each case; the yardstick is that step in plain torch."""
    for name in settings.cases:
        yield _measure_case(settings.case(name), name)


def _measure_case(settings: BenchmarkArguments, name: str) -> list[Row]:
    """The case is made here, so that it is gone when the next one is: its tensors would count as the next one's."""
    module, episode = STEPS[settings.problem](settings)
    lr, (train,), val = settings.learning_rate, episode.train, episode.val

    def prepare(row: Row) -> Estimation:
        if row.estimator in ESTIMATORS:
            return by_estimator(episode, row)
        return PEERS[row.estimator](module, lr, train, val, **row.settings)

    where = {"problem": name}
    rows = settings.rows([AFTER], **where)
    rows += [Row(peer, {}, AFTER, where) for peer in ("higher", "torchopt")]
    rows += [Row("betty", {"type": one}, AFTER, where) for one in ("darts", "sama")]
    measure_estimations(settings, rows, prepare, plain_step(module, lr, train), episode)
    return rows


def weighted_step(settings: BenchmarkArguments) -> tuple[WeightedClassifier, Episode]:
    """Meta-Weight-Net on generated images, and its first step."""
    torch.manual_seed(settings.seed)
    images = noisy_images(settings, EPOCH * settings.batch_size, EPOCH * settings.batch_size)
    width, hidden = settings.sizes()[0]
    module = weighted_classifier(settings, images.train, width, hidden)
    train, val = (
        default_collate([rows[number] for number in range(settings.batch_size)])
        for rows in (ImageRows(images.train), ImageRows(images.meta))
    )
    return module, first_step(module, settings.learning_rate, train, val)


def tagged_step(settings: BenchmarkArguments) -> tuple[CrossLingualTagger, Episode]:
    """MetaXL on random sentences, and its first step: half of the rows are the source's, others judge."""
    module = make_tagger(settings, settings.rtn_layer[0])
    half = max(1, settings.batch_size // 2)
    source, target, meta = (sentences(settings, module, half, language) for language in (0, TARGET, TARGET))
    train, val = default_collate([*source, *target]), default_collate(meta)
    return module, first_step(module, settings.learning_rate, train, val)


STEPS: dict[str, Callable[[BenchmarkArguments], tuple[Any, Episode]]] = {
    "weight_net": weighted_step,
    "tagger": tagged_step,
}


def first_step(module: BilevelModule, lr: float, train: Batch, val: Batch) -> Episode:
    """An SGD step as an episode, of embeddings with the rows that it touches alone, as in the trainer.

    From here on the meta parameters take gradients, as peers have it.
    """
    module.meta.requires_grad_(True)
    rows = module.touched_rows([train, val])
    w = gathered(module.base_parameters(), rows)
    return Episode(module.problem(SGD(lr), rows=rows), w, module.meta_parameters(), [train], val)


def plain_step(module: BilevelModule, lr: float, train: Batch) -> Callable[[], None]:
    """Forward, backward and optimiser as everybody writes them; the meta network stands still."""
    optimizer = torch.optim.SGD(module.base.parameters(), lr=lr)

    def step() -> None:
        module.meta.requires_grad_(False)
        module.mean_inner_loss(train).backward()
        optimizer.step()
        optimizer.zero_grad()
        module.meta.requires_grad_(True)

    return step


def by_higher(module: BilevelModule, lr: float, train: Batch, val: Batch) -> Estimation:
    """A patched copy of the base, which takes a differentiable step (Grefenstette et al., 2019)."""
    higher: Any = _import("higher")
    base = module.base
    optimizer = torch.optim.SGD(base.parameters(), lr=lr)

    def estimate(seed: int) -> Hypergradient:
        try:
            with _TWICE(), higher.innerloop_ctx(base, optimizer) as (module.base, differentiable):
                for patched, own in zip(module.base.modules(), base.modules(), strict=True):
                    patched._forward_hooks = own._forward_hooks  # of the meta network; higher leaves them behind
                differentiable.step(module.mean_inner_loss(train))
                return _by_autograd(module, val)
        finally:
            module.base = base

    return estimate


def by_torchopt(module: BilevelModule, lr: float, train: Batch, val: Batch) -> Estimation:
    """A differentiable optimiser that puts the base's next weights in place (Ren et al., JMLR 2023)."""
    torchopt: Any = _import("torchopt")
    optimizer = torchopt.MetaSGD(module.base, lr=lr)
    start = [torchopt.extract_state_dict(one, by="reference") for one in (module.base, optimizer)]

    def estimate(seed: int) -> Hypergradient:
        try:
            with _TWICE():
                optimizer.step(module.mean_inner_loss(train))
                return _by_autograd(module, val)
        finally:
            for one, state in zip((module.base, optimizer), start, strict=True):
                torchopt.recover_state_dict(one, state)

    return estimate


def by_betty(module: BilevelModule, lr: float, train: Batch, val: Batch, *, type: str) -> Estimation:
    """Two problems in an engine, the lower one's config names the estimator (Choe et al., ICLR 2023)."""
    problems, engine, configs = (_import(f"betty.{part}") for part in ("problems", "engine", "configs"))
    start = [parameter.detach().numpy().copy() for parameter in module.base.parameters()]  # tensors would count
    found: list[Tensor] = []

    class Lower(problems.ImplicitProblem):  # type: ignore[name-defined]
        def training_step(self, batch: Any) -> Tensor:
            return module.mean_inner_loss(train)

    class Upper(problems.ImplicitProblem):  # type: ignore[name-defined]
        def training_step(self, batch: Any) -> Tensor:
            return module.mean_outer_loss(val)

        def custom_optimizer_step(self) -> None:
            found[:] = [parameter.grad * lr for parameter in self.trainable_parameters()]  # Betty leaves lr out

    def problem(cls: Any, part: Any, **config: Any) -> Any:
        optimizer = torch.optim.SGD(part.parameters(), lr=lr)
        loader = [(torch.zeros(1),)]  # the losses read their batches themselves
        settings = {"module": part, "optimizer": optimizer, "train_data_loader": loader}
        return cls(name=cls.__name__.lower(), config=configs.Config(**config), **settings)

    lower, upper = problem(Lower, module.base, type=type, unroll_steps=1), problem(Upper, module.meta)
    logging.getLogger("betty").disabled = True  # it reports every run
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    loop = engine.Engine([upper, lower], configs.EngineConfig(train_iters=1), dependencies)

    def estimate(seed: int) -> Hypergradient:
        try:
            loop.run()
        finally:
            module.zero_grad()
            with torch.no_grad():
                for parameter, value in zip(module.base.parameters(), start, strict=True):
                    parameter.copy_(torch.from_numpy(value))
        return Hypergradient(dict(zip(module.meta_parameters(), found, strict=True)), torch.zeros(()))

    return estimate


PEERS: dict[str, Callable[..., Estimation]] = {"higher": by_higher, "torchopt": by_torchopt, "betty": by_betty}


def _by_autograd(module: BilevelModule, val: Batch) -> Hypergradient:
    parameters = module.meta_parameters()
    loss = module.mean_outer_loss(val)
    return Hypergradient(
        dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)), loss.detach()
    )


def _import(name: str) -> Any:
    library = name.partition(".")[0]
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"{library} cannot be imported ({error}): {INSTALL[library]}") from None
