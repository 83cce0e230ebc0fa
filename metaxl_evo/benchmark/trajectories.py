"""Estimators over whole episodes of a problem that is a plain function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from metaxl_evo.benchmark.arguments import BenchmarkArguments
from metaxl_evo.benchmark.meter import Meter, judge
from metaxl_evo.benchmark.problems import Episode, regression
from metaxl_evo.benchmark.rows import Row, standing
from metaxl_evo.bilevel import BilevelProblem, Hypergradient, PassContext, Tree, run_episode, tree
from metaxl_evo.bilevel.hypergradients import look_ahead
from metaxl_evo.bilevel.problem import InnerStep
from metaxl_evo.bilevel.update_state import UpdateState

AFTER = "after_step"  # the order of an episode
Estimation = Callable[[int], Hypergradient]  # seed -> estimate at the end of an episode that it runs


def measure_regression(settings: BenchmarkArguments) -> Iterator[list[Row]]:
    """The rows of each horizon; the yardstick is the episode's inner steps alone."""
    for horizon in settings.horizons:
        episode = regression(settings, horizon)
        rows = settings.rows([AFTER], horizon=horizon)
        measure_estimations(
            settings,
            rows,
            partial(by_estimator, episode),
            partial(train, episode.problem, episode.w, episode.lam, episode.train),
            episode,
        )
        yield rows


def measure_estimations(
    settings: BenchmarkArguments,
    rows: Sequence[Row],
    prepare: Callable[[Row], Estimation],
    yardstick: Callable[[], object],
    episode: Episode,
) -> None:
    """Judge and measure what `prepare` makes of each row; a row for which it raises has failed."""
    exact = through_all_steps(episode)
    measured: dict[Row | None, Callable[[], object]] = {None: yardstick}
    for row in rows:
        with row.failing():
            estimate = prepare(row)
            judge(row, [estimate(seed) for seed in range(settings.draws(row))], exact)
            measured[row] = partial(estimate, 0)
    meter = Meter(settings, standing(rows), torch.device("cpu"))
    with tqdm(total=len(meter.plan), desc=f"{settings.problem}, {len(episode.train)} steps") as bar:
        while not meter.done:
            which, measure = meter.next()
            with nullcontext() if which is None else which.failing(), meter.measuring(which, measure):
                measured[which]()
            bar.update()
    meter.fill(resident=sum(leaf.nbytes for leaf in [*episode.w.values(), *episode.lam.values()]))


def by_estimator(episode: Episode, row: Row) -> Estimation:
    """The episode with the row's estimator beside it."""
    estimator = row.make()

    def estimate(seed: int) -> Hypergradient:
        generator = torch.Generator().manual_seed(seed)
        where = (episode.w, episode.lam, episode.train, episode.val)
        return run_episode(episode.problem, estimator, *where, generator=generator)

    return estimate


def train(
    problem: BilevelProblem, w: Tree, lam: Tree, batches: Sequence[Any], state: UpdateState | None = None
) -> Tree:
    """The weights after inner steps that teach lam nothing; `state` of the optimiser before them (default: fresh)."""
    state = problem.update.init(w) if state is None else state
    for batch in batches:
        made = look_ahead(PassContext(problem), InnerStep(w, lam, batch, state)).made
        assert made is not None
        w, state = made.w, made.update_state
    return w


def through_all_steps(episode: Episode) -> Tree:
    """The exact hypergradient of the episode: autograd through every step at once."""
    problem, lam = episode.problem, tree.leaves(episode.lam, episode.lam)
    w, state = tree.leaves(episode.w, episode.w), problem.update.init(episode.w)
    with PassContext(problem).scope(0, second_order=True):
        for batch in episode.train:
            grads = torch.autograd.grad(problem.inner_loss(w, lam, batch), list(w.values()), create_graph=True)
            w, state = problem.update(w, state, dict(zip(w, grads, strict=True)), lam)
        found = torch.autograd.grad(problem.outer_loss(w, lam, episode.val), list(lam.values()))
    return dict(zip(lam, found, strict=True))
