"""A dry run of what other libraries make of the settings, so that they complain before data are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from metaxl_evo.messages import one_line
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.values import mapping_of


def refuse_unusable(args: MetaTrainingArguments) -> None:
    """Make both optimisers, the schedule, the reports and the compilation once, for a single number, and drop them.

    Raises:
        ValueError: whatever the library raised, as one line with the settings that it was given.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    with _told(args, "meta_optim", "meta_optim_kwargs"):
        args.make_meta_optimizer([weight])
    _try_base_optimizer(args, weight)
    with _told(args, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"):
        _try_schedule(args, weight)
    with _told(args, "report_to"):
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    if args.torch_compile:
        with _told(args, "torch_compile_backend", "torch_compile_mode"):
            backend = args.torch_compile_backend or "inductor"
            torch.compile(torch.nn.Identity(), backend=backend, mode=args.torch_compile_mode)


def _try_base_optimizer(args: MetaTrainingArguments, weight: torch.nn.Parameter) -> None:
    if args.optimizer_class is not None:
        with _told(args, "optimizer_class", "optimizer_kwargs"):
            args.make_optimizer([weight])
    elif args.optim_target_modules is None:  # else it asks for the modules of a model
        with _told(args, "optim", "optim_args"):
            cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
            cls([weight], **settings)


def _try_schedule(args: MetaTrainingArguments, weight: torch.nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight], lr=1.0)
    own = mapping_of("lr_scheduler_kwargs", args.lr_scheduler_kwargs)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=own)
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        optimizer.step()
        schedule.step()


@contextmanager
def _told(args: MetaTrainingArguments, *names: str) -> Iterator[None]:
    """Turns whatever a library raises into one line with the settings that it was given."""
    try:
        yield
    except Exception as error:
        given = ", ".join(f"{name} {_plain(getattr(args, name))}" for name in names if getattr(args, name))
        raise ValueError(f"{given}: cannot be used ({one_line(error)})") from error


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
