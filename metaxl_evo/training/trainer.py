"""MetaTrainer: the Hugging Face Trainer with a second level."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME

from metaxl_evo.bilevel.hypergradients import Hypergradient, hypergradient
from metaxl_evo.bilevel.randomness import mix_seed
from metaxl_evo.bilevel.replay import Facts
from metaxl_evo.estimators import Estimator
from metaxl_evo.models.bilevel_module import Batch, BilevelModule
from metaxl_evo.models.losses import counts_of, set_totals, view_of
from metaxl_evo.training.arguments import MetaTrainingArguments
from metaxl_evo.training.base_optimizer import BaseOptimizer, unwrapped
from metaxl_evo.training.callbacks import Divergence, LastLog, LevelEvents, MetaCallback, Synchrony
from metaxl_evo.training.check_report import CheckReport
from metaxl_evo.training.checkpoint import (
    META_SHARE,
    META_STATE,
    checkpoints_in,
    find_checkpoint,
    loading,
    made_by,
    read_tensors,
    require_same,
    require_writable,
)
from metaxl_evo.training.history import History
from metaxl_evo.training.isolation import kept_random_state
from metaxl_evo.training.launch import refuse_unresumable
from metaxl_evo.training.meta_level import MetaLevel, meta_seed, problem_of, step_seed
from metaxl_evo.training.meta_rows import (
    MetaRows,
    StreamedMetaRows,
    Window,
    is_in_order,
    make_meta_rows,
    tell_epoch,
)
from metaxl_evo.training.meta_step import MetaStep
from metaxl_evo.training.optimizer_files import SHARDS, load_optimizer, save_optimizer
from metaxl_evo.training.refusals import refuse_another_run, refuse_call, refuse_data, refuse_unfit
from metaxl_evo.training.schedules import with_drops
from metaxl_evo.training.sharding import asks_for_shards, shard_base_only, stand_ins
from metaxl_evo.training.stoppable import StoppableTrainer
from metaxl_evo.training.synchrony import average_statistics, synchronise
from metaxl_evo.training.tuned import fit_groups, learns_all_rates

logger = logging.getLogger(__name__)


class MetaTrainer(StoppableTrainer):
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
        meta_level: the estimator with its optimiser, episodes and diagnostics; None with `estimator: none`. Made anew
            with each training.
        meta_rows: the order in which meta rows are drawn.
        meta_step: the meta level's part of the optimizer step that is being made; None between two.
        window: the batches of the optimizer step that is being made, or was made last.
        learned_numbers: of the base optimiser, as its last step was made with.
        card_sections, run_settings, stoppable: as of `TaskTrainer` and `StoppableTrainer`.

    Raises:
        ValueError: before anything runs, for a launch, an optimiser or an estimator that cannot work together.
    """

    def __init__(
        self,
        model: BilevelModule | None,
        args: MetaTrainingArguments,
        *,
        meta_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        refuse_call(args, kwargs)
        self.args, self.meta_dataset = args, meta_dataset
        self._found = checkpoints_in(Path(str(args.output_dir)))
        self.given_optimizer = (kwargs.get("optimizers") or (None, None))[0]
        if model is not None or kwargs.get("model_init") is None:
            refuse_unfit(args, model, meta_dataset)  # else in call_model_init
        refuse_data(args, kwargs.get("train_dataset"), meta_dataset, kwargs.get("eval_dataset"))
        if args.should_save and model is not None:
            require_writable(args.output_dir)
        events = [
            LevelEvents(self),
            LastLog(),
            Divergence(self),
            Synchrony(self),
            History(lambda: Path(self._get_output_dir(self._trial))),
        ]
        super().__init__(model=model, args=args, callbacks=[*(callbacks or []), *events], **kwargs)
        if asks_for_shards(args) and not self.is_fsdp_enabled:
            raise ValueError(
                "MetaTrainer does not run with fsdp on a CPU: accelerate would shard nothing; leave fsdp out, or "
                "start one process a GPU (accelerate launch --config_file configs/accelerate/fsdp2.yaml)"
            )
        if self.accelerator.num_processes > 1:
            synchronise(self.model)
            # The Trainer has no other name for it yet.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated", category=FutureWarning)
        self.loss_is_scaled_for_ga = True  # the module divides by the totals of the window
        self.meta_rows, self.meta_level = self._make_meta_rows(), self._make_level()
        self.meta_step: MetaStep | None = None
        self.window = Window([], [])
        self.learned_numbers: dict[str, float] = {}

    @property
    def _window(self) -> Window:
        """`window` by its name up to 0.1."""
        return self.window

    @property
    def estimator(self) -> Estimator | None:
        """Of the hypergradient; None with `estimator: none`."""
        return None if self.meta_level is None else self.meta_level.estimator

    @property
    def meta_optimizer(self) -> torch.optim.Optimizer | None:
        """Of the meta parameters; made with the base optimiser."""
        return None if self.meta_level is None else self.meta_level.optimizer

    @property
    def meta_scheduler(self) -> torch.optim.lr_scheduler.LRScheduler | None:
        """Of the meta learning rate; made with the base one's."""
        return None if self.meta_level is None else self.meta_level.scheduler

    @property
    def skipped_meta_steps(self) -> int:
        """How many were not made because the hypergradient was not finite."""
        return 0 if self.meta_level is None else self.meta_level.skipped

    def check(self) -> CheckReport:
        """Run a few steps at the full learning rates, say what they show, and take them back; print the result.

        Nothing of this trainer is changed, and no file is written. Callbacks and evaluation are left out.

        Raises:
            ValueError: for what a training would refuse as well, and with fsdp.
        """
        if self.is_fsdp_enabled:
            raise ValueError("a check does not run with fsdp, which would stay: check on one process without it")
        from metaxl_evo.training.check import check_trainer  # which makes trainers

        return check_trainer(self)

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
            Interrupted: told to stop by a signal; a checkpoint holds the last step.
        """
        if trial is None:
            refuse_unfit(self.args, self.model, self.meta_dataset)  # the arguments may have been changed
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        if not resume_from_checkpoint and trial is None:  # a trial has a folder of its own
            refuse_another_run(Path(str(self.args.output_dir)), self._found)
        if checkpoint is not None:
            refuse_unresumable(self.args)
            require_same(checkpoint, made_by(self.model, self.args, self.run_settings), self.args.world_size)
        self._found = []  # from here on the folder is this trainer's
        output = super().train(checkpoint, trial, ignore_keys_for_eval)
        self._rotate(self._checkpoint(trial))  # a killed run may have kept one too many
        return output

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with meta rows and a meta level of its own, whoever has asked for data loaders."""
        self.meta_rows, self.meta_level = self._make_meta_rows(), self._make_level()
        self.window = Window([], [])
        return super()._inner_training_loop(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; FSDP2 is of the base alone."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            shard_base_only(self.accelerator)

    # ---- a model made anew in each training

    def call_model_init(self, trial: Any = None) -> Any:
        """As the Trainer's; the first model is checked as one that is handed over, before a folder is made."""
        model: Any = super().call_model_init(trial)
        if not getattr(self, "is_in_train", False):
            refuse_unfit(self.args, model, self.meta_dataset)
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
        if self.model_init is not None:
            refuse_unfit(self.args, self.model, self.meta_dataset)
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
        base = BaseOptimizer(optimizer, self.model, self.args)
        fit_groups(base.torch_optimizer, self.model)
        if self.meta_level is not None:
            self.meta_level.make_optimizer(base)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedules of both learning rates, in base steps."""
        if self.meta_level is not None:
            self.meta_level.make_scheduler(num_training_steps)
        if self.lr_scheduler is None and self.args.lr_milestones:
            held = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = with_drops(
                held, self.args.lr_milestones, self.args.lr_milestone_factor, num_training_steps
            )
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
        if self.is_fsdp_enabled and self.meta_rows is not None:
            judged += stand_ins(judged or self.window.meta, len(batches) - len(judged))
        self.window, self.meta_step = Window(batches, judged), None
        return batches, items

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the Trainer's, but for rows that are in order."""
        held = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(cast(Any, held)) if is_in_order(held) else super()._get_train_sampler(train_dataset)

    def _make_meta_rows(self) -> MetaRows | StreamedMetaRows | None:
        if self.meta_dataset is None:
            return None
        args = self.args
        return make_meta_rows(
            self.meta_dataset,
            args.per_device_meta_batch_size * args.world_size,
            portion=args.meta_portion,
            seed=mix_seed(meta_seed(args), 0),
            rank=args.process_index,
            world_size=args.world_size,
        )

    def _make_level(self) -> MetaLevel | None:
        estimator = self.args.make_estimator()
        return None if estimator is None else MetaLevel(self.model, self.args, estimator, self._apply)

    def _apply(self, result: Hypergradient) -> None:
        """Tell the callbacks of a finite hypergradient, and move lam by it."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, MetaCallback):
                callback.on_meta_step(self.args, self.state, self.control, result, self.window, model=self.model)
        if self.meta_level is not None:
            self.meta_level.apply(result, self.state.global_step)

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
        if self.meta_level is not None:
            model.train()
            self._enter_meta_step(self.meta_level)
        with nullcontext() if self.meta_step is None else self.meta_step.reaching_lam():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            _make_dense(self.model)
            if self.args.max_grad_value is not None:
                torch.nn.utils.clip_grad_value_(self.model.base_parameters().values(), self.args.max_grad_value)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            self._refuse_unreduced()
            average_statistics(self.model)
        return loss

    def _enter_meta_step(self, level: MetaLevel) -> None:
        """Before the forward of a micro-batch: the first one begins the step."""
        if self.meta_step is None:
            base = BaseOptimizer(self.optimizer, self.model, self.args)
            self.meta_step = MetaStep(level, base, self.window, self.state.global_step)
            self.meta_step.begin()
        else:
            self.meta_step.micro_batch += 1

    def _refuse_unreduced(self) -> None:
        """Refuse a backward that has not reached all parameters, after which DDP has averaged none of the rest.

        Raises:
            ValueError: naming a parameter and the way out.
        """
        if self.args.ddp_find_unused_parameters or self.is_fsdp_enabled:
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
        step = None if return_outputs or not model.training else self.meta_step
        with nullcontext() if step is None else step.recording():
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs or not model.training:
            return found
        return found * self.accelerator.num_processes

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and self.meta_step is not None:
            self.meta_step.grad_norm = norm
        return norm

    # ---- a hypergradient outside of a training

    def estimate(self, estimator: Estimator) -> Hypergradient:
        """The hypergradient, by any estimator, of a step to come from here over the last window; nothing is changed.

        Before a training, at the learning rate of the arguments and over the window that its first step will have.

        Raises:
            ValueError: where the estimator cannot serve this task or optimiser.
        """
        facts = Facts() if self.meta_level is None else self.meta_level.facts
        with self._at_a_step():
            base = BaseOptimizer(self.optimizer, self.model, self.args)
            rule, state = base.update_rule(estimator, base.steps_before(self.state.global_step))
            return hypergradient(
                problem_of(self.model, self.args, rule, None, facts),
                estimator,
                self.model.base_parameters(),
                self.model.meta_parameters(),
                *self.window,
                generator=torch.Generator().manual_seed(step_seed(self.args, self.state.global_step)),
                update_state=state,
                precision=self.args.meta_precision,
            )

    @contextmanager
    def _at_a_step(self) -> Iterator[None]:
        """In training mode, with a window and an optimiser: before training the first ones, which it makes anew."""
        modes = {module: module.training for module in self.model.modules()}
        held = self.optimizer, self.meta_level, self.meta_rows
        try:
            self.model.train()
            self.meta_level = None
            if not self.window.train:
                with kept_random_state():
                    self._window_of_the_first_step()
            if self.optimizer is None:
                self.create_optimizer()
            yield
        finally:
            self.optimizer, self.meta_level, self.meta_rows = held
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
        del rows
        if hasattr(loader, "end"):
            loader.end()  # accelerate takes a loader that was not read to its end for the one in use

    # ---- logs, checkpoints, model card

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the meta level's means since the last time, and the base optimiser's numbers where lam has them."""
        if "loss" in logs and self.learned_numbers:
            if learns_all_rates(self.model):
                del logs["learning_rate"]  # the scheduler's, which does not act
            logs |= self.learned_numbers
        if "loss" in logs and self.meta_level is not None:
            logs |= self.meta_level.logs()
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        level, folder = self.meta_level, Path(output_dir)
        if self.model.is_sharded:
            held = unwrapped(self.optimizer), self.model.base_parameters()
            save_optimizer(*held, folder, first=self.args.should_save)
            if self.args.should_save:
                torch.save(cast(Any, self.lr_scheduler).state_dict(), folder / SCHEDULER_NAME)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            rows = {} if self.meta_rows is None else {"rows": self.meta_rows.state_dict()}
            torch.save(rows | ({} if level is None else level.state_dict()), folder / META_STATE)
        share = None if level is None else level.episodes.share()
        if self.args.world_size > 1 and share is not None:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(share, folder / META_SHARE.format(self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with loading(checkpoint):
            if self.model.is_sharded or (Path(checkpoint) / SHARDS).exists():
                load_optimizer(unwrapped(self.optimizer), self.model.base_parameters(), Path(checkpoint))
                cast(Any, self.lr_scheduler).load_state_dict(read_tensors(Path(checkpoint) / SCHEDULER_NAME))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
            saved = read_tensors(Path(checkpoint) / META_STATE)
            if self.meta_rows is not None:
                self.meta_rows.load_state_dict(saved["rows"])
            if self.meta_level is not None:
                self.meta_level.load_state_dict(saved)
                self._load_share(Path(checkpoint), self.meta_level)

    def _load_share(self, checkpoint: Path, level: MetaLevel) -> None:
        share = checkpoint / META_SHARE.format(self.args.process_index)
        if self.args.world_size > 1 and share.exists():
            level.episodes.load_share(read_tensors(share))
        level.episodes.to(self.args.device)


def _make_dense(model: BilevelModule) -> None:
    """Turn sparse gradients (`nn.Embedding(sparse=True)`) into dense ones, which the Trainer's clipping asks for."""
    for parameter in model.base_parameters().values():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
