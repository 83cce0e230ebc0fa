"""The check of any task: a few steps of the real configuration in a scratch folder, and findings instead of a run."""

from __future__ import annotations

import copy
import math
import tempfile

from metaxl_evo.bilevel import tree
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.check_report import CheckReport, Findings
from metaxl_evo.training.few_steps import Build, FewSteps, scratch_arguments
from metaxl_evo.training.isolation import Snapshot, kept_random_state
from metaxl_evo.training.trainer import MetaTrainer
from metaxl_evo.training.verdicts import judge


def check_trainer(trainer: MetaTrainer) -> CheckReport:
    """Run a few steps of `trainer` at the full learning rates, and take them back: nothing of it is changed.

    Another trainer makes the steps, with its model, data sets, collator and optimiser, without its callbacks,
    evaluation, files and uploads. The model is restored bit by bit, generators that its modules hold with it.

    Raises:
        ValueError: for what a run would refuse as well.
    """
    model = trainer.model
    before, given = Snapshot(model), trainer.given_optimizer

    def build(args: MetaTrainingArguments) -> MetaTrainer:
        before.restore()
        optimizer = None if given is None else copy.deepcopy(given, {id(p): p for p in model.parameters()})
        other: MetaTrainer = object.__new__(type(trainer))
        MetaTrainer.__init__(
            other,
            model,
            args,
            meta_dataset=trainer.meta_dataset,
            train_dataset=trainer.train_dataset,
            data_collator=trainer.data_collator,
            processing_class=trainer.processing_class,
            optimizers=(optimizer, None),
            optimizer_cls_and_kwargs=trainer.optimizer_cls_and_kwargs,
        )
        vars(other).update({key: value for key, value in vars(trainer).items() if key not in vars(other)})
        return other

    with kept_random_state():
        try:
            return check_training(build, trainer.args)[0]
        finally:
            before.restore()


def check_training(build: Build, args: MetaTrainingArguments) -> tuple[CheckReport, MetaTrainer]:
    """Run a few steps at the full learning rates; returns what was found, and the trainer that made the steps.

    What the trainer logs of its meta steps, diagnosed by turns, is among the findings under the same names.

    Args:
        build: makes a trainer; it is given `args` but for what a check leaves out.

    Raises:
        ValueError: for what a run would refuse as well.
    """
    report = CheckReport()
    found = report.findings
    with tempfile.TemporaryDirectory() as scratch:
        settings = scratch_arguments(args, scratch)
        try:
            run = FewSteps(build, settings)
        except ValueError as reason:  # diagnostics may ask for more than the estimator does
            settings.meta_diagnostics_every = 0
            run = FewSteps(build, settings)
            found["exact_hypergradient"] = f"not possible here ({reason})"
        found |= _facts(run.trainer, args)
        if run.failure is not None:
            report.problems.append(f"a step fails: {run.failure}")
            return report, run.trainer
        judge(run, report)
        found["seconds_per_step"] = run.seconds_per_step
        if run.trainer.estimator is not None:
            settings = scratch_arguments(args, scratch, estimator=False)
            found["times_the_plain_step"] = run.seconds_per_step / FewSteps(build, settings).seconds_per_step
    return report, run.trainer


def _facts(trainer: MetaTrainer, args: MetaTrainingArguments) -> Findings:
    model, planned = trainer.model, args.max_steps
    if planned <= 0:
        batches = len(trainer.get_train_dataloader())
        planned = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
    return {
        "base_parameters": tree.size(model.base_parameters()),
        "meta_parameters": tree.size(model.meta_parameters()),
        "planned_steps": planned,
        "estimator": str(trainer.estimator or NO_ESTIMATOR),
        "attention_kernel": model.attention_kernel or "none",
        "second_derivatives": model.second_order_obstacle or "possible",
    }
