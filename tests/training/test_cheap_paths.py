"""What a meta step leaves out: untouched embedding rows, forwards that the base step made, rows that read no lam.

Each is the same number as without it, and costs what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from metaxl_evo.benchmark.memory import PeakMemory, live_tensors
from metaxl_evo.bilevel import SGD, BilevelProblem, Hypergradient, PassContext, Tree, gate, hypergradient, tree
from metaxl_evo.bilevel.hypergradients import estimate
from metaxl_evo.bilevel.problem import InnerStep
from metaxl_evo.bilevel.products import ENGINES, hessian_product, mixed_product
from metaxl_evo.bilevel.update import AdamW, UpdateRule
from metaxl_evo.bilevel.update_state import UpdateState
from metaxl_evo.estimators import copies as copies_module
from metaxl_evo.estimators import make_estimator
from metaxl_evo.estimators import noise as noise_module
from metaxl_evo.models.bilevel_module import TOTALS, Batch
from metaxl_evo.ner.tagger import TARGET, CrossLingualTagger
from metaxl_evo.training import meta_level
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.tiny import (
    ESTIMATES,
    HIDDEN,
    NO_DROPOUT,
    ORDERS,
    PAD,
    VOCABULARY,
    base_weights,
    close,
    collate,
    meta_weights,
    minus,
    random_rows,
    same,
    tiny_tagger,
    tiny_trainer,
)

WORDS = "roberta.embeddings.word_embeddings.weight"
STEPS = 2


def exact_tagger(*, layers: tuple[int, ...] = (1,), **settings: Any) -> CrossLingualTagger:
    return tiny_tagger(
        torch.float64, dropout=False, layers=layers, base={"num_hidden_layers": max(layers)}, **settings
    )


def batch_of(count: int, language: int | list[int], seed: int = 1) -> Batch:
    return collate(list(random_rows(count, seed=seed, language=language)))


# Embeddings hold the touched rows only


def gathered(tree: Tree, rows: Tree) -> Tree:
    return {name: leaf.detach()[rows[name]] if name in rows else leaf.detach() for name, leaf in tree.items()}


RULES: dict[str, UpdateRule] = {
    "sgd": SGD(0.1, weight_decay=0.1, max_grad_norm=0.3, momentum=0.9, nesterov=True),
    "adamw": AdamW(0.01, weight_decay=0.1, max_grad_norm=0.3),
}


def worn(rule: UpdateRule, w: Tree) -> UpdateState:
    """The optimiser's state after three steps that touched every row."""
    generator = torch.Generator().manual_seed(4)

    def leaf(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) * 0.01 + 1e-4

    held = {key: {n: leaf(x) for n, x in tree.items()} for key, tree in rule.init(w).items() if isinstance(tree, dict)}
    return {"step": 3, **held}


class Both:
    """One step of a tagger on the whole weights, and on those that hold the touched rows alone."""

    def __init__(self, rule: UpdateRule = RULES["adamw"], **settings: Any) -> None:
        self.tagger = exact_tagger(**settings)
        self.train = [batch_of(3, [0, TARGET]), batch_of(2, [0, TARGET], seed=2)]
        self.judge = [batch_of(3, TARGET, seed=3)]
        for window in (self.train, self.judge):
            counts = [self.tagger.counts(batch) for batch in window]
            for batch in window:
                batch[TOTALS] = {key: sum(count[key] for count in counts) for key in counts[0]}
        self.rows = self.tagger.touched_rows([*self.train, *self.judge])
        self.lam, self.w = self.tagger.meta_parameters(), self.tagger.base_parameters()
        state = worn(rule, self.w)
        compact = {key: gathered(held, self.rows) if isinstance(held, dict) else held for key, held in state.items()}
        self.whole = (self.tagger.problem(rule), self.w, state)
        self.some = (self.tagger.problem(rule, rows=self.rows), gathered(self.w, self.rows), compact)

    def hypergradients(self, name: str, settings: dict[str, Any], noise: list[Tree] | None = None) -> list[Tree]:
        found = []
        for problem, w, state in (self.whole, self.some):
            eps = None if noise is None else [gathered(one, problem.rows) for one in noise]  # type: ignore[arg-type]
            generator = torch.Generator().manual_seed(3)
            estimator = make_estimator(name, **settings)
            found.append(
                hypergradient(
                    problem, estimator, w, self.lam, self.train, self.judge,
                    update_state=state, noise=eps, generator=generator,
                ).grads
            )  # fmt: skip
        return found


