"""A study on a distribution of tasks: meta-training over meta-batches, meta-test by adaptation to held-out tasks."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from torch.utils.data import default_collate
from transformers.trainer_utils import SchedulerType

from metaxl_evo.bilevel import tree
from metaxl_evo.experiments.scores import Rate
from metaxl_evo.experiments.task import Task
from metaxl_evo.models.network_files import save_state
from metaxl_evo.models.task_batch import TASK, MetaLearner
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.task_rows import HeldOutTasks, TaskRows, Tasks, mean_measures, measures_of
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.training.values import refuse_count

START = "start"  # where the network goes from which tasks begin


@dataclass
class MetaLearningArguments:
    """What all distributions of tasks are set by.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    meta_batch: int = field(
        default=4,
        metadata={"help": "Tasks of a meta-batch, over all processes; in place of the batch sizes of a device."},
    )
    test_tasks: int = field(default=500, metadata={"help": "Held-out tasks that test; the same in every run."})
    validation_tasks: int = field(
        default=100, metadata={"help": "Held-out tasks that evaluations during training are of."}
    )

    def __post_init__(self) -> None:
        for name in ("meta_batch", "test_tasks", "validation_tasks"):
            refuse_count(name, getattr(self, name))


@dataclass(frozen=True, eq=False)
class TaskSplits:
    """Three distributions that share no task."""

    train: Tasks
    validation: Tasks
    test: Tasks


Settings = TypeVar("Settings", bound=MetaLearningArguments)


class MetaLearningTask(Task[Settings, TaskSplits]):
    """Meta-learning over tasks: every epoch is an episode of `episode_length` base steps on the next meta-batch.

    Attributes:
        measured: the names of the learner's `measures`; the first is compared.
    """

    measured: ClassVar[tuple[str, ...]] = ("cost",)
    greater_is_better = False
    own_files = (START,)

    @abstractmethod
    def make_learner(self, settings: Settings, data: TaskSplits) -> MetaLearner:
        """Both levels, at the weights from which the first tasks begin."""

    def refuse(self, settings: Settings, args: MetaTrainingArguments) -> None:
        for wrong, line in _mistakes(args):
            if wrong:
                raise ValueError(line)

    def fit_arguments(
        self, settings: Settings, args: MetaTrainingArguments, data: TaskSplits
    ) -> MetaTrainingArguments:
        """With the tasks of a meta-batch dealt out to processes and micro-batches."""
        shares = args.world_size * args.gradient_accumulation_steps
        if settings.meta_batch % shares:
            raise ValueError(
                f"meta_batch {settings.meta_batch} is not a multiple of {shares}, the processes times "
                "gradient_accumulation_steps: each has as many tasks"
            )
        args = copy.copy(args)
        args.per_device_train_batch_size = args.per_device_meta_batch_size = settings.meta_batch // shares
        return args

    def build_trainer(self, settings: Settings, args: MetaTrainingArguments, data: TaskSplits) -> MetaTrainer:
        learner, steps = self.make_learner(settings, data), cast(int, args.episode_length)
        learner.make_optimizer = args.make_optimizer
        trainer = MetaTrainer(
            learner,
            args,
            train_dataset=TaskRows(data.train.train, tasks=settings.meta_batch, steps=steps),
            meta_dataset=TaskRows(data.train.judge, tasks=settings.meta_batch, steps=steps),
            eval_dataset=HeldOutTasks(data.validation, settings.validation_tasks, steps=steps),
            data_collator=default_collate,
            compute_metrics=mean_measures(self.measured),
        )
        trainer.label_names = [TASK]  # a held-out task is known by its number
        return trainer

    def score(self, trainer: MetaTrainer, settings: Settings, data: TaskSplits) -> dict[str, Any]:
        tasks = HeldOutTasks(data.test, settings.test_tasks, steps=cast(int, trainer.args.episode_length))
        found = trainer.predict(cast(Any, tasks))
        return {name: Rate.mean(values) for name, values in measures_of(self.measured, found).items()}

    def describe(self, trainer: MetaTrainer, settings: Settings, data: TaskSplits, start: tree.Tree) -> dict[str, Any]:
        network = cast(MetaLearner, trainer.model).base.start
        return {"parameters_of_a_task": tree.size(dict(network.named_parameters()))}

    def write_files(self, folder: Path, trainer: MetaTrainer, settings: Settings, data: TaskSplits) -> None:
        """The network from which tasks begin."""
        save_state(cast(MetaLearner, trainer.model).base.start, folder / START)


def _mistakes(args: MetaTrainingArguments) -> list[tuple[Any, str]]:
    """Settings under which a meta-batch would not be tasks by themselves, or a test other than the training."""
    length, schedule = args.episode_length, args.lr_scheduler_type
    decays = schedule != SchedulerType.CONSTANT or args.warmup_steps or args.lr_milestones
    return [
        (length is None, "a task is adapted in episode_length base steps: set it"),
        (
            args.estimator == NO_ESTIMATOR,
            "estimator: none has no episodes, which would train on from task to task: first_order is the baseline",
        ),
        (
            args.episode_reset == "continue",
            "episode_reset: continue would train on from task to task: set reptile, fomaml or restart",
        ),
        (
            args.max_grad_norm,
            "max_grad_norm would clip the gradients of all tasks of a meta-batch together: set it to 0",
        ),
        (
            decays,
            "tasks that are tested are adapted at the learning rate of every task that trains: set "
            "lr_scheduler_type: constant, without warmup_steps and lr_milestones",
        ),
        (
            args.optimizer_class is None,
            "tasks that are tested have an optimiser of their own: name it in optimizer_class (SGD, Adam, ...)",
        ),
        (
            length is not None and args.max_steps > 0 and args.max_steps % length,
            f"max_steps {args.max_steps} is not a multiple of episode_length ({length}): the last tasks would be cut "
            "off; num_train_epochs is the number of episodes",
        ),
        (args.meta_portion != 1, "rows that judge a task cannot join those that train: set meta_portion to 1"),
    ]
