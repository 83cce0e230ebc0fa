"""N processes with a share of every batch each = one process with the whole of it: every estimator, every toy problem.

Rows are spread unevenly, one process holds its rows in two parts; of three, one has none of the rows that judge, one
none of those that train.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import distributed as dist

from metaxl_evo.bilevel import (
    SGD,
    BilevelProblem,
    Cut,
    Hypergradient,
    PassContext,
    hypergradient,
    run_episode,
    tree,
)
from metaxl_evo.bilevel import processes as processes_module
from metaxl_evo.bilevel.hypergradients import NO_DIRECT_TERM
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.estimators import Estimator, FirstOrder
from tests.estimators.problems import TOYS, Toy
from tests.estimators.test_contract import INSTANCES, PAIRS, build, label, step_made
from tests.processes import on_processes

pytestmark = pytest.mark.distributed

Found = dict[str, Hypergradient]
Pair = tuple[str, dict[str, Any], str]

CASES = ("lookahead", "step made", "episode")
STEPS = 3
CHOSEN = {  # three processes for the first settings of each estimator
    2: PAIRS,
    3: [pair for pair in PAIRS if pair[1] == INSTANCES[pair[0]][0]],
}


@dataclass(frozen=True)
class Part:
    """Rows of a batch (None for a batch of nothing) and their share of its mean."""

    rows: Any
    weight: float


def cut(batch: Any, shares: Sequence[float]) -> list[Part]:
    """The batch in parts of about these shares of its rows, or the same nothing with these weights."""
    if batch is None:
        return [Part(None, share) for share in shares]
    labelled = [int((row != -100).sum()) for row in batch[1].reshape(len(batch[1]), -1)]
    ends = [round(len(labelled) * sum(shares[:index])) for index in range(len(shares) + 1)]
    return [
        Part(tuple(x[a:b] for x in batch), sum(labelled[a:b]) / sum(labelled)) for a, b in itertools.pairwise(ends)
    ]


def of_parts(whole: Cut) -> Cut:
    prefix = whole.prefix
    return Cut(
        whole.names,
        lambda w, lam, below, part: whole.hidden(w, lam, below, part.rows),
        lambda w, hidden, part: part.weight * whole.loss(w, hidden, part.rows),
        None if prefix is None else lambda w, part: prefix(w, part.rows),
    )


def spread(toy: Toy, processes: Processes) -> tuple[BilevelProblem, list[Part], list[Part]]:
    """The problem of this process, and its parts of the train and the validation batch."""

    def weighted(loss: Any) -> Any:
        return lambda w, lam, part: part.weight * loss(w, lam, part.rows)

    plain = toy.problem
    problem = replace(
        plain,
        inner_loss=weighted(plain.inner_loss),
        outer_loss=weighted(plain.outer_loss),
        cut=None if plain.cut is None else of_parts(plain.cut),
        parts=lambda batch: batch,
        processes=processes,
    )
    train, val = cut(toy.train, (0.25, 0.5, 0.25)), cut(toy.val, (0.25, 0.75))
    mine = {0: train[:2], 1: train[2:]} if processes.size == 2 else {0: train[:1], 1: train[1:], 2: []}
    judges = {0: val[:1], 1: val[1:]} if processes.size == 2 else {0: [], 1: val[:1], 2: val[1:]}
    return problem, mine[processes.rank], judges[processes.rank]


def estimates(toy: Toy, estimator: Estimator, problem: BilevelProblem, train: Any, val: Any) -> Found:
    """Of one step, to come or made, and in float64 of an episode, which would add up float32's rounding."""
    found = {
        case: hypergradient(
            problem,
            estimator,
            toy.w,
            toy.lam,
            train,
            val,
            generator=torch.Generator().manual_seed(9),
            update_state=toy.update_state,
            made=step_made(toy) if case == "step made" else None,
        )
        for case in CASES[:2]
    }
    if toy.w[next(iter(toy.w))].dtype == torch.float64:
        generator = torch.Generator().manual_seed(9)
        found["episode"] = run_episode(problem, estimator, toy.w, toy.lam, [train] * STEPS, val, generator=generator)
    return found