def test_touched_rows_are_those_looked_up() -> None:
    both = Both()
    ids = {int(x) for batch in (*both.train, *both.judge) for x in batch["input_ids"].flatten()}
    assert PAD in ids
    assert both.rows.keys() == {WORDS}
    assert both.rows[WORDS].tolist() == sorted(ids | {0, PAD})
    assert len(both.rows[WORDS]) < VOCABULARY - 20
    assert both.some[1][WORDS].shape == (len(both.rows[WORDS]), HIDDEN)


def test_losses_and_gradients_are_those_of_the_whole_weights() -> None:
    both = Both()
    touched = both.rows[WORDS]
    found: dict[str, Any] = {}
    for loss in ("inner_grad", "outer_grad"):
        values = []
        for problem, w, _ in (both.whole, both.some):
            batch = both.train if loss == "inner_grad" else both.judge
            passes = PassContext(problem)
            values.append(getattr(passes, loss)(w, both.lam, batch, wrt_w=w, wrt_lam=both.lam)[:3])
        (value, whole, to_lam), (other, some, other_to_lam) = values
        torch.testing.assert_close(other, value, rtol=1e-13, atol=0)
        close(some, gathered(whole, both.rows), 1e-12)
        untouched = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, touched, False)
        assert not bool(whole[WORDS][untouched].any())
        assert not bool(some[WORDS][touched == PAD].any())
        read = torch.cat([part["input_ids"].flatten() for part in batch]).unique()
        assert bool(some[WORDS][torch.isin(touched, read[read != PAD])].any(1).all())
        found[loss] = to_lam, other_to_lam
    close(found["inner_grad"][1], found["inner_grad"][0], 1e-12)


LOCAL: list[tuple[str, dict[str, Any]]] = [
    *(("one_step", {"engine": engine, "radius": 1e-3}) for engine in ENGINES),
    ("sama", {"engine": "jvp"}),
    ("neumann", {"engine": "jvp", "step": 0.1}),
    ("conjugate_gradient", {"engine": "finite_difference", "damping": 1.0, "radius": 1e-3}),
    ("greedy", {"engine": "double_backward"}),
    ("evograd", {"copies": 3, "sigma": 0.05, "noise": "gaussian"}),
    ("evograd", {"copies": 4, "sigma": 0.05, "antithetic": True}),
    ("evograd", {"copies": 3, "sigma": 0.05, "parameters": "word_embeddings"}),
]


@pytest.mark.parametrize(
    ("name", "settings", "rule"), [(*one, list(RULES)[index % 2]) for index, one in enumerate(LOCAL)]
)
def test_hypergradients_are_those_of_the_whole_weights(name: str, settings: dict[str, Any], rule: str) -> None:
    """EvoGrad's own noise among them: it is keyed by tensor and row."""
    whole, some = Both(RULES[rule], layers=(1, 2)).hypergradients(name, settings)
    close(some, whole, 1e-7 if settings.get("engine") == "finite_difference" else 1e-10)


def test_evograd_with_injected_noise_is_that_of_the_whole_weights() -> None:
    both = Both()
    generator = torch.Generator().manual_seed(9)
    noise = [{n: 0.05 * torch.randn(x.shape, generator=generator).to(x) for n, x in both.w.items()} for _ in range(3)]
    whole, some = both.hypergradients("evograd", {"copies": 3}, noise)
    close(some, whole, 1e-11)


def test_a_pass_over_some_rows_leaves_the_module_as_it_was() -> None:
    both = Both()
    words = both.tagger.base.get_input_embeddings()
    before, weight = {name: leaf.detach().clone() for name, leaf in both.w.items()}, words.weight

    def as_it_was() -> bool:
        kept = same({name: leaf.detach() for name, leaf in both.w.items()}, before)
        return kept and words.weight is weight and not words._forward_pre_hooks

    for name, settings in LOCAL[:: len(ENGINES)]:
        both.hypergradients(name, settings)
        assert as_it_was()
    problem, w, _ = both.some
    broken = [{**both.train[0], "labels": None}]
    with pytest.raises(AttributeError):
        PassContext(problem).inner_grad(w, both.lam, broken, wrt_w=w)
    assert as_it_was()


