"""The loss contract: what a task may return, what it means, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_utils import PreTrainedModel

from metaxl_evo import MetaTrainer, WeightNet
from metaxl_evo.bilevel import SGD, hypergradient
from metaxl_evo.estimators.one_step import OneStep
from metaxl_evo.models.bilevel_module import BilevelModule, totals_of
from metaxl_evo.models.losses import TOTALS, set_totals
from tests.training.tiny import collate as collate_tokens
from tests.training.tiny import random_rows, tiny_arguments, tiny_base

ROWS, WIDTH = 8, 3
Batch = dict[str, Any]


class Task(BilevelModule):
    """Regression, an example's weight read off its features; each form of the loss is a subclass."""

    def errors(self, batch: Batch) -> Tensor:
        return (self.base(batch["x"])[:, 0] - batch["y"]).square()

    def weighted(self, batch: Batch) -> Tensor:
        return self.meta(batch["x"]).sigmoid()[:, 0] * self.errors(batch)

    def inner_loss(self, batch: Batch) -> Any:
        return self.weighted(batch)

    def outer_loss(self, batch: Batch) -> Any:
        return self.errors(batch)


class Masked(Task):
    """Rows with a negative first feature do not count."""

    def inner_loss(self, batch: Batch) -> Any:
        return {"kept": (self.weighted(batch), batch["x"][:, 0] >= 0)}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"kept": int((batch["x"][:, 0] >= 0).sum()), "all": len(batch["x"])}

    def outer_loss(self, batch: Batch) -> Any:
        return {"all": self.errors(batch)}


class LeftOut(Masked):
    def inner_loss(self, batch: Batch) -> Any:
        return {"kept": self.weighted(batch)[batch["x"][:, 0] >= 0]}


class TwoMeans(Masked):
    """A weighted sum of two means; micro-batches need not have both kinds."""

    def inner_loss(self, batch: Batch) -> Any:
        kept = batch["x"][:, 0] >= 0
        losses = self.weighted(batch)
        return {"kept": losses[kept], "left": 0.3 * losses[~kept]}

    def counts(self, batch: Batch) -> dict[str, int]:
        kept = int((batch["x"][:, 0] >= 0).sum())
        return {"kept": kept, "left": len(batch["x"]) - kept, "all": len(batch["x"])}


class Mean(Task):
    """A mean of its own, over what `counts` says."""

    def inner_loss(self, batch: Batch) -> Any:
        return self.weighted(batch).mean()

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"rows": len(batch["x"])}


class Sum(Mean):
    """The old form."""

    def inner_loss(self, batch: Batch) -> Any:
        return self.weighted(batch).sum() / totals_of(self, batch)["rows"]


class BareMean(Task):
    def inner_loss(self, batch: Batch) -> Any:
        return self.weighted(batch).mean()


FORMS = [Task, Masked, LeftOut, TwoMeans, Mean, Sum]


def by_hand(form: type[Task], batch: Batch, task: Task) -> Tensor:
    """The mean over all rows of the window, from the definition."""
    losses, kept = task.weighted(batch), batch["x"][:, 0] >= 0
    if form is TwoMeans:
        return losses[kept].sum() / kept.sum() + 0.3 * losses[~kept].sum() / (~kept).sum()
    return losses[kept].mean() if issubclass(form, Masked) else losses.mean()


def task_of(form: type[Task]) -> Task:
    torch.manual_seed(0)
    return form(nn.Linear(WIDTH, 1).double(), nn.Linear(WIDTH, 1).double())


def rows(count: int = ROWS, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(WIDTH, generator=generator, dtype=torch.float64),
            "y": torch.randn((), generator=generator, dtype=torch.float64),
        }
        for _ in range(count)
    ]


def collate(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in found]) for key in found[0]}


@pytest.mark.filterwarnings("ignore:.*totals_of:FutureWarning")
@pytest.mark.parametrize("cut", [[8], [4, 4], [1] * 8, [3, 5]])
@pytest.mark.parametrize("form", FORMS)
def test_shares_add_up_to_the_mean_over_the_window(form: type[Task], cut: list[int]) -> None:
    task, held = task_of(form), rows()
    pieces = iter(held)
    parts = [collate([next(pieces) for _ in range(size)]) for size in cut]
    set_totals(task, parts, tuple(named(task.counts(parts[0]))))
    expected = by_hand(form, collate(held), task)
    torch.testing.assert_close(sum(map(task.mean_inner_loss, parts)), expected, rtol=1e-12, atol=0.0)


