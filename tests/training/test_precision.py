"""bf16 training: the base step runs under autocast, the meta passes in float32: accelerate patches the forward
alone.

So the hypergradient of a step to come is that of a float32 run to the last bit, and that of a step made differs by
what bf16 did to this step: its gradient, clip factor and new weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForTokenClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from metaxl_evo.bilevel import SGD, BilevelProblem, hypergradient, tree
from metaxl_evo.bilevel.tree import Tree
from metaxl_evo.estimators import OneStep
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.tagger import CrossLingualTagger
from metaxl_evo.training import meta_level
from tests.training.tiny import (
    ESTIMATES,
    LABELS,
    PAD,
    SHALLOW,
    Hypergradients,
    base_weights,
    logged,
    meta_weights,
    minus,
    tiny_tagger,
    tiny_trainer,
)


def dtypes_seen(
    folder: Path, **fields: Any
) -> tuple[set[torch.dtype], set[torch.dtype], dict[str, Tensor], list[float]]:
    """Logit dtypes in base steps and in meta passes, the RTN after one lookahead step, and the logged meta losses."""
    base, meta = set[torch.dtype](), set[torch.dtype]()
    tagger = tiny_tagger(dropout=False)
    classifier = tagger.base.get_submodule("classifier")
    owned = classifier.weight

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        in_place = module._parameters["weight"] is owned  # a meta pass swaps other tensors in
        (base if in_place else meta).add(output.dtype)

    classifier.register_forward_hook(watch)
    trainer = tiny_trainer(folder, tagger=tagger, meta_order="lookahead", meta_optim="SGD", max_steps=1, **fields)
    trainer.train()
    return base, meta, meta_weights(trainer), logged(trainer, "meta_loss")


@pytest.mark.parametrize("kwargs", [{"engine": "double_backward"}, {"engine": "finite_difference"}], ids=str)
def test_meta_passes_stay_in_float32(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    plain = dtypes_seen(tmp_path / "fp32", estimator_kwargs=kwargs)
    mixed = dtypes_seen(tmp_path / "bf16", estimator_kwargs=kwargs, bf16=True)
    assert (plain[0], mixed[0]) == ({torch.float32}, {torch.bfloat16})
    for _, meta, *_ in (
        plain,
        mixed,
    ):  # the value test before weights are perturbed is in float64
        assert meta == {torch.float32} | ({torch.float64} if kwargs["engine"] == "finite_difference" else set())
    assert mixed[3] == plain[3]  # at the same weights the meta loss is the same number
    for name, value in plain[2].items():
        torch.testing.assert_close(mixed[2][name], value, rtol=0, atol=0)


def test_weights_stay_in_float32(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, bf16=True, max_steps=2, estimator="evograd")
    trainer.train()
    for weights in (base_weights(trainer), meta_weights(trainer)):
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())


ROUNDING = torch.finfo(torch.bfloat16).eps  # two units of rounding, 2^-7
ESTIMATORS: dict[str, dict[str, Any]] = {
    **{name: ESTIMATES[name] for name in ("double_backward", "finite_difference", "evograd")},
    "sama": {"estimator": "sama"},
    "neumann": {"estimator": "neumann"},
    "greedy": {"estimator": "greedy", "episode_length": 4},
    "unroll": {"estimator": "unroll", "estimator_kwargs": {"horizon": 1}, "episode_length": 4},
}


def hypergradient_of_first_step(
    folder: Path, case: str, tagger: CrossLingualTagger | None = None, **fields: Any
) -> Tree:
    noted = Hypergradients()
    tiny_trainer(
        folder,
        tagger=tiny_tagger(dropout=False, base=SHALLOW) if tagger is None else tagger,
        trainer={"callbacks": [noted]},
        optimizer_class="SGD",
        learning_rate=1e-2,
        max_steps=1,
        **ESTIMATORS[case] | fields,
    ).train()
    return noted.grads[-1]


def relative_error(found: Tree, expected: Tree) -> float:
    return tree.norm(minus(found, expected)) / tree.norm(expected)


@pytest.mark.parametrize("case", ESTIMATORS)
def test_hypergradients_of_bf16_steps(tmp_path: Path, case: str) -> None:
    reads_nothing_of_the_step = case.startswith("evograd")
    for order, bar in (("after_step", 0.0 if reads_nothing_of_the_step else ROUNDING), ("lookahead", 0.0)):
        plain = hypergradient_of_first_step(tmp_path, case, meta_order=order)
        mixed = hypergradient_of_first_step(tmp_path, case, meta_order=order, bf16=True)
        print(f"{case}, {order}: {relative_error(mixed, plain):.1e}")
        assert relative_error(mixed, plain) <= bar


@pytest.mark.parametrize(
    ("case", "order"), [("finite_difference", "after_step"), ("evograd", "lookahead"), ("sama", "after_step")]
)
def test_autocast_around_the_meta_passes_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, order: str
) -> None:
    """The base step's; differences of losses or gradients would magnify its rounding."""
    plain = hypergradient_of_first_step(tmp_path, case, meta_order=order, bf16=True)
    monkeypatch.setattr(meta_level, "estimate", torch.autocast("cpu", torch.bfloat16)(meta_level.estimate))
    around = hypergradient_of_first_step(tmp_path, case, meta_order=order, bf16=True)
    assert relative_error(around, plain) == 0