def test_embeddings_that_are_read_elsewhere_stay_whole() -> None:
    """Tied ones by other layers, frozen ones are constants, and those with a maximal norm change as they are read."""

    def tie(tagger: CrossLingualTagger) -> None:
        tagger.base.decoder = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        tagger.base.decoder.weight = tagger.base.get_input_embeddings().weight

    def freeze(tagger: CrossLingualTagger) -> None:
        tagger.base.get_input_embeddings().weight.requires_grad_(False)

    def limit(tagger: CrossLingualTagger) -> None:
        tagger.base.get_input_embeddings().max_norm = 1.0

    for change in (tie, freeze, limit):
        tagger, batch = exact_tagger(), batch_of(4, [0, TARGET])
        assert tagger.touched_rows([batch]).keys() == {WORDS}
        change(tagger)
        assert tagger.touched_rows([batch]) == {}


def test_the_padding_row_keeps_its_number() -> None:
    """Of a batch that looks up none of the rows up to it."""
    tagger = exact_tagger()
    batch = {"input_ids": torch.tensor([[9, 7, 9]])}
    assert tagger.touched_rows([batch])[WORDS].tolist() == [0, PAD, 7, 9]
    tagger.base.get_input_embeddings().padding_idx = None
    assert tagger.touched_rows([batch])[WORDS].tolist() == [0, 7, 9]


# In the trainer

ONE_SIDED = {"engine": "finite_difference", "radius": 1e-4, "differences": "one_sided"}
FURTHER: dict[str, dict[str, Any]] = {
    **ESTIMATES,
    "sama": {"estimator": "sama", "estimator_kwargs": {"engine": "jvp"}},
    "neumann": {"estimator": "neumann", "estimator_kwargs": {"engine": "jvp", "step": 0.1}},
    "greedy": {"estimator": "greedy", "estimator_kwargs": {"engine": "jvp"}},
    "one_sided": {"estimator": "one_step", "estimator_kwargs": ONE_SIDED},
    "one_sided greedy": {"estimator": "greedy", "estimator_kwargs": ONE_SIDED},
}


@contextmanager
def spied(look: Callable[[PassContext, InnerStep], Any]) -> Iterator[None]:
    """`look` at what each meta step is given."""

    def spy(passes: PassContext, estimator: Any, step: InnerStep, state: Any) -> Hypergradient:
        look(passes, step)
        return estimate(passes, estimator, step, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_level, "estimate", spy)
        yield


def run(folder: Path, *, layers: tuple[int, ...] = (1,), **fields: Any) -> tuple[MetaTrainer, Tree]:
    """`STEPS` steps in float64, lam moved by minus ten times the hypergradient, and its way."""
    settings: dict[str, Any] = {
        "tagger": exact_tagger(layers=layers),
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "adam_epsilon": 1e-4,  # at 1e-8 Adam would make steps of the rounding errors of gradients that are zero
        "max_grad_norm": 1.0,
        "meta_optim": "SGD",
        "meta_learning_rate": 10.0,
        "meta_lr_scheduler_type": "constant",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_meta_batch_size": 2,
    }
    trainer = tiny_trainer(folder, **settings | fields)
    start = meta_weights(trainer)
    trainer.train()
    return trainer, minus(start, meta_weights(trainer))


@pytest.mark.parametrize(
    ("name", "order"),
    [("jvp", "after_step"), ("finite_difference", "lookahead"), ("evograd", "lookahead"), ("neumann", "after_step"),
     ("greedy", "lookahead")],
)  # fmt: skip
def test_a_run_on_touched_rows_is_one_on_whole_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, order: str
) -> None:
    shapes: list[int] = []

    def look(passes: PassContext, step: InnerStep) -> None:
        shapes.append(len(step.w[WORDS]))

    with spied(look):
        some, moved = run(tmp_path, meta_order=order, **FURTHER[name])
        monkeypatch.setattr(CrossLingualTagger, "lookups", lambda self, batch: {})
        whole, expected = run(tmp_path, meta_order=order, **FURTHER[name])
    assert max(shapes[:STEPS]) < VOCABULARY
    assert shapes[STEPS:] == [VOCABULARY] * STEPS
    close(moved, expected, 1e-7 if name == "finite_difference" else 1e-9)
    close(base_weights(some), base_weights(whole), 1e-11)


