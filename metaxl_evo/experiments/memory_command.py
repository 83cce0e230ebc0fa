"""`metaxl-evo estimate-memory`: the memory that a run would need, its numbers read off the run's settings file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from metaxl_evo.experiments.arguments import RunsArguments
from metaxl_evo.experiments.task import find_task
from metaxl_evo.messages import unknown
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.memory_estimate import MemoryArguments, estimate_memory
from metaxl_evo.training.parser import parse_arguments
from metaxl_evo.training.settings_file import read_config
from metaxl_evo.training.shipped_configs import find_config

HEADS = {  # of tasks on text
    "ner": "tokens",
    "pos": "tokens",
    "sentiment": "rows",
    "weight_text": "rows",
    "mix_text": "language",
    "weight_tags": "tokens",
}
MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}  # of the Trainer's optimisers


def estimate(argv: Sequence[str]) -> None:
    """Print the memory of the run of a settings file, named first, or of the options alone; options win.

    Raises:
        ValueError: for a file of no task on text, and for settings of which no memory was measured.
    """
    (one,) = parse_arguments((MemoryArguments,), options(argv))
    print(
        f"{one.model_name_or_path}, head {one.head}: {one.processes} processes, {one.rows} rows of {one.tokens} "
        f"tokens, {one.estimator}, {one.meta_parameters} meta parameters"
    )
    estimate_memory(one)


def options(argv: Sequence[str]) -> list[str]:
    """The options that say the same without the name of a settings file."""
    if not argv or argv[0].startswith("-"):
        return list(argv)
    return [*_of_run(argv[0]), *argv[1:]]


def _of_run(config: str) -> Iterator[str]:
    """What the settings of a run say of its memory."""
    name = _task_of(config)
    task = find_task(name)
    types = (RunsArguments, task.settings, task.training)
    _, settings, args = parse_arguments(types, ["--config", config, "--output_dir=unused", "--use_cpu=true"])
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in MOMENTS or args.optim_args:
        raise ValueError(unknown("optim whose moments are known", optimizer, MOMENTS))
    if (engine := (args.estimator_kwargs or {}).get("engine", "auto")) not in ("auto", "finite_difference"):
        raise ValueError(f"engine: {engine}: the memory of finite differences alone was measured, which auto takes")
    if args.gradient_checkpointing:
        print("activations are counted without gradient_checkpointing, which keeps fewer")
    yield f"--model_name_or_path={settings.model_name_or_path}"
    yield f"--head={HEADS[name]}"
    yield f"--rows={_rows(args)}"
    yield f"--tokens={settings.max_length}"
    yield f"--estimator={args.estimator}"
    yield f"--moments={MOMENTS[optimizer]}"


def _rows(args: MetaTrainingArguments) -> int:
    """Of the larger micro-batch: that which judges, or that of the base step, with the meta rows that do not judge."""
    judging = args.meta_portion * args.per_device_meta_batch_size
    return math.ceil(max(judging, args.per_device_train_batch_size + args.per_device_meta_batch_size - judging))


def _task_of(config: str) -> str:
    """The task on text that knows all entries of a settings file; of several that of its folder, else the first.

    Those that several know are of taggers, whose heads differ by next to nothing.
    """
    file = find_config(config)
    keys = read_config(file).keys()
    missing = {name: sorted(keys - _known(find_task(name))) for name in HEADS}
    fitting = [name for name, others in missing.items() if not others]
    if not fitting:
        nearest = min(missing, key=lambda name: len(missing[name]))
        raise ValueError(
            f"{config} is no settings file of {', '.join(HEADS)} ({nearest} does not know {missing[nearest][0]}): "
            "give --model_name_or_path, --head, --rows, --tokens and --estimator in its place"
        )
    return next((name for name in fitting if find_task(name).configs == file.parent.name), fitting[0])


def _known(task: Any) -> set[str]:
    return {one.name for kind in (RunsArguments, task.settings, task.training) for one in fields(kind)}
