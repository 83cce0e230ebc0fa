"""The same step by other libraries: higher, TorchOpt and Betty, each used as its documentation does."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.episodes import AFTER, Estimation, by_estimator, measure_estimations
from metaxl_evo.benchmark.problems import Episode
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.benchmark.vision import EPOCH, noisy_images, weighted_classifier
from metaxl_evo.bilevel import SGD, Hypergradient
from metaxl_evo.estimators import ESTIMATORS
from metaxl_evo.models.bilevel_module import Batch
from vision_tasks.images import ImageRows
from vision_tasks.weight_net import WeightedClassifier

EXTRA = "pip install metaxl_evo[peers]"
INSTALL = {
    "higher": EXTRA,
    "torchopt": EXTRA,
    # Its last release wants Python < 3.11, and runs on later ones.
    "betty": "pip install --no-deps --ignore-requires-python betty-ml==0.2.1",
}


def measure_peers(settings: BenchmarkArguments) -> Iterator[list[Row]]:
    """One SGD step of weight_net and its hypergradient; the yardstick is that step in plain torch."""
    module, episode = weighted_step(settings)
    (train,), val = episode.train, episode.val

    def prepare(row: Row) -> Estimation:
        if row.estimator in ESTIMATORS:
            return by_estimator(episode, row)
        return PEERS[row.estimator](trainable(module), settings.learning_rate, train, val, **row.settings)

    rows = [*settings.rows([AFTER]), Row("higher", {}, AFTER), Row("torchopt", {}, AFTER)]
    rows += [Row("betty", {"type": one}, AFTER) for one in ("darts", "sama")]
    measure_estimations(settings, rows, prepare, plain_step(trainable(module), settings.learning_rate, train), episode)
    yield rows


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
    problem = module.problem(SGD(settings.learning_rate))
    return module, Episode(problem, module.base_parameters(), module.meta_parameters(), [train], val)


def plain_step(module: WeightedClassifier, lr: float, train: Batch) -> Callable[[], None]:
    """Forward, backward and optimiser as everybody writes them."""
    optimizer = torch.optim.SGD(module.base.parameters(), lr=lr)

    def step() -> None:
        optimizer.zero_grad()
        module.mean_inner_loss(train).backward()
        optimizer.step()

    return step


def by_higher(module: WeightedClassifier, lr: float, train: Batch, val: Batch) -> Estimation:
    """A patched copy of the base, which takes a differentiable step (Grefenstette et al., 2019)."""
    higher: Any = _import("higher")
    base = module.base
    optimizer = torch.optim.SGD(base.parameters(), lr=lr)

    def estimate(seed: int) -> Hypergradient:
        with higher.innerloop_ctx(base, optimizer) as (module.base, differentiable):
            differentiable.step(module.mean_inner_loss(train))
            found = _by_autograd(module, val)
        module.base = base
        return found

    return estimate


def by_torchopt(module: WeightedClassifier, lr: float, train: Batch, val: Batch) -> Estimation:
    """A differentiable optimiser that puts the base's next weights in place (Ren et al., JMLR 2023)."""
    torchopt: Any = _import("torchopt")
    optimizer = torchopt.MetaSGD(module.base, lr=lr)
    start = [torchopt.extract_state_dict(one, by="reference") for one in (module.base, optimizer)]

    def estimate(seed: int) -> Hypergradient:
        optimizer.step(module.mean_inner_loss(train))
        found = _by_autograd(module, val)
        for one, state in zip((module.base, optimizer), start, strict=True):
            torchopt.recover_state_dict(one, state)
        return found

    return estimate


def by_betty(module: WeightedClassifier, lr: float, train: Batch, val: Batch, *, type: str) -> Estimation:
    """Two problems in an engine, the lower one's config names the estimator (Choe et al., ICLR 2023)."""
    problems, engine, configs = (_import(f"betty.{part}") for part in ("problems", "engine", "configs"))
    start = [parameter.detach().clone() for parameter in module.base.parameters()]
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
        with torch.no_grad():
            for parameter, value in zip(module.base.parameters(), start, strict=True):
                parameter.copy_(value)
        loop.run()
        return Hypergradient(dict(zip(module.meta_parameters(), found, strict=True)), torch.zeros(()))

    return estimate


PEERS: dict[str, Callable[..., Estimation]] = {"higher": by_higher, "torchopt": by_torchopt, "betty": by_betty}


def trainable(module: WeightedClassifier) -> WeightedClassifier:
    """A copy of one's own whose meta parameters take gradients."""
    module = copy.deepcopy(module)
    module.meta.requires_grad_(True)
    return module


def _by_autograd(module: WeightedClassifier, val: Batch) -> Hypergradient:
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
