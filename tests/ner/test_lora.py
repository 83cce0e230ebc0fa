"""A base model below peft's LoRA: its weights alone are learned, by every estimator, and saved as peft does."""

from __future__ import annotations

import ast
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    default_data_collator,
    pipeline,
)

from metaxl_evo.bilevel import SGD, Tree, hypergradient
from metaxl_evo.estimators import ESTIMATORS, EvoGrad, OneStep, make_estimator
from metaxl_evo.models import adapters
from metaxl_evo.models.adapters import add_lora, merged
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.arguments import NerArguments
from metaxl_evo.ner.pretrained import load_config
from metaxl_evo.ner.tagger import IGNORED, TARGET, CrossLingualTagger
from metaxl_evo.training.trainer import MetaTrainer
from scripts.evaluate_ner import main as evaluate
from tests.scripts.runs import WITH_DEV, train, write_data, write_model
from tests.test_layering import sources
from tests.training.test_kernels import ALL, HIDDEN, Judged, Recorded, label, trainer_of
from tests.training.tiny import (
    NO_DROPOUT,
    PAD,
    base_weights,
    close,
    collate,
    different,
    final_state,
    meta_weights,
    random_rows,
    same,
    tiny_arguments,
    tiny_base,
)

PREFIX = "base_model.model."  # of every name below peft's wrapper
RATE = 0.3


def lora_base(dtype: torch.dtype = torch.float64, *, alpha: int = 4, dropout: float = 0.0, **fields: Any) -> Any:
    """A two-layer XLM-R with an adapter that is not zero, as it is at the start."""
    settings = {"hidden_size": HIDDEN, "intermediate_size": 12, **NO_DROPOUT} | fields
    base = add_lora(tiny_base(dtype, **settings), r=2, alpha=alpha, dropout=dropout, target_modules=["query", "value"])
    torch.manual_seed(2)
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return base


def lora_tagger(name: str = "one_step", *, layer: int = 1, base: Any = None) -> CrossLingualTagger:
    base = lora_base() if base is None else base
    torch.manual_seed(1)
    rtn = RepresentationTransform(HIDDEN, layers=(layer,), bottleneck=1).to(next(base.parameters()).dtype)
    for parameter in rtn.parameters():
        nn.init.normal_(parameter, std=0.5)
    return (Judged if name == "first_order" else CrossLingualTagger)(base, rtn, pad_token_id=PAD)


def batch_of(count: int, language: int | list[int], seed: int) -> Batch:
    return collate(list(random_rows(count, seed=seed, language=language)))


def frozen(tagger: CrossLingualTagger) -> Tree:
    return {name: p.detach().clone() for name, p in tagger.base.named_parameters() if not p.requires_grad}


# What is learned


def test_the_base_parameters_are_the_adapters_and_the_classifiers() -> None:
    tagger = lora_tagger()
    trainable = {name for name, p in tagger.base.named_parameters() if p.requires_grad}
    assert {PREFIX + name for name in tagger.base_parameters()} == trainable
    kinds = {name.split(".")[-1 if "lora" not in name else -3] for name in tagger.base_parameters()}
    assert kinds == {"lora_A", "lora_B", "weight", "bias"}
    assert len(trainable) == 2 * 2 * 2 + 2, "two layers, two projections, two factors; the classifier"
    assert sum(name.startswith("classifier.") for name in tagger.base_parameters()) == 2


def test_names_and_parts_are_those_of_the_model_below() -> None:
    batch = batch_of(3, 0, seed=1)
    top, middle = lora_tagger(layer=2), lora_tagger(layer=1)
    for tagger in (top, middle):
        cut = tagger.cut()
        assert cut is not None
        assert cut.names == {name for name in tagger.base_parameters() if "classifier" in name}
        assert (cut.prefix is not None) == (tagger is top)
        assert tagger.touched_rows([batch]) == {}, "the embeddings are frozen"
    base = tiny_base(torch.float64, hidden_size=HIDDEN, intermediate_size=12, **NO_DROPOUT)
    config = LoraConfig(
        task_type=TaskType.TOKEN_CLS, r=2, modules_to_save=["word_embeddings"], target_modules=["query"]
    )
    assert lora_tagger(base=get_peft_model(base, config)).touched_rows([batch]) == {}, "its rows are below a wrapper"


