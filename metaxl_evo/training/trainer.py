"""MetaTrainer: the Hugging Face Trainer with a second level."""

from __future__ import annotations

import copy
import logging
import math
import shutil
import warnings
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, get_scheduler
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import nested_detach
from transformers.trainer_utils import IntervalStrategy

from metaxl_evo.bilevel import gate, tree
from metaxl_evo.bilevel.passes import PassContext
from metaxl_evo.bilevel.problem import (
    BilevelProblem,
    Hypergradient,
    InnerStep,
    StepMade,
    estimate,
    hypergradient,
    why_zero,
)
from metaxl_evo.bilevel.processes import Processes
from metaxl_evo.bilevel.randomness import devices_of, mix_seed
from metaxl_evo.bilevel.replay import Facts
from metaxl_evo.bilevel.update import SGD, UpdateRule, UpdateState, from_optimizer, map_trees, optimizer_rule
from metaxl_evo.estimators import Estimator, takes_any_optimizer
from metaxl_evo.estimators.local import EngineEstimator
from metaxl_evo.messages import unknown
from metaxl_evo.models.adapters import is_adapted
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.models.examples import examples_of
from metaxl_evo.models.heads import columns_of
from metaxl_evo.models.losses import counts_of, set_totals, view_of
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.checkpoint import (
    META_SHARE,
    META_STATE,
    checkpoints_in,
    discarding,
    find_checkpoint,
    loading,
    made_by,
    read_tensors,
    require_same,
    require_whole,
    require_writable,
    rotate,
    saving,
    seal,
    unseal,
)
from metaxl_evo.training.diagnostics import Diagnostics
from metaxl_evo.training.episodes import Episodes
from metaxl_evo.training.history import History, logged_lam
from metaxl_evo.training.isolation import kept_random_state
from metaxl_evo.training.launch import refuse_launch
from metaxl_evo.training.meta_rows import DrawnByEpoch, MetaRows, StreamedMetaRows, make_meta_rows, tell_epoch
from metaxl_evo.training.synchrony import average_statistics, require_synchrony, synchronise
from metaxl_evo.training.tuned import (
    fit_groups,
    keep_in_range,
    learns_all_rates,
    put_numbers,
    refuse_tuned,
    tuned_rule,
)

if TYPE_CHECKING:
    from metaxl_evo.training.check_report import CheckReport

logger = logging.getLogger(__name__)

_SILENCE = 10  # hypergradients of exactly zero at the start of a run: more than batches that do not read lam


