"""The same numbers from any attention kernel, under activation checkpointing and from a compiled base step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metaxl_evo.benchmark.memory import PeakMemory
from metaxl_evo.bilevel import SGD, Counts, Hypergradient, PassContext, hypergradient, passes, tree
from metaxl_evo.estimators import ESTIMATORS, make_estimator
from metaxl_evo.models.bilevel_module import Batch
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.tagger import CrossLingualTagger
from metaxl_evo.training.meta_level import MetaLevel
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.tiny import (
    LAYERS,
    NO_DROPOUT,
    ORDERS,
    PAD,
    Hypergradients,
    base_weights,
    close,
    collate,
    different,
    meta_weights,
    minus,
    random_rows,
    tiny_base,
    tiny_tagger,
    tiny_trainer,
)

HIDDEN = 4  # an RTN of 15 numbers: forward_mode carries a column for each
STEPS = 4  # of two episodes

INSTANCES: dict[str, tuple[dict[str, Any], ...]] = {
    "first_order": ({},),
    "one_step": ({"engine": "double_backward"}, {"engine": "jvp"}, {"engine": "finite_difference"}),
    "evograd": ({"sigma": 0.05}, {"sigma": 0.05, "parameters": "^classifier"}),
    "sama": ({}, {"engine": "jvp"}),
    "neumann": (
        {"engine": "double_backward", "terms": 2, "step": 0.1},
        {"engine": "finite_difference", "terms": 2, "step": 0.1},
    ),
    "conjugate_gradient": (
        {"engine": "jvp", "iterations": 2, "damping": 5.0},
        {"engine": "finite_difference", "iterations": 2, "damping": 5.0},
    ),
    "unroll": ({}, {"horizon": 2}),
    "drmad": ({},),
    "forward_mode": ({},),
    "greedy": ({"engine": "jvp"}, {"engine": "finite_difference"}),
    "hyperdistill": (
        {"fit_every": 2},
        {"scale": "fixed", "engine": "jvp"},
        {"scale": "one", "engine": "finite_difference"},
    ),
}
ALL = [(name, settings) for name, all_settings in INSTANCES.items() for settings in all_settings]


class Judged(CrossLingualTagger):
    """The tagger with a direct term, which `first_order` asks for."""

    direct_term = True

    def outer_loss(self, batch: Batch) -> dict[str, Tensor]:
        squares = torch.stack([parameter.square().sum() for parameter in self.meta.parameters()])
        return {"target": super().outer_loss(batch)["target"] + 0.1 * squares.sum()}


class Recorded(MetaTrainer):
    """Keeps every hypergradient, and says when the base step's own forward runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noted = Hypergradients()
        self.add_callback(self.noted)
        self.in_base_step = False

    @property
    def results(self) -> list[Hypergradient]:
        return self.noted.results

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.in_base_step = True
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            self.in_base_step = False


def tagger_of(name: str, dtype: torch.dtype, *, dropout: bool = False, **base: Any) -> CrossLingualTagger:
    """The tagger for an estimator: without a direct term, which would outweigh the rest, unless it asks for one."""
    model = tiny_base(dtype, hidden_size=HIDDEN, intermediate_size=12, **({} if dropout else NO_DROPOUT), **base)
    torch.manual_seed(1)
    rtn = RepresentationTransform(HIDDEN, layers=(1,), bottleneck=1).to(dtype)
    for parameter in rtn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return (Judged if name == "first_order" else CrossLingualTagger)(model, rtn, pad_token_id=PAD)


def trainer_of(
    folder: Path, tagger: CrossLingualTagger, name: str, settings: dict[str, Any], **fields: Any
) -> Recorded:
    """Two steps of SGD with momentum, also at the meta level, an episode; a fit takes the first one of two."""
    trainer = tiny_trainer(
        folder,
        tagger=tagger,
        trainer_class=Recorded,
        **{
            "estimator": name,
            "estimator_kwargs": settings,
            "episode_length": None if make_estimator(name, **settings).online and "fit_every" not in settings else 2,
            "max_steps": STEPS if "fit_every" in settings else 2,
            "max_grad_norm": 0.0 if name in ("drmad", "hyperdistill") else 1.0,
            "optim": "sgd",
            "optim_args": "momentum=0.5",
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "meta_optim": "SGD",
            "meta_learning_rate": 0.1,
            **fields,
        },
    )
    assert isinstance(trainer, Recorded)
    return trainer