def pretrained_tagger(folder: Path) -> CrossLingualTagger:
    """A pretrained encoder with its top layer transformed."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    base = AutoModelForTokenClassification.from_pretrained(folder, num_labels=LABELS, dtype=torch.float32, **off)
    rtn = RepresentationTransform(base.config.hidden_size, layers=(base.config.num_hidden_layers,), languages=("s",))
    for parameter in rtn.parameters():
        nn.init.normal_(parameter, std=0.02)
    return CrossLingualTagger(base, rtn, pad_token_id=PAD)


@pytest.mark.slow
def test_hypergradients_of_bf16_steps_of_a_pretrained_model(tmp_path: Path, shared: Path) -> None:
    plain, mixed = (
        hypergradient_of_first_step(
            tmp_path, "finite_difference", pretrained_tagger(shared / "models/xlmr-mini"), bf16=bf16
        )
        for bf16 in (False, True)
    )
    assert relative_error(mixed, plain) <= ROUNDING


# The precision of the meta passes themselves

KERNELS = [(torch.backends.cuda, "matmul"), (torch.backends.cudnn, "conv"), (torch.backends.mkldnn, "matmul")]
BF16_ERRORS: dict[str, tuple[dict[str, Any], float]] = {  # of a tagger of 12M weights
    "jvp": ({"estimator_kwargs": {"engine": "jvp"}}, 0.03),
    "double_backward": ({"estimator_kwargs": {"engine": "double_backward"}}, 0.03),
    "finite_difference": ({"estimator_kwargs": {"engine": "finite_difference", "radius": 0.1}}, 0.04),
    "sama": ({"estimator": "sama", "estimator_kwargs": {"radius": 0.1}}, 0.04),
    "evograd head": ({"estimator": "evograd", "estimator_kwargs": {"parameters": "^classifier"}}, 0.15),
    "evograd": ({"estimator": "evograd"}, 0.15),
}


def precisions() -> list[str]:
    return [getattr(of, kind).fp32_precision for of, kind in KERNELS]


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has other switches")
@pytest.mark.parametrize("meta_precision", ["float32", "tf32"])
def test_meta_passes_do_not_compute_in_tf32(tmp_path: Path, meta_precision: str) -> None:
    """As `torch_compile` switches it on, and GPUs convolve unless told otherwise."""
    seen = list[list[str]]()
    tagger, before = tiny_tagger(dropout=False), torch.get_float32_matmul_precision()
    tagger.base.get_submodule("classifier").register_forward_hook(lambda *_: seen.append(precisions()))
    try:
        torch.set_float32_matmul_precision("high")
        outside = precisions()
        tiny_trainer(
            tmp_path, tagger=tagger, meta_order="lookahead", max_steps=1, meta_precision=meta_precision
        ).train()
        assert precisions() == outside == ["tf32"] * 3
    finally:
        torch.set_float32_matmul_precision(before)
    *meta, base = seen
    assert (outside in meta) == (meta_precision == "tf32")
    assert ["ieee"] * 3 in meta  # tests of the loss, if nothing else
    assert base == outside


def test_a_loss_may_switch_cudnn_off() -> None:
    """As torch asks of those who differentiate an LSTM twice; it then reads what the pass has set."""
    lstm, x = nn.LSTM(2, 2), torch.ones(3, 1, 2)
    w, lam = {name: p.detach() for name, p in lstm.named_parameters()}, {"scale": torch.ones(())}

    def loss(w: Tree, lam: Tree, batch: None) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return lam["scale"] * functional_call(lstm, w, (x,))[0].square().sum()

    problem, before = (
        BilevelProblem(inner_loss=loss, outer_loss=loss, update=SGD(0.1)),
        torch.backends.cudnn.allow_tf32,
    )
    found = hypergradient(problem, OneStep("double_backward"), w, lam, None, None).grads
    assert bool(found["scale"])
    assert torch.backends.cudnn.allow_tf32 is before


def test_meta_passes_in_bf16(tmp_path: Path) -> None:
    """Logits are of 16 bits, parameters and hypergradients of 32; the base step is left as it is."""
    base, meta, lam, _ = dtypes_seen(tmp_path, estimator_kwargs={"engine": "jvp"}, meta_precision="bf16")
    assert (base, meta) == ({torch.float32}, {torch.bfloat16, torch.float32})  # tests of the loss are in float32
    assert {value.dtype for value in lam.values()} == {torch.float32}


def of_16_bits(module: nn.Module, query: Tensor, *more: Any, **settings: Any) -> Any:
    """An attention kernel like flash attention's."""
    if query.dtype is not torch.bfloat16:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return sdpa_attention_forward(module, query, *more, **settings)


