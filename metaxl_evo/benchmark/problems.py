"""The problems that estimators are compared on; all generated, nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import PrinterCallback, XLMRobertaConfig, XLMRobertaForTokenClassification

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.rows import Row
from metaxl_evo.bilevel import SGD, BilevelProblem, Tree
from metaxl_evo.models.adapters import add_lora
from metaxl_evo.models.bilevel_module import BilevelModule
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.tagger import TARGET, CrossLingualTagger
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.base_optimizer import BaseOptimizer
from metaxl_evo.training.meta_level import MetaLevel
from metaxl_evo.training.parser import make_settings
from metaxl_evo.training.trainer import MetaTrainer

FOREVER = 10**9  # steps; whoever measures ends the training
EPOCH = 16  # steps' worth of generated rows
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


# Whole episodes as a plain function ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Episode:
    """A bilevel problem, where it starts, and the batches of its steps."""

    problem: BilevelProblem
    w: Tree
    lam: Tree
    train: Sequence[Any]
    val: Any


def regression(settings: BenchmarkArguments, horizon: int) -> Episode:
    """Least squares in mini-batches with a decay for each feature (its logarithm is lam), in float64.

    inner loss = 1/2 mean (x w - y)^2 + 1/2 sum exp(lam) w^2; outer loss = 1/2 mean (x w - y)^2 on other rows. The
    true weights are sparse, so that decays differ.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    features, rows, batches = 20, 8, 5
    truth = torch.randn(features, generator=generator, dtype=torch.float64)
    truth[features // 2 :] = 0

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
        return x, x @ truth + torch.randn(rows, generator=generator, dtype=torch.float64)

    def error(w: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (batch[0] @ w["w"] - batch[1]).square().mean()

    problem = BilevelProblem(
        inner_loss=lambda w, lam, batch: error(w, batch) + 0.5 * (lam["decay"].exp() * w["w"].square()).sum(),
        outer_loss=lambda w, lam, batch: error(w, batch),
        update=SGD(settings.learning_rate),
        direct_term=False,
    )
    w = {"w": torch.randn(features, generator=generator, dtype=torch.float64)}
    lam = {"decay": torch.full((features,), -3.0, dtype=torch.float64)}
    train = [batch(rows) for _ in range(batches)]
    return Episode(problem, w, lam, [train[step % batches] for step in range(horizon)], batch(40))


# Tasks in a MetaTrainer ----------------------------------------------------------------------------------------------


class MeasuredTrainer(MetaTrainer):
    """A MetaTrainer whose estimator can be changed between the steps of a training.

    Attributes:
        switch: turns the task's meta network on and off.
    """

    switch: Callable[[bool], None]
    _level: MetaLevel

    def use(self, row: Row | None) -> None:
        """Go on with the estimator and order of `row`; with None as a plain Trainer without meta network.

        Raises:
            ValueError: where the estimator cannot serve the task, its optimiser or the trainer's arguments.
        """
        if self.meta_level is not None:
            self._level = self.meta_level
        self.meta_level = None
        self._level.forget()  # of a plain step's memory it is no part
        self.switch(row is not None)
        if row is not None:
            args = copy.copy(self.args)
            args.estimator, args.meta_order = row.estimator, row.order
            self._level.use(row.make(), args, BaseOptimizer(self.optimizer, self.model, args))
            self.meta_level = self._level


def tagger(settings: BenchmarkArguments, rtn_layer: int) -> MeasuredTrainer:
    """`make_tagger` on sentences of a source and of the target language, half of the meta rows training."""
    module = make_tagger(settings, rtn_layer)
    args = step_arguments(settings, meta_portion=0.5)
    train = sentences(settings, module, EPOCH * args.per_device_train_batch_size)
    meta = sentences(settings, module, EPOCH * args.per_device_meta_batch_size, TARGET)
    return measured_trainer(module, partial(setattr, module, "transform"), args, train, meta)


def make_tagger(settings: BenchmarkArguments, rtn_layer: int) -> CrossLingualTagger:
    """An XLM-R token classifier with random weights, without dropout, with an RTN after one of its layers."""
    torch.manual_seed(settings.seed)
    config: Any = XLMRobertaConfig(**NO_DROPOUT | settings.model)
    rtn = RepresentationTransform(config.hidden_size, layers=[rtn_layer])
    base: Any = XLMRobertaForTokenClassification(config)
    if settings.lora_r is not None:
        base = add_lora(base, r=settings.lora_r, alpha=settings.lora_r, dropout=0.0, target_modules=None)
    return CrossLingualTagger(base, rtn, pad_token_id=config.pad_token_id)


def sentences(
    settings: BenchmarkArguments, module: CrossLingualTagger, number: int, language: int = 0
) -> list[dict[str, Tensor]]:
    """Random tokens, as many as a batch takes, all of one length, all labelled."""

    def sentence() -> dict[str, Tensor]:
        return {
            "input_ids": torch.randint(5, module.config.vocab_size, (settings.length,)),
            "attention_mask": torch.ones(settings.length, dtype=torch.long),
            "labels": torch.randint(module.config.num_labels, (settings.length,)),
            "language": torch.tensor(language),
        }

    return [sentence() for _ in range(number)]


def step_arguments(settings: BenchmarkArguments, **fields: Any) -> MetaTrainingArguments:
    """Arguments under which steps are alike and nothing but steps happens; `settings.training` wins."""
    plain: dict[str, Any] = {
        "output_dir": settings.output_dir,
        "seed": settings.seed,
        "estimator": "one_step",
        "estimator_kwargs": {"engine": "finite_difference"},
        "max_steps": FOREVER,
        "lr_scheduler_type": "constant",
        "meta_lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return make_settings(MetaTrainingArguments, plain | fields | settings.training)


def measured_trainer(
    module: BilevelModule, switch: Callable[[bool], None], args: MetaTrainingArguments, train: Any, meta: Any
) -> MeasuredTrainer:
    """A silent trainer on generated rows; `switch` turns the module's meta network on and off."""
    trainer = MeasuredTrainer(module, args, train_dataset=train, meta_dataset=meta, data_collator=default_collate)
    trainer.switch = switch
    trainer.remove_callback(PrinterCallback)
    return trainer