def run(folder: Path, tagger: CrossLingualTagger, name: str, settings: dict[str, Any], **fields: Any) -> Recorded:
    trainer = trainer_of(folder, tagger, name, settings, **fields)
    trainer.train()
    return trainer


def differentiates_once(name: str, settings: dict[str, Any]) -> bool:
    estimator = make_estimator(name, **settings)
    return not estimator.second_order


def label(one: tuple[str, dict[str, Any]]) -> str:
    return "-".join([one[0], *map(str, one[1].values())])


FIRST_ORDER = [one for one in ALL if differentiates_once(*one)]
SECOND_ORDER = [one for one in ALL if one not in FIRST_ORDER]
on_first_order = pytest.mark.parametrize("one", FIRST_ORDER, ids=map(label, FIRST_ORDER))
on_second_order = pytest.mark.parametrize("one", SECOND_ORDER, ids=map(label, SECOND_ORDER))

OTHER_MASKS = "a split, which checkpointing rules out, draws the masks of prefix and suffix apart"
DTYPES = (torch.float64, torch.float32)
DROPOUTS = {  # of the base step, and of the meta passes
    "no dropout": (False, False),
    "dropout": (True, False),
    "meta dropout": (True, True),
}


FIRST = [
    pytest.param((name, first), marks=[pytest.mark.slow] if name == "forward_mode" else [])
    for name, (first, *_) in INSTANCES.items()
]


def orders_of(name: str, settings: dict[str, Any]) -> tuple[str, ...]:
    return ORDERS if make_estimator(name, **settings).online else ORDERS[:1]


def tolerance(name: str, settings: dict[str, Any], dtype: torch.dtype) -> float:
    """Relative to the largest entry: a hundred roundings, which a quotient of differences magnifies by 1 / its step.

    EvoGrad's differences are of losses, at a distance of sigma.
    """
    estimator = make_estimator(name, **settings)
    step = 1.0
    if getattr(estimator, "engine", None) == "finite_difference" or (name == "sama" and settings == {}):
        step = getattr(estimator, "radius", 0.01)
    if name == "evograd":
        step = settings["sigma"]
    return 100 * torch.finfo(dtype).eps / step


def test_every_estimator_is_here() -> None:
    assert INSTANCES.keys() == ESTIMATORS.keys()
    assert (len(ALL), len(FIRST_ORDER), len(SECOND_ORDER)) == (21, 9, 12)
    assert {name for name, _ in FIRST_ORDER} == ESTIMATORS.keys() - {"unroll", "drmad", "forward_mode"}
    sizes = [p.numel() for p in tagger_of("one_step", torch.float64).meta.parameters()]
    assert sum(sizes) == 15


def same_run(found: Recorded, expected: Recorded, rtol: float) -> None:
    """The same hypergradient at every meta step, and the same weights at the end."""
    assert len(found.results) == len(expected.results) > 0
    for one, other in zip(found.results, expected.results, strict=True):
        error = tree.norm(minus(one.grads, other.grads)) / tree.norm(other.grads)
        print(f"hypergradients differ by {error:.1e} (bar {rtol:.1e})")
        close(one.grads, other.grads, rtol)
    close(base_weights(found), base_weights(expected), rtol)
    close(meta_weights(found), meta_weights(expected), rtol)


# Attention kernels


