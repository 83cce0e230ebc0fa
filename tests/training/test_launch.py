"""Launches that would be silently wrong are refused at construction, each in one line with the way out.

Neither deepspeed, Megatron-LM nor a second GPU is here: those launches are seen by the arguments and the environment
that `accelerate launch` sets, which is all that the refusal reads. Wrapped, sharded and offloaded models are real, on
a CPU; the quantised ones stand in for those of packages that are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from metaxl_evo.ner.tagger import CrossLingualTagger
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.distributed import refuse_lost_processes
from metaxl_evo.training.trainer import MetaTrainer
from tests.training.tiny import logged, random_rows, tiny_arguments, tiny_base, tiny_tagger, tiny_trainer

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "fsdp 1": ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp version 1: .*version: 2"),
    "fsdp of earlier versions": ({"fsdp": "full_shard auto_wrap"}, "fsdp of one process: .*leave it out"),
    "fsdp, compiled": ({"fsdp": True, "torch_compile": True}, "fsdp and torch_compile: .*leave torch_compile out"),
    "fsdp, offloaded": ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "fsdp cpu_offload: .*leave it out"),
    "fsdp, loaded once": (
        {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}},
        "fsdp cpu_ram_efficient_loading: .*set it to false",
    ),
    "fsdp, renamed": (
        {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
        "fsdp activation_checkpointing: .*gradient_checkpointing: true",
    ),
    "deepspeed": ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "deepspeed: .*FSDP2 .*DDP"),
    "fp16": ({"fp16": True}, "fp16: .*bf16 or float32"),
    "tensor parallel": ({"parallelism_config": ParallelismConfig(tp_size=2)}, "tp_size: .*DDP"),
    "sharded data parallel": ({"parallelism_config": ParallelismConfig(dp_shard_size=2)}, "dp_shard_size: .*DDP"),
    "context parallel": ({"parallelism_config": ParallelismConfig(cp_size=2)}, "cp_size: .*DDP"),
    "sequence parallel": ({"parallelism_config": ParallelismConfig(sp_size=2, sp_backend="deepspeed")}, "sp_size"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel: .*leave it out"),
    "another checkpointing": ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint: SIGTERM .*leave it out"),
    "neftune": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: .*leave it out"),
    "dispatched batches": (
        {"accelerator_config": {"dispatch_batches": True}, "save_strategy": "steps"},
        "dispatch_batches: .*save_strategy: no",
    ),
    "another sampler": (
        {"accelerator_config": {"use_seedable_sampler": False}, "save_strategy": "steps"},
        "use_seedable_sampler: false: .*leave it true",
    ),
}
META_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "shrinking batches": ({"auto_find_batch_size": True}, "auto_find_batch_size: .*gradient_accumulation_steps"),
}
ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {  # arguments as another machine makes them
    "DataParallel": ({"n_gpu": 2}, "DataParallel: .*accelerate launch"),
    "uneven ranks": (
        {"world_size": 2, "accelerator_config": SimpleNamespace(even_batches=False)},
        "even_batches: false: .*leave it true",
    ),
    "16 bits when evaluated": ({"world_size": 2, "bf16_full_eval": True}, "bf16_full_eval: .*bf16: true"),
}
ENVIRONMENTS: dict[str, tuple[dict[str, str], str]] = {
    "--use_fsdp": ({"ACCELERATE_USE_FSDP": "true"}, "fsdp version 1: .*--fsdp_version 2"),
    "--fsdp_offload_params": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
        "fsdp cpu_offload: .*leave it out",
    ),
    "--use_deepspeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed: .*FSDP2 .*DDP"),
    "--use_megatron_lm": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM: .*DDP"),
    "--mixed_precision fp16": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16: .*bf16 or float32"),
    "--mixed_precision fp8": ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8: .*bf16 or float32"),
    "--parallelism_config_tp_size": (
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
        "tp_size: .*DDP",
    ),
}
META_ENVIRONMENTS: dict[str, tuple[dict[str, str], str]] = {
    "--dynamo_backend": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend: .*torch_compile: true"),
}


SHARDED: dict[str, tuple[dict[str, Any], str]] = {  # what meta steps cannot bear with fsdp
    "two derivatives": (
        {"estimator": "one_step", "estimator_kwargs": {"engine": "double_backward"}},
        "fsdp and OneStep.*work .*first_order, one_step, evograd, sama, neumann, conjugate_gradient, greedy$",
    ),
    "exact Hessian products": (
        {"estimator": "neumann", "estimator_kwargs": {"engine": "jvp"}},
        r"fsdp and Neumann.*work engine finite_difference \(jvp where there are no Hessian",
    ),
    "whole episodes": ({"estimator": "unroll", "episode_length": 2}, "fsdp and Unroll.*work .*first_order, "),
    "drawn examples": (
        {"estimator": "hyperdistill", "estimator_kwargs": {"scale": "one"}},
        "fsdp and HyperDistill.*use DDP, or greedy$",
    ),
    "bf16": ({"bf16": True}, "fsdp and bf16: .*use float32"),
    "bf16 meta passes": ({"meta_precision": "bf16"}, "fsdp and bf16: .*use float32"),
    "diagnostics": ({"meta_diagnostics_every": 2}, "fsdp and meta_diagnostics_every: .*leave it at 0"),
    "resets": ({"episode_length": 2, "episode_reset": "restart"}, "fsdp and episode_reset: restart: .*use DDP"),
}


class Elsewhere:
    """Arguments with some values that this machine cannot make."""

    def __init__(self, args: MetaTrainingArguments, **fields: Any):
        self.__dict__ |= {"_args": args, **fields}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_args"], name)


class FourBits(torch.Tensor):
    """In place of a tensor subclass of a quantisation package."""


def based_on(change: Callable[[Any], Any]) -> CrossLingualTagger:
    tagger = tiny_tagger()
    changed = change(tagger.base)
    tagger.base = tagger.base if changed is None else changed
    return tagger


def with_classifier(weight: Any) -> CrossLingualTagger:
    tagger = tiny_tagger()
    held: Any = tagger.base.get_submodule("classifier")
    del held.weight
    held.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return tagger


def marked(**attributes: Any) -> CrossLingualTagger:
    tagger = tiny_tagger()
    tagger.base.__dict__ |= attributes
    return tagger


def dtensor() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(torch.zeros(5, 32), init_device_mesh("cpu", (1,)))


def fully_shard(base: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard

    shard(base, mesh=init_device_mesh("cpu", (1,)))


def half_meta() -> CrossLingualTagger:
    tagger = tiny_tagger()
    tagger.meta.bfloat16()
    return tagger


def half_frozen() -> CrossLingualTagger:
    tagger = tiny_tagger()
    tagger.base.base_model.bfloat16().requires_grad_(False)
    return tagger


def flash_attention() -> CrossLingualTagger:
    tagger = tiny_tagger()
    tagger.base.config._attn_implementation_internal = "flash_attention_2"
    return tagger


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "no task": (tiny_base, "a XLMRobertaForTokenClassification as model: .*BilevelModule"),
    "wrapped task": (lambda: nn.DataParallel(tiny_tagger()), "a DataParallel as model: .*unwrapped"),
    "compiled task": (lambda: torch.compile(tiny_tagger()), "a OptimizedModule as model: .*unwrapped"),
    "DataParallel base": (lambda: based_on(nn.DataParallel), "inside DataParallel: .*bare"),
    "compiled base": (lambda: based_on(torch.compile), "inside OptimizedModule: .*bare"),
    "quantiser": (lambda: marked(hf_quantizer=object()), "a quantised model: .*without quantization_config"),
    "several devices": (
        lambda: marked(hf_device_map={"roberta": 0, "classifier": "cpu"}),
        "several devices: .*without device_map",
    ),
    "8 bits": (lambda: with_classifier(torch.zeros(5, 32, dtype=torch.int8)), "int8 parameters.*in float32"),
    "4 bits": (lambda: with_classifier(torch.zeros(5, 32).as_subclass(FourBits)), "are FourBitss.*load them plain"),
    "offloaded": (lambda: with_classifier(torch.zeros(5, 32, device="meta")), "meta device .*load them whole"),
}
DISTRIBUTED_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "DDP base": (lambda: based_on(nn.parallel.DistributedDataParallel), "inside DistributedDataParallel: .*bare"),
    "sharded base": (lambda: with_classifier(dtensor()), "parameters that are DTensors .*load them plain"),
    "FSDP2 base": (lambda: based_on(fully_shard), "parameters that are DTensors .*load them plain"),
}
META_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "bf16 base": (lambda: based_on(lambda base: base.bfloat16()), r"bfloat16 parameters \(base.*dtype=torch.float32"),
    "fp16 base": (lambda: based_on(lambda base: base.half()), r"float16 parameters \(base.*dtype=torch.float32"),
    "frozen bf16 weights": (
        half_frozen,
        r"frozen torch.bfloat16 parameters \(base.* below float32 ones: .*bf16: true",
    ),
    "bf16 meta network": (half_meta, r"bfloat16 parameters \(meta.*dtype=torch.float32"),
    "flash attention": (flash_attention, "attn_implementation: flash_attention_2: .*sdpa, or meta_precision: bf16"),
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Variables that are gone afterwards, and with them what accelerate took from them."""
    yield monkeypatch
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def one_rank(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def refused(message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=f"^MetaTrainer does not run with .*{message}") as error:
        make()
    assert "\n" not in str(error.value)


def test_every_kind_of_refusal_is_here() -> None:
    tables = (ARGUMENTS, ELSEWHERE, ENVIRONMENTS, MODELS, DISTRIBUTED_MODELS)
    assert [len(table) for table in tables] == [17, 3, 7, 10, 3]
    assert [len(table) for table in (META_ARGUMENTS, META_ENVIRONMENTS, META_MODELS, SHARDED)] == [1, 1, 5, 8]


def in_turn(cases: Iterable[str]) -> Any:
    """The cases, with an estimator and without one by turns."""
    both = [(case, ("evograd", "none")[index % 2]) for index, case in enumerate(cases)]
    return pytest.mark.parametrize(("case", "estimator"), both)


@in_turn(ARGUMENTS)
def test_arguments(case: str, estimator: str, tmp_path: Path) -> None:
    fields, message = ARGUMENTS[case]
    refused(message, lambda: tiny_trainer(tmp_path, estimator=estimator, **fields))


@pytest.mark.parametrize("case", ELSEWHERE)
def test_arguments_of_another_machine(case: str, tmp_path: Path) -> None:
    fields, message = ELSEWHERE[case]
    args: Any = Elsewhere(tiny_arguments(tmp_path), **fields)
    refused(message, lambda: MetaTrainer(tiny_tagger(), args, train_dataset=random_rows(4, seed=1)))


@in_turn(ENVIRONMENTS)
def test_environments_of_accelerate_launch(
    case: str, estimator: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variables, message = ENVIRONMENTS[case]
    for name, value in variables.items():
        environment.setenv(name, value)
    refused(message, lambda: tiny_trainer(tmp_path, estimator=estimator))


@in_turn(MODELS)
def test_models(case: str, estimator: str, tmp_path: Path) -> None:
    make, message = MODELS[case]
    tagger: Any = make()
    refused(message, lambda: tiny_trainer(tmp_path, tagger=tagger, estimator=estimator))


@pytest.mark.parametrize("case", DISTRIBUTED_MODELS)
@pytest.mark.usefixtures("one_rank")
def test_models_of_a_process_group(case: str, tmp_path: Path) -> None:
    make, message = DISTRIBUTED_MODELS[case]
    tagger: Any = make()
    refused(message, lambda: tiny_trainer(tmp_path, tagger=tagger))


@pytest.mark.parametrize("case", [*META_ARGUMENTS, *META_ENVIRONMENTS, *META_MODELS])
def test_what_only_meta_steps_cannot_bear(case: str, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fields, message = META_ARGUMENTS.get(case, ({}, ""))
    variables, message = META_ENVIRONMENTS.get(case, ({}, message))
    make, message = META_MODELS.get(case, (tiny_tagger, message))
    for name, value in variables.items():
        environment.setenv(name, value)
    tagger: Any = make()
    refused(message, lambda: tiny_trainer(tmp_path, tagger=tagger, **fields))
    tiny_trainer(tmp_path, tagger=tagger, estimator="none", **fields)


@pytest.mark.parametrize("case", SHARDED)
def test_what_meta_steps_cannot_bear_on_shards(case: str, tmp_path: Path) -> None:
    fields, message = SHARDED[case]
    refused(message, lambda: tiny_trainer(tmp_path, fsdp=True, **{"estimator": "evograd"} | fields))


LEGITIMATE: dict[str, dict[str, Any]] = {
    "one device": {},
    "bf16": {"bf16": True},
    "replicated": {"parallelism_config": ParallelismConfig(dp_replicate_size=1)},
    "split batches": {"accelerator_config": {"split_batches": True}},
    "uneven batches of one process": {"accelerator_config": {"even_batches": False}},
    "unsaved, dispatched": {"accelerator_config": {"dispatch_batches": True, "use_seedable_sampler": False}},
    "find_unused": {"ddp_find_unused_parameters": True},
}


@pytest.mark.parametrize("case", LEGITIMATE)
def test_legitimate_arguments(case: str, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=1, **LEGITIMATE[case])
    trainer.train()
    assert len(logged(trainer, "meta_loss")) == 1


@pytest.mark.parametrize(
    "variables",
    [
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"},
        {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "1"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_legitimate_environments(variables: dict[str, str], environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    PartialState._reset_state()
    for name, value in variables.items():
        environment.setenv(name, value)
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert len(logged(trainer, "meta_loss")) == 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def loaded(folder: Path, device_map: Any) -> CrossLingualTagger:
    tiny_base().save_pretrained(folder / "base")
    return based_on(
        lambda base: type(base).from_pretrained(folder / "base", device_map=device_map, offload_folder=folder / "disk")
    )


def test_a_model_loaded_onto_several_devices(tmp_path: Path) -> None:
    tagger = loaded(tmp_path, {"roberta": "cpu", "classifier": "disk"})
    refused("several devices: .*without device_map", lambda: tiny_trainer(tmp_path, tagger=tagger))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=str)
def test_a_model_loaded_onto_one_device(device_map: Any, tmp_path: Path) -> None:
    tiny_trainer(tmp_path, tagger=loaded(tmp_path, device_map))


def test_processes_that_do_not_find_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a GPU and without use_cpu, where accelerate makes a world of each."""
    args = tiny_arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(type(args), "world_size", 1)
    with pytest.raises(ValueError, match=r"2 processes were started, .* set use_cpu: true"):
        refuse_lost_processes(args)
    monkeypatch.setattr(type(args), "world_size", 2)
    refuse_lost_processes(args)
