"""Estimators in a MetaTrainer: one trainer, whose estimator changes from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from statistics import fmean
from typing import Any

from torch import Tensor
from tqdm import tqdm

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.meter import Meter, judge, relative_error
from metaxl_evo.benchmark.problems import MeasuredTrainer, tagger
from metaxl_evo.benchmark.rows import Row, standing
from metaxl_evo.benchmark.vision import weight_net
from metaxl_evo.bilevel import Counts, Hypergradient, tree
from metaxl_evo.estimators import Estimator, OneStep
from metaxl_evo.training.callbacks import MetaCallback

EXACT, FULL = OneStep("double_backward"), "float32"  # what estimates are compared with, and its precision
NO_META_STEP = (
    "made no meta step: the hypergradient was not finite (lower training.learning_rate), or the estimator takes its "
    "first episode for itself (hyperdistill: set scale to fixed)"
)


def measure_tagger(settings: BenchmarkArguments) -> Iterator[list[Row]]:
    """The rows for each place of the RTN."""
    for rtn_layer in settings.rtn_layer:
        yield measure_task(settings, tagger(settings, rtn_layer), {"rtn_layer": rtn_layer})


def measure_weight_net(settings: BenchmarkArguments) -> Iterator[list[Row]]:
    """The rows for each size of the backbone and of the weighting net."""
    for width, hidden in settings.sizes():
        yield _measure_sized(settings, partial(weight_net, settings, width, hidden), width)


def measure_widths(
    make: Callable[[BenchmarkArguments, int | None], MeasuredTrainer], settings: BenchmarkArguments
) -> Iterator[list[Row]]:
    """The rows for each size of the backbone."""
    for width in settings.each_width:
        yield _measure_sized(settings, partial(make, settings, width), width)


def _measure_sized(settings: BenchmarkArguments, make: Callable[[], MeasuredTrainer], width: int | None) -> list[Row]:
    """The trainer is made here, so that it is gone when the next one is: its tensors would count as the next one's."""
    trainer = make()
    case = {"meta_parameters": tree.size(trainer.model.meta_parameters())}
    return measure_task(settings, trainer, case if width is None else {"width": width, **case})


def measure_task(settings: BenchmarkArguments, trainer: MeasuredTrainer, case: dict[str, Any]) -> list[Row]:
    """Rows whose yardstick is the training step of the same trainer, meta network and estimator off."""
    rows = settings.rows(**case)
    meter = Meter(settings, rows, trainer.args.device)
    description = " ".join(f"{key} {value}" for key, value in case.items()) or settings.problem
    with tqdm(total=len(meter.plan) + len(rows), desc=description) as bar:
        rotation = _Rotation(trainer, meter, bar)
        trainer.add_callback(rotation)
        while not meter.done:
            try:
                trainer.train()
            except Exception as error:
                rotation.fail(error)  # the steps that are left are made in another training
        meter.fill(_resident_bytes(trainer))
        _judge(settings, trainer, standing(rows), bar)
    return rows


class _Rotation(MetaCallback):
    """Puts the next row of the plan into the trainer and measures its step, or the steps of its episode."""

    def __init__(self, trainer: MeasuredTrainer, meter: Meter, bar: Any) -> None:
        self.trainer, self.meter, self.bar = trainer, meter, bar
        self.row: Row | None = None
        self._counts: Counts | None = None  # of the row's last meta step
        self._steps_left = 0
        self._run = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps_left == 0:
            self.row, measure = self.meter.next()
            self._counts = None
            self.trainer.use(self.row)
            self._steps_left = args.episode_length or 1
            self._run.enter_context(self.meter.measuring(self.row, measure))

    def on_meta_step(self, args: Any, state: Any, control: Any, hypergradient: Any, *more: Any, **kwargs: Any) -> None:
        self._counts = hypergradient.counts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps_left -= 1
        if self._steps_left == 0:
            self._run.close()
            if self.row is not None:
                self._note_counts(self.row)
            self.bar.update()
            control.should_training_stop = self.meter.done

    def _note_counts(self, row: Row) -> None:
        """A run without a meta step would be a plain one that looks cheap."""
        if self._counts is None:
            row.fail(ValueError(NO_META_STEP))
        else:
            row.counts = self._counts.as_dict()

    def fail(self, error: Exception) -> None:
        """Drop the row whose step raised; an error of the yardstick's is the benchmark's own."""
        self._run.close()
        self._steps_left = 0
        if self.row is None:
            raise error
        self.row.fail(error)


def _judge(settings: BenchmarkArguments, trainer: MeasuredTrainer, rows: Sequence[Row], bar: Any) -> None:
    """Compare estimates of a step to come with its exact hypergradient; both orders share them.

    Where meta passes are of another precision than float32, the exact one is not; nor is what shows the difference.
    """
    args = trainer.args
    precision = args.meta_precision

    @cache
    def estimates(estimator: Estimator, draws: int, precision: str) -> list[Hypergradient]:
        args.meta_precision = precision
        found = []
        for args.meta_seed in range(draws):
            found.append(trainer.estimate(estimator))
        return found

    for row in rows:
        with row.failing():
            drawn = row.make(), settings.draws(row)
            found = estimates(*drawn, precision)
            judge(row, found, estimates(EXACT, 1, FULL)[0].grads)
            if precision != FULL:
                full = estimates(*drawn, FULL)
                row.precision_error = fmean(
                    relative_error(one.grads, other.grads) for one, other in zip(found, full, strict=True)
                )
        bar.update()
    args.meta_precision = precision


def _resident_bytes(trainer: MeasuredTrainer) -> int:
    """Weights and optimiser state of both levels, and the base gradients."""
    optimizers = (trainer.optimizer, trainer.meta_optimizer)
    states = [value for one in optimizers if one is not None for held in one.state.values() for value in held.values()]
    gradients = trainer.model.base_parameters().values()
    return sum(t.nbytes for t in [*trainer.model.parameters(), *gradients, *states] if isinstance(t, Tensor))