@pytest.mark.parametrize("name", ["jvp", "sama", "greedy"])
def test_looking_ahead_is_the_estimate_on_whole_weights(tmp_path: Path, name: str) -> None:
    expected: list[Tree] = []
    tagger = exact_tagger()
    start = [meta_weights_of(tagger)]

    def look(passes: PassContext, step: InnerStep) -> None:
        start.append(meta_weights_of(tagger))
        expected.append(trainer.estimate(trainer.estimator).grads)  # type: ignore[arg-type]

    fields = FURTHER[name]["estimator_kwargs"] | ({"decay": 0.0} if name == "greedy" else {})
    trainer = tiny_trainer(
        tmp_path, tagger=tagger, meta_order="lookahead", estimator=FURTHER[name]["estimator"],
        estimator_kwargs=fields, adam_epsilon=1e-4, meta_optim="SGD", meta_learning_rate=10.0,
        meta_lr_scheduler_type="constant",
    )  # fmt: skip
    with spied(look):
        trainer.train()
    ways = [*start[1:], meta_weights_of(tagger)]
    assert len(expected) == 3
    for one, before, after in zip(expected, ways, ways[1:], strict=False):
        close({n: leaf / 10 for n, leaf in minus(before, after).items()}, one, 1e-9)


def meta_weights_of(tagger: CrossLingualTagger) -> Tree:
    return {name: leaf.detach().clone() for name, leaf in tagger.meta_parameters().items()}


def test_estimators_that_remember_weights_keep_them_whole(tmp_path: Path) -> None:
    shapes: list[torch.Size] = []
    with spied(lambda passes, step: shapes.append(step.w[WORDS].shape)):
        run(tmp_path, estimator="unroll", estimator_kwargs={"horizon": 2})
        run(tmp_path, estimator="hyperdistill", estimator_kwargs={"scale": "one"})
    assert shapes == [(VOCABULARY, HIDDEN)] * 2 * STEPS


# The base step's own forward is used again


def forwards(folder: Path, *, layers: tuple[int, ...] = (1,), dropout: bool = False, **fields: Any) -> list[int]:
    """The rows of each forward of the encoder in a training step, when all is known of the losses."""
    seen: list[int] = []

    class Anew(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.clear()

    tagger = tiny_tagger(layers=layers, dropout=dropout)
    tagger.base.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    tiny_trainer(folder, tagger=tagger, trainer={"callbacks": [Anew()]}, max_steps=2, **fields).train()
    return seen


S, T, V = 4, 2, 2  # source, target and meta rows
ALL = S + T  # those of the base step
FORWARDS: dict[str, tuple[list[int], list[int]]] = {  # after_step, lookahead
    "finite_difference": ([ALL, V, S, S], [ALL, V, S, S, ALL]),
    "jvp": ([ALL, V, S], [ALL, V, S, ALL]),
    "double_backward": ([ALL, V, S], [ALL, V, S, ALL]),
    "evograd": ([ALL, ALL, ALL, V], [ALL, ALL, ALL, V, ALL]),  # the first records, one a new shape, one all copies
    "evograd_head": ([ALL, ALL, V], [ALL, V, ALL]),  # the network is below
    "one_sided": ([ALL, V, S], [ALL, V, S, ALL]),  # the base step's own backward is the other side
    "one_sided greedy": ([ALL, V, S, V], [ALL, V, S, V, ALL, V, S]),
    "sama": ([ALL, V, S], [ALL, V, S, ALL]),
    "greedy": ([ALL, V, S, V], [ALL, V, S, V, ALL, V, S]),
}


@pytest.mark.parametrize(("position", "order"), list(enumerate(ORDERS)))
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_of_a_training_step(tmp_path: Path, name: str, position: int, order: str) -> None:
    assert forwards(tmp_path, meta_order=order, **FURTHER[name]) == FORWARDS[name][position]


@pytest.mark.parametrize("copies", [2, 64])
def test_copies_of_the_head_share_the_encoders_forward(tmp_path: Path, copies: int) -> None:
    """Under a network on top of it; after the step it is the base step's."""
    settings: dict[str, Any] = {"estimator": "evograd", "estimator_kwargs": {"copies": copies, "parameters": "^class"}}
    assert forwards(tmp_path, layers=(2,), meta_order="after_step", **settings) == [ALL, V]
    assert forwards(tmp_path, layers=(2,), meta_order="lookahead", **settings) == [ALL, V, ALL]


@pytest.mark.parametrize(
    ("fields", "head", "difference"),
    [
        ({}, [ALL, V], [ALL, V, S, S]),
        ({"dropout": True}, [ALL, ALL, V], [ALL, V, ALL, S, S]),
        ({"dropout": True, "meta_dropout": True}, [ALL, ALL, V], [ALL, V, ALL, ALL, ALL]),  # other rows, other masks
        ({"bf16": True}, [ALL, ALL, V], [ALL, V, ALL, S, S]),
    ],
)
def test_another_forward_than_the_meta_passes_is_not_used(
    tmp_path: Path, fields: dict[str, Any], head: list[int], difference: list[int]
) -> None:
    assert forwards(tmp_path, layers=(2,), **fields, **ESTIMATES["evograd_head"]) == head
    assert forwards(tmp_path, **fields, **ESTIMATES["finite_difference"]) == difference


@pytest.mark.parametrize(
    ("name", "layers"),
    [("finite_difference", (1,)), ("evograd", (1,)), ("greedy", (1,)), ("jvp", (2,)), ("evograd_head", (2,))],
)
def test_a_run_that_uses_its_forwards_is_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layers: tuple[int, ...]
) -> None:
    used, moved = run(tmp_path, layers=layers, **FURTHER[name])
    monkeypatch.setattr(CrossLingualTagger, "has_dropout", True)
    unused, expected = run(tmp_path, layers=layers, **FURTHER[name])
    close(moved, expected, 1e-9 if name == "finite_difference" else 1e-11)
    close(base_weights(used), base_weights(unused), 1e-12)