def named(counts: int | dict[str, int]) -> dict[str, int]:
    return counts if isinstance(counts, dict) else {"items": counts}


@pytest.mark.filterwarnings("ignore:.*totals_of:FutureWarning")
@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("form", FORMS)
def test_base_gradient_and_logged_loss_do_not_depend_on_accumulation(
    tmp_path: Any, form: type[Task], steps: int
) -> None:
    task = task_of(form)
    whole = collate(rows())
    expected_loss = by_hand(form, whole, task)
    expected = torch.autograd.grad(expected_loss, list(task.base.parameters()))
    start = [parameter.detach().clone() for parameter in task.base.parameters()]
    trainer = one_step(tmp_path, task, gradient_accumulation_steps=steps)
    for before, after, gradient in zip(start, task.base.parameters(), expected, strict=True):
        torch.testing.assert_close(before - after, gradient, rtol=1e-6, atol=1e-9)  # the schedule's rate is a float
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(float(expected_loss), rel=1e-5)


def one_step(folder: Any, task: Task, gradient_accumulation_steps: int = 1, **fields: Any) -> MetaTrainer:
    """One base step of learning rate 1 over all rows."""
    args = tiny_arguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=ROWS // gradient_accumulation_steps,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=1.0,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        meta_portion=1.0,
        **fields,
    )
    trainer = MetaTrainer(task, args, train_dataset=rows(), meta_dataset=rows(4, seed=2), data_collator=collate)
    trainer.train()
    return trainer


def test_a_mean_of_its_own_is_right_once_and_refused_elsewhere(tmp_path: Any) -> None:
    task = task_of(BareMean)
    before = [p.detach().clone() for p in task.parameters()]
    with pytest.raises(ValueError, match=r"BareMean.inner_loss returned a mean of its own .* 2 micro-batches: return"):
        one_step(tmp_path / "two", task, gradient_accumulation_steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    one_step(tmp_path / "one", task)


def test_an_empty_mean_adds_nothing() -> None:
    task, part = task_of(Mean), collate(rows(2))
    none = {key: value[:0] for key, value in part.items()}
    set_totals(task, window := [part, none], ("rows",))
    loss = task.mean_inner_loss(window[1])
    assert loss == 0
    gradients = torch.autograd.grad(loss, list(task.base.parameters()))
    assert not any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("engine", ["jvp", "finite_difference"])
def test_an_empty_mean_adds_nothing_at_weights_swapped_in(engine: str) -> None:
    task, part = task_of(Mean), collate(rows(2))
    none = {key: value[:0] for key, value in part.items()}
    problem, w, lam = task.problem(SGD(0.1)), task.base_parameters(), task.meta_parameters()
    estimator = OneStep(engine, radius=1e-4)
    found, expected = (hypergradient(problem, estimator, w, lam, one, part).grads for one in ([none, part], [part]))
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-10, atol=0.0)


