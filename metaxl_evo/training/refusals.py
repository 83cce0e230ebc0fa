"""What a MetaTrainer cannot be made of, refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer

from metaxl_evo.bilevel.update import SGD
from metaxl_evo.messages import unknown
from metaxl_evo.training.arguments import LEARNED_START, MetaTrainingArguments
from metaxl_evo.training.launch import refuse_launch
from metaxl_evo.training.meta_rows import DrawnByEpoch
from metaxl_evo.training.optimizers import with_rates
from metaxl_evo.training.tuned import refuse_tuned, tuned_rule
from metaxl_evo.training.values import mapping_of


def refuse_call(args: Any, further: Mapping[str, Any]) -> None:
    """Refuse arguments of another class, and keywords that nobody takes.

    Raises:
        ValueError: naming the argument.
    """
    if not hasattr(args, "make_estimator"):
        raise ValueError(f"MetaTrainer takes MetaTrainingArguments, and args is a {type(args).__name__}")
    taken = [*signature(Trainer).parameters, "meta_dataset"]
    for name in further:
        if name not in taken:
            raise ValueError(unknown("argument of MetaTrainer", name, taken))
    if further.get("compute_loss_func") is not None:
        raise ValueError("a task has its own losses: leave out compute_loss_func")


def refuse_data(args: MetaTrainingArguments, train: Any, meta: Any, evaluated: Any) -> None:
    """Refuse train rows that would be drawn for another epoch than the one that they are read in.

    Raises:
        ValueError: with the way out.
    """
    if not isinstance(train, DrawnByEpoch):
        return
    evaluated = list(evaluated.values()) if isinstance(evaluated, dict) else [evaluated]
    for name, held in {"meta_dataset": [meta], "eval_dataset": evaluated}.items():
        if any(one is train for one in held):
            raise ValueError(
                f"train_dataset and {name} are one data set with set_epoch, which is told of one pass at a time: "
                "make it twice"
            )
    if args.dataloader_persistent_workers and not isinstance(train, IterableDataset):
        raise ValueError(
            "dataloader_persistent_workers would keep the train_dataset of the first epoch, and it has set_epoch: "
            "set it to false"
        )


def refuse_unfit(args: MetaTrainingArguments, model: Any, meta: Any) -> None:
    """Refuse a model that cannot be trained with these arguments.

    Raises:
        ValueError: in one line, with the way out.
    """
    estimator = args.make_estimator()
    refuse_launch(args, model, estimator)
    refuse_tuned(args, model)
    if estimator is None:
        return
    if meta is None or args.meta_portion == 0:
        raise ValueError(
            f"estimator {args.estimator!r} needs meta rows: give meta_dataset and a meta_portion above 0, "
            "or set estimator: none"
        )
    with_rates(model.meta_parameters(), mapping_of("meta_learning_rates", args.meta_learning_rates))
    _refuse_start(args, model)
    problem = model.problem(tuned_rule(SGD(0.0), model))
    estimator.check(problem, model.base_parameters(), model.meta_parameters())


def _refuse_start(args: MetaTrainingArguments, model: Any) -> None:
    """Refuse episodes that would not begin where the task says, and a task that does not say it."""
    name, learned = type(model).__name__, model.first_weights() is not None
    if learned and args.episode_reset != LEARNED_START:
        raise ValueError(
            f"{name} computes its first weights from the meta parameters: set episode_reset: {LEARNED_START}, and "
            "episode_length"
        )
    if not learned and args.episode_reset == LEARNED_START:
        raise ValueError(
            f"episode_reset: {LEARNED_START} begins at weights computed from the meta parameters, and {name} has no "
            "first_weights: set reptile, fomaml or restart"
        )


def refuse_another_run(folder: Path, found: Iterable[Path]) -> None:
    """Refuse a start among checkpoints that were there before: the newest, which `latest` means, may not be ours.

    Settings that a checkpoint does not hold may differ, so those of equal settings are no exception.

    Raises:
        ValueError: naming the folder and the ways out.
    """
    for checkpoint in found:
        if checkpoint.parent == folder and checkpoint.exists():
            raise ValueError(
                f"{folder} holds another run ({checkpoint.name}): choose another output_dir, or go on with that "
                'run by train(resume_from_checkpoint="latest")'
            )