@pytest.mark.parametrize("fields", [{}, {"activation_checkpointing": True}], ids=str)
@pytest.mark.parametrize("name", ["one_sided", "one_sided greedy"])
def test_the_base_step_leaves_the_gradient_at_lam(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    """Of the whole window, in no `.grad`; the base step is the same to the last bit as without it."""
    found: list[bool] = []

    def look(passes: PassContext, step: InnerStep) -> None:
        assert step.made is not None
        assert step.made.lam_grad is not None
        fresh = PassContext(passes.problem)
        close(step.made.lam_grad, fresh.lam_grad(step.w, step.lam, step.batch), 1e-12)
        found.append(all(leaf.grad is None for leaf in step.lam.values()))

    moves: dict[str, Any] = {"meta_learning_rate": 0.0, **fields}
    with spied(look):
        trainer, _ = run(tmp_path, **moves, **FURTHER[name])
    plain, _ = run(tmp_path, **moves, **ESTIMATES["finite_difference"])
    assert found == [True] * STEPS
    assert same(base_weights(trainer), base_weights(plain))


def test_one_sided_differences_go_to_the_exact_hypergradient(tmp_path: Path) -> None:
    _, exact = run(tmp_path, **ESTIMATES["double_backward"])
    found = []
    for radius in (1e-3, 1e-4):
        settings = {"estimator": "one_step", "estimator_kwargs": ONE_SIDED | {"radius": radius}}
        found.append(tree.norm(minus(run(tmp_path, **settings)[1], exact)) / tree.norm(exact))
    assert 8 < found[0] / found[1] < 12
    assert found[1] < 1e-3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tagger": tiny_tagger()}, "draws dropout masks .*set the base's rates to 0"),
        ({"bf16": True}, "another precision"),
        ({"meta_precision": "bf16"}, "another precision"),
    ],
    ids=["dropout", "bf16", "meta_precision"],
)
def test_one_sided_differences_are_refused_where_the_step_is_of_no_use(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    settings = {"tagger": tiny_tagger(dropout=False), **fields, **FURTHER["one_sided"]}
    with pytest.raises(ValueError, match=f"differences: one_sided .*{said}.* lookahead, or leave .*central") as error:
        tiny_trainer(tmp_path, **settings).train()
    assert "\n" not in str(error.value)
    if fields.keys() != {"meta_precision"}:  # under which this radius is refused, too
        tiny_trainer(tmp_path, meta_order="lookahead", **settings).train()


def test_each_micro_batch_has_its_own_states(tmp_path: Path) -> None:
    """Those of the step's own weights and rows, and no forward is made for them."""
    found: list[float] = []

    def look(passes: PassContext, step: InnerStep) -> None:
        fresh = PassContext(passes.problem)
        states = []
        for index, part in passes.parts(step.batch):
            kept, made = passes.prefix(step.w, index, part), fresh.prefix(step.w, index, part)
            assert kept is not None
            assert made is not None
            torch.testing.assert_close(kept, made, rtol=1e-12, atol=1e-12)
            assert kept.grad_fn is None
            states.append(kept)
        assert (passes.counts.forwards, fresh.counts.forwards) == (0, 2)
        found.append(float((states[0][0, 0] - states[1][0, 0]).abs().max()))

    with spied(look):
        run(tmp_path, layers=(2,), **ESTIMATES["evograd_head"])
    assert len(found) == STEPS
    assert min(found) > 1e-3


@pytest.mark.parametrize("key", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_every_rate_of_the_configuration_is_dropout(key: str) -> None:
    assert not tiny_tagger(dropout=False).has_dropout
    assert tiny_tagger(base=NO_DROPOUT | {key: 0.1}).has_dropout


# Only the rows that read lam


@pytest.mark.parametrize("settings", [{"layers": (1,)}, {"layers": (1, 2), "languages": ("a", "b")}], ids=str)
def test_the_rows_that_read_lam_give_the_whole_gradient(settings: dict[str, Any]) -> None:
    tagger = exact_tagger(**settings)
    batch = batch_of(7, [0, TARGET, len(tagger.meta.languages) - 1, TARGET])
    rows = tagger.reads_lam(batch)
    assert (rows["language"] >= 0).all()
    assert len(rows["input_ids"]) == len(rows["labels"]) == 4
    problem = tagger.problem(SGD(0.1))
    totals = {"source": 50, "target": 60}
    assert problem.reads_lam(batch)[TOTALS] == tagger.counts(batch)
    assert problem.reads_lam({**batch, TOTALS: totals})[TOTALS] == totals
    w, lam = tagger.base_parameters(), tagger.meta_parameters()
    found, expected = (
        PassContext(one).lam_grad(w, lam, [batch]) for one in (problem, replace(problem, reads_lam=lambda part: part))
    )
    close(found, expected, 1e-12)
    assert all(bool(leaf.any()) for leaf in found.values())


def test_batches_of_one_side_are_taken_whole() -> None:
    tagger = exact_tagger()
    for language in (0, TARGET):
        batch = batch_of(3, language)
        assert tagger.reads_lam(batch) is batch


@pytest.mark.parametrize("engine", ENGINES)
def test_the_mixed_product_runs_them_alone(engine: str) -> None:
    tagger, batch = exact_tagger(layers=(1, 2)), batch_of(7, [0, TARGET, TARGET])
    w, lam = gathered(tagger.base_parameters(), {}), gathered(tagger.meta_parameters(), {})
    generator = torch.Generator().manual_seed(6)
    v = {name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for name, leaf in w.items()}
    rows: list[int] = []
    tagger.base.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))

    def products(problem: BilevelProblem, product: Any = mixed_product) -> Tree:
        gate.record(PassContext(problem), w, lam, [batch])  # which find out what is to be known of the loss
        product(PassContext(problem), engine, w, lam, [batch], v)
        rows.clear()
        passes = PassContext(problem)
        gate.record(passes, w, lam, [batch])
        return product(passes, engine, w, lam, [batch], v, radius=1e-3)

    problem, passes = tagger.problem(SGD(0.1)), 2 if engine == "finite_difference" else 1
    found = products(problem)
    assert rows == [10] + [6] * passes  # a source row runs once a layer: 3 * 2 + 4 target rows, the recorded pass
    expected = products(replace(problem, reads_lam=lambda part: part))
    assert rows == [10] * (1 + passes)
    close(found, expected, 1e-8 if engine == "finite_difference" else 1e-12)
    products(problem, hessian_product)
    assert rows == [10] * (1 + passes)
    products(tagger.problem(SGD(0.1), dropout=True))  # other rows would have other masks
    assert rows == [10] * (1 + passes)