def of_pairs(pairs: Sequence[Pair], dtype: torch.dtype, processes: Processes) -> dict[str, Found]:
    found = {}
    for name, settings, toy_name in pairs:
        if dtype == torch.float32 and "radius" in settings:
            settings = settings | {"radius": 0.01}  # the default: a smaller one leaves float32 no digits
        toy = TOYS[toy_name](dtype)
        whole = toy.problem, toy.train, toy.val
        batches = whole if processes.size == 1 else spread(toy, processes)
        found[label(name, settings, toy_name)] = estimates(toy, build(name, settings), *batches)
    return found


def of_this_process(dtype: torch.dtype) -> dict[str, Found]:
    dist.init_process_group("gloo")
    count = dist.get_world_size()
    return of_pairs(CHOSEN[count], dtype, Processes(dist.get_rank(), count))


@cache
def alone(dtype: torch.dtype) -> dict[str, Found]:
    return of_pairs(CHOSEN[2], dtype, Processes())


@cache
def together(count: int, dtype: torch.dtype) -> list[dict[str, Found]]:
    return on_processes(count, of_this_process, dtype)


def error(found: Hypergradient, expected: Hypergradient) -> float:
    size = tree.norm(expected.grads)
    return tree.norm(tree.add(found.grads, expected.grads, -1.0)) / (size or 1.0)


