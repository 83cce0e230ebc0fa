"""The sinusoid experiment: many-shot ANIL in small."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.experiments.meta_learning import MetaLearningArguments, MetaLearningTask, TaskSplits
from metaxl_evo.long_horizon.sinusoid import LEARNERS, SinusoidLearner, Sinusoids
from metaxl_evo.messages import unknown
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.values import refuse_count

_VALIDATION, _TEST = 1, 2  # what the seeds of tasks that do not train are kept apart by


@dataclass
class SinusoidArguments(MetaLearningArguments):
    """Settings of the sinusoid experiment.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    learner: str = field(
        default="anil",
        metadata={
            "help": "What is learned: anil, the layers below a head of each task; maml, the weights from which the "
            "whole network of a task begins (episode_reset: learned, estimator: unroll)."
        },
    )
    shots: int = field(default=10, metadata={"help": "Points of a task that train, and others that judge."})
    test_points: int = field(default=100, metadata={"help": "Points that an adapted task is tested on."})
    hidden: int = field(default=100, metadata={"help": "Units of each of the three layers that tasks share."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learner not in LEARNERS:
            raise ValueError(unknown("learner", self.learner, LEARNERS))
        for name in ("shots", "test_points", "hidden"):
            refuse_count(name, getattr(self, name))


class SinusoidTask(MetaLearningTask[SinusoidArguments]):
    """Features from which a linear head fits a new sinusoid (Lee et al., ICLR 2022, appendix G)."""

    settings = SinusoidArguments
    title = "Sinusoid regression"
    sources = (
        "Lee et al., Online Hyperparameter Meta-Learning with Hypergradient Distillation, ICLR 2022, appendix G",
        "Raghu et al., Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML, ICLR 2020",
    )
    units: ClassVar = {"mse": ""}
    configs = "long_horizon"
    measured = ("mse",)

    def load(self, settings: SinusoidArguments, args: MetaTrainingArguments) -> TaskSplits:
        size = {"shots": settings.shots, "test_points": settings.test_points}
        seed = args.seed if args.data_seed is None else args.data_seed
        held_out = [Sinusoids(mix_seed(split), **size) for split in (_VALIDATION, _TEST)]  # the same in every run
        return TaskSplits(Sinusoids(mix_seed(0, seed), **size), *held_out)

    def make_learner(self, settings: SinusoidArguments, data: TaskSplits) -> SinusoidLearner:
        return LEARNERS[settings.learner](settings.meta_batch, settings.hidden)