def transformed(model: Any, rtn: RepresentationTransform, lam: Tree, w: Tree, batch: Batch, on: bool) -> Tensor:
    """Mean cross-entropy of one batch at the given weights, by torch alone."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        network: Any = rtn.nets[0][0]  # type: ignore[index]
        own = {name.removeprefix("nets.0.0."): leaf for name, leaf in lam.items()}
        return output + functional_call(network, own, (output.detach(), None))

    handle = model.get_base_model().roberta.encoder.layer[0].register_forward_hook(hook) if on else None
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = functional_call(model, {PREFIX + name: leaf for name, leaf in w.items()}, kwargs=inputs).logits
    if handle is not None:
        handle.remove()
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize(
    ("estimator", "tolerance"),
    [
        (OneStep("double_backward"), 1e-10),
        (OneStep("jvp"), 1e-10),
        (OneStep("finite_difference", radius=1e-4), 1e-6),
    ],
    ids=["double_backward", "jvp", "finite_difference"],
)
def test_one_step_is_autograd_through_the_adapters_step(estimator: OneStep, tolerance: float) -> None:
    model = lora_base(attn_implementation="eager")
    tagger = lora_tagger(base=copy.deepcopy(model)).eval()
    train_batch, meta_batch = batch_of(4, 0, seed=1), batch_of(3, TARGET, seed=2)
    w = {name: p.detach().clone().requires_grad_() for name, p in tagger.base_parameters().items()}
    lam = {name: p.detach().clone().requires_grad_() for name, p in tagger.meta_parameters().items()}
    inner = transformed(model.eval(), tagger.meta, lam, w, train_batch, on=True)
    step = torch.autograd.grad(inner, list(w.values()), create_graph=True)
    moved = {name: leaf - RATE * g for (name, leaf), g in zip(w.items(), step, strict=True)}
    outer = transformed(model, tagger.meta, lam, moved, meta_batch, on=False)
    expected = dict(zip(lam, torch.autograd.grad(outer, list(lam.values())), strict=True))
    found = hypergradient(
        tagger.problem(SGD(RATE)),
        estimator,
        tagger.base_parameters(),
        tagger.meta_parameters(),
        train_batch,
        meta_batch,
    )
    close(found.grads, expected, tolerance)
    torch.testing.assert_close(found.outer_loss, outer.detach(), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("layer", [1, 2])
def test_evograd_on_the_classifier_is_that_of_the_merged_model(layer: int) -> None:
    """Whose body is frozen; the noise is the same."""
    adapted = lora_tagger(layer=layer)
    plain = lora_tagger(layer=layer, base=merged(adapted.base))
    for name, parameter in plain.base.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    wrapped = {
        name: name.replace("classifier.", "classifier.modules_to_save.default.") for name in plain.base_parameters()
    }
    assert len(wrapped) == 2
    generator = torch.Generator().manual_seed(0)
    draws = [
        {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in plain.base_parameters().items()}
        for _ in range(3)
    ]
    estimator = EvoGrad(sigma=0.05, copies=3, parameters="^classifier", antithetic=False)
    found = [
        hypergradient(
            tagger.problem(SGD(RATE)), estimator, tagger.base_parameters(), tagger.meta_parameters(),
            batch_of(4, 0, seed=1), batch_of(3, TARGET, seed=2), noise=noise,
        )
        for tagger, noise in ((plain, draws), (adapted, [{wrapped[k]: v for k, v in one.items()} for one in draws]))
    ]  # fmt: skip
    assert found[1].counts == found[0].counts
    assert found[1].counts.suffixes > 0, "the encoder runs once for all copies"
    close(found[1].grads, found[0].grads, 1e-9)


# Every estimator in the trainer


FIRST = [*{name: (name, settings) for name, settings in reversed(ALL)}.values()]  # settings of each estimator


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", [OneStep("jvp"), OneStep("finite_difference"), EvoGrad(copies=2)], ids=str)
def test_frozen_weights_of_16_bits_are_those_numbers(estimator: Any, low: torch.dtype) -> None:
    """Meta passes in float32 compute with them as if they were held in float32."""

    def grads(dtype: torch.dtype) -> Tree:
        tagger = lora_tagger(base=lora_base(torch.float32)).eval()
        for parameter in tagger.base.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(low).to(dtype)
        w, lam = tagger.base_parameters(), tagger.meta_parameters()
        batches, generator = (batch_of(4, 0, seed=1), batch_of(3, TARGET, seed=2)), torch.Generator().manual_seed(0)
        found = hypergradient(tagger.problem(SGD(RATE)), estimator, w, lam, *batches, generator=generator).grads
        assert {leaf.dtype for leaf in frozen(tagger).values()} == {dtype}
        return found

    found, expected = grads(low), grads(torch.float32)
    assert not different(found, expected)
    assert any(bool(leaf.any()) for leaf in expected.values())


@pytest.mark.parametrize("meta_precision", ["float32", "bf16"])
def test_a_run_on_frozen_weights_of_16_bits(tmp_path: Path, meta_precision: str) -> None:
    tagger = lora_tagger(base=lora_base(torch.float32))
    for parameter in tagger.base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    fields = {"bf16": True, "meta_precision": meta_precision, "max_steps": 2}
    trainer = trainer_of(tmp_path, tagger, "one_step", {"engine": "jvp"}, **fields)
    fixed = frozen(tagger)
    trainer.train()
    assert all(bool(leaf.isfinite().all()) for leaf in trainer.results[-1].grads.values())
    assert not different(frozen(tagger), fixed)
    assert {leaf.dtype for leaf in fixed.values()} == {torch.bfloat16}
    assert {leaf.dtype for leaf in tagger.base_parameters().values()} == {torch.float32}


def test_every_estimator_is_here() -> None:
    assert {name for name, _ in FIRST} == ESTIMATORS.keys()


def lora_trainer(folder: Path, one: tuple[str, dict[str, Any]], *, base: Any = None, **fields: Any) -> Recorded:
    name, settings = one
    return trainer_of(folder, lora_tagger(name, base=base), name, settings, **{"max_steps": 4, **fields})


@pytest.mark.parametrize("one", FIRST, ids=[label(one) for one in FIRST])
def test_every_estimator_learns_from_the_adapter_and_leaves_the_rest(
    tmp_path: Path, one: tuple[str, dict[str, Any]]
) -> None:
    trainer = lora_trainer(tmp_path, one)
    tagger: Any = trainer.model
    fixed, start, lam = frozen(tagger), base_weights(trainer), meta_weights(trainer)
    trainer.train()
    assert len(trainer.results) > 0
    assert all(bool(leaf.isfinite().all()) for result in trainer.results for leaf in result.grads.values())
    assert all(any(bool(leaf.any()) for leaf in result.grads.values()) for result in trainer.results)
    assert set(different(base_weights(trainer), start)) == {PREFIX + name for name in tagger.base_parameters()}
    assert different(meta_weights(trainer), lam)
    assert not different(frozen(tagger), fixed)


@pytest.mark.parametrize("name", ["one_step", "evograd"])
def test_a_meta_pass_leaves_everything_as_it_was(tmp_path: Path, name: str) -> None:
    """Dropout in the adapter on, as in training."""
    trainer = lora_trainer(tmp_path, (name, {}), base=lora_base(dropout=0.3))
    trainer.train()
    trainer.model.train()

    def state() -> dict[str, Any]:
        modes = [module.training for module in trainer.model.modules()]
        held = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        return {**copy.deepcopy(final_state(trainer)), "modes": modes, "gradients": held, "python": random.getstate()}

    before = state()
    trainer.estimate(make_estimator(name))
    assert same(state(), before)


def test_a_resumed_run_is_bit_exact(tmp_path: Path) -> None:
    one = ("evograd", {"sigma": 0.05})
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = lora_trainer(tmp_path / "whole", one, base=lora_base(torch.float32, dropout=0.3), **saving)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert {"adapter", "rtn"} <= {path.name for path in checkpoint.iterdir()}
    assert not (checkpoint / "model.safetensors").exists()
    again = lora_trainer(tmp_path / "again", one, base=lora_base(torch.float32, dropout=0.3))
    for parameter in again.model.base_parameters().values():
        nn.init.zeros_(parameter)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert same(final_state(again), final_state(whole))


def test_first_order_passes_under_activation_checkpointing(tmp_path: Path) -> None:
    def grads(folder: str, **fields: Any) -> list[Tree]:
        trainer = lora_trainer(tmp_path / folder, ("evograd", {"sigma": 0.05}), **fields)
        trainer.train()
        return [result.grads for result in trainer.results]

    plain, checkpointed = grads("plain"), grads("checkpointed", activation_checkpointing=True)
    assert len(plain) == len(checkpointed) == 4
    for found, expected in zip(checkpointed, plain, strict=True):
        close(found, expected, 1e-12)


# Saved and loaded


def test_what_is_saved_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    saved, other = lora_tagger(), lora_tagger()
    for parameter in (*other.base_parameters().values(), *other.meta.parameters()):
        nn.init.normal_(parameter)
    saved.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "rtn"]
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert different(dict(other.named_parameters()), dict(saved.named_parameters()))
    other.load_pretrained(tmp_path)
    assert not different(dict(other.named_parameters()), dict(saved.named_parameters()))
    assert other.base_parameters().keys() == saved.base_parameters().keys(), "still trainable"


def spoilt(folder: Path) -> Iterator[str]:
    """Damages a saved adapter in turn; what is said of it."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights, whole, settings = load_file(file), file.read_bytes(), json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"lora_alpha": 99}))
    yield "another lora_alpha"
    config.write_text(json.dumps(settings))
    for name, leaf in {
        "classifier.weight": torch.zeros(9, HIDDEN, dtype=torch.float64),
        "surplus": torch.zeros(1),
    }.items():
        save_file({**weights, PREFIX + name: leaf}, file)
        yield f"does not fit this model at {PREFIX}{name}"
    file.write_bytes(whole[: len(whole) // 2])
    yield "cannot be read"
    file.unlink()
    yield "cannot be read"


def test_a_damaged_or_foreign_adapter_is_refused(tmp_path: Path) -> None:
    tagger = lora_tagger()
    tagger.save_pretrained(tmp_path)
    before = {name: p.detach().clone() for name, p in tagger.named_parameters()}
    cases = 0
    for message in spoilt(tmp_path / "adapter"):
        with pytest.raises(ValueError, match=message):
            tagger.load_pretrained(tmp_path)
        cases += 1
    assert cases == 5
    assert not different(dict(tagger.named_parameters()), before), "nothing is half loaded"


# Settings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_r", 0, "lora_r must be at least 1"),
        ("lora_alpha", 0, "lora_alpha must be at least 1"),
        ("lora_dropout", 1.0, "below 1"),
        ("lora_dropout", -0.1, "at least 0"),
    ],
)
def test_settings_that_cannot_be(field: str, value: float, message: str) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=message):
        NerArguments(use_peft=True, **settings)


