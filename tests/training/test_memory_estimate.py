"""The formula of a process's memory against the peak of all live storage, on two processes with a sharded base."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, TrainerCallback, XLMRobertaConfig

from metaxl_evo.benchmark.memory import live_tensors
from metaxl_evo.cli import main
from metaxl_evo.models.rtn import RepresentationTransform
from metaxl_evo.ner.tagger import CrossLingualTagger
from metaxl_evo.training.memory_estimate import GIB, HEADS, MemoryArguments, memory_of
from tests.processes import on_processes
from tests.sharded import ShardedTrainer
from tests.training.tiny import NO_DROPOUT, PAD, random_rows, tiny_base, tiny_trainer

ROWS, TOKENS = 4, 64
SMALL = 1024
SIZES = {  # of the network: where activations weigh most, where copies of weights do, where the table does
    "activations": ({"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 2000}, "one_step"),
    "copies": ({"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 4000}, "evograd"),
    "table": ({"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 20000}, "one_step"),
}


class Peak(TorchDispatchMode):
    """The most bytes in all storages that are alive; fully_shard frees what it gathered by making it smaller.

    Those below a KiB, of which there are very many, are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held, self.peak = WeakIdKeyDictionary(), 0
        for tensor in live_tensors():
            self._hold(tensor.untyped_storage())

    def _hold(self, storage: torch.UntypedStorage) -> bool:
        """Whether it is a new one that counts."""
        new = storage.nbytes() >= SMALL and storage not in self.held
        if new:
            self.held[storage] = True
        return new

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [leaf._local_tensor if isinstance(leaf, DTensor) else leaf for leaf in tree_leaves(out)]
        new = [self._hold(leaf.untyped_storage()) for leaf in leaves if isinstance(leaf, Tensor)]
        if any(new):
            self.peak = max(self.peak, sum(storage.nbytes() for storage in self.held))
        return out


class Looks(TrainerCallback):
    """At the second step, when there are moments."""

    def __init__(self) -> None:
        self.mode: Peak | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.mode = Peak()
            self.mode.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.mode is not None
        self.mode.__exit__(None, None, None)


def network(size: dict[str, int]) -> Any:
    wide = size | {"intermediate_size": 4 * size["hidden_size"], "max_position_embeddings": TOKENS + 16}
    return tiny_base(**wide, **NO_DROPOUT)


def rows(language: int) -> Dataset:
    """All of one length."""
    found = random_rows(16, seed=1, language=language)
    return found.map(lambda row: {key: (row[key] * TOKENS)[:TOKENS] for key in row if key != "language"})


def peaks() -> dict[str, tuple[int, int]]:
    """And the numbers of the meta network."""
    found = {}
    for name, (size, estimator) in SIZES.items():
        rtn = RepresentationTransform(size["hidden_size"], layers=(1,), languages=("source",), kind="gated_tied")
        tagger = CrossLingualTagger(network(size), rtn, pad_token_id=PAD)
        tagger.straight_through = True  # the value test, once a run, has copies of its own
        looks = Looks()
        with tempfile.TemporaryDirectory() as folder:
            trainer = tiny_trainer(
                folder,
                tagger=tagger,
                train=rows(0),
                meta=rows(-1),
                trainer_class=ShardedTrainer,
                fsdp=True,
                estimator=estimator,
                max_steps=2,
                meta_portion=1,
                per_device_train_batch_size=ROWS,
                per_device_meta_batch_size=ROWS,
            )
            trainer.add_callback(looks)
            trainer.train()
        assert looks.mode is not None
        found[name] = looks.mode.peak, sum(p.numel() for p in rtn.parameters())
        del tagger, trainer, looks
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_the_formula_is_within_a_tenth_of_the_peak() -> None:
    for name, (peak, meta) in on_processes(2, peaks)[0].items():
        size, estimator = SIZES[name]
        settings = {"head": "tokens", "processes": 2, "rows": ROWS, "tokens": TOKENS, "estimator": estimator}
        found = memory_of(network(size).to("meta"), MemoryArguments("", meta_parameters=meta, **settings))  # type: ignore[arg-type]
        print(f"{name}: {peak / 2**20:.2f} MiB, by the formula {found.total / 2**20:.2f} MiB")
        assert found.total == pytest.approx(peak, rel=0.1), name


def test_the_command_loads_no_weights(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_base().config.save_pretrained(tmp_path)
    numbers = sum(p.numel() for p in tiny_base().parameters())
    options = ["--head", "tokens", "--processes", "4", "--tokens", "16", "--estimator", "one_step"]
    assert main(["estimate-memory", "--model_name_or_path", str(tmp_path), *options]) == 0
    said, *lines = capsys.readouterr().out.splitlines()
    assert said.endswith(", head tokens: 4 processes, 1 rows of 16 tokens, one_step, 0 meta parameters")
    terms = {line.split()[0]: float(line.split()[-2]) for line in lines}
    assert list(terms) == ["weights", "moments", "perturbed", "pass", "meta", "in"]
    assert terms["weights"] == pytest.approx(4 * numbers / 4 / GIB, rel=0.01)
    assert terms["moments"] == pytest.approx(2 * terms["weights"], rel=0.01)


LLAMA = {"num_attention_heads": 32, "head": "language"}
MODELS: dict[str, dict[str, Any]] = {  # of the table in docs/scaling.md
    "0.3B": {"head": "tokens", "vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1},
    "1B": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8}
    | {"vocab_size": 128256, "tie_word_embeddings": True},
    "7B": LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_the_docs_is_what_the_formula_says(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} (")]
    alone, *rest = [float(cell) for cell in line.split("|")[2:9]]
    settings = dict(MODELS[name])
    head = settings.pop("head")
    config = (LlamaConfig if head == "language" else XLMRobertaConfig)(**settings)
    with torch.device("meta"):
        base = HEADS[head].from_config(config, dtype=torch.float32)
    for place, processes, one in ((0, 8, "none"), (1, 8, "one_step"), (5, 64, "evograd")):
        found = memory_of(base, MemoryArguments("", head=head, processes=processes, rows=1, tokens=512, estimator=one))
        assert found.total / GIB == pytest.approx(rest[place], rel=0.03)
    assert 16 * sum(p.numel() for p in base.parameters()) / GIB == pytest.approx(alone, rel=0.03)


def test_estimators_that_were_not_measured_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unroll.* none, one_step, evograd"):
        MemoryArguments("", estimator="unroll")
    with pytest.raises(ValueError, match="processes must be at least 2"):
        MemoryArguments("", processes=1)


def test_what_autograd_keeps_of_one_layer() -> None:
    """Of tanh its result, of a product the other factor; weights are no activations."""
    from metaxl_evo.training.memory_estimate import activations

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.out(torch.tanh(self.table(input_ids)))

    ids, hidden = 6 * 8, 6 * 3 * 4  # bytes of 2 x 3 tokens
    assert activations(Net().to("meta"), 2, 3) == ids + hidden
