"""Every field of transformers' TrainingArguments works in `train_ner`, or is refused in one line before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainingArguments

from metaxl_evo.ner.arguments import UNFIT, refuse_fields
from tests.ner.encoders import scores_by_hand
from tests.scripts.runs import WITH_DEV, train

WORKING = {  # one run each, with all of its fields off their defaults
    "optimisation": """
        max_steps=3 learning_rate=1e-3 per_device_train_batch_size=3 gradient_accumulation_steps=2 seed=3 data_seed=3
        lr_scheduler_type=cosine lr_scheduler_kwargs={"num_cycles":1} warmup_steps=1 optim=adamw_torch weight_decay=0.1
        optim_args=foreach=False max_grad_norm=0.5 adam_beta1=0.8 adam_beta2=0.9 adam_epsilon=1e-6
        torch_empty_cache_steps=2 use_cache=true average_tokens_across_devices=false activation_checkpointing=true
        activation_checkpointing_kwargs={"use_reentrant":false}""",
    "precision": "bf16=true",
    "older names": """
        gradient_checkpointing=true gradient_checkpointing_kwargs={"use_reentrant":false} max_steps=-1
        optim_target_modules=all-linear num_train_epochs=0.2 eval_strategy=no load_best_model_at_end=false
        liger_kernel_config={"rope":true} save_strategy=epoch""",
    "evaluation": """
        eval_strategy=epoch save_strategy=epoch eval_delay=1 per_device_eval_batch_size=7 eval_on_start=true
        eval_do_concat_batches=false eval_use_gather_object=true eval_accumulation_steps=1 include_for_metrics=inputs
        metric_for_best_model=loss greater_is_better=false dataloader_drop_last=true max_steps=12 label_names=labels
        train_sampling_strategy=group_by_length length_column_name=n save_only_model=true""",
    "rows": """
        dataloader_num_workers=1 dataloader_persistent_workers=true dataloader_prefetch_factor=3 eval_steps=1
        dataloader_multiprocessing_context=fork dataloader_in_order=false dataloader_pin_memory=false save_steps=1
        accelerator_config={"split_batches":true} ignore_data_skip=true full_determinism=true""",
    "logs": """
        logging_strategy=steps logging_steps=1 logging_first_step=true log_level=error log_on_each_node=false
        logging_nan_inf_filter=false include_num_input_tokens_seen=true log_level_replica=error disable_tqdm=true
        report_to=none run_name=x project=x trackio_space_id=x trackio_bucket_id=x trackio_static_space_id=x
        skip_memory_metrics=false save_total_limit=1 save_on_each_node=true
        restore_callback_states_from_checkpoint=true resume_from_checkpoint=latest do_train=true do_eval=true
        do_predict=true""",
    "places": """
        max_steps=1 eval_strategy=no save_strategy=no load_best_model_at_end=false
        use_cpu=true local_rank=0 ddp_timeout=100 ddp_find_unused_parameters=true ddp_bucket_cap_mb=1
        ddp_broadcast_buffers=true ddp_static_graph=true fsdp_config={"version":2} hub_token=x hub_private_repo=true
        hub_model_id=x hub_strategy=end hub_always_push=true hub_revision=x torch_compile=true
        torch_compile_backend=eager torch_compile_mode=default""",
}
REFUSED: dict[str, tuple[Any, str]] = {
    **{name: ("true", f"{name} cannot be set for NER: .*: leave it out$") for name in UNFIT if name != "debug"},
    "debug": ("underflow_overflow", "debug cannot be set for NER: .*: leave it out$"),
    "label_names": ("tags", "label_names: malformed tag 'tags': a tag is O, B-TYPE or I-TYPE$"),
    "label_smoothing_factor": (0.1, "label_smoothing_factor must be 0"),
    "fp16": ("true", "does not run with fp16"),
    "tf32": ("true", "tf32 requires Ampere"),
    "enable_jit_checkpoint": ("true", "does not run with enable_jit_checkpoint"),
    "use_liger_kernel": ("true", "does not run with use_liger_kernel"),
    "neftune_noise_alpha": (0.1, "does not run with neftune_noise_alpha"),
    "auto_find_batch_size": ("true", "does not run with auto_find_batch_size"),
    "parallelism_config": ('{"tp_size": 2}', "parallelism_config: expected ParallelismConfig"),
    "ddp_backend": ("gloo", "ddp_backend: cannot be used"),
    "fsdp": ("true", "does not run with fsdp"),
    "deepspeed": ('{"a": 1}', "does not run with deepspeed"),
    "push_to_hub": ("true", "push_to_hub: the Hub cannot be reached|offline|push_to_hub"),
    "dataloader_drop_last": (
        "true",
        "dataloader_drop_last would drop all 40 train sentences, less than a batch of 64",
    ),
}


@pytest.fixture(autouse=True)
def as_before() -> Any:
    """Undo what some fields leave in the process."""
    level = transformers.logging.get_verbosity()
    yield
    torch.use_deterministic_algorithms(False)
    transformers.logging.set_verbosity(level)


def settings_of(name: str) -> dict[str, Any]:
    return {key: value for key, _, value in (setting.partition("=") for setting in WORKING[name].split())}


def test_every_field_is_tried() -> None:
    names = {field.name for field in dataclasses.fields(TrainingArguments)} - {"output_dir"}
    tried = {name for name in WORKING for name in settings_of(name)}
    assert tried | set(REFUSED) == names
    assert (len(names), len(tried), len(REFUSED)) == (113, 95, 20)


@pytest.mark.parametrize("name", WORKING)
def test_fields_that_work(name: str, tmp_path: Path, model: Path, data: Path) -> None:
    """All sentences are scored, as they are by hand with the model that is left."""
    method = {"method": "joint_training"} if name not in ("optimisation", "rows") else {}
    settings = {**WITH_DEV, "eval_max_length": 128, "max_length": 128, **method, **settings_of(name)}
    found = train(model, data, tmp_path / "out", **settings)["test"]["beru"]
    expected = scores_by_hand(tmp_path / "out", data / "beru/test")
    if name != "precision":  # by hand it is float32
        assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert (found["n_sentences"], found["n_truncated_words"], found["n_words_without_sub_token"]) == (30, 0, 0)


def test_dispatched_batches_on_several_processes_are_refused() -> None:
    config = SimpleNamespace(dispatch_batches=True)
    args: Any = SimpleNamespace(**dict.fromkeys(UNFIT), accelerator_config=config, world_size=2, label_names=None)
    with pytest.raises(ValueError, match="dispatch_batches cannot send batches of unequal lengths"):
        refuse_fields(args)


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_are_refused(
    name: str, tmp_path: Path, model: Path, data: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    value, message = REFUSED[name]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("metaxl_evo.training.trainer.require_writable", lambda folder: None)
    small = {"per_device_train_batch_size": 64} if name == "dataloader_drop_last" else {}
    refused(message, model, data, tmp_path / "out", **{**WITH_DEV, **small, name: value})