def test_attention_that_knows_16_bits_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = "flash_attention_2"
    monkeypatch.setitem(AttentionInterface._global_mapping, kernel, of_16_bits)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, kernel, sdpa_mask)
    tagger = tiny_tagger(dropout=False)
    tagger.base.config._attn_implementation = kernel
    fields: dict[str, Any] = {"tagger": tagger, "meta_precision": "bf16", "bf16": True, "max_steps": 2}
    trainer = tiny_trainer(tmp_path, estimator="evograd", **fields)
    trainer.train()
    assert len(logged(trainer, "meta_loss")) == 2
    with pytest.raises(ValueError, match=f"meta_diagnostics_every beside {kernel}: .*leave it out"):
        tiny_trainer(tmp_path, estimator="evograd", meta_diagnostics_every=1, **fields)


@pytest.mark.parametrize(("case", "bar"), [(case, bar) for case, (_, bar) in BF16_ERRORS.items()])
def test_errors_of_bf16_meta_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Path, case: str, bar: float
) -> None:
    """Measured, with room: what a user of `meta_precision: bf16` gives up."""
    monkeypatch.setitem(ESTIMATORS, case, BF16_ERRORS[case][0])
    exact, low = (
        hypergradient_of_first_step(
            tmp_path / precision,
            case,
            pretrained_tagger(shared / "models/xlmr-mini"),
            meta_order="lookahead",
            meta_precision=precision,
        )
        for precision in ("float32", "bf16")
    )
    print(f"{case}, bf16 meta passes: {relative_error(low, exact):.1e}, cosine {tree.cosine(low, exact):.4f}")
    assert 1e-4 < relative_error(low, exact) <= bar


def test_small_differences_are_refused_in_bf16(tmp_path: Path) -> None:
    kwargs = {"engine": "finite_difference", "radius": 0.05}
    with pytest.raises(ValueError, match=r"radius to 0\.1 or more"):
        tiny_trainer(tmp_path, max_steps=1, meta_precision="bf16", estimator_kwargs=kwargs).train()


def test_small_perturbations_are_refused_in_bf16(tmp_path: Path) -> None:
    kwargs = {"sigma": 1e-6}
    with pytest.raises(ValueError, match=r"size 1e-06 drown in the rounding of bf16, .*raise sigma"):
        tiny_trainer(
            tmp_path, max_steps=1, meta_precision="bf16", estimator="evograd", estimator_kwargs=kwargs
        ).train()