# Memory


def held(tree: Tree | None) -> dict[str, int]:
    return {} if tree is None else {name: leaf.shape[0] for name, leaf in tree.items()}


@pytest.mark.parametrize(
    ("name", "order"),
    [("jvp", "after_step"), ("jvp", "lookahead"), ("evograd", "after_step"), ("sama", "lookahead"),
     ("greedy", "after_step")],
)  # fmt: skip
def test_what_a_meta_step_holds(tmp_path: Path, name: str, order: str) -> None:
    """No base gradients, of the weights before a step the body and the touched rows; those after it are shared."""
    looked: list[bool] = []
    tagger = exact_tagger()
    own = {leaf.data_ptr() for leaf in tagger.base_parameters().values()}

    def look(passes: PassContext, step: InnerStep) -> None:
        assert all(parameter.grad is None for parameter in tagger.parameters())
        touched = len(passes.problem.rows[WORDS])
        assert touched < VOCABULARY
        body = {n: len(leaf) for n, leaf in tagger.base_parameters().items()} | {WORDS: touched}
        assert held(step.w) == body
        shared = [name for name, leaf in step.w.items() if leaf.data_ptr() in own]
        assert bool(shared) == (order == "lookahead" or name == "sama")
        rule = trainer.estimator.needs_update_rule  # type: ignore[union-attr]
        assert (step.made is not None) == (rule and order == "after_step")
        if step.made is not None:
            moments = [step.made.update_state[key] for key in ("exp_avg", "exp_avg_sq")]
            for tree in (step.made.w, step.made.grad, *moments):
                assert held(tree) == body
            assert sum(leaf.data_ptr() in own for leaf in step.made.w.values()) == len(body) - 1
        looked.append(True)

    trainer = tiny_trainer(tmp_path, tagger=tagger, meta_order=order, **FURTHER[name])
    with spied(look):
        trainer.train()
    assert len(looked) == 3