def test_without_peft_its_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "is_peft_available", lambda: False)
    NerArguments()
    with pytest.raises(ValueError, match=r"pip install 'metaxl_evo\[peft\]'"):
        NerArguments(use_peft=True)


def test_peft_is_imported_where_it_is_asked_for_only() -> None:
    found = {}
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft":
                found[file.name] = node.col_offset
            assert not (isinstance(node, ast.Import) and any(one.name.startswith("peft") for one in node.names))
    assert found == {"adapters.py": 4}, "inside functions"


@pytest.mark.parametrize("targets", [["nothing"], ["query", "typo"], ["classifier"], ["uery"]])
def test_target_modules_that_match_nothing(targets: list[str]) -> None:
    with pytest.raises(ValueError, match=r"are no layers of .*: choose from all-linear, dense, key, query, value$"):
        add_lora(tiny_base(), r=2, alpha=2, dropout=0.0, target_modules=targets)


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (None, {"query", "value"}),
        (["attention.output.dense"], {"dense"}),
        (["all-linear"], {"query", "key", "value", "dense"}),
    ],
)
def test_target_modules(targets: list[str] | None, adapted: set[str]) -> None:
    base = add_lora(tiny_base(), r=2, alpha=2, dropout=0.0, target_modules=targets)
    names = [name for name, p in base.named_parameters() if p.requires_grad]
    assert {name.split(".")[-4] for name in names if "lora_A" in name} == adapted
    assert sum(".classifier.modules_to_save." in name for name in names) == 2