class Attention:
    """Counts calls of the stock attention by whether it may use fused kernels, apart in base steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainer: Any = None
        self.free, self.confined, self.confined_in_base = 0, 0, 0
        self.counts: list[Counts] = []  # of all passes
        plain_passes = MetaLevel.passes

        def passes(*args: Any) -> PassContext:
            context = plain_passes(*args)
            self.counts.append(context.counts)
            return context

        monkeypatch.setattr(MetaLevel, "passes", passes)
        plain: Callable[..., Tensor] = F.scaled_dot_product_attention

        def attend(*args: Any, **kwargs: Any) -> Tensor:
            flags = torch.backends.cuda
            fused = flags.flash_sdp_enabled() or flags.mem_efficient_sdp_enabled() or flags.cudnn_sdp_enabled()
            self.free += fused
            self.confined += not fused
            self.confined_in_base += not fused and self.trainer.in_base_step
            return plain(*args, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)


@pytest.mark.parametrize("one", FIRST, ids=label)
def test_stock_attention_gives_the_numbers_of_eager(
    tmp_path: Path, one: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout in the base step and none in the meta passes, whose kernel is the fused one.

    The math kernel runs in the second-order passes, as many as are counted, in the few by which an engine is found
    out, and nowhere else.
    """
    attention = Attention(monkeypatch)
    attention.trainer = stock = trainer_of(tmp_path, tagger_of(one[0], torch.float64, dropout=True), *one)
    stock.train()
    assert stock.model.attention_kernel == "sdpa"
    calls = attention.free + attention.confined
    second_order = sum(counts.hvps + counts.jvps for counts in attention.counts)
    eager = run(tmp_path, tagger_of(one[0], torch.float64, dropout=True, attn_implementation="eager"), *one)
    assert attention.free + attention.confined == calls  # eager attention does not come by
    same_run(stock, eager, tolerance(*one, torch.float64))
    assert (second_order == 0) == (one in FIRST_ORDER)
    looks = 8 if one[0] == "hyperdistill" else 4  # whose drawn batches are of another kind
    assert 0 <= attention.confined - LAYERS * second_order <= LAYERS * (looks if second_order else 0)
    assert attention.confined_in_base == 0
    assert attention.free >= LAYERS * stock.state.global_step


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dropout", "meta_dropout"), DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize(
    ("one", "order"),
    [(one, order) for one in ALL for order in orders_of(*one)],
    ids=lambda v: v if isinstance(v, str) else label(v),
)
def test_any_dtype_dropout_and_order(
    tmp_path: Path, one: tuple[str, dict[str, Any]], order: str, dropout: bool, meta_dropout: bool, dtype: torch.dtype
) -> None:
    stock, eager = (
        run(
            tmp_path, tagger_of(one[0], dtype, dropout=dropout, attn_implementation=kernel), *one, meta_order=order,
            meta_dropout=meta_dropout,
        )
        for kernel in ("sdpa", "eager")
    )  # fmt: skip
    same_run(stock, eager, tolerance(*one, dtype))


@on_second_order
def test_second_order_passes_fail_on_the_fused_kernel(
    tmp_path: Path, one: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation mode; dropout would hide it, since only the math kernel knows dropout on the CPU."""
    monkeypatch.setattr(passes, "sdpa_kernel", lambda *kernels: nullcontext())
    with pytest.raises((RuntimeError, NotImplementedError), match="attention"):
        run(tmp_path, tagger_of(one[0], torch.float64, dropout=True), *one)


# Activation checkpointing


def meta_point(tagger: CrossLingualTagger) -> tuple[dict[str, Tensor], dict[str, Tensor], Batch, Batch]:
    """Weights that are not the module's own, and a batch for each level."""
    torch.manual_seed(5)
    w, lam = (
        {name: leaf.detach() + 0.05 * torch.randn_like(leaf) for name, leaf in held.items()}
        for held in (tagger.base_parameters(), tagger.meta_parameters())
    )
    train, judge = (list(random_rows(6, seed=seed, language=language)) for seed, language in ((1, [0, -1]), (2, -1)))
    return w, lam, collate(train), collate(judge)


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    scale = max(float(leaf.abs().max()) for leaf in expected.values())
    return max(float((found[name] - leaf).abs().max()) for name, leaf in expected.items()) / scale


def test_a_gradient_outside_of_functional_call_is_the_trap() -> None:
    """The backward recomputes the layers at the module's own weights: no error, and not the gradient.

    Inside a pass the weights stay swapped in until the backward is over.
    """
    found: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for checkpointing in (False, True):
        tagger = tagger_of("one_step", torch.float64).train()
        if checkpointing:
            tagger.activation_checkpointing_enable()
        w, lam, batch, _ = meta_point(tagger)
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in w.items()}
        swapped_in = {f"base.{n}": leaf for n, leaf in leaves.items()} | {f"meta.{n}": leaf for n, leaf in lam.items()}
        loss = torch.func.functional_call(tagger, swapped_in, kwargs=batch)["loss"]
        outside = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        found["outside", checkpointing] = dict(zip(leaves, outside, strict=True))
        value, inside, _ = PassContext(tagger.problem(SGD(0.1))).inner_grad(w, lam, [batch], wrt_w=w)
        torch.testing.assert_close(value, loss.detach())
        found["inside", checkpointing] = inside
    close(found["inside", False], found["outside", False], 1e-12)
    assert different(found["inside", True], found["inside", False]) == []
    assert largest_error(found["outside", True], found["outside", False]) > 0.1