@pytest.mark.parametrize(
    ("count", "dtype", "cases"),
    [
        (2, torch.float64, 3),
        pytest.param(3, torch.float64, 3, marks=pytest.mark.slow),
        pytest.param(2, torch.float32, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_hypergradient_of_several_processes_is_that_of_one(count: int, dtype: torch.dtype, cases: int) -> None:
    ranks, worst = together(count, dtype), dict[str, float]()
    assert len(ranks[0]) == len(CHOSEN[count]) >= 60
    for pair in ranks[0]:
        one = alone(dtype)[pair]
        assert len(one) == cases
        rough = pair.startswith(("evograd", "sama-0.0")) or "finite_difference" in pair
        bound = 1e-10 if dtype == torch.float64 else 1e-4 if rough else 1e-6
        for case, whole in one.items():
            mine = [rank[pair][case] for rank in ranks]
            assert error(mine[0], whole) < bound, (pair, case)
            kind = pair.split("-")[0] if pair.startswith("evograd") else "differences" if rough else "exact"
            worst[kind] = max(worst.get(kind, 0.0), error(mine[0], whole))
            assert float(mine[0].outer_loss) == pytest.approx(float(whole.outer_loss), rel=bound)
            for other in mine[1:]:  # to the last bit
                assert all(torch.equal(other.grads[name], leaf) for name, leaf in mine[0].grads.items()), (pair, case)
    print({kind: f"{value:.1e}" for kind, value in worst.items()})


Sent = tuple[int, int, int]  # trees like w, trees like lam, single numbers
LOCAL: tuple[Sent, Sent, Sent] = ((2, 1, 1), (1, 1, 1), (1, 1, 1))
SENT: dict[str, tuple[tuple[Sent, Sent, Sent], ...]] = {  # by hand: of each instance, in each of the cases
    "first_order": (((0, 1, 1),) * 3,),
    "one_step": (LOCAL,) * 4,
    "evograd": tuple(((0, 1, 2 * copies + 1),) * 3 for copies in (2, 5, 4, 3, 3, 2)),  # losses and slopes
    "sama": (LOCAL,) * 2,
    "neumann": (((7, 1, 1),) * 3, ((1, 1, 1),) * 3, ((4, 1, 1),) * 3),
    "unroll": (
        *(((3, 1, 1), (2, 1, 1), (6, 1, 1)), ((3, 1, 1), (2, 1, 1), (4, 1, 1))),
        ((3, 1, 1), (2, 1, 1), (7, 1, 1)),  # the second of three steps is made again
    ),
    "drmad": (((3, 1, 1), (2, 1, 1), (6, 1, 1)),),
    "greedy": (((2, 2, 1), (1, 2, 1), (3, 4, 1)),) * 2,
    "hyperdistill": (LOCAL,) * 3,
}
NOT_COUNTED = ("conjugate_gradient", "forward_mode")  # it ends early; it sends as much for every entry of lam


@pytest.mark.parametrize(("count", "cases"), [(2, 229), pytest.param(3, 139, marks=pytest.mark.slow)])
def test_what_is_sent_is_what_was_counted_by_hand(count: int, cases: int) -> None:
    seen = 0
    for name, settings, toy_name in CHOSEN[count]:
        if name in NOT_COUNTED:
            continue
        toy, expected = TOYS[toy_name](torch.float64), SENT[name][INSTANCES[name].index(settings)]
        for case, (trees_w, trees_lam, numbers) in zip(CASES, expected, strict=True):
            if case == "episode" and name == "hyperdistill" and not settings:
                continue  # which fits first, and that is no part of an answer
            sent = together(count, torch.float64)[0][label(name, settings, toy_name)][case].counts.reduced
            of_trees = trees_w * tree.size(toy.w) + trees_lam * tree.size(toy.lam)
            assert sent == of_trees + numbers, (name, settings, toy_name, case)
            seen += 1
    assert seen >= cases  # without those of an estimator that is being added


def of_odd_rows(rows: Sequence[Sequence[float]]) -> Any:
    """The outer loss is in float64, of weights in float32; only a row above 2 reads lam."""
    dist.init_process_group("gloo")
    problem = BilevelProblem(
        inner_loss=lambda w, lam, row: row * (w["a"] * lam["b"]).sum(),
        outer_loss=lambda w, lam, row: row * w["a"].double().sum() + (lam["b"].sum() if row > 2 else 0.0),
        update=SGD(0.1),
        parts=lambda batch: batch,
        processes=Processes(dist.get_rank(), dist.get_world_size()),
    )
    w, lam = {"a": torch.ones(2)}, {"b": torch.ones(2)}
    try:
        found = hypergradient(problem, FirstOrder(), w, lam, [1.0], rows[dist.get_rank()])
    except ValueError as error:
        return str(error)
    return found.grads["b"].tolist(), float(found.outer_loss)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (([], [3.0]), ([1.0, 1.0], 8.0)),
        (([1.0], [3.0]), ([1.0, 1.0], 10.0)),
        (([1.0], [2.0]), NO_DIRECT_TERM),
    ],
)
def test_a_process_whose_rows_are_of_another_kind_keeps_step(rows: Any, expected: Any) -> None:
    assert on_processes(2, of_odd_rows, rows) == [expected, expected]


def of_odd_leaves() -> bool:
    dist.init_process_group("gloo")
    processes_module._BUCKET = 8
    shares = {
        "turned": torch.arange(20.0).view(4, 5).t(),
        "number": torch.tensor(2.0),
        "double": torch.ones(3, dtype=torch.float64),
        "expanded": torch.ones(1).expand(6),
        "nothing": torch.empty(0),
        "small": torch.ones(2, 2),
    }
    found = Processes(dist.get_rank(), 2).all_reduce(dict(shares))
    assert list(found) == list(shares)
    for name, share in shares.items():
        torch.testing.assert_close(found[name], 2 * share, rtol=0, atol=0)
    return True


def test_leaves_of_every_kind_are_summed() -> None:
    """In buckets that are smaller than some leaves, and end within others' dtypes."""
    assert on_processes(2, of_odd_leaves) == [True, True]


def test_a_bucket_is_of_one_dtype_and_no_larger_than_asked() -> None:
    leaves = {name: torch.zeros(size) for name, size in (("a", 5), ("b", 3), ("c", 1), ("large", 20), ("d", 1))}
    leaves["b"] = leaves["b"].double()
    leaves["e"] = torch.zeros(3)
    assert list(tree.in_groups(leaves, 8)) == [["a", "c"], ["large"], ["d", "e"], ["b"]]


def test_one_process_sends_nothing() -> None:
    assert all(one.counts.reduced == 0 for found in alone(torch.float64).values() for one in found.values())


def test_the_dropout_of_two_processes_is_not_the_same() -> None:
    """Each part of each process draws masks of its own, so that they are those of more rows."""
    seeds = set()
    for rank in range(3):
        problem = BilevelProblem(None, None, SGD(0.1), processes=Processes(rank, 3))  # type: ignore[arg-type]
        passes = PassContext(problem, seed=4)
        for part in range(2):
            with passes.scope(part):
                seeds.add(float(torch.rand(())))
    assert len(seeds) == 6