def test_what_changes_the_models_inputs_is_refused() -> None:
    config = PromptTuningConfig(task_type=TaskType.TOKEN_CLS, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PROMPT_TUNING changes the inputs"):
        lora_tagger(base=get_peft_model(tiny_base(hidden_size=HIDDEN), config))


# The script


LORA = {"use_peft": "true", "lora_r": 4, "lora_dropout": 0.1, "lora_target_modules": "query,value", "select": "dev"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data, model and the output folder of a finished LoRA run that chose its best checkpoint."""
    root = tmp_path_factory.mktemp("lora")
    places = {"data": write_data(root / "data"), "model": write_model(root / "model"), "run": root / "run"}
    train(places["model"], places["data"], places["run"], **{**WITH_DEV, **LORA, "learning_rate": 0.02})
    return places


def test_the_output_folder_is_a_plain_model_and_its_adapter(places: dict[str, Path]) -> None:
    run = places["run"]
    assert not (run / "adapter_config.json").exists(), "transformers would load it over the model"
    model: Any = AutoModelForTokenClassification.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    base = AutoModelForTokenClassification.from_pretrained(
        places["model"], id2label=model.config.id2label, label2id=model.config.label2id
    )
    start = base.state_dict()
    changed = [name for name, leaf in model.state_dict().items() if not torch.equal(leaf, start[name])]
    assert {name.split(".")[-2] for name in changed} == {"query", "value", "classifier"}
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), run / "adapter").eval()
    batch = tokenizer([["aba", "beru"]], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, adapted(**batch).logits, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert isinstance(pipeline("token-classification", model=str(run))("aba beru"), list)


def test_the_folder_evaluates_to_the_scores_of_the_run(places: dict[str, Path]) -> None:
    results = json.loads((places["run"] / "results.json").read_text())
    found = evaluate(
        ["--model_name_or_path", str(places["run"]), "--dataset", str(places["data"]), "--languages", "beru",
         "--max_length", "64"]
    )  # fmt: skip
    assert found["test"]["beru"]["f1"] == pytest.approx(results["test"]["beru"]["f1"], abs=1e-12)
    assert results["settings"]["use_peft"] is True
    assert results["run"]["best_checkpoint"] is not None
    assert "`adapter/`" in (places["run"] / "README.md").read_text()


def test_the_best_checkpoints_adapter_is_the_runs(places: dict[str, Path]) -> None:
    results = json.loads((places["run"] / "results.json").read_text())
    best = load_file(Path(results["run"]["best_checkpoint"]) / "adapter/adapter_model.safetensors")
    assert not different(load_file(places["run"] / "adapter/adapter_model.safetensors"), best)


def test_an_adapter_is_no_model(places: dict[str, Path]) -> None:
    for folder in (places["run"] / "adapter", next(places["run"].glob("checkpoint-*"))):
        with pytest.raises(ValueError, match="holds a peft adapter, not a model: give the output folder"):
            load_config(str(folder))


class OwnTask(BilevelModule):
    """Sequence classification, of which nothing knows that an adapter is below."""

    def inner_loss(self, batch: Batch) -> Tensor:
        return self.meta.weight.squeeze().sigmoid() * self.losses(batch)

    def outer_loss(self, batch: Batch) -> Tensor:
        return self.losses(batch)


def test_a_task_of_ones_own_leaves_a_plain_model_with_its_adapter(tmp_path: Path) -> None:
    """Checkpoints hold the adapter alone; the folder at the end loads by from_pretrained."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"])
    base = get_peft_model(AutoModelForSequenceClassification.from_config(config), lora)
    rows = [{"input_ids": torch.arange(4) + i, "labels": torch.tensor(i % 2)} for i in range(12)]
    trainer = MetaTrainer(
        OwnTask(base, nn.Linear(1, 1, bias=False)),
        tiny_arguments(tmp_path, meta_portion=1, learning_rate=0.1, save_strategy="steps", save_steps=3),
        train_dataset=rows,
        meta_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "checkpoint-3/model.safetensors").exists()
    assert (tmp_path / "checkpoint-3/adapter/adapter_model.safetensors").is_file()
    batch = {"input_ids": torch.arange(8).reshape(2, 4)}
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model.base(**batch).logits
        torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-5, atol=1e-6)
        adapter = PeftModel.from_pretrained(base.unload(), tmp_path / "adapter").eval()
        torch.testing.assert_close(adapter(**batch).logits, expected, rtol=1e-5, atol=1e-6)