@pytest.mark.parametrize(
    ("one", "dropout"),
    [(one, index % 2 == 1) for index, one in enumerate(FIRST_ORDER[1:6])],  # but for the head: OTHER_MASKS
    ids=lambda value: label(value) if isinstance(value, tuple) else str(value),
)
def test_estimates_at_other_weights_are_the_same_under_checkpointing(
    one: tuple[str, dict[str, Any]], dropout: bool
) -> None:
    found = []
    for checkpointing in (False, True):
        tagger = tagger_of(one[0], torch.float64, dropout=True).train()
        if checkpointing:
            tagger.activation_checkpointing_enable()
        w, lam, train, judge = meta_point(tagger)
        problem, estimator = tagger.problem(SGD(0.1), dropout=dropout), make_estimator(one[0], **one[1])
        generator = torch.Generator().manual_seed(0)
        found.append(hypergradient(problem, estimator, w, lam, [train], [judge], generator=generator).grads)
    close(found[1], found[0], tolerance(*one, torch.float64))


@on_first_order
def test_checkpointing_changes_no_number(tmp_path: Path, one: tuple[str, dict[str, Any]]) -> None:
    """Without dropout, where meta passes reuse what the base step's own, checkpointed forward recorded."""
    found, expected = (
        run(tmp_path, tagger_of(one[0], torch.float64), *one, activation_checkpointing=on) for on in (True, False)
    )
    assert found.model.base.is_activation_checkpointing
    same_run(found, expected, tolerance(*one, torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("meta_dropout", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@on_first_order
def test_checkpointing_changes_no_number_with_dropout(
    tmp_path: Path, one: tuple[str, dict[str, Any]], order: str, meta_dropout: bool, dtype: torch.dtype
) -> None:
    if meta_dropout and "parameters" in one[1]:
        pytest.skip(OTHER_MASKS)
    found, expected = (
        run(
            tmp_path, tagger_of(one[0], dtype, dropout=True), *one, activation_checkpointing=on, meta_order=order,
            meta_dropout=meta_dropout,
        )
        for on in (True, False)
    )  # fmt: skip
    same_run(found, expected, tolerance(*one, dtype))


@on_second_order
def test_second_order_is_refused(tmp_path: Path, one: tuple[str, dict[str, Any]]) -> None:
    for field in ("activation_checkpointing", "torch_compile"):
        with pytest.raises(ValueError, match=r"differentiates (the inner loss )?twice") as error:
            trainer_of(tmp_path, tagger_of(one[0], torch.float64), one[0], one[1], **{field: True})
        assert field in str(error.value)
        assert "finite_difference" in str(error.value)


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    fields = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    tagger = tagger_of("evograd", torch.float64)
    with pytest.raises(ValueError, match=r"MetaTrainer does not run with use_reentrant: true: .*leave it out"):
        trainer_of(tmp_path, tagger, "evograd", {}, **fields)


@pytest.mark.parametrize("dropout", [False, True])
def test_meta_passes_checkpoint_too(dropout: bool) -> None:
    """A pass holds the inputs of six layers instead of what is in them: less than half, and not a bit differs."""
    peaks, gradients = [], []
    for checkpointing in (True, False):
        base = {"num_hidden_layers": 6, "max_position_embeddings": 140}
        tagger = tiny_tagger(base=base, layers=(3,)).train()
        if checkpointing:
            tagger.activation_checkpointing_enable()
        batch = collate(list(random_rows(8, seed=1, language=[0, -1], length=128)))
        w, lam = tagger.base_parameters(), tagger.meta_parameters()
        context = PassContext(tagger.problem(SGD(0.1), dropout=dropout))
        with PeakMemory() as memory:
            _, grad_w, grad_lam = context.inner_grad(w, lam, [batch], wrt_w=w, wrt_lam=lam)
        peaks.append(memory.peak)
        gradients.append({**grad_w, **{f"meta.{name}": leaf for name, leaf in grad_lam.items()}})
    assert different(*gradients) == []
    print(f"peak with checkpointing, of that without: {peaks[0] / peaks[1]:.2f}")
    assert peaks[0] < 0.5 * peaks[1]


@pytest.mark.parametrize("dropout", [False, True])
def test_recomputed_layers_are_in_the_mode_of_the_pass_wherever_they_run(dropout: bool) -> None:
    """Some layers of transformers read their own `training` for dropout; afterwards all is as it was."""
    tagger = tagger_of("one_step", torch.float64, dropout=True).train()
    tagger.activation_checkpointing_enable()
    layers = tagger.base.roberta.encoder.layer
    functions, training = [layer._gradient_checkpointing_func for layer in layers], list[bool]()
    for layer in layers:
        layer.attention.register_forward_hook(
            lambda module, args, output, layer=layer: training.extend(m.training for m in layer.modules())
        )
    w, lam, batch, _ = meta_point(tagger)
    PassContext(tagger.problem(SGD(0.1), dropout=dropout)).inner_grad(w, lam, [batch], wrt_w=w)
    assert training == [dropout] * 2 * sum(len([*layer.modules()]) for layer in layers)  # once more in the backward
    assert [layer._gradient_checkpointing_func for layer in layers] == functions
    assert all(module.training for module in tagger.modules())


# Compiled base steps


def compiled_runs(folder: Path, one: tuple[str, dict[str, Any]], backend: str, **fields: Any) -> list[Recorded]:
    """A compiled run and a plain one, with evaluation at the end."""
    torch.compiler.reset()
    runs = []
    both: tuple[dict[str, Any], ...] = ({"torch_compile": True, "torch_compile_backend": backend}, {})
    for index, settings in enumerate(both):
        tagger = tagger_of(one[0], torch.float64)
        rows = {"eval_dataset": random_rows(5, seed=9, language=None)}
        trainer = trainer_of(folder / str(index), tagger, one[0], one[1], trainer=rows, **settings, **fields)
        trainer.train()
        trainer.save_model()
        runs.append(trainer)
    return runs


def same_compiled(runs: list[Recorded], one: tuple[str, dict[str, Any]]) -> None:
    compiled, plain = runs
    assert compiled.args.torch_compile
    assert not plain.args.torch_compile
    same_run(compiled, plain, tolerance(*one, torch.float64))
    losses = [trainer.evaluate()["eval_loss"] for trainer in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    saved = [type(t.model.base).from_pretrained(t.args.output_dir, dtype=torch.float64).state_dict() for t in runs]
    close(saved[0], saved[1], tolerance(*one, torch.float64))
    assert different(dict(saved[0]), dict(compiled.model.base.state_dict())) == []


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@on_first_order
def test_a_compiled_base_step_changes_no_number(tmp_path: Path, one: tuple[str, dict[str, Any]], order: str) -> None:
    same_compiled(compiled_runs(tmp_path, one, "aot_eager", meta_order=order), one)


@pytest.mark.slow
def test_the_compiler_of_torch(tmp_path: Path) -> None:
    one = ("evograd", {"sigma": 0.05})
    same_compiled(compiled_runs(tmp_path, one, "inductor"), one)