class MetaTrainer(Trainer):
    """Trains a BilevelModule: the base by the Trainer's own loop, the meta network by hypergradients.

    One meta step per optimizer step (or every `meta_every`), over the whole accumulation window. With
    `meta_order="after_step"` it follows the base step and differentiates that very step; with `lookahead` it precedes
    it.

    Args:
        model: the task; None with `model_init`, which makes it anew in each training (`hyperparameter_search`).
        args: both levels' arguments.
        meta_dataset: the rows that judge; a share of them (`1 - meta_portion`) joins the train rows. May be left out
            where `args.estimator` is `none`. It, and `train_dataset`, may be `DrawnByEpoch`, or stream.
        kwargs: as for `transformers.Trainer`.

    Attributes:
        card_sections: Markdown for the model card.
        run_settings: the task's own settings, plain values; a checkpoint made with others is not resumed from.

    Raises:
        ValueError: before anything runs, for a launch, an optimiser or an estimator that cannot work together.
    """

    model: BilevelModule
    args: MetaTrainingArguments

    def __init__(
        self,
        model: BilevelModule | None,
        args: MetaTrainingArguments,
        *,
        meta_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        _refuse_call(args, kwargs)
        self.estimator: Estimator | None = args.make_estimator()
        self.args, self.meta_dataset = args, meta_dataset
        self._found = checkpoints_in(Path(str(args.output_dir)))
        self.given_optimizer = (kwargs.get("optimizers") or (None, None))[0]
        if model is not None or kwargs.get("model_init") is None:
            self._refuse_unfit(model)  # else in call_model_init
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(f"{type(model).__name__} has its own losses: leave out compute_loss_func")
        _refuse_data(args, kwargs.get("train_dataset"), meta_dataset, kwargs.get("eval_dataset"))
        if args.should_save and model is not None:
            require_writable(args.output_dir)
        super().__init__(
            model=model, args=args, callbacks=[*(callbacks or []), _MetaSteps(self), History(self)], **kwargs
        )
        if self.accelerator.num_processes > 1:
            synchronise(self.model)
            # The Trainer has no other name for it yet.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
        self.loss_is_scaled_for_ga = True  # the module divides by the totals of the window
        if args.label_names is None:
            self.label_names = ["labels"]
        self.meta_rows = self._make_meta_rows()
        self.meta_optimizer: torch.optim.Optimizer | None = None
        self.meta_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self.card_sections: list[str] = []
        self.run_settings: dict[str, Any] = {}
        self._window: tuple[list[Batch], list[Batch]] = ([], [])
        self._window_rows: tree.Tree | None = None  # of the embeddings, as far as the window touches them
        self._window_is_new, self._micro_batch = False, 0
        self.episodes = self._make_episodes()
        self.diagnostics = self._make_diagnostics()
        self._facts = Facts()  # about the losses, from the first step on
        self._passes: PassContext | None = None  # of the current step, where its own forward is recorded
        self._before: InnerStep | None = None  # the current step, as long as it has not been made
        self._row_gradients: dict[str, Tensor | None] = {}  # of embeddings that were stepped ahead of the rest
        self._grad_norm: float | None = None
        self._acting: dict[str, float] = {}  # learned numbers of the base optimiser, as the last step was made with
        self._prepared = False
        self._meta_learning_rate: Any = args.meta_learning_rate
        self._skipped_in_a_row = 0
        self.skipped_meta_steps = 0
        self._trained: frozenset[str] | None = None  # the base parameters at the start of the episode
        self._silent_steps: int | None = 0  # meta steps since the start that were all exactly zero; None after another
        self._said = set[str]()
        self._start_of_lam: tree.Tree = {}  # of the run, also after resume
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def check(self) -> CheckReport:
        """Run a few steps at the full learning rates, say what they show, and take them back; print the result.

        Nothing of this trainer is changed, and no file is written. Callbacks and evaluation are left out.

        Raises:
            ValueError: for what a training would refuse as well.
        """
        from metaxl_evo.training.check import check_trainer  # which makes trainers

        return check_trainer(self)

    def _refuse_unfit(self, model: Any) -> None:
        """Refuse a model that cannot be trained with these arguments.

        Raises:
            ValueError: in one line, with the way out.
        """
        args, estimator = self.args, self.estimator
        refuse_launch(args, model, estimator)
        refuse_tuned(args, model)
        if estimator is None:
            return
        if self.meta_dataset is None or args.meta_portion == 0:
            raise ValueError(
                f"estimator {args.estimator!r} needs meta rows: give meta_dataset and a meta_portion above 0, "
                "or set estimator: none"
            )
        problem = model.problem(tuned_rule(SGD(0.0), model))
        estimator.check(problem, model.base_parameters(), model.meta_parameters())

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As the Trainer's, from a checkpoint that is complete and of this run.

        Args:
            resume_from_checkpoint: as for `find_checkpoint`: a folder, `latest`, or True for the newest one.

        Raises:
            ValueError: before anything is trained, saying what is wrong with the checkpoint.
        """
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        if not resume_from_checkpoint and trial is None:  # a trial has a folder of its own
            self._refuse_another_run()
        if checkpoint is not None:
            require_same(checkpoint, made_by(self.model, self.args, self.run_settings), self.args.world_size)
        self._found = []  # from here on the folder is this trainer's
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _refuse_another_run(self) -> None:
        """Refuse a start among checkpoints that were there before: the newest, which `latest` means, may not be ours.

        Settings that a checkpoint does not hold may differ, so those of equal settings are no exception.

        Raises:
            ValueError: naming the folder and the ways out.
        """
        folder = Path(str(self.args.output_dir))
        for checkpoint in self._found:
            if checkpoint.parent == folder and checkpoint.exists():
                raise ValueError(
                    f"{folder} holds another run ({checkpoint.name}): choose another output_dir, or go on with that "
                    'run by train(resume_from_checkpoint="latest")'
                )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with meta rows, episodes and counts of its own, whoever has asked for data loaders."""
        self.meta_rows, self.episodes = self._make_meta_rows(), self._make_episodes()
        self._window, self._window_rows, self._window_is_new = ([], []), None, False
        self.skipped_meta_steps = self._skipped_in_a_row = self._silent_steps = 0
        self._facts, self._prepared = Facts(), False
        self._metrics.clear()
        self._start_of_lam = tree.clone(self.model.meta_parameters())
        return super()._inner_training_loop(*args, **kwargs)

    # ---- a model made anew in each training

    def call_model_init(self, trial: Any = None) -> Any:
        """As the Trainer's; the first model is checked as one that is handed over, before a folder is made."""
        model: Any = super().call_model_init(trial)
        if not getattr(self, "is_in_train", False):
            self._refuse_unfit(model)
            if self.args.should_save:
                require_writable(self.args.output_dir)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """As the Trainer's, and what the arguments of this trial make of the meta level."""
        seed, meta_seed = self.args.seed, self.args.meta_seed
        super()._hp_search_setup(trial)
        if trial is not None:
            if meta_seed == seed and self.args.meta_seed == meta_seed:  # it follows the seed
                self.args.meta_seed = self.args.seed
            self.args.check_settings()
            self.estimator = self.args.make_estimator()
            self.diagnostics = self._make_diagnostics()
        if self.model_init is not None:
            self._refuse_unfit(self.model)
            if self.accelerator.num_processes > 1:
                synchronise(self.model)

    # ---- the two levels' optimisers

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The base optimiser over the base parameters, and the meta optimiser over the meta parameters."""
        if not self.model.base_parameters():
            raise ValueError(
                f"all parameters of the base ({type(self.model.base).__name__}) are frozen, and there is nothing to "
                "train: set requires_grad of some"
            )
        if self.optimizer is None and self.args.optimizer_class is not None:
            self.optimizer = self.args.make_optimizer(self.model.base_parameters().values())
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        fit_groups(_plain(optimizer), self.model)
        if self.estimator is not None:
            if isinstance(self.estimator, EngineEstimator) and self.estimator.engine == "auto":
                self._say_what_auto_is()
            if self.estimator.needs_update_rule:
                self.estimator.check(
                    self._problem(self._update_rule(self.estimator)[0]),
                    self.model.base_parameters(),
                    self.model.meta_parameters(),
                )
            elif self.diagnostics is not None:
                try:
                    self._update_rule(self.diagnostics.exact)
                except ValueError as error:
                    raise ValueError(f"{error}, or leave meta_diagnostics_every at 0") from None
            self.meta_optimizer = self.args.make_meta_optimizer(self.model.meta_parameters().values())
        return optimizer

    def _say_what_auto_is(self) -> None:
        if not self._problem(SGD(0.0)).second_order:
            reason = self.model.second_order_obstacle or "torch_compile"
            logger.warning("engine auto takes finite differences here (%s)", reason)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedules of both learning rates, in base steps."""
        if self.meta_optimizer is not None:
            warmup = self.args.meta_warmup_steps
            self.meta_scheduler = get_scheduler(
                self.args.meta_lr_scheduler_type,
                optimizer=self.meta_optimizer,
                num_warmup_steps=int(warmup if warmup >= 1 else math.ceil(warmup * num_training_steps)),
                num_training_steps=num_training_steps,
            )
        if self.lr_scheduler is None and self.args.lr_milestones:
            held = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = _with_drops(self.args, held, num_training_steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- the window of one optimizer step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step with their meta rows, and the totals that their losses divide by."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        judged: list[Batch] = []
        if self.meta_rows is not None:
            for index, (train_rows, meta_rows) in enumerate(self.meta_rows.draw(len(batches))):
                if train_rows:
                    batches[index] = self.model.join(batches[index], self.collated(train_rows))
                if meta_rows:
                    judged.append(self.collated(meta_rows))
        if batches:
            names = tuple(counts_of(self.model, view_of(batches[0])))
            for window in (batches, judged):
                set_totals(self.model, window, names, self._over_processes)
        self._window, self._window_is_new = (batches, judged), True
        self._window_rows = None
        return batches, items

    def _make_meta_rows(self) -> MetaRows | StreamedMetaRows | None:
        if self.meta_dataset is None:
            return None
        args = self.args
        return make_meta_rows(
            self.meta_dataset,
            args.per_device_meta_batch_size * args.world_size,
            portion=args.meta_portion,
            seed=mix_seed(_meta_seed(args), 0),
            rank=args.process_index,
            world_size=args.world_size,
        )

    def _make_episodes(self) -> Episodes | None:
        return None if self.estimator is None else Episodes(self.estimator, self.args)

    def _make_diagnostics(self) -> Diagnostics | None:
        every = self.args.meta_diagnostics_every
        return None if self.estimator is None or not every else Diagnostics(self.estimator, every)

    def collated(self, rows: list[Any]) -> Batch:
        """Rows as a batch on this process's device."""
        return self._prepare_inputs(self.data_collator(rows))

    def _over_processes(self, numbers: list[int]) -> list[Tensor]:
        """Whole numbers summed over the processes, each a 0-d tensor."""
        sums = torch.tensor(numbers, device=self.args.device)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        return list(sums.unbind())

    # ---- the base step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The base step of one micro-batch, behind the meta step where the order is `lookahead`."""
        if self._window_is_new:
            model.train()
            self._begin_step()
        self._window_is_new, self._micro_batch = False, 0 if self._window_is_new else self._micro_batch + 1
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            _make_dense(self.model.base_parameters().values())
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            self._refuse_unreduced()
            average_statistics(self.model)
        return loss

    def _refuse_unreduced(self) -> None:
        """Refuse a backward that has not reached all parameters, after which DDP has averaged none of the rest.

        Raises:
            ValueError: naming a parameter and the way out.
        """
        if self.args.ddp_find_unused_parameters:
            return
        for name, parameter in self.model.base_parameters().items():
            if parameter.grad is None:
                raise ValueError(
                    f"{name} got no gradient in a step, so that the gradients of {self.args.world_size} processes "
                    "were not averaged: set ddp_find_unused_parameters: true"
                )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The inner loss in training (times the ranks, whose gradients DDP averages), the base model's own
        otherwise."""
        recorded = model.training and not return_outputs and self._passes is not None
        with self._passes.recording(self._micro_batch) if recorded and self._passes else nullcontext():
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs or not model.training:
            return found
        return found * self.accelerator.num_processes

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The base's outputs on the columns that it takes, and a loss where it gives one; the labels as they came."""
        inputs = self._prepare_inputs(inputs)
        held = [inputs.get(name) for name in self.label_names]
        labels = None if not held or any(one is None for one in held) else nested_detach(tuple(held))
        left = sorted(inputs.keys() - columns_of(self.model.plain_base, inputs).keys())
        if left and type(self.model).forward is BilevelModule.forward:
            self._say_once(f"evaluation leaves out {', '.join(left)}, which the base's forward does not take")
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        loss, logits = outputs_of(outputs, ignore_keys, self.model)
        if loss is None and labels is not None:
            self._say_once(
                "the base gives no loss in evaluation: eval_loss is left out, compute_metrics sees its outputs"
            )
        if prediction_loss_only:
            return loss, None, None
        logits = nested_detach(logits)
        single = labels is not None and len(labels) == 1
        return loss, logits[0] if len(logits) == 1 else logits, labels[0] if labels is not None and single else labels

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s", text)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self._grad_norm = None if norm is None else float(norm)
        return norm

    # ---- the meta step

    def _begin_step(self) -> None:
        """Before a base step: begin an episode where one is due, look ahead where the order says so."""
        self._passes = self._before = None
        if self.episodes is None or self.estimator is None:
            return
        weights, estimator = self.model.base_parameters(), self.estimator

        def init(learned: Any) -> Any:
            problem, self._trained = self._problem(self._update_rule(estimator)[0]), frozenset(weights)
            return estimator.init(problem, weights, self.model.meta_parameters(), learned)

        self.episodes.begin_step(self.state.global_step, weights, _plain(self.optimizer), init)
        if not self._prepared:
            rows, self._prepared = self._touched_rows(), True
            passes = self._new_passes(self._problem(SGD(0.0), rows))
            at = _gathered(weights, rows), self.model.meta_parameters(), self._window[0]
            gate.evaluate(passes, *at)
            estimator.prepare(passes, *at)
        if self.args.meta_order == "lookahead" and self._meta_step_is_due():
            self._look_ahead()
        elif self._follows_the_step() and self._forward_is_of_use():
            self._passes = self._new_passes(self._problem(SGD(0.0)))

    def _meta_step_is_due(self) -> bool:
        """Whether this optimizer step has a meta step; at a learning rate of zero only an episode's end has."""
        if self.episodes is None or not self.episodes.answers(self.state.global_step):
            return False
        if not self.episodes.estimator.online or self.model.tuned_optimizer:
            return True
        return any(group["lr"] != 0 for group in _plain(self.optimizer).param_groups)

    def _follows_the_step(self) -> bool:
        """Whether something is to be done once this base step is made."""
        if self.episodes is None:
            return False
        return self.episodes.remembers or (self.args.meta_order == "after_step" and self._meta_step_is_due())

    def _forward_is_of_use(self) -> bool:
        """Whether the base step's forward computes what the meta passes would: no dropout masks, no autocast."""
        assert self.estimator is not None
        plain = self.accelerator.mixed_precision == "no" and not self.args.torch_compile
        return plain and self.estimator.evaluated_at == "previous" and not self.model.has_dropout

    def _look_ahead(self) -> None:
        """The hypergradient of the step to come."""
        assert self.estimator is not None
        assert self.episodes is not None
        rows = self._touched_rows()
        rule, state = self._update_rule(self._at_work()[-1], rows)
        step = self._inner_step(_gathered(self.model.base_parameters(), rows), state)
        self._meta_step(self._new_passes(self._problem(rule, rows)), step, step)

    def _keep_previous(self) -> None:
        """Before the base step: keep the weights, and the optimiser's state, that are needed from there."""
        assert self.estimator is not None
        rows, state = self._touched_rows(), None
        dampened = any(group.get("dampening") for group in _plain(self.optimizer).param_groups)  # reads who was new
        if self.estimator.needs_state_before or self.model.tuned_optimizer or dampened:
            state = map_trees(tree.clone, self._update_rule(self.estimator, rows)[1])
        w = _gathered(self.model.base_parameters(), rows)
        if any(one.evaluated_at == "previous" for one in self._at_work()):
            if may_step_in_two(_plain(self.optimizer)):
                self._step_embeddings(rows)
            w = {name: leaf if name in rows else leaf.clone() for name, leaf in w.items()}
        self._before = self._inner_step(w, state)

    def _step_embeddings(self, rows: tree.Tree) -> None:
        """Let the optimiser step the embeddings alone, and keep the touched rows of their gradients.

        They are most of the gradient and empty but for these rows: what is kept of the weights goes into their place,
        so that a meta step needs no more memory than the base step. Others than torch's own optimisers may count their
        steps, and hooks would see two: there the gradient waits, whole, until the step is made.
        """
        if not rows:
            return
        parameters = self.model.base_parameters()
        waiting = {name: p.grad for name, p in parameters.items() if name not in rows}
        for name in waiting:
            parameters[name].grad = None
        _plain(self.optimizer).step()
        for name, numbers in rows.items():
            gradient, parameters[name].grad = parameters[name].grad, None
            self._row_gradients[name] = None if gradient is None else gradient[numbers]
            del gradient
        for name, gradient in waiting.items():
            parameters[name].grad = gradient

    def _after_step(self) -> None:
        """After the base step: observe it, and take its hypergradient where one is due."""
        assert self.estimator is not None
        assert self.episodes is not None
        assert self._before is not None
        before, self._before = self._before, None
        rows = self._touched_rows()
        rule, state = self._update_rule(self._at_work()[-1], rows, made=True)
        now = _gathered(self.model.base_parameters(), rows)
        made = StepMade(now, self._take_gradient(rows), state)  # nobody else holds the gradient, so it can be freed
        step = replace(before, w=now) if self.estimator.evaluated_at == "current" else before
        if self.estimator.needs_update_rule:
            step = replace(step, made=made)
        problem = self._problem(rule, rows)
        passes = self._new_passes(problem) if self._passes is None else replace(self._passes, problem=problem)
        self._passes = None
        if self.episodes.remembers:
            self._refuse_other_parameters(frozenset(now))
            self.episodes.state = self.estimator.observe(passes, step, self.episodes.state)
        if self.args.meta_order == "after_step" and self._meta_step_is_due():
            self._meta_step(passes, step, replace(before, made=made))
        if self.episodes.ends(self.state.global_step):
            self.episodes.end(self.estimator.end_episode(passes, step, self.episodes.state))

    def _refuse_other_parameters(self, now: frozenset[str]) -> None:
        """Refuse to remember weights that were constants at one step of an episode, and are none at another."""
        assert self.estimator is not None
        if self._trained is None or self._trained == now or self.estimator.remembers == "meta":
            return
        raise ValueError(
            f"{min(self._trained ^ now)!r} was frozen, or set free, within an episode, whose weights the estimator "
            f"{self.args.estimator!r} remembers: do it between episodes (episode_length), or use one_step or greedy"
        )

    def _meta_step(self, passes: PassContext, step: InnerStep, from_start: InnerStep) -> None:
        """Estimate at `step`, and move lam; `from_start` is the same step as the exact estimator has to see it."""
        assert self.estimator is not None
        assert self.episodes is not None
        diagnostics = self._diagnostics_of_step()
        exact = None if diagnostics is None else diagnostics.take_exact(passes, from_start)
        result = estimate(passes, self.estimator, step, self.episodes.state)
        if diagnostics is not None and exact is not None:
            diagnostics.compare(result, exact, was_zero=self._silent_steps is not None)
        if self._silent_steps is not None:
            self._watch_silence(result, passes, step)
        if tree.all_finite(result.grads) and bool(result.outer_loss.isfinite()):
            self._apply(result)
        else:
            self._skip(result)

    def _watch_silence(self, result: Hypergradient, passes: PassContext, step: InnerStep) -> None:
        """Warn where the first hypergradient is exactly zero; end the run where the first ten are.

        One alone may be right: a batch need not read lam.
        """
        assert self._silent_steps is not None
        if tree.norm(result.grads) != 0:
            self._silent_steps = None
            return
        self._silent_steps += 1
        if self._silent_steps == 1:
            logger.warning("step %d: %s", self.state.global_step, _why_zero(passes, step))
        if self._silent_steps >= _SILENCE:
            raise ValueError(f"all of the first {_SILENCE} meta steps: {_why_zero(passes, step)}")

    def estimate(self, estimator: Estimator) -> Hypergradient:
        """The hypergradient, by any estimator, of a step to come from here over the last window; nothing is changed.

        Before a training, at the learning rate of the arguments and over the window that its first step will have.

        Raises:
            ValueError: where the estimator cannot serve this task or optimiser.
        """
        with self._at_a_step():
            rule, state = self._update_rule(estimator)
            train_window, meta_window = self._window
            return hypergradient(
                self._problem(rule),
                estimator,
                self.model.base_parameters(),
                self.model.meta_parameters(),
                train_window,
                meta_window,
                generator=torch.Generator().manual_seed(self._step_seed()),
                update_state=state,
            )

    @contextmanager
    def _at_a_step(self) -> Iterator[None]:
        """In training mode, with a window and an optimiser: before training the first ones, which it makes anew."""
        modes = {module: module.training for module in self.model.modules()}
        held = self.optimizer, self.meta_optimizer, self.meta_rows
        try:
            self.model.train()
            if not self._window[0]:
                with kept_random_state():
                    self._window_of_the_first_step()
            if self.optimizer is None:
                self.create_optimizer()
            yield
        finally:
            self.optimizer, self.meta_optimizer, self.meta_rows = held
            for module, training in modes.items():
                module.training = training

    def _window_of_the_first_step(self) -> None:
        """Draw it as a training will, from data loaders that nobody else reads."""
        self.meta_rows = self._make_meta_rows()
        tell_epoch(self.train_dataset, 0)
        loader = self.get_train_dataloader()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(0)
        rows = iter(loader)
        self.get_batch_samples(rows, self.args.gradient_accumulation_steps, self.args.device)
        self._window_is_new = False
        del rows
        if hasattr(loader, "end"):
            loader.end()  # accelerate takes a loader that was not read to its end for the one in use

    def _diagnostics_of_step(self) -> Diagnostics | None:
        """The diagnostics, where they look at the meta step that this base step may have."""
        due = self.diagnostics is not None and self.diagnostics.is_due(self.state.global_step)
        return self.diagnostics if due else None

    def _at_work(self) -> list[Estimator]:
        """The estimators that this step is to serve; the last of them needs the update rule if any does."""
        assert self.estimator is not None
        diagnostics = self._diagnostics_of_step()
        return [self.estimator] if diagnostics is None else [self.estimator, diagnostics.exact]

    def _inner_step(self, w: tree.Tree, update_state: UpdateState | None) -> InnerStep:
        train_window, meta_window = self._window
        return InnerStep(w, self.model.meta_parameters(), train_window, update_state, None, meta_window)

    def _problem(self, rule: UpdateRule, rows: tree.Tree | None = None) -> BilevelProblem:
        problem = self.model.problem(rule, dropout=self.args.meta_dropout, rows=rows)
        processes = Processes(self.args.process_index, self.args.world_size)
        second_order = problem.second_order and not self.args.torch_compile
        examples = examples_of(self.model, processes)
        return replace(problem, second_order=second_order, processes=processes, examples=examples, facts=self._facts)

    def _new_passes(self, problem: BilevelProblem) -> PassContext:
        devices = devices_of(self.model.base_parameters(), self.model.meta_parameters())
        return PassContext(problem, seed=self._step_seed(), devices=devices)

    def _step_seed(self) -> int:
        """Of a meta step's randomness: it depends on the seed and the number of the step alone."""
        return mix_seed(_meta_seed(self.args), 1, self.state.global_step)

    def _touched_rows(self) -> tree.Tree:
        """The embedding rows that the current window reads, on any process; all where weights outlive the step."""
        assert self.estimator is not None
        if self.estimator.remembers not in ("nothing", "meta"):
            return {}
        if self._window_rows is None:
            touched = self.model.touched_rows([batch for window in self._window for batch in window])
            self._window_rows = {name: self._on_all_processes(rows) for name, rows in touched.items()}
        return self._window_rows

    def _on_all_processes(self, rows: Tensor) -> Tensor:
        """The sorted row numbers that any process has; they are padded to one length by row 0, which all have."""
        if self.accelerator.num_processes == 1:
            return rows
        return self.accelerator.gather(self.accelerator.pad_across_processes(rows, pad_index=0)).unique()

    def _apply(self, result: Hypergradient) -> None:
        assert self.meta_optimizer is not None
        self._skipped_in_a_row = 0
        norm = tree.norm(result.grads)
        limit = self.args.meta_max_grad_norm
        factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        parameters = self.model.meta_parameters()
        for name, parameter in parameters.items():
            parameter.grad = result.grads[name].to(parameter.dtype) * factor
        diagnostics = self._diagnostics_of_step()
        with nullcontext() if diagnostics is None else diagnostics.watching(self.meta_optimizer, parameters):
            self.meta_optimizer.step()
        keep_in_range(self.model)
        for parameter in parameters.values():
            parameter.grad = None
        for key, value in {
            "meta_loss": float(result.outer_loss),
            "meta_grad_norm": norm,
            **result.diagnostics,
        }.items():
            self._metrics[key if key.startswith("meta_") else f"meta_{key}"].append(value)

    def _skip(self, result: Hypergradient) -> None:
        """Count a non-finite hypergradient; stop the run after too many in a row."""
        self.skipped_meta_steps += 1
        self._skipped_in_a_row += 1
        logger.warning("step %d: the hypergradient is not finite, no meta update", self.state.global_step)
        if self._skipped_in_a_row >= self.args.max_skipped_meta_steps:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} hypergradients in a row were not finite (outer loss "
                f"{float(result.outer_loss):.3g}): "
                "lower learning_rate or meta_learning_rate, set meta_max_grad_norm, or raise max_skipped_meta_steps"
            )

    def _update_rule(
        self, estimator: Estimator, rows: tree.Tree | None = None, *, made: bool = False
    ) -> tuple[UpdateRule, UpdateState]:
        """The inner update as the optimiser makes it now; a placeholder where the estimator does without.

        `made` says that the current step is among those that the state has seen.
        """
        if not estimator.needs_update_rule:
            return SGD(0.0), {"step": 0, "momentum_buffer": {}}
        try:
            optimizer_rule(_plain(self.optimizer))
        except ValueError as reason:
            names_of_others = ", ".join(takes_any_optimizer())
            raise ValueError(f"{reason}, or an estimator that takes any optimizer: {names_of_others}") from None
        names = {parameter: name for name, parameter in self.model.base_parameters().items()}
        limit = self.args.max_grad_norm or None
        rule, state = from_optimizer(
            _plain(self.optimizer), names, max_grad_norm=limit, steps=self._steps_of_optimizer() + made
        )
        return tuned_rule(rule, self.model), map_trees(lambda held: _gathered(held, rows), state)

    def _steps_of_optimizer(self) -> int:
        """How many steps the base optimiser has made since its state was fresh."""
        if self.args.episode_length is None or self.args.episode_reset == "continue":
            return self.state.global_step
        return self.state.global_step % self.args.episode_length

    def _take_gradient(self, rows: tree.Tree) -> tree.Tree:
        """The base gradient as it was before clipping, where there is one; `.grad` is empty afterwards."""
        limit, norm = self.args.max_grad_norm or math.inf, self._grad_norm or 0.0
        clipped, is_read = norm + 1e-6 > limit, self._at_work()[-1].needs_update_rule
        taken = {}
        for name, parameter in self.model.base_parameters().items():
            gradient, parameter.grad = parameter.grad, None
            if not is_read:
                continue
            if name in rows:
                gradient = self._row_gradients.pop(name, None) if gradient is None else gradient[rows[name]]
            if gradient is not None:  # without one the optimiser has passed the parameter over
                taken[name] = gradient.mul_((norm + 1e-6) / limit) if clipped else gradient
        self._row_gradients.clear()
        return taken

    # ---- logs, checkpoints, model card

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the meta level's means since the last time, and the base optimiser's numbers where lam has them."""
        if "loss" in logs and self._acting:
            if learns_all_rates(self.model):
                del logs["learning_rate"]  # the scheduler's, which does not act
            logs |= self._acting
        if "loss" in logs and self.meta_optimizer is not None:
            logs |= {key: sum(values) / len(values) for key, values in self._metrics.items()}
            logs["meta_learning_rate"] = self._meta_learning_rate
            logs |= logged_lam(self.model.meta_parameters(), self._start_of_lam)
            if self.skipped_meta_steps:
                logs["skipped_meta_steps"] = self.skipped_meta_steps
            self._metrics.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a base that peft wraps is written as the merged model, beside its adapter.

        Checkpoints hold the adapter alone.
        """
        if not _internal_call and self.args.should_save and is_adapted(self.model.base):
            folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
            with saving(folder):
                self.model.save_merged(folder)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        with saving(folder):
            self.model.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, completed by a manifest, before which no older one is deleted and nothing is pushed."""
        args, folder = self.args, Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if args.should_save:
            with saving(folder):
                unseal(folder)
        self.accelerator.wait_for_everyone()  # until then no rank writes
        with discarding(folder):
            self.args = copy.copy(args)
            self.args.save_total_limit, self.args.push_to_hub = None, False
            try:
                with saving(folder):
                    super()._save_checkpoint(model, trial)
            finally:
                self.args = args
            self.accelerator.wait_for_everyone()  # every rank's random state is there
            if args.should_save:
                with saving(folder):
                    torch.save(args, folder / TRAINING_ARGS_NAME)
                    seal(folder, made_by(self.model, args, self.run_settings), args.world_size)
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            rotate(folder, args.save_total_limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_pretrained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        try:
            require_whole(Path(self.state.best_model_checkpoint))
        except ValueError as error:
            raise ValueError(f"{error}, or end with the last weights (load_best_model_at_end: false)") from error
        self.model.load_pretrained(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            states = {name: holder.state_dict() for name, holder in self._stateful().items()}
            skipped = [self.skipped_meta_steps, self._skipped_in_a_row]
            torch.save({**states, "skipped": skipped, "start": self._start_of_lam}, Path(output_dir) / META_STATE)
        share = None if self.episodes is None else self.episodes.share()
        if self.args.world_size > 1 and share is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(share, Path(output_dir) / META_SHARE.format(self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            saved = read_tensors(Path(checkpoint) / META_STATE)
            for name, holder in self._stateful().items():
                holder.load_state_dict(saved[name])
            share = Path(checkpoint) / META_SHARE.format(self.args.process_index)
            if self.episodes is not None and self.args.world_size > 1 and share.exists():
                self.episodes.load_share(read_tensors(share))
            self.skipped_meta_steps, self._skipped_in_a_row = saved["skipped"]
            self._silent_steps = None  # the start is behind it
            start = saved.get("start", {})  # checkpoints of earlier versions have none
            self._start_of_lam |= {name: leaf.to(self.args.device) for name, leaf in start.items()}
        if self.episodes is not None:
            self.episodes.to(self.args.device)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """None: fp16 is refused, and one that stands in a checkpoint is not ours to read."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with loading(checkpoint):
                super()._load_rng_state(checkpoint)

    def _stateful(self) -> dict[str, Any]:
        held = {
            "optimizer": self.meta_optimizer,
            "scheduler": self.meta_scheduler,
            "rows": self.meta_rows,
            "episodes": self.episodes,
        }
        return {name: holder for name, holder in held.items() if holder is not None}

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        language: str | None = None,
        tasks: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | None = None,
        **kwargs: Any,
    ) -> None:
        """A card of what is known: metadata for the Hub, the estimator, and `card_sections` (Markdown).

        Args:
            finetuned_from, dataset_tags: Hub ids; leave out what is not on the Hub.
            kwargs: the Trainer's further fields, for which this card has no place.
        """
        if not self.is_world_process_zero():
            return
        metadata = ModelCardData(
            language=language,
            library_name="transformers",
            pipeline_tag=tasks,
            tags=["metaxl-evo", "generated_from_trainer", *([tags] if isinstance(tags, str) else tags or [])],
            base_model=finetuned_from,
            datasets=dataset_tags,
        )
        title = f"# {model_name or Path(self.args.output_dir).name}"
        made = f"Trained by metaxl_evo's MetaTrainer, estimator `{self.estimator or 'none'}`."
        text = "\n\n".join([f"---\n{metadata.to_yaml()}\n---", title, made, *self.card_sections])
        ModelCard(text + "\n").save(Path(self.args.output_dir) / "README.md")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            for part in Path(checkpoint_folder).iterdir():
                if part.is_dir():  # the meta network or an adapter; the Trainer copies only the file names it knows
                    shutil.copytree(part, Path(str(self.args.output_dir)) / part.name, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)


