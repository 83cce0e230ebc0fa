"""What HyperDistill distils from an episode: averages of its weights and examples, and the fit of its term's size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metaxl_evo.bilevel import tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import Examples, InnerStep
from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators.trajectory import Visit, straight_line, walk_back

_STREAM = 0xD157  # keeps the seeds of the drawn examples apart from those of the passes


@dataclass(frozen=True)
class Averages:
    """Weights w* and examples D* (None where batches cannot be taken apart) that stand for those of several steps."""

    w: Tree
    batch: Any = None

    def moved(self, w: Tree, batch: Any, share: float, examples: Examples | None, seed: int) -> Averages:
        """The mean weights with a share of `w`, and the examples with as large a share replaced by some of `batch`."""
        mean = tree.tree_map(lambda old, new: torch.lerp(old, new.detach(), share), self.w, w)
        return Averages(mean, None if examples is None else _drawn(examples, self.batch, batch, share, seed))


LocalTerm = Callable[[Averages, Tree], Tree]  # of a cotangent, which it takes over, at the averages; a share


def fit_theta(
    passes: PassContext, step: InnerStep, visits: Sequence[Visit], decay: float, local_term: LocalTerm
) -> float:
    """Least squares of <v_s / |v_s|, g_s> = theta n_s |v_s| over the horizons s of an episode; NaN where nothing fits.

    Args:
        step: the last one, which was made; its `val_batch` judges.
        visits: all steps, the first one first.

    Source: Lee et al., ICLR 2022, algorithm 4.
    """
    xy = xx = 0.0
    for horizon, local, found in _terms(passes, step, visits, decay, local_term):
        xy += horizon * tree.dot(local, found).item()
        xx += (horizon * tree.norm(local)) ** 2
    return xy / xx if xx else math.nan


def _terms(
    passes: PassContext, step: InnerStep, visits: Sequence[Visit], decay: float, local_term: LocalTerm
) -> Iterator[tuple[float, Tree, Tree]]:
    """n_s, v_s and g_s: the last s steps give v_s at (w*_s, D*_s); one walk back finds g_s of every s on its way."""
    _, alpha, _, _ = passes.outer_grad(step.current, step.lam, step.val_batch, wrt_w=step.w, wrt_lam=())
    walk = walk_back(passes, straight_line(visits, visits[0].w, step.current), alpha)
    found, averages, horizon, weight = tree.zeros_like(step.lam), Averages(step.w), 0.0, 1.0
    for visit, term in zip(reversed(visits), walk, strict=True):
        found, horizon = tree.add(found, passes.all_reduce(term)), horizon + weight
        averages = averages.moved(visit.w, visit.batch, weight / horizon, passes.problem.examples, visit.seed)
        yield horizon, passes.all_reduce(local_term(averages, dict(alpha))), found
        weight *= decay


def _drawn(examples: Examples, held: Any, batch: Any, share: float, seed: int) -> Any:
    """What is held (None: nothing yet) with a share of it replaced by as large a share of `batch`, at random.

    The share is rounded up or down by chance, since 1/n of a small batch always rounds to nothing.
    """
    if held is None:
        return batch
    generator = torch.Generator().manual_seed(mix_seed(seed, _STREAM))
    chance = torch.rand((), generator=generator).item()
    leave, enter = (int(examples.size(one) * share + chance) for one in (held, batch))
    stay, come = (torch.randperm(examples.size(one), generator=generator) for one in (held, batch))
    return examples.concat([examples.take(held, stay[leave:]), examples.take(batch, come[:enter])])