def test_the_old_form_says_once_that_it_goes() -> None:
    class Old(Sum):
        pass

    task, batch = task_of(Old), collate(rows())
    with pytest.warns(FutureWarning, match="Old divides its losses by totals_of"):
        task.mean_inner_loss(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.mean_inner_loss(batch)


REFUSED: dict[str, tuple[type[Task], Callable[[Task, Batch], Any], str]] = {
    "zeros": (Mean, lambda t, b: t.weighted(b)[1:], "returned 7 losses of 'rows' .* counts.batch. says 8: leave"),
    "broadcast": (Task, lambda t, b: t.meta(b["x"]) * t.errors(b), r"shape \[8, 8\] for a batch of 8 rows"),
    "column": (Task, lambda t, b: t.base(b["x"]) ** 2, r"shape \[8, 1\] for a batch of 8 rows: return one a row"),
    "name": (Mean, lambda t, b: {"row": t.weighted(b)}, r"losses of 'row', of which counts.batch. knows \['rows'\]"),
    "names": (TwoMeans, lambda t, b: t.weighted(b), "counts are of .*: return a dict"),
    "number": (Task, lambda t, b: 1.0, "returned float: return the losses"),
    "divided": (
        Mean,
        lambda t, b: t.weighted(b) / totals_of(t, b)["rows"],
        "divided by them as well: leave totals_of",
    ),
    "in place": (Task, lambda t, b: b["x"].mul_(2)[:, 0] * t.weighted(b), "changes a tensor of its batch in place"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_loss_of_the_items_is_refused_in_one_line(case: str) -> None:
    form, loss, message = REFUSED[case]
    task, batch = task_of(form), collate(rows())
    task.inner_loss = lambda batch: loss(task, batch)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message) as error:
        task.mean_inner_loss(batch)
    assert "\n" not in str(error.value)


def test_a_loss_may_take_keys_from_its_batch() -> None:
    task, batch = task_of(Task), collate(rows())
    expected = task.mean_inner_loss({**batch, "nested": {"y": 1}})

    def pops(batch: Batch) -> Tensor:
        batch["nested"].pop("y")
        y = batch.pop("y")
        return task.weighted({"x": batch.pop("x"), "y": y})

    task.inner_loss = pops  # type: ignore[method-assign]
    held = {**batch, "nested": {"y": 1}, TOTALS: {"items": ROWS}}
    for _ in range(2):
        torch.testing.assert_close(task.mean_inner_loss(held), expected)
    assert held["nested"] == {"y": 1}


def test_rows_are_counted_or_asked_for() -> None:
    task = task_of(Task)
    assert task.counts({"x": torch.ones(3, 2), "scale": torch.tensor(1.0)}) == 3
    assert task.counts({"texts": ["a", "b"]}) == 2
    assert task.counts({"labels": torch.ones(2), "prior": torch.ones(5)}) == 2
    for batch in ({"x": torch.ones(3), "prior": torch.ones(5)}, {}):
        with pytest.raises(ValueError, match=r"define counts\(batch\)"):
            task.counts(batch)


def test_a_parameter_of_both_networks_is_refused() -> None:
    class OnTop(nn.Module):
        def __init__(self, encoder: nn.Module):
            super().__init__()
            self.encoder, self.read = encoder, nn.Linear(1, 1)

    base = nn.Sequential(nn.Linear(WIDTH, 1))
    with pytest.raises(ValueError, match=r"base.0.weight is meta.encoder.weight \(2 parameters in all\).*copy"):
        Task(base, OnTop(base[0]))
    assert all(parameter.requires_grad for parameter in base.parameters())


# The losses of Hugging Face heads


SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def heads() -> dict[str, tuple[PreTrainedModel, Batch]]:
    torch.manual_seed(0)
    ids = torch.randint(3, 30, (4, 7))
    labels = ids.masked_fill(torch.rand(4, 7) < 0.3, -100)
    labels[:, -1] = ids[:, -1]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.arange(4)}
    bert = {**SMALL, "max_position_embeddings": 16}
    return {
        "classes": (BertForSequenceClassification(BertConfig(**bert, num_labels=3)), text | {"labels": ids[:, 0] % 3}),
        "regression": (
            BertForSequenceClassification(BertConfig(**bert, num_labels=1)),
            text | {"labels": torch.rand(4)},
        ),
        "several": (
            BertForSequenceClassification(BertConfig(**bert, num_labels=3)),
            text | {"labels": (torch.rand(4, 3) > 0.5).float()},
        ),
        "tagging": (tiny_base(), collate_tokens(list(random_rows(4, seed=1, language=None)))),
        "llama": (LlamaForCausalLM(LlamaConfig(**SMALL)), text | {"labels": labels}),
        "gpt2": (
            GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
            text | {"labels": labels},
        ),
        "t5": (
            T5ForConditionalGeneration(
                T5Config(
                    vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
                )
            ),
            text | {"labels": labels},
        ),
        "images": (
            ViTForImageClassification(
                ViTConfig(**{**SMALL, "vocab_size": None}, image_size=8, patch_size=4, num_labels=3)
            ),
            {"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.arange(4) % 3},
        ),
    }


TOKENS = ("tagging", "llama", "gpt2", "t5")


@pytest.mark.parametrize("name", [*heads()])
def test_row_losses_are_the_models_own_loss_of_each_row(name: str) -> None:
    model, batch = heads()[name]
    task = Task(model.eval(), nn.Linear(1, 1))
    inputs = {key: value for key, value in batch.items() if key != "index"}
    expected = [
        model(**{key: value[row : row + 1] for key, value in inputs.items()}).loss for row in range(4)
    ]  # a row of its own: padding is masked, so it changes nothing
    torch.testing.assert_close(task.losses(batch), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert task.losses(batch).requires_grad
    if name in TOKENS:
        found = task.losses(batch, tokens=True)
        torch.testing.assert_close(found.mean(), model(**inputs).loss, rtol=1e-5, atol=1e-6)
        assert len(found) == task.labelled_tokens(batch)
        means = [found[task.token_rows(batch) == row].mean() for row in range(4)]
        torch.testing.assert_close(torch.stack(means), task.losses(batch))
    else:
        with pytest.raises(ValueError, match="one loss a row"):
            task.losses(batch, tokens=True)


def test_losses_say_what_they_cannot_know() -> None:
    batch = collate(rows())
    with pytest.raises(ValueError, match="the losses of a Linear are not known here"):
        task_of(Task).losses({**batch, "labels": batch["y"]})
    model, held = heads()["llama"]
    with pytest.raises(ValueError, match="no labels"):
        Task(model, nn.Linear(1, 1)).losses({"input_ids": held["input_ids"]})
    held["labels"][1] = -100
    with pytest.raises(ValueError, match="a row has no labelled token"):
        Task(model, nn.Linear(1, 1)).losses(held)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="a loss of its routers"):
        Task(model, nn.Linear(1, 1)).losses(held)
    model, held = heads()["classes"]
    held["labels"][1] = -100  # which cross_entropy takes for a loss of zero
    with pytest.raises(ValueError, match="a row has the label -100"):
        Task(model, nn.Linear(1, 1)).losses(held)


def test_causal_models_with_a_loss_of_their_own_are_refused() -> None:
    """BART's decoder is one: it does not shift its labels."""
    sizes = {"vocab_size": 30, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    task = Task(BartForCausalLM(BartConfig(**sizes)), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="the losses of a BartForCausalLM are not known here"):
        task.losses(heads()["llama"][1])


@pytest.mark.parametrize("name", ["classes", "llama"])
def test_labels_may_be_integers_of_any_width(name: str) -> None:
    model, batch = heads()[name]
    task = Task(model.eval(), nn.Linear(1, 1))
    assert torch.equal(task.losses(batch | {"labels": batch["labels"].int()}), task.losses(batch))


# What a task need not write


class Net(nn.Module):
    """A base that is no Hugging Face model, two of whose parameters are one."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.outside.weight = self.inside.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(torch.tanh(self.inside(x)))


def test_networks_without_save_pretrained_come_back(tmp_path: Any) -> None:
    torch.manual_seed(0)
    task, other = (Task(Net(), nn.Linear(WIDTH, 1)) for _ in range(2))
    task.save_pretrained(tmp_path)
    other.load_pretrained(tmp_path)
    for a, b in zip(task.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.base.inside.weight is other.base.outside.weight
    (tmp_path / "meta" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"meta/model.safetensors cannot be read"):
        other.load_pretrained(tmp_path)


def test_a_meta_network_keeps_its_own_files(tmp_path: Any) -> None:
    torch.manual_seed(0)
    task = Task(nn.Linear(WIDTH, 1), WeightNet(5))
    task.save_pretrained(tmp_path)
    found = WeightNet.from_pretrained(tmp_path / "meta")
    assert all(torch.equal(a, b) for a, b in zip(task.meta.parameters(), found.parameters(), strict=True))
    other = Task(nn.Linear(WIDTH, 1), WeightNet(5))
    other.load_pretrained(tmp_path)
    assert torch.equal(other.meta.hidden.weight, found.hidden.weight)


def test_evaluation_takes_the_columns_that_the_base_takes() -> None:
    batch = {"x": torch.ones(2, WIDTH), "index": torch.arange(2)}
    task = Task(Net(), nn.Linear(WIDTH, 1)).eval()
    assert torch.equal(task(**batch), task.base(batch["x"]))