class _MetaSteps(TrainerCallback):
    """Calls the trainer's meta level around `optimizer.step()`, which no method of the Trainer surrounds."""

    def __init__(self, trainer: MetaTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._require_synchrony("before the first step")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The number of whole epochs made, also within one: the last step of epoch k sets it to k + n/n. The Trainer
        # makes its iterator, and the workers their copies of the data set, after this.
        tell_epoch(self.trainer.train_dataset, int(state.epoch))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_the_rest(args, state, control)  # before a checkpoint of the last step is written

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log_the_rest(args, state, control)  # an evaluation may have ended the training

    def _log_the_rest(self, args: Any, state: Any, control: Any) -> None:
        """Log what the last steps of a training have done, which may be fewer than logging_steps.

        The Trainer logs no step twice.
        """
        ends = control.should_training_stop or state.global_step >= state.max_steps
        control.should_log |= ends and args.logging_strategy != IntervalStrategy.NO

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._require_synchrony(f"after step {state.global_step}")

    def _require_synchrony(self, when: str) -> None:
        if self.trainer.accelerator.num_processes > 1:
            require_synchrony(self.trainer.model, when)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.model.tuned_optimizer:
            trainer._acting = put_numbers(_plain(trainer.optimizer), trainer.model, trainer._steps_of_optimizer())
        if trainer._follows_the_step():
            trainer._keep_previous()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._before is not None:
            self.trainer._after_step()
        scheduler = self.trainer.meta_scheduler
        if scheduler is not None:
            self.trainer._meta_learning_rate = scheduler.get_last_lr()[0]  # of this step, for the log
            with warnings.catch_warnings():
                # torch warns where the first meta steps are skipped, at a zero learning rate
                warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
                scheduler.step()


def may_step_in_two(optimizer: torch.optim.Optimizer) -> bool:
    """Whether two calls of `step`, each on the gradients of some parameters, are one call on all, for all who look."""
    hooks = (
        *(optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks),
        *(torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks),
    )
    return type(optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) and not any(hooks)


def _with_drops(args: MetaTrainingArguments, optimizer: Any, steps: int) -> LambdaLR:
    """A constant rate with drops: the step nearest to a milestone's share of them all is the first at the lower rate.

    No MultiStepLR: resume would bring back its milestones of before, where the other schedules follow the arguments.
    """
    drops = [round(share * steps) for share in args.lr_milestones or ()]
    return LambdaLR(optimizer, lambda step: args.lr_milestone_factor ** bisect_right(drops, step))


def outputs_of(outputs: Any, ignore_keys: list[str] | None, model: Any) -> tuple[Tensor | None, tuple[Any, ...]]:
    """A loss, if there is one, and what else a base gave: a mapping, a tuple whose first is a number, or a tensor."""
    if isinstance(outputs, Mapping):
        if ignore_keys is None:
            ignore_keys = getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"])
        loss = outputs.get("loss")
        rest = tuple(value for key, value in outputs.items() if key not in [*ignore_keys, "loss"])
    elif isinstance(outputs, tuple):
        first = outputs[0] if isinstance(outputs[0], Tensor) and outputs[0].dim() == 0 else None
        loss, rest = first, outputs if first is None else outputs[1:]
    else:
        loss, rest = None, (outputs,)
    return None if loss is None else loss.detach().mean(), rest


def _refuse_call(args: Any, further: Mapping[str, Any]) -> None:
    """Refuse arguments of another class, and keywords that nobody takes."""
    if not hasattr(args, "make_estimator"):
        raise ValueError(f"MetaTrainer takes MetaTrainingArguments, and args is a {type(args).__name__}")
    taken = [*signature(Trainer).parameters, "meta_dataset"]
    for name in further:
        if name not in taken:
            raise ValueError(unknown("argument of MetaTrainer", name, taken))


def _refuse_data(args: MetaTrainingArguments, train: Any, meta: Any, evaluated: Any) -> None:
    """Refuse train rows that would be drawn for another epoch than the one that they are read in."""
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


def _why_zero(passes: PassContext, step: InnerStep) -> str:
    """As `why_zero`, in the words of a task, which has no first weights to learn."""
    text = why_zero(passes, step).replace(", nor are first weights computed from what requires a gradient", "")
    return (
        text.replace("lam", "the meta parameters")
        .replace("inner loss", "inner_loss")
        .replace("outer loss", "outer_loss")
    )


def _gathered(leaves: tree.Tree, rows: tree.Tree | None) -> tree.Tree:
    """The leaves outside any graph, of some only the given rows; the others share their storage."""
    rows = rows or {}
    return {name: leaf.detach()[rows[name]] if name in rows else leaf.detach() for name, leaf in leaves.items()}


def _make_dense(parameters: Iterable[Tensor]) -> None:
    """Turn sparse gradients (`nn.Embedding(sparse=True)`) into dense ones, which the Trainer's clipping asks for."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser behind accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _meta_seed(args: MetaTrainingArguments) -> int:
    return args.seed if args.meta_seed is None else args.meta_seed
