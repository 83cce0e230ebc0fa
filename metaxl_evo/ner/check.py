"""`--check`: a few steps of the real configuration in a scratch folder, and a verdict instead of a training run."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from metaxl_evo.bilevel import tree
from metaxl_evo.estimators import Estimator, make_estimator
from metaxl_evo.ner.arguments import NerArguments, steps_of
from metaxl_evo.ner.data import encode
from metaxl_evo.ner.experiment import (
    TargetData,
    build_trainer,
    fit_arguments,
    load_target,
    refuse_another_run,
    require_enough,
)
from metaxl_evo.ner.pretrained import trained_labels
from metaxl_evo.ner.tagger import CrossLingualTagger
from metaxl_evo.training.arguments import NO_ESTIMATOR, MetaTrainingArguments
from metaxl_evo.training.trainer import MetaTrainer

STEPS = 6  # of them the first is not timed
LITTLE = 0.01  # an RTN that moves less than this over a run stays, for all that F1 can tell, at its random start
AGREEMENT = 0.99  # the least cosine to the exact hypergradient of an estimator that calls itself exact


def check_experiment(ner: NerArguments, args: MetaTrainingArguments) -> dict[str, Any]:
    """Run a few steps for the first target at the full learning rates; print the findings and a verdict, return them.

    Nothing of the user's is touched. The returned `problems` is empty where the verdict is OK.

    Raises:
        ValueError: for what a run would refuse as well.
    """
    target = ner.target_languages[0]
    ner = replace(ner, target_languages=[target])
    data = load_target(ner, target, trained_labels(ner.model_name_or_path))
    require_enough(ner, args, target, data)
    found: dict[str, Any] = {"target": target, "problems": [], "warnings": []}
    try:
        refuse_another_run(Path(args.output_dir), args.resume_from_checkpoint is not None)
    except ValueError as error:
        found["problems"].append(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        trainer, recorder, start = _few_steps(ner, _scratch_arguments(args, scratch), data)
        found |= _describe(ner, args, data, trainer)
        found |= _losses(recorder, found["problems"])
        found |= _movement(trainer, args, start, found)
        found |= _agreement(trainer, found["problems"])
        found |= _evaluation(trainer, found["problems"])
        found["seconds_per_step"] = recorder.seconds_per_step
        if trainer.estimator is not None:
            plain = copy.copy(args)
            plain.estimator, plain.estimator_kwargs = NO_ESTIMATOR, None
            without = _few_steps(ner, _scratch_arguments(plain, scratch), data)[1].seconds_per_step
            found["times_the_plain_step"] = found["seconds_per_step"] / without
    if args.should_log:
        print(_report(found))
    return found


class _Recorder(TrainerCallback):
    """Keeps the logs and the time of every step."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self._seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds.append(time.perf_counter() - self._begun)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.logs.append(dict(logs))

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(self._seconds[1:])

    def series(self, key: str) -> list[float]:
        return [logs[key] for logs in self.logs if key in logs]


def _scratch_arguments(args: MetaTrainingArguments, folder: str) -> MetaTrainingArguments:
    """The user's arguments for a few steps at the full learning rates, without files, evaluation or uploads."""
    args = copy.copy(args)
    args.output_dir, args.push_to_hub, args.report_to = folder, False, []
    args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    args.save_strategy, args.resume_from_checkpoint = SaveStrategy.NO, None
    args.max_steps, args.logging_steps, args.logging_strategy = STEPS * args.meta_every, 1, IntervalStrategy.STEPS
    args.lr_scheduler_type = args.meta_lr_scheduler_type = SchedulerType.CONSTANT
    args.warmup_steps = args.meta_warmup_steps = 0
    args.disable_tqdm = True
    return args


def _few_steps(
    ner: NerArguments, args: MetaTrainingArguments, data: TargetData
) -> tuple[MetaTrainer, _Recorder, tuple[tree.Tree, tree.Tree]]:
    """A trainer after a few steps, what was recorded, and both levels' parameters before."""
    set_seed(args.seed)
    trainer, _ = build_trainer(ner, args, data)
    recorder = _Recorder()
    trainer.add_callback(recorder)
    trainer.remove_callback(PrinterCallback)
    start = tree.clone(trainer.model.base_parameters()), tree.clone(trainer.model.meta_parameters())
    trainer.train()
    return trainer, recorder, start


def _describe(
    ner: NerArguments, args: MetaTrainingArguments, data: TargetData, trainer: MetaTrainer
) -> dict[str, Any]:
    tokenizer = trainer.processing_class
    parts = {f"train {language}": (rows, ner.max_length) for language, rows in data.sources.items()}
    parts |= {"train target": (data.target, ner.max_length)} if data.target is not None else {}
    parts |= {"dev": (data.dev, ner.eval_max_length)} if data.dev is not None else {}
    parts["test"] = (data.test, ner.eval_max_length)
    args = fit_arguments(ner, args, data)
    batch = args.per_device_train_batch_size * args.world_size
    planned = steps_of(
        args.num_train_epochs, len(cast(Dataset, trainer.train_dataset)), batch, args.gradient_accumulation_steps
    )
    return {
        "sentences": {name: len(rows) for name, (rows, _) in parts.items()},
        "labels": data.names,
        "words_cut_off": {name: _cut_off(rows, tokenizer, length) for name, (rows, length) in parts.items()},
        "base_parameters": tree.size(trainer.model.base_parameters()),
        "meta_parameters": tree.size(trainer.model.meta_parameters()),
        "planned_steps": args.max_steps if args.max_steps > 0 else planned,
        "estimator": "none" if trainer.estimator is None else str(trainer.estimator),
    }