class Peak(TrainerCallback):
    """The peak of all live storage in the last step."""

    def __init__(self, last: int) -> None:
        self.last, self.peak = last, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.last - 1:
            self.memory = PeakMemory(live_tensors()).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.last:
            self.memory.__exit__(None, None, None)
            self.peak = self.memory.peak


WIDE = 8_000  # rows of the embeddings


def peak_of(folder: Path, **fields: Any) -> int:
    """Of a step whose body is a quarter of its weights, as in XLM-R base; groups of leaves are in proportion to it."""
    peak = Peak(2)
    tagger = tiny_tagger(dropout=False, layers=(2,), base={"vocab_size": WIDE, "intermediate_size": 512})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "TOGETHER", 2**14)
        tiny_trainer(folder, tagger=tagger, trainer={"callbacks": [peak]}, max_steps=2, **fields).train()
    return peak.peak


BARS: dict[str, dict[str, float]] = {  # times a plain step's peak
    "after_step": {"jvp": 1.08, "finite_difference": 1.05, "evograd": 1.05, "evograd_head": 1.02},
    "lookahead": {"evograd": 1.05, "evograd_head": 1.02},
}


def in_proportion_to_the_small_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn, and which copies are evaluated, at a time."""
    monkeypatch.setattr(noise_module, "_BLOCK", 2**10)
    monkeypatch.setattr(copies_module, "WHOLE_TOGETHER_ON_CPU", 2**10)


@pytest.mark.parametrize("order", ORDERS)
def test_the_peak_of_a_meta_step_is_about_a_plain_steps(
    tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_proportion_to_the_small_body(monkeypatch)
    plain, bars = peak_of(tmp_path, estimator="none"), BARS[order]
    assert plain > 4 * WIDE * HIDDEN * 4  # weights, gradients and two moments
    peaks = {name: peak_of(tmp_path, meta_order=order, **ESTIMATES[name]) / plain for name in bars}
    print({name: round(peak, 3) for name, peak in peaks.items()})  # -s
    assert {name: peak for name, peak in peaks.items() if peak > bars[name]} == {}


def test_hooks_on_the_optimiser_cost_the_weights_of_the_body(tmp_path: Path) -> None:
    """Its gradients then wait for the one step, beside what is kept of the weights."""
    plain = peak_of(tmp_path, estimator="none")
    hook = register_optimizer_step_post_hook(lambda *_: None)
    try:
        peak = peak_of(tmp_path, **ESTIMATES["jvp"]) / plain
        print({"jvp with a hook": round(peak, 3)})  # -s
    finally:
        hook.remove()
    assert 1.02 < peak < 1.08


def test_more_copies_need_no_more_than_their_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the size of lam each; those of the head need none."""
    in_proportion_to_the_small_body(monkeypatch)
    lam = sum(leaf.nbytes for leaf in tiny_tagger(layers=(2,)).meta_parameters().values())
    for settings, each in (({}, lam), ({"parameters": "^classifier"}, 0)):
        two, five = (
            peak_of(tmp_path, estimator="evograd", estimator_kwargs={"copies": copies, **settings})
            for copies in (2, 5)
        )
        assert five - two <= 3 * each + 2**12