def _cut_off(rows: Dataset, tokenizer: Any, max_length: int) -> float:
    """The share of words that lie beyond the maximal length."""
    positions = encode(rows, tokenizer, max_length, keep_words=True)["word_positions"][:]
    lost = [position < 0 for row in positions for position in row]
    return sum(lost) / len(lost)


def _losses(recorder: _Recorder, problems: list[str]) -> dict[str, Any]:
    found = {"inner_loss": recorder.series("loss"), "meta_loss": recorder.series("meta_loss")}
    for name, values in found.items():
        if not all(map(math.isfinite, values)):
            problems.append(f"{name} is not finite: lower learning_rate")
    return found


def _movement(
    trainer: MetaTrainer, args: MetaTrainingArguments, start: tuple[tree.Tree, tree.Tree], found: dict[str, Any]
) -> dict[str, float]:
    """How far both levels went, and how far the RTN will go: steps that cancel like a random walk, and that add up."""
    base = tree.norm(tree.add(trainer.model.base_parameters(), start[0], -1.0)) / tree.norm(start[0])
    if not base > 0:
        found["problems"].append("the base model did not move: raise learning_rate")
    moved = {"base_moved": base}
    if trainer.estimator is None:
        return moved
    updates = STEPS - trainer.skipped_meta_steps
    if updates == 0:
        found["problems"].append("no hypergradient was finite: see the losses, lower learning_rate")
        return moved
    step = cast(CrossLingualTagger, trainer.model).meta.relative_change(start[1]) / updates
    planned = found["planned_steps"] / args.meta_every
    moved |= {"rtn_moved_a_step": step, "rtn_at_least": step * math.sqrt(planned), "rtn_at_most": step * planned}
    if not step > 0:
        found["problems"].append("the RTN did not move: raise meta_learning_rate")
    elif moved["rtn_at_least"] < LITTLE:
        found["warnings"].append(
            f"over the run the RTN would move by about {moved['rtn_at_least']:.2%} of its size (unless all its steps "
            "point one way): it may stay at its random start; raise meta_learning_rate, and compare with --method "
            "frozen_rtn"
        )
    return moved


def _agreement(trainer: MetaTrainer, problems: list[str]) -> dict[str, Any]:
    """The configured estimator beside the exact one-step hypergradient, on the same window from the same weights."""
    estimator = trainer.estimator
    if estimator is None:
        return {}
    try:
        exact = trainer.estimate(_other_engine(estimator)).grads
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return {"exact_hypergradient": f"not possible here ({str(error).splitlines()[0]})"}
    estimate = trainer.estimate(estimator).grads
    norms = tree.norm(estimate), tree.norm(exact)
    if 0.0 in norms:
        problems.append("the hypergradient is zero: the meta network does not reach the meta loss")
        return {"hypergradient_norms": norms}
    along = math.fsum(float((estimate[name].double() * exact[name].double()).sum()) for name in exact)
    cosine = along / (norms[0] * norms[1])
    if estimator.exact == "always" and not cosine > AGREEMENT:
        problems.append(
            f"{estimator} has a cosine of {cosine:.4f} to the exact hypergradient: set engine: double_backward"
        )
    return {"cosine_to_exact": cosine, "norm_by_exact": norms[0] / norms[1]}


def _other_engine(estimator: Estimator) -> Estimator:
    """The exact estimator, by another engine than the configured one."""
    return make_estimator("one_step", engine="jvp" if "double_backward" in str(estimator) else "double_backward")


def _evaluation(trainer: MetaTrainer, problems: list[str]) -> dict[str, bool]:
    """Whether another RTN changes the training loss (it should, where it acts) and the evaluation (it must not)."""
    module, dataset = trainer.model, cast(Dataset, trainer.train_dataset)
    rows = [dataset[index] for index in range(min(4, len(dataset)))]
    batch = send_to_device(trainer.data_collator(rows), trainer.args.device)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    module.eval()
    before = tree.clone(module.meta_parameters())
    with torch.no_grad():
        loss, logits = module.inner_loss(batch), module(**inputs).logits
        for parameter in module.meta_parameters().values():
            parameter.mul_(-2.0)
        reaches, same = not torch.equal(loss, module.inner_loss(batch)), torch.equal(logits, module(**inputs).logits)
        for name, parameter in module.meta_parameters().items():
            parameter.copy_(before[name])
    if not same:
        problems.append("the RTN changes the evaluation: please report this as a bug")
    if module.transform and not reaches:
        problems.append("the RTN does not change the training loss: check rtn_layers and rtn_module_path")
    return {"evaluation_without_rtn": same, "rtn_reaches_training": reaches}


def _report(found: dict[str, Any]) -> str:
    lines = [f"{key}: {_readable(value)}" for key, value in found.items() if key not in ("problems", "warnings")]
    lines += [f"WARNING: {warning}" for warning in found["warnings"]]
    return "\n".join([*lines, *([f"PROBLEM: {problem}" for problem in found["problems"]] or ["OK"])])


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_readable, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
